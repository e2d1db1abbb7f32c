"""A load for measurements: Redis writes at a steady rate over a plain socket, from address to address.

Usage: python tools/redis_load.py STATUS_FILE --rate WRITES_PER_SECOND --keys N ADDRESS:PORT [ADDRESS:PORT...]

Every millisecond the SETs that are due go out together, to random keys ("key:0" to "key:N-1", what `DEBUG POPULATE`
makes). When the connection breaks it tries the addresses in turn. Appends a line to STATUS_FILE every 0.1 s: answers
counted, and the longest time between two answers since the line before, which is what a client sees of a migration.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import time

VALUE = b"v" * 1000
TICK_S = 0.001
NOTE_S = 0.1


def connect(addresses: list[tuple[str, int]]) -> socket.socket:
    """The first server that answers PING, for as long as it takes."""
    while True:
        for address in addresses:
            try:
                server = socket.create_connection(address, timeout=5)
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                server.sendall(b"PING\r\n")
                if server.recv(100) == b"+PONG\r\n":
                    return server
                server.close()
            except OSError:
                continue
        time.sleep(TICK_S)


def set_command(key: bytes) -> bytes:
    return b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n" % (len(key), key, len(VALUE), VALUE)


class Load:
    """Counts answers and the silence between them."""

    def __init__(self, fd: int, rate: int, keys: int) -> None:
        self.fd = fd
        self.rate = rate
        self.keys = keys
        self.answers = 0
        self.longest_gap_s = 0.0
        self.answered_at = self.noted_at = time.monotonic()
        self.random = random.Random(1)

    def run(self, server: socket.socket) -> None:
        """Write until the connection breaks.

        :raises OSError: it broke.
        """
        begun, sent = time.monotonic(), 0
        while True:
            # At least one: a server that is there answers all the time.
            due = max(int((time.monotonic() - begun) * self.rate) - sent, 1)
            due = min(due, self.rate // 100 + 1)
            keys = [b"key:%d" % self.random.randrange(self.keys) for _ in range(due)]
            server.sendall(b"".join(map(set_command, keys)))
            sent += due
            missing = 5 * due  # "+OK\r\n"
            while missing > 0:
                got = len(server.recv(missing))
                if not got:
                    raise ConnectionError("closed")
                missing -= got
            self._answered(due)
            time.sleep(TICK_S)

    def _answered(self, count: int) -> None:
        now = time.monotonic()
        self.answers += count
        self.longest_gap_s = max(self.longest_gap_s, now - self.answered_at)
        self.answered_at = now
        if now - self.noted_at >= NOTE_S:
            note = {"answers": self.answers, "longest_gap_s": round(self.longest_gap_s, 6)}
            os.write(self.fd, json.dumps(note).encode() + b"\n")
            self.longest_gap_s, self.noted_at = 0.0, now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("status")
    parser.add_argument("addresses", nargs="+")
    parser.add_argument("--rate", type=int, default=10_000, help="writes per second; 0 is about one per millisecond")
    parser.add_argument("--keys", type=int, default=1000)
    arguments = parser.parse_args()
    addresses = [
        (host, int(port)) for host, _, port in (text.rpartition(":") for text in arguments.addresses)
    ]
    fd = os.open(arguments.status, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    load = Load(fd, arguments.rate, arguments.keys)
    while True:
        server = connect(addresses)
        try:
            load.run(server)
        except OSError:
            server.close()


if __name__ == "__main__":
    main()

"""A Redis client that times every answer and follows the server to another address.

Usage: python -m tools.benchmark.client ping  SAMPLES_FILE ADDRESS:PORT [ADDRESS:PORT...]
       python -m tools.benchmark.client write SAMPLES_FILE --rate N --keys N ADDRESS:PORT [ADDRESS:PORT...]

ping: one PING every millisecond on a connection of its own; the value of a sample is the number of the address that
answered. When an answer is SILENCE_S late it asks every other address too, again and again, and stays with the one that
answers first. It takes real-time priority where it may: what is to be seen is the server's silence, not the client's.

write: every millisecond the SETs that are due go out together, to random keys ("key:0" to "key:N-1", what DEBUG
POPULATE makes); the value of a sample is how many. A silent or broken connection is given up for whoever answers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import socket
import time

from tools.benchmark.samples import SampleWriter

TICK_NS = 1_000_000
SILENCE_S = 0.002
"""So late, an answer makes the client look elsewhere as well."""
RETRY_S = 0.001
"""Between two attempts to connect to an address that refuses: more would take CPU time from those who make it answer"""
ANSWER_S = 5.0
"""So late, an answer to a write is not waited for."""
PRIORITY = 3
"""Above the agents' own, for the few microseconds that a ping takes."""
PING, PONG = b"PING\r\n", b"+PONG\r\n"
VALUE = b"v" * 1000

Address = tuple[str, int]


def _nonblocking(address: Address) -> socket.socket:
    made = socket.socket()
    made.setblocking(False)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.connect_ex(address)
    return made


class Pinger:
    """Asks whoever answers. `current` is the number of the address that did last."""

    def __init__(self, addresses: list[Address], samples: SampleWriter) -> None:
        self.addresses = addresses
        self.samples = samples
        self.current = 0
        self.server: socket.socket | None = None

    def run(self) -> None:
        due = time.monotonic_ns()
        while True:
            due = max(due + TICK_NS, time.monotonic_ns())
            time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
            asked = time.monotonic_ns()
            if not (self.server and self._asks(self.server) and self._answers(self.server)):
                self._look_around()
            self.samples.add(asked, time.monotonic_ns(), self.current)

    def _asks(self, server: socket.socket) -> bool:
        with contextlib.suppress(OSError):
            return server.send(PING) == len(PING)
        return False

    def _answers(self, server: socket.socket) -> bool:
        with contextlib.suppress(OSError):
            return bool(select.select([server], [], [], SILENCE_S)[0]) and server.recv(100) == PONG
        return False

    def _look_around(self) -> None:
        """Ask every address until one answers; the connection there was stays one of those asked."""
        asked: dict[int, socket.socket] = {} if self.server is None else {self.current: self.server}
        connecting: dict[int, socket.socket] = {}
        while True:
            for number, address in enumerate(self.addresses):
                if number not in asked and number not in connecting:
                    connecting[number] = _nonblocking(address)
            readable, writable, _ = select.select(asked.values(), connecting.values(), [], RETRY_S)
            for number, server in list(connecting.items()):
                if server in writable:
                    del connecting[number]
                    if not server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) and self._asks(server):
                        asked[number] = server
                    else:
                        server.close()
            for number, server in list(asked.items()):
                if server in readable:
                    if self._answers(server):
                        del asked[number]
                        for other in [*asked.values(), *connecting.values()]:
                            other.close()
                        self.current, self.server = number, server
                        return
                    server.close()
                    del asked[number]
            if not readable:
                # An address that refuses is writable at once: no spinning on it. Whoever is asked may answer meanwhile.
                select.select(asked.values(), [], [], RETRY_S)


def connect(addresses: list[Address]) -> socket.socket:
    """The first server that answers PING, for as long as it takes."""
    while True:
        for address in addresses:
            with contextlib.suppress(OSError):
                server = socket.create_connection(address, timeout=ANSWER_S)
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                server.sendall(PING)
                if server.recv(100) == PONG:
                    return server
                server.close()
        time.sleep(TICK_NS / 1e9)


def set_command(key: bytes) -> bytes:
    return b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n" % (len(key), key, len(VALUE), VALUE)


def write(server: socket.socket, samples: SampleWriter, rate: int, keys: int) -> None:
    """Write until the connection breaks.

    :raises OSError: it broke.
    """
    chance = random.Random(1)
    begun, sent = time.monotonic_ns(), 0
    while True:
        due = int((time.monotonic_ns() - begun) / 1e9 * rate) - sent
        # After a silence it goes on at its rate, not in a burst.
        if due > rate // 100 + 1:
            sent += due - (rate // 100 + 1)
            due = rate // 100 + 1
        if due > 0:
            asked = time.monotonic_ns()
            server.sendall(b"".join(set_command(b"key:%d" % chance.randrange(keys)) for _ in range(due)))
            sent += due
            missing = 5 * due  # "+OK\r\n"
            while missing > 0:
                got = len(server.recv(missing))
                if not got:
                    raise ConnectionError("closed")
                missing -= got
            samples.add(asked, time.monotonic_ns(), due)
        time.sleep(TICK_NS / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["ping", "write"])
    parser.add_argument("samples")
    parser.add_argument("addresses", nargs="+")
    parser.add_argument("--rate", type=int, default=10_000)
    parser.add_argument("--keys", type=int, default=1000)
    arguments = parser.parse_args()
    addresses = [
        (host, int(port)) for host, _, port in (text.rpartition(":") for text in arguments.addresses)
    ]
    samples = SampleWriter(arguments.samples)
    if arguments.mode == "ping":
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
        Pinger(addresses, samples).run()
    while True:
        with contextlib.suppress(OSError), connect(addresses) as server:
            write(server, samples, arguments.rate, arguments.keys)


if __name__ == "__main__":
    main()

"""A Redis client that writes without pause and counts what the server acknowledged.

Usage: python -m tests.workloads.redis_writer STATUS_FILE ADDRESS:PORT [ADDRESS:PORT...]

Speaks RESP over a plain socket. Each write is INCR of one counter and SET of one key; an acknowledged write must never
be lost, so a counter below what was acknowledged is an "error". When the connection breaks it tries the addresses in
turn, without end. Notes the longest time between two acknowledgements (longest_gap_s) and how often it reconnected.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from typing import Optional

from tests.workloads.status import Status

_TIMEOUT_S = 5.0


class Server:
    """One connection; every method raises OSError when it breaks."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=_TIMEOUT_S)
        self._file = self._socket.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def command(self, *words: str) -> bytes:
        """One command, one reply; `b""` is a nil."""
        parts = [f"${len(word)}\r\n{word}\r\n" for word in words]
        self._socket.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("connection closed")
        kind, text = line[:1], line[1:-2]
        if kind == b"-":
            raise ConnectionError(text.decode())
        if kind == b"$":
            if text == b"-1":
                return b""
            body = self._file.read(int(text) + 2)
            if len(body) != int(text) + 2:
                raise ConnectionError("connection closed")
            return body[:-2]
        return text


def connect(addresses: list[str]) -> tuple[Server, str]:
    """The first address that answers PING, trying for as long as it takes."""
    while True:
        for address in addresses:
            server: Optional[Server] = None
            try:
                server = Server(address)
                if server.command("PING") == b"PONG":
                    return server, address
            except OSError:
                if server is not None:
                    with contextlib.suppress(OSError):
                        server.close()
        time.sleep(0.002)


def main() -> None:
    status = Status(sys.argv[1])
    addresses = sys.argv[2:]
    acknowledged = 0
    longest_gap_s = 0.0
    reconnected = -1
    last = noted = time.monotonic()
    while True:
        server, address = connect(addresses)
        reconnected += 1
        try:
            counter = int(server.command("GET", "counter") or 0)
            # One write more than acknowledged may have arrived: its answer was lost with the connection.
            status.check(
                counter >= acknowledged, f"counter is {counter}, acknowledged were {acknowledged}"
            )
            if acknowledged:
                found = server.command("GET", f"key:{acknowledged % 1000}").decode()
                status.check(
                    found.startswith(f"{acknowledged}:"), f"last acknowledged key holds {found[:20]!r}"
                )
            value = counter
            while True:
                value += 1
                server.command("SET", f"key:{value % 1000}", f"{value}:" + "x" * 100)
                answer = int(server.command("INCR", "counter"))
                status.check(answer == value, f"INCR gave {answer}, expected {value}")
                value = acknowledged = answer
                now = time.monotonic()
                longest_gap_s, last = max(longest_gap_s, now - last), now
                if now - noted > 0.05:
                    noted = now
                    status.note(
                        acknowledged=acknowledged,
                        longest_gap_s=longest_gap_s,
                        reconnected=reconnected,
                        address=address,
                    )
                time.sleep(0.0005)
        except OSError:
            server.close()


if __name__ == "__main__":
    main()

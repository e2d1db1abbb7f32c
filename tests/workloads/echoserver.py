"""A TCP server that sends back what it gets, by epoll; it writes no file, so only its sockets could ever change.

Usage: python -m tests.workloads.echoserver PORT
"""

from __future__ import annotations

import select
import socket
import sys


def main() -> None:
    listener = socket.create_server(("0.0.0.0", int(sys.argv[1])), backlog=16)
    epoll = select.epoll()
    epoll.register(listener.fileno(), select.EPOLLIN)
    clients: dict[int, socket.socket] = {}
    while True:
        for fd, _events in epoll.poll():
            if fd == listener.fileno():
                client, _address = listener.accept()
                clients[client.fileno()] = client
                epoll.register(client.fileno(), select.EPOLLIN)
                continue
            try:
                data = clients[fd].recv(4096)
            except ConnectionResetError:
                data = b""
            if data:
                clients[fd].sendall(data)
            else:
                clients.pop(fd).close()


if __name__ == "__main__":
    main()

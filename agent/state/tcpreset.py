"""TCP connections that their peer has reset, made without a peer. Source: socket(7), SO_LINGER."""

from __future__ import annotations

import logging
import socket

from agent.state.sockopts import pack_linger

_log = logging.getLogger(__name__)


class ResetMaker:
    """Makes TCP sockets whose next read fails with ECONNRESET: a loopback connection, reset by the other end."""

    def __init__(self) -> None:
        self._listeners: dict[int, socket.socket] = {}

    def make(self, family: int) -> socket.socket:
        """Return such a socket; without a loopback network a socket that is not connected (ENOTCONN, EPOLLHUP)."""
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener = self._listener(family)
            sock.settimeout(1.0)
            sock.connect(listener.getsockname())
            other, _ = listener.accept()
            other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, pack_linger(on=True, seconds=0))
            other.close()
            sock.setblocking(True)
            return sock
        except OSError as err:
            _log.warning("No loopback network for a reset TCP connection: %s", err)
            sock.close()
            return socket.socket(family, socket.SOCK_STREAM)

    def _listener(self, family: int) -> socket.socket:
        if family not in self._listeners:
            listener = self._listeners[family] = socket.socket(family, socket.SOCK_STREAM)
            listener.settimeout(1.0)
            listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
            listener.listen(1)
        return self._listeners[family]

    def close(self) -> None:
        """Close what it needed."""
        for listener in self._listeners.values():
            listener.close()

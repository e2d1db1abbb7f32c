"""A TCP or UDP socket over IPv4 or IPv6."""

from __future__ import annotations

import enum
import ipaddress
from dataclasses import dataclass

from protocol.state.sockopts import SocketOptions


class InetState(enum.Enum):
    """Where a socket stands."""

    OPEN = "open"
    """Neither listening nor connected; perhaps bound."""
    LISTENING = "listening"
    CONNECTED = "connected"
    """UDP with a default destination."""
    RESET = "reset"
    """A TCP connection that is carried as one that its peer has reset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InetAddress:
    """An address, a port, and for link-local IPv6 the name of the interface."""

    host: str
    port: int
    flowinfo: int = 0
    interface: str = ""

    def __post_init__(self) -> None:
        ipaddress.ip_address(self.host)
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port {self.port} is out of range")


@dataclass(frozen=True, slots=True, kw_only=True)
class InetMessage:
    """A datagram that waits to be read."""

    data: bytes
    sender: InetAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class InetSocket:
    """One socket; ``local`` is None when it is not bound.

    ``queue`` has only datagrams from the host itself, which one of the process's sockets may have
    sent.
    """

    family: int
    type: int
    protocol: int
    state: InetState
    options: SocketOptions
    local: InetAddress | None = None
    remote: InetAddress | None = None
    backlog: int = 0
    shutdown: int = 0
    queue: tuple[InetMessage, ...] = ()

    def __post_init__(self) -> None:
        if self.family not in (2, 10) or (self.type, self.protocol) not in ((1, 6), (2, 17), (2, 136)):
            raise ValueError(f"socket {self.family}, {self.type}, {self.protocol} is not carried")
        if self.state is InetState.LISTENING and self.local is None:
            raise ValueError("a listening socket has no address")
        if self.state is InetState.CONNECTED and self.remote is None:
            raise ValueError("a connected socket has no remote address")

"""What all sockets share: which kind of file one is, and how to look at it through a descriptor of the agent's.

Source: socket(7).
"""

from __future__ import annotations

import socket

from agent.state.openfile import Description, DumpJob


class opened:
    """Lend a socket object for an agent descriptor; the descriptor stays its owner's.

    It is the plain one of the C module: its family and type are numbers.
    """

    __slots__ = ("_sock",)

    def __init__(self, fd: int, family: int, kind: int, protocol: int) -> None:
        self._sock = socket.SocketType(family, kind, protocol, fd)

    def __enter__(self) -> socket.SocketType:
        return self._sock

    def __exit__(self, *error: object) -> None:
        self._sock.detach()


def kind_of_socket(job: DumpJob, desc: Description) -> str:
    """Return the name of the kind of a socket, or "" after recording why it cannot be carried."""
    fd = job.fetch(desc)
    family, kind, protocol = job.memo[f"socket {desc.fd}"] = socket_identity(fd)
    if family == socket.AF_UNIX:
        return "unix"
    if family in (socket.AF_INET, socket.AF_INET6):
        carried = {
            (socket.SOCK_STREAM, socket.IPPROTO_TCP),
            (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
            (socket.SOCK_DGRAM, 136),  # IPPROTO_UDPLITE
        }
        if (kind, protocol) in carried:
            return "inet"
    try:
        named = socket.AddressFamily(family).name
    except ValueError:
        named = f"address family {family}"
    hint = "have the process close it, or use --external fd[N]"
    if family == socket.AF_NETLINK:
        hint = "netlink sockets talk to this host's kernel; have the process close it"
    job.refuse(
        desc, "socket", f"{named} socket of type {kind}, protocol {protocol} cannot be carried", hint
    )
    return ""


def is_tcp(job: DumpJob, desc: Description) -> bool:
    """Tell whether a socket is one of TCP.

    :raises OSError: it is none, or gone.
    """
    family, _kind, protocol = socket_identity(job.fetch(desc))
    return family in (socket.AF_INET, socket.AF_INET6) and protocol == socket.IPPROTO_TCP


def socket_identity(fd: int) -> tuple[int, int, int]:
    """Return family, type and protocol of a socket given an agent descriptor.

    :raises OSError: it is none; the descriptor is left open in any case.
    """
    with opened(fd, socket.AF_UNIX, socket.SOCK_STREAM, 0) as sock:
        return (
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN),
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE),
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL),
        )

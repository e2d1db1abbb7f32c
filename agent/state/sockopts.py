"""Socket options of every family: what differs from a new socket is dumped and set again.

Options are named on the wire as in the C headers, so that a received name can only choose a row of
the table below. Options that mirror the state of a connection, or that only a new connection could
take over, are left out. Sources: socket(7), ip(7), ipv6(7), tcp(7), udp(7), unix(7),
include/uapi/asm-generic/socket.h.
"""

from __future__ import annotations

import ctypes
import functools
import socket
import struct
from typing import NamedTuple

from agent.errors import RestoreError
from agent.kernel.libc import check, libc
from protocol.state.sockopts import SocketOptions

SOL_SOCKET, SOL_IP, SOL_TCP, SOL_UDP, SOL_IPV6 = 1, 0, 6, 17, 41
SO_SNDBUF, SO_RCVBUF, SO_SNDBUFFORCE, SO_RCVBUFFORCE = 7, 8, 32, 33
SO_GET_FILTER = 26
SO_BUF_LOCK = 72
SO_PEEK_OFF = 42
SOCK_SNDBUF_LOCK, SOCK_RCVBUF_LOCK = 1, 2


class Option(NamedTuple):
    """Level and number; ``length`` is 0 for an int."""

    level: int
    number: int
    length: int = 0


OPTIONS: dict[str, Option] = {
    "SO_BROADCAST": Option(SOL_SOCKET, 6),
    "SO_BUSY_POLL": Option(SOL_SOCKET, 46),
    "SO_DONTROUTE": Option(SOL_SOCKET, 5),
    "SO_KEEPALIVE": Option(SOL_SOCKET, 9),
    "SO_MARK": Option(SOL_SOCKET, 36),
    "SO_NO_CHECK": Option(SOL_SOCKET, 11),
    "SO_OOBINLINE": Option(SOL_SOCKET, 10),
    "SO_PASSCRED": Option(SOL_SOCKET, 16),
    "SO_PASSPIDFD": Option(SOL_SOCKET, 76),
    "SO_PASSRIGHTS": Option(SOL_SOCKET, 83),
    "SO_PASSSEC": Option(SOL_SOCKET, 34),
    "SO_PRIORITY": Option(SOL_SOCKET, 12),
    "SO_RCVLOWAT": Option(SOL_SOCKET, 18),
    "SO_RCVMARK": Option(SOL_SOCKET, 75),
    "SO_REUSEADDR": Option(SOL_SOCKET, 2),
    "SO_REUSEPORT": Option(SOL_SOCKET, 15),
    "SO_RXQ_OVFL": Option(SOL_SOCKET, 40),
    "SO_TIMESTAMP": Option(SOL_SOCKET, 29),
    "SO_TIMESTAMPING": Option(SOL_SOCKET, 37),
    "SO_TIMESTAMPNS": Option(SOL_SOCKET, 35),
    "IP_BIND_ADDRESS_NO_PORT": Option(SOL_IP, 24),
    "IP_FREEBIND": Option(SOL_IP, 15),
    "IP_MINTTL": Option(SOL_IP, 21),
    "IP_MTU_DISCOVER": Option(SOL_IP, 10),
    "IP_MULTICAST_ALL": Option(SOL_IP, 49),
    "IP_MULTICAST_LOOP": Option(SOL_IP, 34),
    "IP_MULTICAST_TTL": Option(SOL_IP, 33),
    "IP_PKTINFO": Option(SOL_IP, 8),
    "IP_RECVERR": Option(SOL_IP, 11),
    "IP_RECVORIGDSTADDR": Option(SOL_IP, 20),
    "IP_RECVTOS": Option(SOL_IP, 13),
    "IP_RECVTTL": Option(SOL_IP, 12),
    "IP_TOS": Option(SOL_IP, 1),
    "IP_TRANSPARENT": Option(SOL_IP, 19),
    "IP_TTL": Option(SOL_IP, 2),
    "IPV6_DONTFRAG": Option(SOL_IPV6, 62),
    "IPV6_FREEBIND": Option(SOL_IPV6, 78),
    "IPV6_MTU_DISCOVER": Option(SOL_IPV6, 23),
    "IPV6_MULTICAST_HOPS": Option(SOL_IPV6, 18),
    "IPV6_MULTICAST_LOOP": Option(SOL_IPV6, 19),
    "IPV6_RECVERR": Option(SOL_IPV6, 25),
    "IPV6_RECVHOPLIMIT": Option(SOL_IPV6, 51),
    "IPV6_RECVPKTINFO": Option(SOL_IPV6, 49),
    "IPV6_RECVTCLASS": Option(SOL_IPV6, 66),
    "IPV6_TCLASS": Option(SOL_IPV6, 67),
    "IPV6_TRANSPARENT": Option(SOL_IPV6, 75),
    "IPV6_UNICAST_HOPS": Option(SOL_IPV6, 16),
    "IPV6_V6ONLY": Option(SOL_IPV6, 26),
    "TCP_CORK": Option(SOL_TCP, 3),
    "TCP_DEFER_ACCEPT": Option(SOL_TCP, 9),
    "TCP_FASTOPEN": Option(SOL_TCP, 23),
    "TCP_INQ": Option(SOL_TCP, 36),
    "TCP_KEEPCNT": Option(SOL_TCP, 6),
    "TCP_KEEPIDLE": Option(SOL_TCP, 4),
    "TCP_KEEPINTVL": Option(SOL_TCP, 5),
    "TCP_LINGER2": Option(SOL_TCP, 8),
    "TCP_NODELAY": Option(SOL_TCP, 1),
    "TCP_NOTSENT_LOWAT": Option(SOL_TCP, 25),
    "TCP_SAVE_SYN": Option(SOL_TCP, 27),
    "TCP_SYNCNT": Option(SOL_TCP, 7),
    "TCP_USER_TIMEOUT": Option(SOL_TCP, 18),
    "TCP_WINDOW_CLAMP": Option(SOL_TCP, 10),
    "UDP_CORK": Option(SOL_UDP, 1),
    "UDP_GRO": Option(SOL_UDP, 104),
    "UDP_SEGMENT": Option(SOL_UDP, 103),
    "SO_LINGER": Option(SOL_SOCKET, 13, 8),
    "SO_RCVTIMEO": Option(SOL_SOCKET, 20, 16),
    "SO_SNDTIMEO": Option(SOL_SOCKET, 21, 16),
    "SO_BINDTODEVICE": Option(SOL_SOCKET, 25, 16),
    "TCP_CONGESTION": Option(SOL_TCP, 13, 16),
}

BEFORE_BIND = frozenset(
    {
        "SO_REUSEADDR", "SO_REUSEPORT", "SO_BINDTODEVICE", "SO_MARK", "SO_PRIORITY", "IPV6_V6ONLY",
        "IP_FREEBIND", "IPV6_FREEBIND", "IP_TRANSPARENT", "IPV6_TRANSPARENT",
        "IP_BIND_ADDRESS_NO_PORT",
    }
)  # fmt: skip
"""Options that bind(2) looks at."""

_getsockopt = libc["getsockopt"]

Value = int | bytes


def _read(sock: socket.socket, option: Option) -> Value:
    if option.length:
        return sock.getsockopt(option.level, option.number, option.length)
    return sock.getsockopt(option.level, option.number)


_NOT_OF_STREAMS = frozenset({"IP_MULTICAST_TTL", "IPV6_MULTICAST_HOPS"})
"""Accepted connections have what came in with their first packet; nobody can set it."""


@functools.cache
def _defaults(family: int, kind: int, protocol: int) -> dict[str, tuple[Option, Value]]:
    """The options that this sort of socket has, with the values of a new one."""
    found: dict[str, tuple[Option, Value]] = {}
    levels = {SOL_SOCKET}
    if family != socket.AF_UNIX:
        levels |= {SOL_IP, SOL_TCP if protocol == socket.IPPROTO_TCP else SOL_UDP}
        levels |= {SOL_IPV6} if family == socket.AF_INET6 else set()
    with socket.socket(family, kind, protocol) as sock:
        for name, option in OPTIONS.items():
            if option.level in levels and not (kind == socket.SOCK_STREAM and name in _NOT_OF_STREAMS):
                try:
                    found[name] = (option, _read(sock, option))
                except OSError:
                    continue  # This kernel, or this family, does not know it.
    return found


def dump_options(sock: socket.socket) -> SocketOptions:
    """Return the options of ``sock`` that a new socket would not have."""
    ints: dict[str, int] = {}
    blobs: dict[str, bytes] = {}
    for name, (option, default) in _defaults(sock.family, sock.type, sock.proto).items():
        value = _read(sock, option)
        if value != default:
            if isinstance(value, int):
                ints[name] = value
            else:
                blobs[name] = value.rstrip(b"\0") if option.length == 16 and name[-2:] != "EO" else value
    try:
        locked = sock.getsockopt(SOL_SOCKET, SO_BUF_LOCK)
    except OSError:
        # Before Linux kernel commit 04190bf8944d ("sock: allow reading and changing sk_userlocks
        # with setsockopt") (in v5.15) nothing tells whether the sizes were set or grew by
        # themselves.
        locked = 0
    if locked & SOCK_SNDBUF_LOCK:
        ints["SO_SNDBUF"] = sock.getsockopt(SOL_SOCKET, SO_SNDBUF)
    if locked & SOCK_RCVBUF_LOCK:
        ints["SO_RCVBUF"] = sock.getsockopt(SOL_SOCKET, SO_RCVBUF)
    return SocketOptions(ints=ints, blobs=blobs)


def apply_options(sock: socket.socket, options: SocketOptions, *, before_bind: bool | None = None) -> None:
    """Set options; ``before_bind`` chooses those of BEFORE_BIND or the others, None all.

    :raises RestoreError: when the name is unknown or the kernel refuses the value.
    """
    values: dict[str, Value] = {**options.ints, **options.blobs}
    for name, value in values.items():
        if before_bind is not None and (name in BEFORE_BIND) != before_bind:
            continue
        try:
            if name in ("SO_SNDBUF", "SO_RCVBUF") and isinstance(value, int):
                set_buffer(sock, SO_SNDBUF if name == "SO_SNDBUF" else SO_RCVBUF, value)
                continue
            option = OPTIONS.get(name)
            if option is None or bool(option.length) != isinstance(value, bytes):
                raise RestoreError(f"Cannot restore a socket: unknown option {name}")
            sock.setsockopt(option.level, option.number, value)
        except OSError as err:
            raise RestoreError(
                f"Cannot restore a socket: option {name} = {value!r}: {err.strerror}"
            ) from err


def set_buffer(sock: socket.socket, option: int, value: int) -> None:
    """Set a buffer size to what getsockopt(2) reported, which is twice what setsockopt(2) takes."""
    force = SO_SNDBUFFORCE if option == SO_SNDBUF else SO_RCVBUFFORCE
    try:
        sock.setsockopt(SOL_SOCKET, force, value // 2)
    except PermissionError:
        sock.setsockopt(SOL_SOCKET, option, value // 2)


def has_filter(sock: socket.socket) -> bool:
    """Say whether a packet filter is attached (SO_ATTACH_FILTER, SO_ATTACH_BPF)."""
    # The length counts instructions, not bytes: with 0 the kernel writes nothing and returns the
    # count.
    length = ctypes.c_uint32(0)
    try:
        check(
            _getsockopt(sock.fileno(), SOL_SOCKET, SO_GET_FILTER, None, ctypes.byref(length)),
            "getsockopt(SO_GET_FILTER)",
        )
    except OSError:
        return True  # EACCES: a BPF program.
    return length.value > 0


def pack_linger(*, on: bool, seconds: int) -> bytes:
    """Return a struct linger."""
    return struct.pack("=ii", on, seconds)

"""Socket options of every family: what differs from a new socket is dumped and set again.

Options are named on the wire as in the C headers, so that a received name can only choose a row of
the table below. Options that mirror the state of a connection, or that only a new connection could
take over, are left out. Sources: socket(7), ip(7), ipv6(7), tcp(7), udp(7), unix(7),
include/uapi/asm-generic/socket.h.
"""

from __future__ import annotations

import contextlib
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
Values = list[Value]
"""What a socket answers to all questions of its Columns, in their order."""

_BUFFERS = {"SO_SNDBUF": (SO_SNDBUF, SOCK_SNDBUF_LOCK), "SO_RCVBUF": (SO_RCVBUF, SOCK_RCVBUF_LOCK)}

_NOT_OF_STREAMS = frozenset({"IP_MULTICAST_TTL", "IPV6_MULTICAST_HOPS"})
"""Accepted connections have what came in with their first packet; nobody can set it."""


class Columns(NamedTuple):
    """All that one sort of socket is asked, the arguments of getsockopt(2) by columns, and what a new one answers."""

    names: tuple[str, ...]
    levels: tuple[int, ...]
    numbers: tuple[int, ...]
    lengths: tuple[int, ...]
    defaults: tuple[Value, ...]

    def ask(self, sock: socket.SocketType) -> Values:
        """Put every question to a socket.

        :raises OSError: it is of another sort.
        """
        # Without a line of Python for each: sockets that listen are asked all of it in the freeze.
        return list(map(sock.getsockopt, self.levels, self.numbers, self.lengths))

    def options(self, values: Values) -> SocketOptions:
        """Return the options, among the answers of a socket, that a new one would not have."""
        ints: dict[str, int] = {}
        blobs: dict[str, bytes] = {}
        answers = dict(zip(self.names, values))
        for name, length, value, default in zip(self.names, self.lengths, values, self.defaults):
            if value == default or name not in OPTIONS:
                continue
            if isinstance(value, int):
                ints[name] = value
            else:
                blobs[name] = value.rstrip(b"\0") if length == 16 and name[-2:] != "EO" else value
        # Before Linux kernel commit 04190bf8944d ("sock: allow reading and changing sk_userlocks with setsockopt") (in
        # v5.15) nothing tells whether the sizes were set or grew by themselves.
        locked = answers.get("SO_BUF_LOCK", 0)
        for name, (_number, lock) in _BUFFERS.items():
            size = answers[name]
            if isinstance(locked, int) and locked & lock and isinstance(size, int):
                ints[name] = size
        return SocketOptions(ints=ints, blobs=blobs)


@functools.cache
def columns_of(family: int, kind: int, protocol: int) -> Columns:
    """Return what a sort of socket is asked, as far as this kernel knows it: its sort, too, and what OPTIONS lists."""
    questions = {
        "SO_DOMAIN": Option(SOL_SOCKET, socket.SO_DOMAIN),
        "SO_TYPE": Option(SOL_SOCKET, socket.SO_TYPE),
        "SO_PROTOCOL": Option(SOL_SOCKET, socket.SO_PROTOCOL),
        "SO_BUF_LOCK": Option(SOL_SOCKET, SO_BUF_LOCK),
        **{name: Option(SOL_SOCKET, number) for name, (number, _lock) in _BUFFERS.items()},
    }
    levels = {SOL_SOCKET}
    if family != socket.AF_UNIX:
        levels |= {SOL_IP, SOL_TCP if protocol == socket.IPPROTO_TCP else SOL_UDP}
        levels |= {SOL_IPV6} if family == socket.AF_INET6 else set()
    for name, option in OPTIONS.items():
        if option.level in levels and not (kind == socket.SOCK_STREAM and name in _NOT_OF_STREAMS):
            questions[name] = option
    rows: list[tuple[str, int, int, int, Value]] = []
    with socket.socket(family, kind, protocol) as sock:
        for name, option in questions.items():
            # This kernel, or this family, may not know it.
            with contextlib.suppress(OSError):
                rows.append((name, *option, sock.getsockopt(*option)))
    return Columns(*zip(*rows))


def dump_options(sock: socket.SocketType) -> SocketOptions:
    """Return the options of ``sock`` that a new socket would not have."""
    columns = columns_of(sock.family, sock.type, sock.proto)
    return columns.options(columns.ask(sock))


def apply_options(sock: socket.socket, options: SocketOptions, *, before_bind: bool | None = None) -> None:
    """Set options; ``before_bind`` chooses those of BEFORE_BIND or the others, None all.

    :raises RestoreError: when the name is unknown or the kernel refuses the value.
    """
    values: dict[str, Value] = {**options.ints, **options.blobs}
    for name, value in values.items():
        if before_bind is not None and (name in BEFORE_BIND) != before_bind:
            continue
        try:
            if name in _BUFFERS and isinstance(value, int):
                set_buffer(sock, _BUFFERS[name][0], value)
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


def has_filter(sock: socket.SocketType) -> bool:
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

"""How far a TCP connection has got with what was written to it, and what holds it up.

Source: include/uapi/linux/tcp.h (struct tcp_info), Documentation/networking/snmp_counter.rst; the times are since Linux
kernel commit 0f87230d1a6c ("tcp: instrument how long TCP is busy sending") (in v4.10).
"""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple

_BYTES_ACKED: Final = 120
_DELIVERY_RATE: Final = 160
_BUSY_TIME: Final = 168
_SIZE: Final = 192


class LinkProgress(NamedTuple):
    """Totals since the connection was made. Bytes and microseconds."""

    bytes_acked: int
    busy_us: int
    """While there was something to send."""
    receiver_limited_us: int
    """Of these, while the receiver's window was closed: it does not read fast enough."""
    delivery_rate: int
    """Bytes a second, lately, while it had something to send."""


def read_progress(sock: socket.socket) -> LinkProgress | None:
    """Return it, or None: no TCP, or an older kernel."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)
    except OSError:
        return None
    if len(info) < _SIZE:
        return None
    (acked,) = struct.unpack_from("<Q", info, _BYTES_ACKED)
    rate, busy_us, limited_us = struct.unpack_from("<QQQ", info, _DELIVERY_RATE)
    return LinkProgress(acked, busy_us, limited_us, rate)

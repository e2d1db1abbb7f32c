"""What the kernel tells of all unix sockets of a network namespace: peers, names, queues (sock_diag(7)).

Nothing else connects a socket with its peer. The query is made in the target's network namespace,
by a thread that enters it and ends. Source: include/uapi/linux/unix_diag.h.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from dataclasses import dataclass

from agent.errors import DumpError
from agent.kernel.clone import CLONE_NEWNET
from agent.kernel.namespaces import setns

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST, NLM_F_DUMP = 0x001, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
UDIAG_SHOW_ALL = 0x01 | 0x02 | 0x04 | 0x08 | 0x10  # NAME VFS PEER ICONS RQLEN
(
    UNIX_DIAG_NAME, UNIX_DIAG_VFS, UNIX_DIAG_PEER, UNIX_DIAG_ICONS, UNIX_DIAG_RQLEN,
    UNIX_DIAG_MEMINFO, UNIX_DIAG_SHUTDOWN,
) = range(7)  # fmt: skip
TCP_LISTEN = 10

_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBHIIIII")
_MESSAGE = struct.Struct("=BBBBIII")
_ATTRIBUTE = struct.Struct("=HH")


@dataclass(slots=True)
class UnixInfo:
    """One socket. ``peer`` is an inode number, 0 for one that was closed, None for no peer."""

    inode: int
    type: int
    listening: bool
    name: bytes = b""
    node: tuple[int, int] | None = None
    """Device (the kernel's own encoding) and low 32 bits of the inode of the path."""
    peer: int | None = None
    pending: int = 0
    """Connections that wait for accept(2)."""
    queue: int = 0
    limit: int = 0
    shutdown: int = 0


def query(pid: int) -> dict[int, UnixInfo]:
    """Return all unix sockets in the network namespace of ``pid`` by inode number.

    :raises DumpError: when the kernel has no sock_diag for unix sockets.
    """
    try:
        sock = _netlink_socket(pid)
        with sock:
            return _dump(sock)
    except OSError as err:
        raise DumpError(
            f"Cannot list unix sockets of process {pid}: {err}",
            hint="load the unix_diag module on the source",
        ) from err


def _netlink_socket(pid: int) -> socket.socket:
    own, its = os.stat("/proc/self/ns/net"), os.stat(f"/proc/{pid}/ns/net")
    if (own.st_dev, own.st_ino) == (its.st_dev, its.st_ino):
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
    made: list[socket.socket] = []
    errors: list[OSError] = []

    def enter() -> None:
        try:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                setns(fd, CLONE_NEWNET)
            finally:
                os.close(fd)
            made.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG))
        except OSError as err:
            errors.append(err)

    thread = threading.Thread(target=enter, name="unix-diag")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return made[0]


def _dump(sock: socket.socket) -> dict[int, UnixInfo]:
    body = _REQUEST.pack(
        socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, UDIAG_SHOW_ALL, 0xFFFFFFFF, 0xFFFFFFFF
    )
    header = _HEADER.pack(
        _HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 1, 0
    )
    sock.send(header + body)
    found: dict[int, UnixInfo] = {}
    while True:
        data = sock.recv(1 << 18)
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
            if kind == NLMSG_DONE:
                return found
            if kind == NLMSG_ERROR:
                errno = -struct.unpack_from("=i", data, offset + _HEADER.size)[0]
                raise OSError(errno, os.strerror(errno))
            info = _parse(data[offset + _HEADER.size : offset + length])
            found[info.inode] = info
            offset += (length + 3) & ~3


def _parse(data: bytes) -> UnixInfo:
    _, kind, state, _, inode, _, _ = _MESSAGE.unpack_from(data)
    info = UnixInfo(inode, kind, state == TCP_LISTEN)
    offset = _MESSAGE.size
    while offset + _ATTRIBUTE.size <= len(data):
        length, attribute = _ATTRIBUTE.unpack_from(data, offset)
        value = data[offset + _ATTRIBUTE.size : offset + length]
        if attribute == UNIX_DIAG_NAME:
            info.name = value if value[:1] == b"\0" else value.rstrip(b"\0")
        elif attribute == UNIX_DIAG_VFS:
            node, device = struct.unpack("=II", value)
            info.node = (device, node)
        elif attribute == UNIX_DIAG_PEER:
            info.peer = struct.unpack("=I", value)[0]
        elif attribute == UNIX_DIAG_ICONS:
            info.pending = len(value) // 4
        elif attribute == UNIX_DIAG_RQLEN:
            info.queue, info.limit = struct.unpack("=II", value)
        elif attribute == UNIX_DIAG_SHUTDOWN:
            info.shutdown = value[0]
        offset += (length + 3) & ~3
    return info

"""unix(7) sockets, the source side: who is connected to whom, what is queued, under which name.

Peers come from sock_diag(7); queues are peeked at, never read. A peer in another process is an
obstacle, except for a datagram socket connected to somebody's path (a system log): that is
connected again by name. Files in flight inside a queue are an obstacle. Restore is in
agent.state.unixrestore.

A path is what its owner gave to bind(2), and the kernel tells it as it was: from the root directory
that the owner had, which may have changed since (a daemon binds, then changes its root). Where it
leads is found by the node.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import stat
import struct
import termios

from agent.errors import DumpError
from agent.kernel.kcmp import kcmp_file
from agent.procfs.process import read_cwd, read_root
from agent.state.openfile import Description, DumpJob, FileKind
from agent.state.paths import reach
from agent.state.sockets import opened
from agent.state.sockopts import SO_PEEK_OFF, dump_options, has_filter
from agent.state.unixdiag import UnixInfo, query
from agent.state.unixrestore import (
    install_unix,
    preflight_unix,
    read_boot_id,
    restore_unix,
)
from protocol.state.unixsk import UnixMessage, UnixName, UnixPeer, UnixSocket

MAX_DATAGRAM = 1 << 20
"""Bytes to read at once; larger than any datagram that a default send buffer takes."""
SCM_PIDFD = 4
_UCRED = struct.Struct("=iII")
SCM_MAX_FD = 253
ANCILLARY_SPACE = (
    socket.CMSG_SPACE(12) + socket.CMSG_SPACE(4 * SCM_MAX_FD) + socket.CMSG_SPACE(4) + 512
)
"""Credentials, descriptors, a pidfd, a security label."""
HINT_OUTSIDE = "move or stop the other process too, or carry it with --external fd[N]"


def dump_unix(job: DumpJob, desc: Description) -> UnixSocket | None:
    """Describe a unix socket, or refuse it."""
    _, kind, _ = job.memo[f"socket {desc.fd}"]
    table: dict[int, UnixInfo] | None = job.memo.get("unix")
    if table is None:
        table = job.memo["unix"] = query(job.ctx.pid)
    info = table.get(desc.inode)
    if info is None and desc.inode not in (table := query(job.ctx.pid)):
        # Made after the first look, or in a namespace that the process has left.
        job.refuse(desc, "unix socket", f"{desc.link} is not in the process's network namespace")
        return None
    info = table[desc.inode]
    if job.refuse_if_shared(desc, "unix socket"):
        return None
    if info.listening and info.pending:
        job.refuse(
            desc, "unix socket", f"{info.pending} connections to {_show(info.name)} wait for accept(2)",
            "try again",
        )  # fmt: skip
        return None
    peer, peer_id, peer_name, peer_root = UnixPeer.NONE, 0, b"", ""
    if not info.listening and info.peer is not None:
        found = _find_peer(job, desc, info, table)
        if found is None:
            return None
        peer, peer_id, peer_name, peer_root = found
    name = _dump_name(job, desc, info) if info.name else None
    if info.name and name is None:
        return None
    with opened(job.fetch(desc), socket.AF_UNIX, kind, 0) as sock:
        if has_filter(sock):
            job.refuse(desc, "socket filter", "a packet filter is attached", "it is not carried yet")
            return None
        queue: list[UnixMessage] | None = []
        if job.content and not info.listening and _is_readable(sock):
            queue = peek_queue(job, sock)
        if queue is None:
            job.refuse(
                desc, "unix socket", "a file that is closed here is in flight in its queue", "try again"
            )
            return None
        return UnixSocket(
            type=kind,
            options=dump_options(sock),
            name=name,
            backlog=info.limit if info.listening else -1,
            listener=_listener(job, sock) if info.listening else None,
            peer=peer,
            peer_id=peer_id,
            peer_name=peer_name,
            peer_root=peer_root,
            shutdown=info.shutdown & 3,
            queue=tuple(queue),
        )


def _listener(job: DumpJob, sock: socket.SocketType) -> tuple[int, int] | None:
    # What whoever connects is told with SO_PEERCRED: it is as of listen(2).
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return (uid, gid) if pid == job.ctx.pid else None


def _show(name: bytes) -> str:
    return "@" + name[1:].decode(errors="replace") if name[:1] == b"\0" else os.fsdecode(name)


def _find_peer(
    job: DumpJob, desc: Description, info: UnixInfo, table: dict[int, UnixInfo]
) -> tuple[UnixPeer, int, bytes, str] | None:
    if not info.peer:
        # No inode: the peer was closed (then both directions are shut), or nobody has accepted it
        # yet.
        if info.type != socket.SOCK_DGRAM and info.shutdown != 3:
            job.refuse(desc, "unix socket", "its connection is not accepted yet", "try again")
            return None
        return UnixPeer.GONE, 0, b"", ""
    inside = job.by_link().get(f"socket:[{info.peer}]")
    if inside:
        return UnixPeer.FILE, inside[0].id, b"", ""
    other = table.get(info.peer)
    if other is not None and other.type == socket.SOCK_DGRAM and other.name:
        if other.name[:1] == b"\0":
            return UnixPeer.NAMED, 0, other.name, ""
        for place in _roots(job):
            if _node_at(job, place, other) is not None:
                return UnixPeer.NAMED, 0, other.name, place
        # A path of another mount namespace, or of another directory than "/".
        job.refuse(
            desc, "unix socket", f"connected to {_show(other.name)}, which leads elsewhere from here",
            HINT_OUTSIDE,
        )  # fmt: skip
        return None
    name = f" ({_show(other.name)})" if other is not None and other.name else ""
    job.refuse(desc, "unix socket", f"connected to another process{name}", HINT_OUTSIDE)
    return None


def _dump_name(job: DumpJob, desc: Description, info: UnixInfo) -> UnixName | None:
    if info.name[:1] == b"\0":
        return UnixName(name=info.name)
    path = os.fsdecode(info.name)
    # A relative name starts at a directory that is not recorded anywhere: the present one may be it.
    directory = "" if path.startswith("/") else read_cwd(job.ctx.pid)
    places = [""] if directory else _roots(job)
    for place in places:
        node = _node_at(job, place + directory, info)
        if node is not None:
            return UnixName(
                name=info.name,
                root=place,
                directory=directory,
                mode=stat.S_IMODE(node.st_mode),
                uid=node.st_uid,
                gid=node.st_gid,
                # An original that goes on must keep its name.
                boot_id="" if job.ctx.options.leave_running else read_boot_id(),
                node=(node.st_dev, node.st_ino),
            )
    if directory or any(os.path.lexists(_at(job, place, info)) for place in places):
        job.refuse(
            desc, "unix socket", f"its path {path} now leads elsewhere",
            "bind unix sockets by absolute paths",
        )  # fmt: skip
        return None
    # Removed: there must be a directory to bind it in once more.
    homes = [place for place in places if os.path.isdir(os.path.dirname(_at(job, place, info)))]
    return UnixName(name=info.name, root=(homes or places)[0], unlinked=True)


def _roots(job: DumpJob) -> list[str]:
    # Where an absolute name may start, the likeliest first.
    roots: list[str] | None = job.memo.get("roots")
    if roots is None:
        root = read_root(job.ctx.pid)
        roots = job.memo["roots"] = [""] if root == "/" else [root, ""]
    return roots


def _at(job: DumpJob, place: str, info: UnixInfo) -> str:
    return f"{reach(job.ctx.pid)}{place}/{os.fsdecode(info.name)}"


def _node_at(job: DumpJob, place: str, info: UnixInfo) -> os.stat_result | None:
    try:
        found = os.lstat(_at(job, place, info))
    except OSError:
        return None
    # The device is not compared: overlayfs and btrfs show another one to stat(2) than the
    # superblock's.
    if info.node is not None and stat.S_ISSOCK(found.st_mode) and found.st_ino & 0xFFFFFFFF == info.node[1]:
        return found
    return None


def _is_readable(sock: socket.SocketType) -> bool:
    poller = select.poll()
    poller.register(sock.fileno(), select.POLLIN)
    return any(events & select.POLLIN for _, events in poller.poll(0))


class _InFlight(Exception):
    """A description is on its way that the process has no number for."""


def peek_queue(job: DumpJob, sock: socket.SocketType) -> list[UnixMessage] | None:
    """Return what waits in the queue of a socket of the target.

    None when descriptors are among it that the process does not have open too.

    :raises DumpError: when it cannot be copied whole.
    """
    try:
        if sock.type == socket.SOCK_STREAM:
            return _peek_stream(job, sock)
        before = sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
        messages: list[UnixMessage] = []
        if before < 0 and sock.type == socket.SOCK_DGRAM:
            # The kernel skips an empty datagram that was peeked at before, so that of several looks
            # only the first one sees it, unless it comes first of all.
            first = _peek(job, sock, MAX_DATAGRAM)
            if not first.data:
                messages.append(first)
        return messages + _walk(job, sock, before)
    except _InFlight:
        return None


def _walk(job: DumpJob, sock: socket.SocketType, before: int) -> list[UnixMessage]:
    # The queue is walked through with a peek offset, which is the socket's: it is put back at once.
    messages: list[UnixMessage] = []
    sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    try:
        while True:
            try:
                message = _peek(job, sock, MAX_DATAGRAM)
            except BlockingIOError:
                return messages
            if not message.data and sock.type != socket.SOCK_DGRAM:
                return messages  # The end, after the peer is gone.
            messages.append(message)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, before)


def _peek_stream(job: DumpJob, sock: socket.SocketType) -> list[UnixMessage]:
    length = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)))[0]
    if length == 0:
        return []
    before = sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
    messages = [_peek(job, sock, length)] if before < 0 else []
    if sum(len(message.data) for message in messages) != length:
        # A read ends behind a piece that descriptors were passed with.
        messages = _walk(job, sock, before)
    found = sum(len(message.data) for message in messages)
    if found != length:
        raise DumpError(f"Cannot copy a unix socket: {length} bytes expected, {found} found")
    return messages


def _peek(job: DumpJob, sock: socket.SocketType, size: int) -> UnixMessage:
    data, extra, flags, sender = sock.recvmsg(
        size, ANCILLARY_SPACE, socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, content in extra:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        elif level == socket.SOL_SOCKET and kind == SCM_PIDFD:
            os.close(struct.unpack("i", content)[0])
    try:
        file_ids = tuple(_identify(job, fd) for fd in fds)
    finally:
        for fd in fds:
            os.close(fd)
    if flags & socket.MSG_CTRUNC:
        raise _InFlight
    if flags & socket.MSG_TRUNC:
        raise DumpError(f"Cannot copy a datagram longer than {size} bytes")
    name = os.fsencode(sender) if isinstance(sender, (str, bytes)) else b""
    return UnixMessage(data=data, sender=name, file_ids=file_ids)


def _identify(job: DumpJob, fd: int) -> int:
    # ``fd`` is the agent's duplicate of a description in flight.
    link = os.readlink(f"/proc/self/fd/{fd}")
    for desc in job.by_link().get(link, ()):
        if kcmp_file(job.ctx.pid, os.getpid(), desc.fd, fd) == 0:
            return desc.id
    raise _InFlight


KIND = FileKind(
    name="unix", dump=dump_unix, restore=restore_unix, preflight=preflight_unix, install=install_unix
)

"""unix(7) sockets, the destination side: names bound, peers joined, queues refilled.

An accepted connection has the name of its listener, which nobody can bind a second time; so it is
made as it came about: a listener stands under the name (the process's own, or one for that moment),
one end connects, the other is accepted. Order: names and listeners, connections, options, queues,
shutdown, and last the removal of nodes that no longer existed. Credentials of the peer
(SO_PEERCRED) and of queued messages are the agent's; but those that a listening socket shows to whoever
connects are of the last listen(2), so that the process itself listens once more.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from agent.errors import RestoreError
from agent.kernel import syscalls as nr
from agent.kernel.namespaces import unshare
from agent.state.openfile import Item, PreflightJob, RestoreJob, set_status_flags
from agent.state.sockopts import SO_SNDBUF, apply_options, set_buffer
from protocol.state.unixsk import UnixMessage, UnixName, UnixPeer, UnixSocket

if TYPE_CHECKING:
    from agent.target.batch import Batch

CLONE_FS = 0x200
FILL_BUFFER = 16 << 20
"""Send buffer while a queue is refilled: the overhead per message may be counted differently here."""
SO_BUF_LOCK = 72

UnixItem = Item[UnixSocket]


def preflight_unix(job: PreflightJob, items: Sequence[UnixItem]) -> None:
    """Check that the names can be had and that log daemons and the like listen."""
    for item in items:
        name = item.body.name
        if name is not None and name.name[0] and not name.unlinked:
            problem = _name_problem(name)
            if problem:
                job.refuse(
                    item, "unix socket", f"{os.fsdecode(name.name)}: {problem}",
                    "stop what uses the name on the destination",
                )  # fmt: skip
        elif name is not None and not name.name[0] and item.body.peer is UnixPeer.NONE:
            with socket.socket(socket.AF_UNIX, item.body.type) as sock:
                try:
                    sock.bind(name.name)
                except OSError as err:
                    shown = name.name[1:].decode(errors="replace")
                    job.refuse(
                        item, "unix socket", f"@{shown}: {err.strerror}",
                        "stop what uses the name on the destination",
                    )  # fmt: skip
        if item.body.peer is UnixPeer.NAMED and not _is_bound(
            item.body.peer_root, "", item.body.peer_name
        ):
            job.refuse(
                item, "unix socket", f"nobody receives at {os.fsdecode(item.body.peer_name)}",
                "start the service (a log daemon, for instance) on the destination",
            )  # fmt: skip


def read_boot_id() -> str:
    """Return what tells this boot of this host from all others."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _is_sources_own(path: str, name: UnixName) -> bool:
    found = os.lstat(path)
    return (found.st_dev, found.st_ino) == name.node and name.boot_id == read_boot_id()


def _node_path(name: UnixName) -> str:
    return name.root + os.path.join(name.directory, os.fsdecode(name.name))


def _name_problem(name: UnixName) -> str:
    path = _node_path(name)
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return "something that is not a socket stands there"
        if _is_sources_own(path, name):
            return ""
    except FileNotFoundError:
        folder = os.path.dirname(path) or "/"
        return "" if os.path.isdir(folder) else f"directory {folder} does not exist"
    except OSError as err:
        return os.strerror(err.errno or 0)
    bound = _is_bound(name.root, name.directory, name.name)
    return "another process has bound it" if bound else ""


def _is_bound(root: str, directory: str, address: bytes) -> bool:
    # No connection is made: the owner would see it. A socket of a type that nobody uses for a
    # service gets another error from a bound name than from a stale one.
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.setblocking(False)
            if kind == socket.SOCK_SEQPACKET:
                try:
                    _in_place(root, directory, lambda: sock.connect(address))
                except OSError as err:
                    if err.errno == errno.EPROTOTYPE:
                        return True
                    if err.errno in (errno.ECONNREFUSED, errno.ENOENT):
                        return False
                return True
    return True


def restore_unix(job: RestoreJob, items: Sequence[UnixItem]) -> None:
    """Make every socket with its queue.

    :raises RestoreError: when a name cannot be had, or the state contradicts itself.
    """
    with ExitStack() as stack:
        builder = _Builder(job, items, stack)
        builder.build()
        for item in items:
            fd = builder.socks.pop(item.id).detach()
            job.put(item, fd)
            set_status_flags(fd, item.file.flags)


def install_unix(job: RestoreJob, items: Sequence[UnixItem], batch: Batch) -> None:
    """Have the process listen again where it did so with the ids that it still has from the agent."""
    for item in items:
        if item.body.listener == (os.geteuid(), os.getegid()):
            _listen_call(batch, item)


def listen_calls(items: Iterable[UnixItem], batch: Batch) -> None:
    """Add the calls that have the process listen again where that needs its own ids; it has them by then."""
    for item in items:
        if item.body.listener not in (None, (os.geteuid(), os.getegid())):
            _listen_call(batch, item)


def _listen_call(batch: Batch, item: UnixItem) -> None:
    batch.call(nr.NR_listen, item.fds[0], item.body.backlog, name=f"listen({item})")


class _Builder:
    def __init__(self, job: RestoreJob, items: Sequence[UnixItem], stack: ExitStack) -> None:
        self.job = job
        self.replaced = job.replaced
        self.items = {item.id: item for item in items}
        self.socks: dict[int, socket.socket] = {}
        self.stack = stack
        self.gone: dict[int, socket.socket] = {}
        """The other ends of those whose peer was closed; they are closed when all is done."""
        stack.callback(self._close_rest)

    def _close_rest(self) -> None:
        for sock in [*self.socks.values(), *self.gone.values()]:
            sock.close()

    def build(self) -> None:
        connected = []
        for item in self.items.values():
            body = item.body
            if body.peer is UnixPeer.FILE:
                other = self.items.get(body.peer_id)
                if other is None or other.body.type != body.type:
                    raise RestoreError(f"Cannot restore {item}: its peer is no unix socket")
            if body.type != socket.SOCK_DGRAM and body.peer in (UnixPeer.FILE, UnixPeer.GONE):
                connected.append(item)
        for item in self.items.values():
            if item not in connected and not self._is_pair(item):
                self._make_single(item)
        for item in connected:
            if item.id not in self.socks:
                self._connect_stream(item)
        for item in self.items.values():
            if item.body.type == socket.SOCK_DGRAM:
                self._connect_datagram(item)
        for item in self.items.values():
            apply_options(self.socks[item.id], item.body.options)
        for item in self.items.values():
            self._fill(item)
        for item in self.items.values():
            self._finish(item)

    # Names.

    def _bind(self, sock: socket.socket, item: UnixItem) -> None:
        name = item.body.name
        assert name is not None
        try:
            if not name.name[0]:
                sock.bind(name.name)
                return
            path, problem = _node_path(name), _name_problem(name)
            if problem:
                raise RestoreError(f"Cannot restore {item}: {path}: {problem}")
            self._clear_path(path, name)
            _in_place(name.root, name.directory, lambda: sock.bind(name.name))
        except OSError as err:
            raise RestoreError(
                f"Cannot restore {item}: unix socket {name.name!r}: {err.strerror}"
            ) from err

    def _clear_path(self, path: str, name: UnixName) -> None:
        if not os.path.lexists(path):
            return
        if not name.unlinked and _is_sources_own(path, name):
            # The source must have it back if the crossing fails.
            aside = f"{path}.ferry-{os.getpid()}"
            os.rename(path, aside)
            self.replaced.append((path, aside))
        else:
            os.unlink(path)

    def _set_node(self, name: UnixName) -> None:
        path = _node_path(name)
        if name.unlinked:
            os.unlink(path)
            return
        os.chown(path, name.uid, name.gid)
        os.chmod(path, name.mode)

    # Sockets that are not one end of a connection.

    def _is_pair(self, item: UnixItem) -> bool:
        # A datagram socket without a name can be connected to only if socketpair(2) made it.
        body = item.body
        if body.type != socket.SOCK_DGRAM or body.peer is not UnixPeer.FILE:
            return False
        return body.name is None and self.items[body.peer_id].body.name is None

    def _make_single(self, item: UnixItem) -> None:
        body = item.body
        sock = self.socks[item.id] = socket.socket(socket.AF_UNIX, body.type)
        if body.name is not None:
            self._bind(sock, item)
        if body.backlog >= 0:
            sock.listen(body.backlog)

    # Connections.

    def _connect_stream(self, item: UnixItem) -> None:
        body = item.body
        peer = self.items[body.peer_id] if body.peer is UnixPeer.FILE else None
        names = {body.name, peer.body.name if peer else None} - {None}
        if not names:
            ours, theirs = socket.socketpair(socket.AF_UNIX, body.type)
        else:
            server = self._pick_server(item, peer)
            client = peer if server is item else item
            accepted, connecting = self._accept(server, client)
            ours, theirs = (accepted, connecting) if server is item else (connecting, accepted)
        self.socks[item.id] = ours
        if peer is not None:
            self.socks[peer.id] = theirs
        else:
            self.gone[item.id] = theirs

    def _pick_server(self, item: UnixItem, peer: UnixItem | None) -> UnixItem:
        listening = {
            other.body.name.name
            for other in self.items.values()
            if other.body.backlog >= 0 and other.body.name is not None
        }
        ends = [end for end in (item, peer) if end is not None and end.body.name is not None]
        for end in ends:
            assert end.body.name is not None
            if end.body.name.name in listening:
                return end
        return ends[0]

    def _accept(
        self, server: UnixItem, client: UnixItem | None
    ) -> tuple[socket.socket, socket.socket]:
        name = server.body.name
        assert name is not None
        listener = None
        for other in self.items.values():
            if other.body.backlog >= 0 and other.body.name is not None:
                if other.body.name.name == name.name and other.body.type == server.body.type:
                    listener = self.socks[other.id]
        connecting = socket.socket(socket.AF_UNIX, server.body.type)
        made = None
        try:
            if listener is None:
                listener = made = socket.socket(socket.AF_UNIX, server.body.type)
                self._bind(made, server)
                made.listen(1)
            if client is not None and client.body.name is not None:
                self._bind(connecting, client)
            _connect(connecting, name)
            accepted, _ = listener.accept()
            return accepted, connecting
        except BaseException:
            connecting.close()
            raise
        finally:
            if made is not None:
                made.close()

    def _connect_datagram(self, item: UnixItem) -> None:
        body = item.body
        if self._is_pair(item) and item.id not in self.socks:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            self.socks[item.id] = ours
            other = self.items[body.peer_id]
            if other.body.peer_id == item.id:
                self.socks[other.id] = theirs
                return
            theirs.close()
            raise RestoreError(f"Cannot restore {item}: its peer is connected elsewhere")
        if body.peer is UnixPeer.NAMED:
            _connect(self.socks[item.id], UnixName(name=body.peer_name, root=body.peer_root))
        elif body.peer is UnixPeer.FILE and not self._is_pair(item):
            name = self.items[body.peer_id].body.name
            if name is None:
                raise RestoreError(f"Cannot restore {item}: its peer has no name")
            _connect(self.socks[item.id], name)
        elif body.peer is UnixPeer.GONE:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other_end:
                other_end.bind("")  # Any free abstract name.
                self.socks[item.id].connect(other_end.getsockname())

    # Queues.

    def _fill(self, item: UnixItem) -> None:
        for message in item.body.queue:
            with ExitStack() as stack:
                sender, address = self._sender(item, message, stack)
                rights = [self._agent_fd(item, file_id) for file_id in message.file_ids]
                if address is None:
                    _send(sender, message.data, None, item, rights)
                    continue
                data, to = message.data, address.name
                _in_place(
                    address.root, address.directory, lambda: _send(sender, data, to, item, rights)
                )

    def _agent_fd(self, item: UnixItem, file_id: int) -> int:
        sock = self.socks.get(file_id)
        try:
            return sock.fileno() if sock is not None else self.job.agent_fd(file_id)
        except KeyError:
            raise RestoreError(
                f"Cannot restore {item}: file {file_id} in its queue does not exist"
            ) from None

    def _sender(
        self, item: UnixItem, message: UnixMessage, stack: ExitStack
    ) -> tuple[socket.socket, UnixName | None]:
        body = item.body
        if body.type != socket.SOCK_DGRAM:
            found = self.gone.get(item.id) or self.socks.get(body.peer_id)
            if found is None:
                raise RestoreError(f"Cannot restore {item}: a queue without a peer")
            return found, None
        target = body.name
        for other in self.items.values():
            if other.body.type == socket.SOCK_DGRAM and other.body.name is not None:
                if message.sender and other.body.name.name == message.sender:
                    connected = other.body.peer is UnixPeer.FILE and other.body.peer_id == item.id
                    return self.socks[other.id], None if connected else target
        if body.peer is UnixPeer.FILE and target is None:
            return self.socks[body.peer_id], None
        if target is None:
            raise RestoreError(f"Cannot restore {item}: nobody can send to a socket without a name")
        spare = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        if message.sender and not message.sender[0]:
            spare.bind(message.sender)
        return spare, target

    def _finish(self, item: UnixItem) -> None:
        sock = self.socks[item.id]
        gone = self.gone.pop(item.id, None)
        if gone is not None:
            gone.close()
        how = {1: socket.SHUT_RD, 2: socket.SHUT_WR, 3: socket.SHUT_RDWR}.get(item.body.shutdown)
        if how is not None:
            sock.shutdown(how)
        name = item.body.name
        bound_here = item.body.backlog >= 0 or item.body.peer is not UnixPeer.GONE
        if name is not None and name.name[0] and bound_here:
            try:
                self._set_node(name)
            except FileNotFoundError:
                pass  # Several sockets share the name: another one has removed it.


def _send(
    sock: socket.socket,
    data: bytes,
    address: bytes | None,
    item: UnixItem,
    rights: Sequence[int] = (),
) -> None:
    view = memoryview(data)
    for attempt in range(2):
        try:
            while True:
                if rights:
                    passed = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", rights))
                    if address is None:
                        sent = sock.sendmsg([view], [passed], socket.MSG_DONTWAIT)
                    else:
                        sent = sock.sendmsg([view], [passed], socket.MSG_DONTWAIT, address)
                    rights = ()
                elif address is None:
                    sent = sock.send(view, socket.MSG_DONTWAIT)
                else:
                    sent = sock.sendto(view, socket.MSG_DONTWAIT, address)
                view = view[sent:]
                if not view:
                    return
        except BlockingIOError as err:
            if attempt:
                raise RestoreError(f"Cannot restore {item}: its queue does not take all data") from err
            before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            locked = sock.getsockopt(socket.SOL_SOCKET, SO_BUF_LOCK)
            set_buffer(sock, SO_SNDBUF, FILL_BUFFER)
            try:
                _send(sock, bytes(view), address, item, rights)
                return
            finally:
                set_buffer(sock, SO_SNDBUF, before)
                sock.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, locked)


def _connect(sock: socket.socket, name: UnixName) -> None:
    _in_place(name.root, name.directory, lambda: sock.connect(name.name))


def _in_place(root: str, directory: str, action: Callable[[], None]) -> None:
    """Call ``action`` with another root or working directory, in a thread that has its own."""
    if not root and not directory:
        action()
        return
    errors: list[BaseException] = []

    def run() -> None:
        try:
            unshare(CLONE_FS)
            if root:
                os.chroot(root)
            os.chdir(directory or "/")
            action()
        except BaseException as err:
            errors.append(err)

    thread = threading.Thread(target=run, name="unix-name")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]

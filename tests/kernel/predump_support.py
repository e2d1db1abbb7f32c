"""What tests of files dumped ahead have in common: a child that changes its table, and what was told of it."""

from __future__ import annotations

import dataclasses
import os
import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.errors import RefusedError
from agent.state.context import DumpContext, RestoreContext
from agent.state.fileitems import decode_items
from agent.state.filerestore import FileRestorer
from agent.state.files import dump_files
from agent.state.openfile import O_LARGEFILE
from agent.state.predump import PreDump
from agent.target.batch import Batch
from agent.target.inject_skeleton import SkeletonInjector
from agent.types import Pid
from protocol.state.files import FilesChange, FilesState
from tests.kernel.files_support import Child, Options, live_child
from tests.kernel.test_state_files_install import AGENT_PIDFD, skeleton

LATER = """
def file(name, number, flags=os.O_RDWR | os.O_CREAT, size=100):
    fd = os.open(name, flags, 0o600)
    os.ftruncate(fd, size) if size else None
    place(fd, number)
def place(fd, number, cloexec=False):
    if fd != number:
        os.dup2(fd, number, not cloexec); os.close(fd)
def pipe(reader, writer):
    r, w = os.pipe()
    place(fcntl.fcntl(r, fcntl.F_DUPFD, 500), reader); os.close(r)
    place(fcntl.fcntl(w, fcntl.F_DUPFD, 500), writer); os.close(w)
def event(number, count=0):
    place(os.eventfd(count), number)
def swap(a, b):
    spare = os.dup(a); os.dup2(b, a); os.dup2(spare, b); os.close(spare)
LIBC = ctypes.CDLL(None, use_errno=True)
ADD, DEL, MOD = 1, 2, 3
def watch(epoll, operation, fd, events=0):
    if LIBC.epoll_ctl(epoll, operation, fd, struct.pack("=IQ", events, fd)) < 0:
        raise OSError(ctypes.get_errno(), "epoll_ctl")
def epoll(number, *watched):
    place(LIBC.epoll_create1(0), number)
    for fd, events in watched: watch(number, ADD, fd, events)
def tcp(number, port=None, backlog=None, reuse=0):
    s = socket.socket(); s.setsockopt(1, 2, reuse)
    if port is not None: s.bind(("127.0.0.1", port))
    if backlog is not None: s.listen(backlog)
    place(s.detach(), number)
def lent(number):
    return socket.socket(fileno=os.dup(number))
def port(number):
    return lent(number).getsockname()[1]
def connection(listener, there, here):
    s = lent(listener); client = socket.create_connection(s.getsockname())
    place(s.accept()[0].detach(), there); place(client.detach(), here)
def later(signum, frame):
    {later}
    os.mkdir(sys.argv[1] + ".later")
signal.signal(signal.SIGUSR1, later)
"""


def whole_of(earlier: FilesState, change: FilesChange) -> FilesState:
    """The table that a change of an earlier one means."""
    entries = {entry.fd: entry for entry in earlier.fds}
    for fd in change.closed:
        del entries[fd]
    entries.update((entry.fd, entry) for entry in change.fds)
    named = {entry.file_id for entry in entries.values()}
    files = [file for file in earlier.files if file.id in named]
    return FilesState(
        fds=tuple(entries[fd] for fd in sorted(entries)), files=(*files, *change.files)
    )


def picture(state: FilesState) -> dict[tuple[int, ...], tuple[Any, ...]]:
    """What a table means, whatever ids the files have: by the numbers of each file."""
    items = [item for found in decode_items(state).values() for item in found]
    fds = {item.id: item.fds for item in items}
    pipes: dict[int, list[tuple[int, ...]]] = {}
    for item in items:
        if item.file.kind == "pipe":
            pipes.setdefault(item.body.pipe_id, []).append(item.fds)
    cloexec = {entry.fd: entry.cloexec for entry in state.fds}
    result = {}
    for item in items:
        body: Any = item.body
        if item.file.kind == "pipe":
            body = (body.capacity, body.path, b"".join(body.chunks), sorted(pipes[body.pipe_id]))
        elif item.file.kind == "epoll":
            body = sorted((i.fd, fds[i.file_id], i.events, i.data) for i in body.items)
        elif item.file.kind == "timerfd":
            body = dataclasses.replace(body, remaining_ns=bool(body.remaining_ns), deadline_ns=None)
        elif item.file.kind == "unix":
            queue = [(m.data, [fds[number] for number in m.file_ids]) for m in body.queue]
            body = (body.peer, fds.get(body.peer_id), queue, body.shutdown)
        file = item.file
        marks = tuple(cloexec[fd] for fd in item.fds)
        # The first end of a pipe is made by pipe(2), whichever way it was: without O_LARGEFILE, which means nothing.
        flags = file.flags & ~O_LARGEFILE if file.kind == "pipe" else file.flags
        result[item.fds] = (marks, file.kind, flags, file.pos, file.owner, file.locks, body)
    return result


@dataclass
class Told:
    """What the source says of one child: ahead, in the end, and in one piece."""

    ahead: FilesState
    change: FilesChange
    whole: FilesState
    calls: dict[str, int]
    """How often functions of os were called in the end."""

    @property
    def dumped(self) -> set[int]:
        """Numbers whose files were dumped in the end."""
        new = {file.id for file in self.change.files}
        return {entry.fd for entry in self.change.fds if entry.file_id in new}

    @property
    def prepared(self) -> set[int]:
        return {entry.fd for entry in self.ahead.fds}


@contextmanager
def changing_child(
    tmp_path: Path, before: str, later: str, options: Options | None = None
) -> Iterator[Child]:
    body = textwrap.indent(textwrap.dedent(later).strip() or "pass", "    ").strip()
    code = LATER.replace("{later}", body) + textwrap.dedent(before) + "\nready()"
    with live_child(tmp_path, code, options) as child:
        yield child


def let_change(child: Child, tmp_path: Path) -> None:
    for flag in tmp_path.glob("*.later"):
        flag.rmdir()
    os.kill(child.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 10
    while not list(tmp_path.glob("*.later")):
        assert time.monotonic() < deadline, (tmp_path / "stderr").read_text()
        time.sleep(0.002)


def refused_later(tmp_path: Path, before: str, later: str) -> set[str]:
    """Have a child do something after the first dump that the second one refuses; what the obstacles name."""
    with changing_child(tmp_path, before, later) as child:
        with closing(PreDump(child.ctx)) as ahead:
            let_change(child, tmp_path)
            with pytest.raises(RefusedError) as refused:
                ahead.dump_change()
    return {obstacle.what for obstacle in refused.value.obstacles}


def told(tmp_path: Path, before: str, later: str, options: Options | None = None) -> Told:
    """Have a child do something after the first dump; both ways to dump it must say the same."""
    with changing_child(tmp_path, before, later, options) as child:
        with closing(PreDump(child.ctx)) as ahead:
            let_change(child, tmp_path)
            change, calls = counting_calls(ahead.dump_change)
            result = Told(ahead.state, change, dump_files(child.ctx), calls)
    assert picture(whole_of(result.ahead, result.change)) == picture(result.whole)
    return result


def skeleton_context(
    pid: Pid, injector: SkeletonInjector, options: Options | None = None
) -> RestoreContext:
    """To restore files into a skeleton of these tests."""
    return RestoreContext(
        pid=pid, injector=injector, options=options or Options(), agent_pidfd=AGENT_PIDFD,
        reserved_fds=frozenset({AGENT_PIDFD}),
    )  # fmt: skip


@contextmanager
def rebuilt(state: Told, options: Options | None = None) -> Iterator[DumpContext]:
    """Install what was told in a skeleton, in both steps; it must be as the source has it."""
    with skeleton() as (pid, injector):
        ctx = skeleton_context(pid, injector, options)
        with closing(FileRestorer(ctx)) as restorer:
            restorer.prepare(state.ahead)
            restorer.open_all(state.change)
            restorer.install()
            restorer.start()
        last = Batch()
        last.call(3, AGENT_PIDFD)
        injector.run(last)
        pidfd = os.pidfd_open(pid)
        try:
            copy = DumpContext(pid, pidfd, options or Options())
            assert picture(dump_files(copy)) == picture(state.whole)
            yield copy
        finally:
            os.close(pidfd)


def counting_calls(action: Callable[[], FilesChange]) -> tuple[FilesChange, dict[str, int]]:
    """What an action returns, and how often functions of os were called meanwhile."""
    counts = dict.fromkeys(("open", "pread", "readlink", "stat", "listdir"), 0)
    with pytest.MonkeyPatch.context() as patch:
        for name in counts:
            def counted(*args: Any, name: str = name, real: Any = getattr(os, name), **kwargs: Any) -> Any:
                counts[name] += 1
                return real(*args, **kwargs)

            patch.setattr(os, name, counted)
        return action(), counts


def outcome(dump: Any) -> Any:
    """A picture, or which numbers stand in the way."""
    try:
        return picture(dump())
    except RefusedError as err:
        return {(obstacle.kind, obstacle.what) for obstacle in err.obstacles}

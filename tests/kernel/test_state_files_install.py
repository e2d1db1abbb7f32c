"""The whole way: dump a live child, install its files in another process, dump that one and compare."""

from __future__ import annotations

import dataclasses
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.errors import InjectError
from agent.kernel import syscalls as nr
from agent.kernel.pidfd import pidfd_getfd
from agent.state import filerestore
from agent.state.context import DumpContext, RestoreContext
from agent.state.fileitems import decode_items
from agent.state.filerestore import FileRestorer
from agent.state.files import check_files, dump_files
from agent.target.batch import Batch
from agent.target.inject_skeleton import SkeletonInjector
from agent.target.tracer import Tracer
from agent.types import Pid
from protocol.state.files import FilesState
from tests.kernel.files_support import Options, body_of, file_of, live_child

SCRATCH = 0x100000000
AGENT_PIDFD = 900


@contextmanager
def skeleton() -> Iterator[tuple[Pid, SkeletonInjector]]:
    """A stopped process that files can be installed in; number AGENT_PIDFD is its pidfd of this process."""
    process = subprocess.Popen(["/bin/sleep", "1000"], stdin=subprocess.DEVNULL)
    try:
        # Popen() returns while execve(2) is still at work.
        while " S " not in Path(f"/proc/{process.pid}/stat").read_text():
            time.sleep(0.001)
        with Tracer(process.pid, kill_on_exit=True) as tracer:
            tracer.stop_all()
            with SkeletonInjector(tracer, scratch_hint=SCRATCH) as injector:
                batch = Batch()
                pidfd = batch.call(nr.NR_pidfd_open, os.getpid(), 0)
                batch.call(nr.NR_dup3, pidfd, AGENT_PIDFD, os.O_CLOEXEC)
                injector.run(batch)
                yield Pid(process.pid), injector
    finally:
        process.kill()
        process.wait()


@contextmanager
def moved(state: FilesState, options: Options | None = None) -> Iterator[DumpContext]:
    """Install ``state`` in a skeleton; yields a context to look at it."""
    with skeleton() as (pid, injector):
        ctx = RestoreContext(
            pid=pid, injector=injector, options=options or Options(), agent_pidfd=AGENT_PIDFD,
            reserved_fds=frozenset({AGENT_PIDFD}),
        )  # fmt: skip
        restorer = FileRestorer(ctx)
        try:
            restorer.open_all(state)
            restorer.install()
            restorer.start()
        finally:
            restorer.close()
        last = Batch()
        last.call(nr.NR_close, AGENT_PIDFD)
        injector.run(last)
        pidfd = os.pidfd_open(pid)
        try:
            yield DumpContext(pid, pidfd, options or Options())
        finally:
            os.close(pidfd)


def comparable(state: FilesState) -> tuple[list[tuple[Any, ...]], list[tuple[int, bool]]]:
    """What must be the same in both processes."""
    files = []
    for items in decode_items(state).values():
        for item in items:
            body = item.body
            if item.file.kind == "pipe":
                body = dataclasses.replace(body, pipe_id=0)
            elif item.file.kind == "epoll":
                # The kernel sorts them by the address of the file.
                body = sorted(body.items, key=lambda interest: interest.data)
            elif item.file.kind == "timerfd":
                body = dataclasses.replace(body, remaining_ns=0, deadline_ns=0)
            files.append((item.fds, item.file.kind, item.file.flags, item.file.pos, body))
    return sorted(files, key=lambda file: file[0]), [(e.fd, e.cloexec) for e in state.fds]


EVERYTHING = """
import resource
libc = ctypes.CDLL(None, use_errno=True)
def keep(s, number, inheritable=True):
    os.dup2(s.fileno(), number, inheritable); s.close()
r, w = os.pipe(); os.write(w, b"in the pipe")
f = open("file", "w+"); f.write("0123456789"); f.flush(); f.seek(3)
a, b = socket.socketpair(); a.send(b"queued")
l = socket.socket(); l.bind(("127.0.0.1", 0)); l.listen(); keep(l, 700, False)
u = socket.socket(socket.AF_UNIX); u.bind(b"\\0ferry-%d" % os.getpid()); u.listen(); keep(u, 20)
e1 = libc.eventfd(3, 0)
tfd = libc.timerfd_create(1, 0)
libc.timerfd_settime(tfd, 0, struct.pack("=qqqq", 1, 0, 1000, 0), None)
ep = select.epoll(); os.dup2(ep.fileno(), 41); ep.close(); ep = select.epoll.fromfd(41)
outer = select.epoll(); outer.register(41, select.EPOLLIN)
def add(fd, events, data):
    assert libc.epoll_ctl(41, 1, fd, struct.pack("=IQ", events, data)) == 0
add(b.fileno(), select.EPOLLIN | select.EPOLLET, 0xfeedface00000001)
add(a.fileno(), select.EPOLLOUT | select.EPOLLONESHOT, 2)
assert dict(ep.poll(0))  # uses the one-shot up
add(r, select.EPOLLIN | select.EPOLLONESHOT, 3)
add(700, select.EPOLLIN | (1 << 28), 4)
add(tfd, select.EPOLLIN, 5)
os.dup2(w, 300); add(300, select.EPOLLOUT, 6); os.close(300)
os.dup2(r, 301); add(301, select.EPOLLPRI, 7); os.dup2(0, 301, False)
os.dup2(f.fileno(), 250); os.dup2(f.fileno(), 0); os.dup2(w, 1)
fcntl.fcntl(a.fileno(), fcntl.F_SETOWN, os.getpid())
for number in range(60): os.open("/dev/zero", os.O_RDONLY)
ready()
"""


@pytest.mark.parametrize("numbers_at_once", [1, 7, filerestore.NUMBERS_AT_ONCE])
def test_everything_at_once(
    tmp_path: Path, numbers_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filerestore, "NUMBERS_AT_ONCE", numbers_at_once)
    with live_child(tmp_path, EVERYTHING) as child:
        assert check_files(child.ctx) == []
        state = dump_files(child.ctx)
    with moved(state) as ctx:
        again = dump_files(ctx)
        assert comparable(again) == comparable(state)
        pidfd = ctx.pidfd
        epoll = select.epoll.fromfd(pidfd_getfd(pidfd, 41))
        # The epoll descriptor shows what is ready by the data of the interests, as the target would
        # see it.
        ready = dict(epoll.poll(0))
        epoll.close()
        # User data 0xfeedface00000001 is cut to 32 bits by select.epoll.
        assert set(ready) == {1, 3, 6} and ready[3] == select.EPOLLIN
        reader = pidfd_getfd(pidfd, body_and_end(state, "pipe", os.O_RDONLY))
        assert os.read(reader, 100) == b"in the pipe"
        os.close(reader)
        listener = socket.socket(fileno=pidfd_getfd(pidfd, 700))
        with socket.create_connection(listener.getsockname()):
            pass
        listener.close()


def body_and_end(state: FilesState, kind: str, mode: int) -> int:
    """Return a number whose description has this kind and access mode."""
    return next(
        entry.fd
        for entry in state.fds
        for file in state.files
        if file.id == entry.file_id and file.kind == kind and file.flags & os.O_ACCMODE == mode
    )


@pytest.mark.parametrize("numbers_at_once", [100, filerestore.NUMBERS_AT_ONCE])
def test_high_numbers_and_many_descriptors(
    tmp_path: Path, numbers_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filerestore, "NUMBERS_AT_ONCE", numbers_at_once)
    code = """
    import resource
    for number in range(400): os.open("/dev/null", os.O_RDWR)
    for number in range(100): os.pipe()
    os.dup2(0, 899); os.closerange(5, 30)
    ready()
    """
    with live_child(tmp_path, code) as child:
        state = dump_files(child.ctx)
    with moved(state) as ctx:
        assert comparable(dump_files(ctx)) == comparable(state)


def test_a_spent_one_shot_stays_spent(tmp_path: Path) -> None:
    code = """
    a, b = socket.socketpair()
    r, w = os.pipe()
    os.dup2(a.fileno(), 51); os.dup2(r, 52); os.dup2(w, 53)
    ep = select.epoll(); os.dup2(ep.fileno(), 50); ep.close(); ep = select.epoll.fromfd(50)
    os.write(53, b"x")
    ep.register(51, select.EPOLLOUT | select.EPOLLONESHOT)
    ep.register(52, select.EPOLLIN | select.EPOLLONESHOT)
    assert len(ep.poll(0)) == 2
    os.read(52, 1)
    ready()
    """
    with live_child(tmp_path, code) as child:
        state = dump_files(child.ctx)
    with moved(state) as ctx:
        epoll = select.epoll.fromfd(pidfd_getfd(ctx.pidfd, 50))
        pipe = pidfd_getfd(ctx.pidfd, 53)
        os.write(pipe, b"y")
        assert epoll.poll(0) == []
        os.close(pipe)
        epoll.close()
        items = {item.fd: item.events for item in body_of(dump_files(ctx), 50).items}
        assert items[51] == select.EPOLLONESHOT


def test_a_number_that_the_skeleton_needs_is_refused(tmp_path: Path) -> None:
    code = f"os.dup2(0, {AGENT_PIDFD}); ready()"
    with live_child(tmp_path, code) as child:
        state = dump_files(child.ctx)
    with pytest.raises(Exception, match="the skeleton needs this number"), moved(state):
        pass


def test_posix_locks_belong_to_the_process(tmp_path: Path) -> None:
    code = """
    p = open("posix", "w"); fcntl.lockf(p, fcntl.LOCK_EX, 10, 5); os.dup2(p.fileno(), 50)
    ready()
    """
    options = Options(file_locks=True)
    with live_child(tmp_path, code, options) as child:
        state = dump_files(child.ctx)
        with pytest.raises(InjectError, match="take an exclusive posix lock on fd"), moved(state, options):
            pass
    with moved(state, options) as ctx:
        assert file_of(dump_files(ctx), 50).locks == file_of(state, 50).locks

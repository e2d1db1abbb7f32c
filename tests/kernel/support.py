"""Situations for tests against the real kernel: a child that does what it is told, stopped children, tracked memory.

A Puppet is a forked interpreter; ``puppet.run(function, *args)`` runs any importable function in it and gives the
result or raises its exception here. Nothing here sleeps to synchronise: pipes, waitpid and conditions only.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final, NoReturn, TypeVar

import pytest

from agent.kernel import mman, pidfd, ptrace, uffd, wait
from agent.kernel.features import kernel_features
from agent.kernel.pagemap import PagemapScanner
from agent.kernel.prctl import PR_SET_PDEATHSIG, prctl
from agent.kernel.syscalls import NR_recvfrom
from agent.procfs.syscall import read_syscall
from tests.prerequisites import require_root

T = TypeVar("T")

PAGE: Final = 4096
RW: Final = mman.PROT_READ | mman.PROT_WRITE
ANON: Final = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS
SHARED_ANON: Final = mman.MAP_SHARED | mman.MAP_ANONYMOUS

NOBODY: Final = 65534


def skip_unless(feature: str) -> None:
    """Skip the test unless ``kernel_features()`` has ``feature``; with AGENT_TEST_FORCE=1 fail instead."""
    features = kernel_features()
    if getattr(features, feature):
        return
    skip_or_fail(f"{feature} is missing: {features.reasons.get(feature, 'see agent.kernel.features')}")


def skip_or_fail(reason: str) -> NoReturn:
    """Skip the test; with AGENT_TEST_FORCE=1 fail instead."""
    if os.environ.get("AGENT_TEST_FORCE") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def skip_unless_has_pagemap_scan() -> None:
    """Skip unless written pages can be tracked: Linux 6.7 with CONFIG_USERFAULTFD=y."""
    skip_unless("has_scan_tracking")


def skip_unless_root() -> None:
    """Skip the test for an ordinary user; with AGENT_TEST_FORCE=1 fail instead."""
    require_root()


def wait_for(condition: Callable[[], bool], what: str, *, timeout_s: float = 20.0) -> None:
    """Wait until ``condition`` holds; fail the test, naming ``what``, when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"timed out waiting for: {what}")
        time.sleep(0.001)


class Puppet:
    """A child interpreter that runs what it is told, one function at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _serve(theirs)
        theirs.close()
        self._socket = ours
        self._stream = ours.makefile("rwb")
        self._reaped = False

    def start(self, function: Callable[..., Any], *args: object) -> None:
        """Start ``function(*args)`` in the child and return at once; finish() takes the result."""
        pickle.dump((function, args), self._stream)
        self._stream.flush()

    def finish(self) -> Any:
        """Wait for what start() started: return its result or raise its exception."""
        succeeded, value = pickle.load(self._stream)
        if not succeeded:
            raise value
        return value

    def run(self, function: Callable[..., T], *args: object) -> T:
        """Run ``function(*args)`` in the child and return its result or raise its exception."""
        self.start(function, *args)
        result: T = self.finish()
        return result

    def wait_idle(self) -> None:
        """Wait until the child is blocked in recvfrom(2), waiting for orders."""
        wait_for(lambda: blocked_in(self.pid) == NR_recvfrom, "the puppet to wait for orders")

    def map(
        self, nr_pages: int, *, flags: int = ANON, prot: int = RW, at: int = 0, fd: int = -1
    ) -> int:
        """Map pages in the child and return their address."""
        return self.run(mman.mmap, at, nr_pages * PAGE, prot, flags, fd, 0)

    def poke(self, address: int, data: bytes = b"x") -> None:
        """Store bytes in the child's memory, by its own instructions."""
        self.run(poke, address, data)

    def peek(self, address: int, length: int = 1) -> bytes:
        """Load bytes of the child's memory, by its own instructions."""
        return self.run(peek, address, length)

    def close(self) -> None:
        """Kill and reap the child."""
        self._stream.close()
        self._socket.close()
        if not self._reaped:
            self._reaped = True
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, wait.WALL)


def _serve(connection: socket.socket) -> None:
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        stream = connection.makefile("rwb")
        while True:
            function, args = pickle.load(stream)
            try:
                reply = (True, function(*args))
            except Exception as err:  # whatever it is, the test shall see it
                reply = (False, err)
            pickle.dump(reply, stream)
            stream.flush()
    except EOFError:
        pass
    finally:
        os._exit(0)


def blocked_in(tid: int) -> int | None:
    """Return the number of the system call that a thread is blocked in, or None while it runs."""
    info = read_syscall(tid, tid)
    return None if info is None else info.nr


def poke(address: int, data: bytes) -> None:
    """Store bytes at an address of this process."""
    ctypes.memmove(address, data, len(data))


def peek(address: int, length: int) -> bytes:
    """Load bytes from an address of this process."""
    return ctypes.string_at(address, length)


def become_nobody() -> None:
    """Give up all privileges of this process, but stay traceable by root."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


@contextmanager
def puppet() -> Iterator[Puppet]:
    """A puppet that is killed at the end."""
    child = Puppet()
    try:
        child.run(os.getpid)  # past its own start-up
        yield child
    finally:
        child.close()


@contextmanager
def stopped_child(options: int = ptrace.PTRACE_O_TRACESYSGOOD) -> Iterator[Puppet]:
    """A puppet that is seized and stopped in recvfrom(2), where it awaits orders; killed at the end."""
    with puppet() as child:
        child.wait_idle()
        seize_and_stop(child.pid, options)
        yield child


def seize_and_stop(tid: int, options: int = ptrace.PTRACE_O_TRACESYSGOOD) -> None:
    """Seize a thread and wait for its stop."""
    ptrace.seize(tid, options)
    ptrace.interrupt(tid)
    status = wait_stop(tid)
    assert wait.ptrace_event(status) == ptrace.PTRACE_EVENT_STOP


def wait_stop(tid: int) -> int:
    """Wait for the next stop of a traced thread and return its status."""
    found = wait.waitpid4(tid)
    assert found is not None and wait.stop_signal(found[1]) is not None, found
    return found[1]


class TrackedPuppet:
    """A puppet with a userfaultfd for tracking: ``uffd`` is our copy, the child's own is closed."""

    def __init__(self, child: Puppet, uffd_fd: int, scanner: PagemapScanner) -> None:
        self.child = child
        self.uffd = uffd_fd
        self.scanner = scanner

    def register(self, start: int, nr_pages: int) -> None:
        """Register pages for write protection."""
        uffd.register(self.uffd, start, nr_pages * PAGE, uffd.UFFDIO_REGISTER_MODE_WP)

    def protect(self, start: int, nr_pages: int) -> None:
        """Write-protect all pages of a registered range, unpopulated ones too."""
        uffd.writeprotect(self.uffd, start, nr_pages * PAGE, True)

    def scan(self, start: int, nr_pages: int, **options: int) -> list[tuple[int, int, int]]:
        """Scan pages; the result in page numbers relative to ``start``: (first, end, categories)."""
        flat = self.scanner.scan(start, start + nr_pages * PAGE, **options)
        return [
            ((first - start) // PAGE, (end - start) // PAGE, categories)
            for first, end, categories in zip(flat[0::3], flat[1::3], flat[2::3])
        ]


def open_own_uffd(features: int) -> int:
    """Create a userfaultfd in this process that any user may have, with ``features``."""
    fd = uffd.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | uffd.UFFD_USER_MODE_ONLY)
    uffd.api(fd, features)
    return fd


@contextmanager
def tracked_puppet(features: int = uffd.UFFD_FEATURES_SCAN) -> Iterator[TrackedPuppet]:
    """A puppet whose userfaultfd was fetched and closed over there, as Ferry does it."""
    skip_unless_has_pagemap_scan()
    with ExitStack() as stack:
        child = stack.enter_context(puppet())
        theirs = child.run(open_own_uffd, features)
        fd = fetch_fd(child.pid, theirs)
        stack.callback(_close_quietly, fd)
        child.run(os.close, theirs)
        scanner = stack.enter_context(PagemapScanner(child.pid))
        yield TrackedPuppet(child, fd, scanner)


def fetch_fd(pid: int, fd: int) -> int:
    """Return our own copy of a child's descriptor."""
    handle = os.pidfd_open(pid)
    try:
        return pidfd.pidfd_getfd(handle, fd)
    finally:
        os.close(handle)


def _close_quietly(fd: int) -> None:
    with suppress(OSError):  # the test may have closed it
        os.close(fd)

"""The reader: a process of the agent's that takes what a synchronous userfaultfd reports and lets the target go on.

Until a message is read, and for a store until the protection is lifted, the thread that caused it waits: what matters
here is the time to answer. Hence a process of its own: beside a busy agent a thread answers 99 of 100 stores in 0.1 to
3 ms (it waits for the interpreter's lock), a process in 0.02 to 0.09; half of them in 9 us (figures of one run).
It sees nothing of the agent but two descriptors and the log, which is shared memory.

For each batch: record, then lift the protection of neighbouring pages together, which wakes their writers. A record
exists before the store can happen, so that what was taken is never too little.

Death. The agent and the reader hold one reference each to the userfaultfd. The agent's death closes the socket and
kills the reader; then the last reference goes, and the kernel lets every waiter run. If the reader dies a thread of the
agent notices and replaces the agent's reference by /dev/null, with the same end; the next take() raises.

When the log is full the reader takes no more messages (`stall`), or goes on in a bitmap until the next take()
(`spill`). A stall ends at the latest when somebody stops the target's threads: one that waits inside the kernel
could not be stopped, and the freeze would wait for a round that waits for the freeze.
Must never touch the target otherwise. Addresses are target addresses.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import select
import signal
import socket
import struct
import threading
import time
from ctypes import addressof, get_errno
from dataclasses import dataclass
from typing import NoReturn

from agent.errors import DumpError
from agent.kernel import uffd
from agent.kernel.ioctl import raw_ioctl
from agent.kernel.prctl import PR_SET_PDEATHSIG, prctl
from agent.procfs.process import list_tids
from agent.procfs.status import read_task_status
from agent.ranges import RangeSet
from agent.tracker.eventlog import EVENT_WORDS, EventLog, Overflow, Touched, page_ranges
from agent.types import PAGE_SIZE

BATCH = 512
"""Messages taken by one read(2)."""
STALL_LOOK_MS = 1
"""How often a stalled reader looks whether the target is being stopped."""
RETRY_MS = 1
"""How long to wait before lifting again what could not be lifted because mappings were changing."""
END_S = 2.0
"""How long the reader may take to end; then it is killed."""

_MESSAGE_BYTES = 32
_PAGE_MASK = ~(PAGE_SIZE - 1)
_HEADER = struct.Struct("<9Q")
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Taken:
    """What the target did since the last take(). `stored`: pages; the ranges of events as in Touched."""

    stored: RangeSet
    dropped: RangeSet
    replaced: RangeSet
    first: int = 0
    """Sequence number of the first record in the log."""
    nr_logged: int = 0
    nr_forks: int = 0
    nr_stalls: int = 0
    stall_s: float = 0.0
    spilled: bool = False


class Reader:
    """Owns the reader process for `uffd_fd`, which stays the caller's; close() it before the descriptor.

    Capacity 0 with `spill` keeps a bitmap and no log.
    """

    def __init__(self, pid: int, uffd_fd: int, *, capacity: int, when_full: str) -> None:
        self._events = EventLog(capacity)
        self._socket, theirs = socket.socketpair()
        agent_pid = os.getpid()
        self.reader_pid = os.fork()
        if not self.reader_pid:
            _become_reader(agent_pid, pid, uffd_fd, theirs, self._events, stall=when_full == "stall")
        theirs.close()
        self._pidfd = os.pidfd_open(self.reader_pid)
        self._stop, stop = os.pipe2(os.O_CLOEXEC)
        self._watchdog = threading.Thread(
            target=_watch, args=(self._pidfd, self._stop, uffd_fd), daemon=True
        )
        self._stop_write = stop
        self._watchdog.start()

    def take(self) -> Taken:
        """Return everything up to now, and begin anew.

        :raises DumpError: the reader died; the target is no longer tracked, and runs.
        """
        try:
            self._socket.sendall(b"t")
            header = _HEADER.unpack(self._receive(_HEADER.size))
            content = self._receive(header[-1])
        except OSError as err:
            raise DumpError("The reader of page faults is gone: memory is no longer tracked") from err
        half, first, nr_stores, nr_events, nr_forks, nr_stalls, stall_ns, spilled, _ = header
        stores, events = self._events.read(half, nr_stores, nr_events)
        overflow = Overflow.load(content) if spilled else Overflow()
        touched = Touched()
        # In the order of the log; see agent.tracker.log for why the order of the kernel is all that there is to it.
        for at in range(0, len(events), EVENT_WORDS):
            touched.add_event(*events[at + 1 : at + EVENT_WORDS])
        return Taken(
            stored=page_ranges(stores).union(overflow.bitmap.ranges()),
            dropped=touched.dropped.union(overflow.touched.dropped),
            replaced=touched.replaced.union(overflow.touched.replaced),
            first=first,
            nr_logged=nr_stores + nr_events,
            nr_forks=nr_forks,
            nr_stalls=nr_stalls,
            stall_s=stall_ns / 1e9,
            spilled=bool(spilled),
        )

    def _receive(self, nr_bytes: int) -> bytes:
        content = bytearray(nr_bytes)
        view = memoryview(content)
        while view:
            nr = self._socket.recv_into(view)
            if not nr:
                raise ConnectionResetError(errno.ECONNRESET, "the reader closed its end")
            view = view[nr:]
        return bytes(content)

    def close(self) -> None:
        """End the reader and the watch over it; the caller then closes the userfaultfd."""
        os.close(self._stop_write)
        self._watchdog.join()
        self._socket.close()
        ended = select.poll()
        ended.register(self._pidfd, select.POLLIN)
        if not ended.poll(END_S * 1000):
            os.kill(self.reader_pid, signal.SIGKILL)
        os.waitpid(self.reader_pid, 0)
        os.close(self._pidfd)
        os.close(self._stop)


def _watch(pidfd: int, stop: int, uffd_fd: int) -> None:
    # The number must not become free: the rounds may use it at this moment.
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.register(stop, select.POLLHUP)
    if all(fd != stop for fd, _ in poller.poll()):
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, uffd_fd, inheritable=False)
        os.close(null)
        _log.warning("The reader of page faults died; the process runs on, untracked")


def _become_reader(
    agent_pid: int, pid: int, uffd_fd: int, link: socket.socket, events: EventLog, *, stall: bool
) -> NoReturn:
    status = 1
    try:
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(sig, signal.SIG_IGN)  # meant for the agent, who ends this process
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == agent_pid:
            for name in os.listdir("/proc/self/fd"):
                if int(name) not in (uffd_fd, link.fileno()):
                    with contextlib.suppress(OSError):
                        os.close(int(name))
            gc.disable()
            _Server(pid, uffd_fd, link, events, stall=stall).run()
        status = 0
    finally:
        os._exit(status)


class _Server:
    """The reader's own side."""

    def __init__(
        self, pid: int, uffd_fd: int, link: socket.socket, events: EventLog, *, stall: bool
    ) -> None:
        self._pid = pid
        self._uffd = uffd_fd
        self._link = link
        self._log = events
        self._overflow = Overflow()
        self._stall = stall
        self._spilling = not events.capacity
        self._stalled_ns = 0  # since when, or 0
        self._stall_ns = 0
        self._nr_stalls = 0
        self._nr_forks = 0
        self._refused: list[int] = []  # pages that could not be lifted: mappings were changing
        buffer = bytearray(BATCH * _MESSAGE_BYTES)
        self._words = memoryview(buffer).cast("Q")
        self._bytes = memoryview(buffer)
        self._lift_arg = uffd.uffdio_writeprotect(uffd.uffdio_range(0, PAGE_SIZE), 0)
        self._range = self._lift_arg.range
        self._address = addressof(self._lift_arg)

    def run(self) -> None:
        """Serve until the agent closes its end."""
        both, link_only = select.poll(), select.poll()
        both.register(self._uffd, select.POLLIN)
        for poller in (both, link_only):
            poller.register(self._link, select.POLLIN)
        uffd_fd = self._uffd
        while True:
            room = BATCH if self._spilling else min(BATCH, self._log.room - len(self._refused))
            if room <= 0:
                if self._stall:
                    self._note_stall(both)
                if not self._stall or self._is_being_stopped():
                    self._spilling = True
                    continue
                ready = link_only.poll(STALL_LOOK_MS)
            else:
                ready = both.poll(RETRY_MS if self._refused else None)
            self._end_stall(room)
            if room > 0 and any(fd == uffd_fd for fd, _ in ready):
                self._read(room)
            if self._refused and room > 0:
                refused, self._refused = self._refused, []
                self._let_go(refused)
            if any(fd != uffd_fd for fd, _ in ready) and not self._answer():
                return

    def _read(self, room: int) -> None:
        try:
            nr = os.readv(self._uffd, [self._bytes[: room * _MESSAGE_BYTES]]) // _MESSAGE_BYTES
        except BlockingIOError:
            return  # the one who waited has given up
        words = self._words
        kinds = words[0 : 4 * nr : 4].tolist()
        if kinds.count(uffd.UFFD_EVENT_PAGEFAULT) == nr:
            pages = words[2 : 4 * nr : 4].tolist()
        else:
            pages = []
            for at, kind in zip(range(0, 4 * nr, 4), kinds):
                if kind == uffd.UFFD_EVENT_PAGEFAULT:
                    pages.append(words[at + 2])
                else:
                    self._add_event(kind, *words[at + 1 : at + 4])
        if pages:
            self._let_go([page & _PAGE_MASK for page in pages])

    def _add_event(self, kind: int, first: int, second: int, third: int) -> None:
        if kind == uffd.UFFD_EVENT_FORK:
            # The message brought a userfaultfd of the child's. Closed, the child is as without one.
            self._nr_forks += 1
            os.close(first)
        if self._spilling:
            self._overflow.add_event(kind, first, second, third)
        else:
            self._log.add_event(kind, first, second, third)

    def _let_go(self, pages: list[int]) -> None:
        # Record first. What could not be lifted is recorded again when it is: the consumer may have been there between.
        if len(pages) > 1:
            pages = sorted(set(pages))
        if self._spilling or len(pages) > self._log.room:
            self._overflow.add_stores(pages)
        else:
            self._log.add_stores(pages)
        begin = 0
        for end in range(1, len(pages) + 1):
            if end == len(pages) or pages[end] != pages[end - 1] + PAGE_SIZE:
                if not self._lift(pages[begin], (end - begin) * PAGE_SIZE):
                    self._lift_each(pages[begin:end])
                begin = end

    def _lift(self, start: int, nr_bytes: int) -> bool:
        # Lifts and wakes.
        self._range.start, self._range.len = start, nr_bytes
        return raw_ioctl(self._uffd, uffd.UFFDIO_WRITEPROTECT, self._address) == 0

    def _lift_each(self, pages: list[int]) -> None:
        for page in pages:
            if self._lift(page, PAGE_SIZE):
                continue
            if get_errno() == errno.EAGAIN:
                self._refused.append(page)
            else:
                # Unmapped meanwhile: whoever waits there shall see for himself.
                raw_ioctl(self._uffd, uffd.UFFDIO_WAKE, addressof(self._range))

    # Being full

    def _is_being_stopped(self) -> bool:
        try:
            tids = list_tids(self._pid)
            # The first one may be a leader that has exited.
            return any(read_task_status(self._pid, tid).tracer_pid for tid in {tids[0], tids[-1]})
        except (OSError, IndexError):
            return True

    def _note_stall(self, both: select.poll) -> None:
        if not self._stalled_ns and any(fd == self._uffd for fd, _ in both.poll(0)):
            self._stalled_ns = time.monotonic_ns()
            self._nr_stalls += 1

    def _end_stall(self, room: int) -> None:
        if self._stalled_ns and room > 0:
            self._stall_ns += time.monotonic_ns() - self._stalled_ns
            self._stalled_ns = 0

    # The agent

    def _answer(self) -> bool:
        if not self._link.recv(1):
            return False
        overflow, self._overflow = self._overflow, Overflow()
        content = overflow.dump() if overflow.used else b""
        self._spilling = not self._log.capacity
        flipped = self._log.flip()
        self._end_stall(1)
        counts = self._nr_forks, self._nr_stalls, self._stall_ns, overflow.used, len(content)
        self._nr_forks = self._nr_stalls = self._stall_ns = 0
        self._link.sendall(_HEADER.pack(*flipped, *counts) + content)
        return True

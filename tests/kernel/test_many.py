"""One system call for many things: those that fail cost nobody else the result."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

from agent.kernel.many import try_each
from agent.kernel.pidfd import pidfd_getfds
from agent.state.fdtable import make_room


@contextmanager
def pipes(count: int) -> Iterator[list[int]]:
    """The read ends of some pipes, each with its place in the list in it."""
    ends = [os.pipe() for _ in range(count)]
    for number, (_reader, writer) in enumerate(ends):
        os.write(writer, b"%d" % number)
    try:
        yield [reader for reader, _writer in ends]
    finally:
        for end in ends:
            for fd in end:
                os.close(fd)


def test_each_row_has_its_result_or_none() -> None:
    with pipes(40) as fds:
        missing = {0, 7, 8, 39}
        asked = [1 << 30 if number in missing else fd for number, fd in enumerate(fds)]
        read = try_each(os.read, asked, repeat(100))
        assert read == [None if n in missing else b"%d" % n for n in range(40)]


def test_there_may_be_nothing_to_ask_or_nothing_to_get() -> None:
    assert try_each(os.read, [], repeat(100)) == []
    assert try_each(os.read, repeat(1 << 30, 3), repeat(100)) == [None] * 3


def test_descriptors_that_cannot_be_had_are_told_apart() -> None:
    pidfd = os.pidfd_open(os.getpid())
    with pipes(2) as (first, second):
        got = pidfd_getfds(pidfd, [first, 1 << 30, second])
        assert got[1] == -1
        assert [os.read(fd, 9) for fd in (got[0], got[2])] == [b"0", b"1"]
        for fd in (got[0], got[2]):
            assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            os.close(fd)
    os.close(pidfd)


def test_room_is_made_before_it_is_needed() -> None:
    # A child's: the table never gets smaller again.
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        os._exit(not (make_room(3000) and table_size() >= 3000 and not os.path.exists("/proc/self/fd/3255")))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def table_size() -> int:
    """How many files fit into this process's table without it being enlarged."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("FDSize:"))

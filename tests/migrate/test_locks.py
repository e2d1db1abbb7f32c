"""File locks: carried where the copy can have them while the original still does, refused where it cannot.

The hosts of the tests share their file systems and one kernel, so each sees the other's locks, as hosts that share a
network file system do; a tmpfs makes a directory the destination's own.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

from tests.hosts import Host
from tests.migrate.crossing import REFUSED, Receiver, Workload, agent_send, migrate
from tests.migrate.test_refusals import start_with

KINDS = ("flock", "posix", "ofd")
# F_OFD_SETLK of bytes 3 to 6.
CODE = """
directory, exclusive = {directory!r}, {exclusive!r}
f, p, o = (open(os.path.join(directory, name), 'w+') for name in {kinds!r})
fcntl.flock(f, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
fcntl.lockf(p, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, 10, 5)
import struct
fcntl.fcntl(o, 37, struct.pack('=hh4xqqi4x', int(exclusive), 0, 3, 4, 0))
"""


def start_locker(source: Host, tmp_path: Path, *, exclusive: bool) -> tuple[Workload, Path]:
    directory = tmp_path / "locked"
    directory.mkdir()
    code = CODE.format(directory=str(directory), exclusive=exclusive, kinds=KINDS)
    return start_with(source, tmp_path, code), directory


WHOLE = struct.pack("=hh4xqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
# How to ask for a whole file, exclusively, without waiting.
ATTEMPTS: dict[str, Callable[[int], object]] = {
    "flock": lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
    "posix": lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
    "ofd": lambda fd: fcntl.fcntl(fd, 37, WHOLE),
}


def locked(directory: Path) -> set[str]:
    """Which of the files somebody else has locked."""
    found = set()
    for name, attempt in ATTEMPTS.items():
        fd = os.open(directory / name, os.O_RDWR)
        try:
            attempt(fd)
        except BlockingIOError:
            found.add(name)
        finally:
            os.close(fd)
    return found


def test_shared_locks_cross_on_a_file_system_of_both_hosts(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    workload, directory = start_locker(source, tmp_path, exclusive=False)
    assert locked(directory) == set(KINDS)
    migrate(workload, destination, tmp_path, send=["--file-locks"])
    workload.assert_healthy(destination, count=3)
    assert locked(directory) == set(KINDS)


def test_exclusive_locks_cross_to_a_file_system_of_the_destination(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    workload, directory = start_locker(source, tmp_path, exclusive=True)
    destination.run(["mount", "-t", "tmpfs", "none", directory])
    destination.run(["touch", *(directory / name for name in KINDS)])
    there = Path(f"/proc/{destination.init_pid}/root{directory}")
    assert locked(there) == set()
    migrate(workload, destination, tmp_path, send=["--file-locks"])
    workload.assert_healthy(destination, count=3)
    assert locked(there) == set(KINDS)
    assert locked(directory) == set(), "the original is gone, and its locks with it"


def test_exclusive_locks_on_a_file_system_of_both_hosts_are_refused_by_name(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    workload, directory = start_locker(source, tmp_path, exclusive=True)
    receiver = Receiver(destination, tmp_path)
    sent = agent_send(source, tmp_path, "--file-locks", workload.pid, receiver.address, check=REFUSED)
    obstacles = sent.outcome["obstacles"]
    assert {obstacle["kind"] for obstacle in obstacles} == {"file lock"}
    for name, obstacle in zip(KINDS, obstacles, strict=True):
        assert f"an exclusive {name} lock of {directory / name}" in obstacle["detail"]
    workload.assert_healthy(source, count=3)
    assert locked(directory) == set(KINDS)

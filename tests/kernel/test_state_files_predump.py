"""Files dumped while the process runs, and what became of them: the result is always that of a dump in the freeze."""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import select
import signal
import socket
import textwrap
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from agent.errors import TransferError
from agent.kernel.pidfd import pidfd_getfd
from agent.state.context import DumpContext, RestoreContext
from agent.state.filerestore import FileRestorer
from agent.state.files import dump_files
from agent.state.predump import PreDump
from protocol.state.files import FdEntry, FilesChange, FilesState
from tests.kernel.files_support import Options, live_child
from tests.kernel.predump_support import (
    LATER,
    changing_child,
    let_change,
    outcome,
    picture,
    rebuilt,
    refused_later,
    skeleton_context,
    told,
    whole_of,
)
from tests.kernel.test_state_files_install import AGENT_PIDFD, skeleton

STAND = """
file("a", 10); file("b", 11); os.lseek(11, 7, 0); os.dup2(11, 12); file("a", 13)
pipe(20, 21); pipe(22, 23)
event(30, 5); event(31)
os.dup2(0, 40, False); place(os.open("/dev/zero", os.O_RDONLY), 41)
place(os.open(".", os.O_RDONLY | os.O_DIRECTORY), 42); place(os.open("a", os.O_PATH), 43)
epoll(50, (30, 1), (20, 1)); epoll(51, (50, 1))
place(LIBC.timerfd_create(1, 0), 60)
place(LIBC.signalfd(-1, struct.pack("=Q", 1 << 11), 0), 61)
"""
STANDING = {0, 1, 2, 10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 40, 41, 42, 43, 50, 51, 60, 61}

CHANGES: dict[str, tuple[str, set[int]]] = {
    "nothing": ("pass", set()),
    "closed": ("for fd in (10, 11, 20, 21, 31, 50, 51): os.close(fd)", set()),
    # Epolls fall with what they watch; 22 and 23 stay what they are.
    "last writer closed": ("os.close(21)", {20, 50, 51}),
    "last reader closed": ("os.close(22)", {23}),
    "opened": ("file('c', 70); event(71, 1); pipe(72, 73); os.dup2(10, 74)", {70, 71, 72, 73}),
    "closed and opened the same": ("os.close(13); file('a', 13, os.O_RDWR, 0)", set()),
    "closed and opened another": ("os.close(13); file('b', 13, os.O_RDWR, 0)", {13}),
    "numbers swapped": ("swap(10, 11); swap(0, 41); swap(22, 23)", {0, 11, 22, 23}),
    "numbers swapped in an epoll": ("swap(30, 31)", {30, 31, 50, 51}),
    "moved to other numbers": ("os.dup2(10, 80); os.close(10); os.dup2(20, 81); os.close(20)", {21, 50, 51, 80, 81}),
    "made one": ("os.dup2(10, 13)", set()),
    "made two": ("file('b', 12, os.O_RDWR, 0); os.lseek(12, 7, 0)", {12}),
    "close on exec": ("for fd in (10, 12, 20, 30, 50): os.set_inheritable(fd, False)", set()),
    "kept through exec": ("for fd in (40,): os.set_inheritable(fd, True)", set()),
    "position": ("os.lseek(10, 3, 0)", {10}),
    "shared position": ("os.lseek(12, 3, 0)", {11, 12}),
    "appending": ("fcntl.fcntl(10, fcntl.F_SETFL, os.O_APPEND)", {10}),
    "non-blocking": ("os.set_blocking(20, False); os.set_blocking(30, False)", {20, 21, 30, 50, 51}),
    "renamed": ("os.rename('b', 'c')", {11, 12}),
    "written": ("os.pwrite(11, b'x', 200)", {11, 12}),
    "truncated": ("os.truncate('b', 9)", {11, 12}),
    "mode": ("os.chmod('a', 0o640)", {10, 13, 43}),
    "pipe filled": ("os.write(21, b'x')", {20, 21, 50, 51}),
    "pipe filled and emptied": ("os.write(21, b'x'); os.read(20, 1)", set()),
    "pipe size": ("fcntl.fcntl(23, 1031, 1 << 17)", {22, 23}),
    "pipe owner": ("fcntl.fcntl(22, 10, 12)", {22, 23}),
    "pipe owner given up": (
        "fcntl.fcntl(23, fcntl.F_SETOWN, os.getpid()); fcntl.fcntl(23, fcntl.F_SETOWN, 0)", set()
    ),
    "one more reader": ("place(os.open('/proc/self/fd/22', os.O_RDONLY), 75)", {22, 23, 75}),
    "signals asked for": ("fcntl.fcntl(22, fcntl.F_SETFL, os.O_ASYNC)", {22, 23}),
    "one reader more and less": ("os.close(os.open('/proc/self/fd/22', os.O_RDONLY))", set()),
    # The directory has been the only one that looks so.
    "another one like it": ("place(os.open('.', os.O_RDONLY | os.O_DIRECTORY), 70); os.dup2(31, 71)", {70}),
    "the same once more": ("os.dup2(42, 70); os.dup2(30, 71)", set()),
    "taken over by another one like it": (
        "file('b', 70, os.O_RDWR, 0); os.lseek(70, 7, 0); os.dup2(70, 11)", {12}
    ),
    "taken over by another one that has no other number": (
        "file('b', 70, os.O_RDWR, 0); os.lseek(70, 7, 0); os.dup2(70, 11); os.close(70)", {12}
    ),
    "another pipe": ("os.close(22); os.close(23); pipe(22, 23)", {22, 23}),
    "event counted": ("os.eventfd_write(31, 1)", {31}),
    "watched event counted": ("os.eventfd_write(30, 1)", {30, 50, 51}),
    "interest added": ("watch(50, ADD, 31, 1)", {50, 51}),
    "interest changed": ("watch(50, MOD, 30, 5)", {50, 51}),
    "interest given up": ("watch(50, DEL, 30)", {50, 51}),
    "interest given up and had again": (
        "watch(50, DEL, 20); watch(50, ADD, 20, 1)", set()
    ),
    "timer armed": ("LIBC.timerfd_settime(60, 0, struct.pack('=qqqq', 0, 0, 1000, 0), None)", {60}),
    "signals masked": ("LIBC.signalfd(61, struct.pack('=Q', 3), 0)", {61}),
    "another device": ("os.dup2(41, 40, False)", set()),
    "socket": ("a, b = socket.socketpair(); place(a.detach(), 76); place(b.detach(), 77)", {76, 77}),
    "locks": ("fcntl.flock(10, 1); fcntl.lockf(31, 1) if 0 else None", {10}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_and_nothing_else_is_dumped_again(tmp_path: Path, name: str) -> None:
    later, dumped = CHANGES[name]
    options = Options(file_locks=True)
    state = told(tmp_path, STAND, later, options)
    assert state.prepared == STANDING
    assert state.dumped == dumped
    with rebuilt(state, options):
        pass


def test_an_epoll_whose_number_means_an_equal_file_now_is_made_again(tmp_path: Path) -> None:
    # Two descriptions of one pipe that look alike: only the epoll can tell which of them it watches.
    before = """
    pipe(20, 21)
    for number in (22, 20): place(os.open("/proc/self/fd/20", os.O_RDONLY), number)
    epoll(50, (20, 1))
    """
    state = told(tmp_path, before, "swap(20, 22)")
    assert state.dumped == {50}
    with rebuilt(state) as copy:
        kept = [pidfd_getfd(copy.pidfd, number) for number in (21, 50)]
        os.write(kept[0], b"x")
        epoll = select.epoll.fromfd(kept[1])
        assert [fd for fd, _events in epoll.poll(0)] == [20]
        for fd in kept:
            os.close(fd)


def test_a_reader_sees_the_end_of_what_was_made_ahead(tmp_path: Path) -> None:
    state = told(tmp_path, "pipe(20, 21)", "os.close(21)")
    with rebuilt(state) as copy:
        fd = pidfd_getfd(copy.pidfd, 20)
        os.set_blocking(fd, False)
        assert os.read(fd, 1) == b""
        os.close(fd)


def test_a_file_made_ahead_can_be_on_its_way_in_a_queue(tmp_path: Path) -> None:
    later = """
    a, b = socket.socketpair()
    socket.send_fds(a, [b"!"], [21])
    place(a.detach(), 24); place(b.detach(), 25)
    """
    state = told(tmp_path, "pipe(20, 21)", later)
    assert state.dumped == {24, 25}
    with rebuilt(state) as copy:
        receiver = socket.socket(fileno=pidfd_getfd(copy.pidfd, 25))
        _data, (writer,), _flags, _address = socket.recv_fds(receiver, 1, 1)
        reader = pidfd_getfd(copy.pidfd, 20)
        os.write(writer, b"through")
        assert os.read(reader, 100) == b"through"
        os.close(reader)
        os.close(writer)
        receiver.close()


UNPREPARED = {
    "queued bytes": "pipe(20, 21); os.write(21, b'x')",
    "lone end": "pipe(20, 21); os.close(21)",
    "owner": "pipe(20, 21); fcntl.fcntl(20, fcntl.F_SETOWN, os.getpid())",
    "lock": "file('a', 20); fcntl.flock(20, 1)",
    "fifo": "os.mkfifo('f'); place(os.open('f', os.O_RDWR), 20)",
    "socket": "a, b = socket.socketpair(); place(a.detach(), 20); place(b.detach(), 21)",
    "timer": "place(LIBC.timerfd_create(1, 0), 20);"
    "LIBC.timerfd_settime(20, 0, struct.pack('=qqqq', 0, 0, 1000, 0), None)",
    "procfs": "place(os.open('/proc/sys/kernel/pid_max', os.O_RDONLY), 20)",
    "own procfs": "place(os.open('/proc/self/stat', os.O_RDONLY), 20)",
    "symbolic link": "os.symlink('x', 'l'); place(os.open('l', os.O_PATH | os.O_NOFOLLOW), 20)",
    "epoll of a socket": "s = socket.socketpair(); epoll(20, (s[0].fileno(), 1))",
    "datagrams": "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('127.0.0.1', 0));"
    "place(s.detach(), 20)",
    "owner of a socket": "tcp(20, 0, 7); fcntl.fcntl(20, fcntl.F_SETOWN, os.getpid())",
    "external": "file('a', 20)",
}


@pytest.mark.parametrize("name", UNPREPARED)
def test_what_others_might_notice_is_not_made_ahead(tmp_path: Path, name: str) -> None:
    options = Options(
        file_locks=True, external_fds=frozenset({20} if name == "external" else ())
    )
    state = told(tmp_path, UNPREPARED[name], "pass", options)
    assert state.prepared == {0, 1, 2}
    assert 20 in state.dumped


def test_obstacles_that_have_come_up_are_named(tmp_path: Path) -> None:
    later = "os.unlink('a'); place(os.open('/dev/ptmx', os.O_RDWR), 30)"
    assert refused_later(tmp_path, "file('a', 10); file('b', 11)", later) == {"fd 10", "fd 30"}


def test_an_end_that_another_process_has_now_is_named(tmp_path: Path) -> None:
    later = """
    if os.fork():
        os.close(21)
    else:
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os.close(20)
        while True: signal.pause()
    """
    assert refused_later(tmp_path, "pipe(20, 21)", later) == {"fd 20"}


def test_a_device_under_another_name_is_dumped_again(tmp_path: Path) -> None:
    before = """
    os.mknod("null", 0o20666, os.makedev(1, 3))
    place(os.open("null", os.O_RDWR), 20)
    """
    state = told(tmp_path, before, "os.rename('null', 'other')")
    assert 20 in state.prepared
    assert state.dumped == {20}


def test_obstacles_that_are_gone_by_the_freeze_do_not_matter(tmp_path: Path) -> None:
    before = "file('a', 10); os.unlink('a'); file('b', 11)"
    state = told(tmp_path, before, "os.close(10)")
    assert state.prepared == {0, 1, 2, 11}


def test_what_cannot_be_made_ahead_is_made_in_the_end(tmp_path: Path) -> None:
    before = """
    for number in range(20): file(f"f{number}", 20 + number)
    pipe(50, 51); epoll(52, (50, 1))
    """
    state = told(tmp_path, before, "os.lseek(25, 1, 0)")
    for name in ("f3", "f5", "f7"):
        (tmp_path / name).rename(tmp_path / (name + ".away"))
    with skeleton() as (pid, injector):
        ctx = skeleton_context(pid, injector)
        with closing(FileRestorer(ctx)) as restorer:
            restorer.prepare(state.ahead)
            made = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
            assert made == {entry.fd for entry in state.ahead.fds} - {23, 25, 27} | {AGENT_PIDFD}
            for name in ("f3", "f5", "f7"):
                (tmp_path / (name + ".away")).rename(tmp_path / name)
            restorer.open_all(state.change)
            restorer.install()
            restorer.start()
        pidfd = os.pidfd_open(pid)
        found = picture(dump_files(DumpContext(pid, pidfd, Options(external_fds=frozenset({AGENT_PIDFD})))))
        os.close(pidfd)
    assert {fds: what for fds, what in found.items() if fds != (AGENT_PIDFD,)} == picture(state.whole)


def test_a_whole_table_replaces_what_was_made_ahead(tmp_path: Path) -> None:
    state = told(tmp_path, STAND, "pass")
    with skeleton() as (pid, injector):
        ctx = skeleton_context(pid, injector)
        with closing(FileRestorer(ctx)) as restorer:
            restorer.prepare(state.ahead)
            few = {0: 0, 11: 11, 12: 11}
            lowest = {entry.file_id: entry.fd for entry in reversed(state.whole.fds)}
            entries = tuple(e for e in state.whole.fds if lowest[e.file_id] == few.get(e.fd))
            named = {entry.file_id for entry in entries}
            files = tuple(file for file in state.whole.files if file.id in named)
            restorer.open_all(FilesState(fds=entries, files=files))
            restorer.install()
            restorer.start()
        assert {int(name) for name in os.listdir(f"/proc/{pid}/fd")} == {0, 11, 12, AGENT_PIDFD}


def test_a_change_of_what_was_never_sent_is_the_sources_mistake() -> None:
    ctx = RestoreContext(
        pid=0, injector=None, options=Options(), agent_pidfd=-1  # type: ignore[arg-type]
    )
    with closing(FileRestorer(ctx)) as restorer, pytest.raises(TransferError, match="never sent"):
        restorer.open_all(FilesChange())


# -- at random -------------------------------------------------------------------------------------------------------

STORM = """
import random
chance = random.Random({seed})
numbers = range(5, 45)
def one():
    fd, other = chance.choice(numbers), chance.choice(numbers)
    what = chance.randrange(16)
    try:
        if what == 0: os.close(fd)
        elif what == 1: os.dup2(fd, other, chance.random() < 0.5)
        elif what == 2: place(os.open(f"f{{chance.randrange(3)}}", os.O_RDWR | os.O_CREAT), fd)
        elif what == 3: os.lseek(fd, chance.randrange(3), 0)
        elif what == 4: pipe(fd, other) if fd != other else None
        elif what == 5: os.write(fd, b"xy")
        elif what == 6: os.set_blocking(fd, False); os.read(fd, 5)
        elif what == 7: event(fd, chance.randrange(2))
        elif what == 8: epoll(fd)
        elif what == 9: watch(fd, ADD, other, chance.choice([1, 5, 1 | 1 << 30]))
        elif what == 10: watch(fd, DEL, other)
        elif what == 11: os.set_inheritable(fd, chance.random() < 0.5)
        elif what == 12: os.set_blocking(fd, chance.random() < 0.5)
        elif what == 13: fcntl.fcntl(fd, fcntl.F_SETFL, chance.choice([0, os.O_APPEND]))
        elif what == 14: swap(fd, other)
        elif what == 15: os.rename("f0", "f"); os.rename("f", "f0")
    except OSError:
        pass
for number in range(200): one()
"""


@pytest.mark.parametrize("seed", range(4))
def test_random_changes_are_told_as_they_are(tmp_path: Path, seed: int) -> None:
    later = "for number in range(chance.randrange(6)): one()"
    kept = 0
    with changing_child(tmp_path, STORM.format(seed=seed), later) as child:
        for _turn in range(60):
            with closing(PreDump(child.ctx)) as ahead:
                let_change(child, tmp_path)
                expected = outcome(lambda: dump_files(child.ctx))
                found = outcome(lambda: whole_of(ahead.state, ahead.dump_change()))  # noqa: B023
                assert found == expected
                kept += len(ahead.state.files)
    assert kept > 60


def test_a_look_in_the_middle_of_a_storm_is_put_right_in_the_end(tmp_path: Path) -> None:
    code = STORM.format(seed=random.randrange(100)) + "while True: one()"
    kept = agreed = 0
    with ExitStack() as stack:
        child = stack.enter_context(live_child(tmp_path, LATER.replace("{later}", "pass") + textwrap.dedent(
            "os.rename(sys.argv[1] + '.tmp', sys.argv[1])"
        ) + code))  # fmt: skip
        for turn in range(150):
            with closing(PreDump(child.ctx)) as ahead:
                time.sleep(turn % 3 * 0.0005)
                os.kill(child.pid, signal.SIGSTOP)
                while " T " not in Path(f"/proc/{child.pid}/stat").read_text():
                    time.sleep(0.0002)
                expected = outcome(lambda: dump_files(child.ctx))
                found = outcome(lambda: whole_of(ahead.state, ahead.dump_change()))  # noqa: B023
                assert found == expected
                agreed += isinstance(found, dict)
                kept += len(ahead.state.files)
            os.kill(child.pid, signal.SIGCONT)
    assert kept > 150 and agreed > 10


def test_obstacles_of_a_table_in_motion_are_not_named(tmp_path: Path) -> None:
    code = LATER.replace("{later}", "pass") + """
file("a", 10)
file("gone", 11); os.unlink("gone")
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
while True:
    for number in range(20, 60): event(number)
    for number in range(20, 60): pipe(number, number + 100)
    os.closerange(20, 160)
"""
    with live_child(tmp_path, code) as child:
        for _turn in range(20):
            assert {obstacle.what for obstacle in child.check()} == {"fd 11"}


MANY = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (4000, 4000))
for number in range(1000, 1250): file("a", number)
for number in range(1250, 1750, 2): pipe(number, number + 1)
for number in range(1750, 2000): event(number)
"""


@pytest.mark.parametrize("name, later, dumped", [
    ("nothing", "pass", set()),
    ("count", "os.eventfd_write(1900, 1)", {1900}),
    ("closed", "os.close(1901)", set()),
    ("opened", "event(2000)", {2000}),
    ("closed and opened", "os.close(1000); event(2000)", {2000}),
])  # fmt: skip
def test_many_unchanged_files_cost_one_look_each(
    tmp_path: Path, name: str, later: str, dumped: set[int]
) -> None:
    state = told(tmp_path, MANY, later)
    assert state.dumped == dumped
    calls = state.calls
    assert calls["pread"] <= 1010 and calls["readlink"] <= 260 and calls["stat"] <= 260, calls
    assert calls["open"] <= 10 and calls["listdir"] <= 2, calls


@pytest.mark.parametrize("end", [1250, 1506, 1749])
def test_one_of_many_pipes_is_told_from_the_others(tmp_path: Path, end: int) -> None:
    later = f"fcntl.fcntl({end}, fcntl.F_SETOWN, os.getpid())"
    assert told(tmp_path, MANY, later).dumped == {end & ~1, end | 1}


def test_a_text_longer_than_one_look_is_compared_to_its_end(tmp_path: Path) -> None:
    before = """
    for number in range(100, 400): event(number)
    for number in (20, 21, 22): epoll(number, *((fd, 1) for fd in range(100, 400)))
    epoll(23, *((fd, 1) for fd in range(100, 105)))
    """
    assert told(tmp_path, before, "watch(20, MOD, 399, 5); watch(23, MOD, 104, 5)").dumped == {20, 23}


def test_a_table_may_have_become_much_larger(tmp_path: Path) -> None:
    later = "import resource; resource.setrlimit(7, (4000, 4000)); [event(n) for n in range(1000, 2000)]"
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, limits[1]))
    try:
        state = told(tmp_path, "event(20)", later)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert state.dumped == set(range(1000, 2000))


def test_numbers_may_be_given_to_each_other(tmp_path: Path) -> None:
    # PreDump never says so, but the wire can.
    state = told(tmp_path, "file('a', 10); file('b', 11); os.dup2(11, 12); event(13)", "pass")
    ids = {entry.fd: entry.file_id for entry in state.ahead.fds}
    moved = {10: ids[11], 11: ids[10], 12: ids[13], 13: ids[11], 14: ids[10]}
    entries = tuple(FdEntry(fd=fd, file_id=number, cloexec=fd == 11) for fd, number in moved.items())
    change = FilesChange(closed=(0,), fds=entries)
    with rebuilt(dataclasses.replace(state, change=change, whole=whole_of(state.ahead, change))):
        pass


def test_entries_of_a_change_must_make_sense() -> None:
    entry = FdEntry(fd=3, file_id=1)
    with pytest.raises(ValueError, match="order"):
        FilesChange(fds=(entry, entry))
    with pytest.raises(ValueError, match="order"):
        FilesChange(closed=(4, 3))

"""The log and bitmap trackers: capacity, order, what happens when the log is full, and who may die."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent.errors import DumpError, SetupError
from agent.kernel import mman
from agent.kernel.syscalls import NR_poll, NR_read
from agent.procfs.process import list_fds, read_fd_link
from agent.procfs.smaps import read_vm_flags
from agent.procfs.syscall import read_syscall
from agent.target.memory import TargetMemory
from agent.target.tracer import Tracer
from agent.tracker import create
from agent.tracker.base import DirtySet, TrackerStats
from agent.tracker.create import create_tracker
from agent.tracker.log import BitmapTracker, LogTracker
from tests.hosts import REPOSITORY
from tests.kernel.support import blocked_in, skip_unless, skip_unless_root, wait_for
from tests.tracker.orders import NR_PAGES, PAGE
from tests.tracker.replica import Replica

ANON = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS
RW = mman.PROT_READ | mman.PROT_WRITE
MOVE = mman.MREMAP_MAYMOVE | mman.MREMAP_FIXED
NOBODY = 65534


class Target:
    """A process that takes orders."""

    def __init__(self) -> None:
        skip_unless("has_uffd_wp_shmem")
        skip_unless_root()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.tracker.orders"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        self.run("getpid")

    def start(self, name: str, *arguments: object) -> None:
        """Give an order; finish() takes the answer."""
        print(json.dumps([name, *arguments]), file=self.process.stdin, flush=True)

    def finish(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def run(self, name: str, *arguments: object) -> Any:
        self.start(name, *arguments)
        return self.finish()

    def wait_idle(self) -> None:
        wait_for(lambda: blocked_in(self.pid) == NR_read, "the target to wait for orders")

    def map(self, nr_pages: int, *, at: int = 0, prot: int = RW, flags: int = ANON, fd: int = -1) -> int:
        address: int = self.run("mmap", at, nr_pages * PAGE, prot, flags, fd, 0)
        return address

    def fill(self, nr_pages: int) -> int:
        """Map pages and give them content."""
        base = self.map(nr_pages)
        self.run("madvise", base, nr_pages * PAGE, mman.MADV_NOHUGEPAGE)
        self.run("poke", base, "x" * nr_pages * PAGE)
        return base

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@dataclass
class Tracked:
    """A target under a tracker, and what a destination would hold."""

    child: Target
    tracker: LogTracker
    replica: Replica
    base: int
    """NR_PAGES with content, all of them clean."""
    stats: list[TrackerStats] = field(default_factory=list)

    def round(self, *, final: bool = False) -> DirtySet:
        dirty = self.replica.round(final=final)
        self.stats.append(dirty.stats)
        return dirty

    def check(self) -> TrackerStats:
        """Stop the target: the replica equals it."""
        with Tracer(self.child.pid) as tracer:
            tracer.stop_all()
            dirty = self.round(final=True)
            assert self.replica.differences(dirty) == []
        return dirty.stats

    def dirty_pages(self, dirty: DirtySet) -> list[int]:
        """Page numbers from `base` that are to be sent."""
        inside = dirty.pages.clip(self.base, self.base + NR_PAGES * PAGE)
        return [(page - self.base) // PAGE for r in inside for page in range(r.start, r.end, PAGE)]

    def total(self, name: str) -> Any:
        return sum(getattr(stats, name) for stats in self.stats)


@contextmanager
def tracked(name: str = "log", **options: Any) -> Iterator[Tracked]:
    with closing(Target()) as child:
        base = child.fill(NR_PAGES)
        child.wait_idle()
        pidfd = os.pidfd_open(child.pid)
        try:
            tracker = create_tracker(name, child.pid, pidfd, **options)
        finally:
            os.close(pidfd)
        assert isinstance(tracker, LogTracker)
        try:
            tracker.arm()
            replica = Replica(child.pid, tracker)
            found = Tracked(child, tracker, replica, base)
            found.round()
            yield found
        finally:
            tracker.disarm()


@pytest.mark.parametrize("name", ["log", "bitmap"])
def test_only_what_was_stored_to_is_sent_again(name: str) -> None:
    with tracked(name) as target:
        target.child.run("poke", target.base + 5 * PAGE, "y")
        target.child.run("poke", target.base + 9 * PAGE, "y" * 2 * PAGE)
        assert target.dirty_pages(target.round()) == [5, 9, 10]
        assert target.dirty_pages(target.round()) == []
        assert target.check().pages_unlogged == 0


@pytest.mark.parametrize("name", ["log", "bitmap"])
def test_moved_pages_are_sent_at_their_new_address(name: str) -> None:
    with tracked(name) as target:
        away = target.child.map(4)
        target.round()
        target.child.run("mremap", target.base + 8 * PAGE, 4 * PAGE, 4 * PAGE, MOVE, away)
        dirty = target.round()
        assert dirty.pages.covers(away, away + 4 * PAGE)
        assert dirty.absent.covers(target.base + 8 * PAGE, target.base + 12 * PAGE)
        # and stores at the new address are seen
        target.child.run("poke", away + PAGE, "y")
        assert target.round().pages.clip(away, away + 4 * PAGE).pairs.tolist() == [away + PAGE, away + 2 * PAGE]
        assert target.check().pages_unlogged == 0


@pytest.mark.parametrize("name", ["log", "bitmap"])
def test_dropped_and_unmapped_pages_become_absent(name: str) -> None:
    with tracked(name) as target:
        target.child.run("madvise", target.base, 2 * PAGE, mman.MADV_DONTNEED)
        target.child.run("munmap", target.base + 4 * PAGE, 2 * PAGE)
        absent = target.round().absent
        assert absent.covers(target.base, target.base + 2 * PAGE)
        assert absent.covers(target.base + 4 * PAGE, target.base + 6 * PAGE)
        target.child.run("poke", target.base, "anew")
        assert target.dirty_pages(target.round()) == [0]
        target.check()


def test_mapping_that_stands_where_another_was_is_sent_whole() -> None:
    with tracked() as target:
        at = target.base + 16 * PAGE
        target.child.map(4, at=at, flags=ANON | mman.MAP_FIXED)
        target.child.run("poke", at + PAGE, "new")
        dirty = target.round()
        # and the pages by which neighbours were asked whether they are registered still
        assert {17} <= set(target.dirty_pages(dirty)) <= {0, 15, 17, 20}
        assert dirty.absent.covers(at, at + PAGE)
        target.child.run("poke", at + PAGE, "newer")
        assert target.dirty_pages(target.round()) == [17]
        assert target.check().pages_unlogged == 0


@pytest.mark.parametrize("name", ["log", "bitmap"])
def test_guard_over_a_page_is_found_in_the_final_round(name: str) -> None:
    skip_unless("has_guard_pages")
    with tracked(name) as target:
        target.child.run("madvise", target.base + 3 * PAGE, PAGE, mman.MADV_GUARD_INSTALL)
        assert target.check().pages_unlogged == 1


@pytest.mark.parametrize("name", ["log", "bitmap"])
def test_shared_memory_is_reported_by_offset(name: str) -> None:
    with tracked(name) as target:
        memfd = target.child.run("memfd_create", "shared")
        target.child.run("ftruncate", memfd, 8 * PAGE)
        first = target.child.map(8, flags=mman.MAP_SHARED, fd=memfd)
        second = target.child.map(4, flags=mman.MAP_SHARED, fd=memfd)
        target.child.run("close", memfd)
        target.round()
        for address in (first + 6 * PAGE, second + PAGE):  # neither is populated
            target.child.run("poke", address, "stored")
        (offsets,) = target.round().shared.values()
        assert offsets is not None and offsets.covers(6 * PAGE, 7 * PAGE) and offsets.covers(PAGE, 2 * PAGE)
        target.check()


def test_one_page_of_a_huge_page_is_sent_again() -> None:
    huge = 2 << 20
    with tracked() as target:
        at = (target.child.map(2 * huge // PAGE) + huge - 1) // huge * huge
        target.child.run("madvise", at, huge, mman.MADV_HUGEPAGE)
        target.child.run("poke", at, "h" * huge)
        target.round()
        target.child.run("poke", at + 7 * PAGE, "i")
        dirty = target.round().pages.clip(at, at + huge)
        assert dirty.pairs.tolist() == [at + 7 * PAGE, at + 8 * PAGE]
        target.check()


def test_reservation_costs_no_page_tables() -> None:
    with tracked() as target:
        nr = (16 << 30) // PAGE
        at = target.child.map(nr, prot=mman.PROT_NONE, flags=ANON | mman.MAP_NORESERVE)
        target.child.run("mprotect", at + (8 << 30), PAGE, RW)
        target.child.run("poke", at + (8 << 30), "committed")
        before = _page_table_kib(target.child.pid)
        dirty = target.round()
        assert dirty.pages.covers(at + (8 << 30), at + (8 << 30) + PAGE)
        assert _page_table_kib(target.child.pid) - before < 64
        target.check()


def _page_table_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmPTE:")[1].split()[0])


def test_fork_is_recorded_and_the_child_runs() -> None:
    with tracked() as target:
        assert target.child.run("fork_and_store", target.base) == 7
        target.round()
        assert target.total("nr_forks") == 1
        target.check()


@pytest.mark.parametrize("capacity", [1, 20, NR_PAGES])
def test_spill_loses_nothing(capacity: int) -> None:
    with tracked(log_capacity=capacity, log_when_full="spill") as target:
        for seed in range(1, 4):
            target.child.run("store_everywhere", target.base, seed)
            assert target.dirty_pages(target.round()) == list(range(NR_PAGES))
        # what else the target stores to counts too
        assert target.total("nr_spills") >= 3
        assert target.total("nr_stalls") == 0
        assert max(stats.nr_records for stats in target.stats) <= capacity
        assert target.check().pages_unlogged == 0


def test_large_log_does_not_spill() -> None:
    with tracked() as target:
        target.child.run("store_everywhere", target.base, 1)
        assert target.dirty_pages(target.round()) == list(range(NR_PAGES))
        assert target.total("nr_spills") == 0
        assert target.total("nr_records") >= NR_PAGES


PINNED = pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="stored to when it was sent already: pinned, past any protection"
)


@pytest.mark.parametrize(
    "order",
    [
        ("store_everywhere", 1),
        ("write_as_debugger", 1),
        # A page is pinned, and not stored to before the round that lets the last one of the call be pinned.
        pytest.param(("write_as_debugger", NR_PAGES), marks=PINNED),
    ],
    ids=lambda order: f"{order[0]}-{order[1]}",
)
def test_stalled_writer_goes_on_with_the_next_round(order: tuple[str, int]) -> None:
    name, argument = order
    with tracked(log_capacity=20, log_when_full="stall") as target:
        target.child.start(name, target.base, argument)
        rounds = 0

        def has_finished() -> bool:
            nonlocal rounds
            rounds += 1
            target.round()
            return not _is_busy(target.child)

        wait_for(has_finished, "the writer to get through")
        target.child.finish()
        assert rounds >= NR_PAGES // 20
        assert target.total("nr_stalls") > 0 and target.total("stall_s") > 0
        assert target.total("nr_spills") == 0
        assert max(stats.nr_records for stats in target.stats) <= 2 * 20  # two passes
        assert target.check().pages_unlogged == 0


def _is_busy(child: Target) -> bool:
    stdout = child.process.stdout
    assert stdout is not None
    return not select.select([stdout], [], [], 0)[0]


def test_stalled_writer_can_be_stopped() -> None:
    # In a system call, which could not be: it waits for the reader, and the reader for the round.
    with tracked(log_capacity=200, log_when_full="stall") as target:
        target.child.start("read_over", target.base)
        wait_for(lambda: _is_stalled(target) and blocked_in(target.child.pid) == NR_read, "a stall in read(2)")
        with Tracer(target.child.pid) as tracer:
            tracer.stop_all()
            dirty = target.round(final=True)
            assert target.replica.differences(dirty) == []
        assert (dirty.stats.nr_stalls, dirty.stats.nr_spills) == (1, 1)
        wait_for(lambda: not _is_busy(target.child) or not target.round(), "the writer to get through")
        target.child.finish()


def _is_stalled(target: Tracked) -> bool:
    # The reader looks at its socket alone, and somebody waits.
    reader = target.tracker._reader
    assert reader is not None
    blocked = read_syscall(reader.reader_pid, reader.reader_pid)
    full = blocked is not None and blocked.nr == NR_poll and blocked.args[1] == 1
    return full and _somebody_waits(target)


def _somebody_waits(target: Tracked) -> bool:
    waits = select.poll()
    waits.register(target.tracker._uffd, select.POLLIN)
    return bool(waits.poll(0))


def test_killed_reader_lets_the_target_go_on() -> None:
    with tracked() as target:
        reader = target.tracker._reader
        assert reader is not None
        os.kill(reader.reader_pid, signal.SIGSTOP)
        target.child.start("store_everywhere", target.base, 1)
        wait_for(lambda: _somebody_waits(target), "the writer to wait")
        os.kill(reader.reader_pid, signal.SIGKILL)
        target.child.finish()  # with nobody in the agent doing anything
        with pytest.raises(DumpError):
            target.round()
        wait_for(lambda: not _is_registered(target.child.pid), "the registrations to go")


def _is_registered(pid: int) -> bool:
    return any("uw" in flags for _, _, flags in read_vm_flags(pid))


AGENT = """
import os, sys
from agent.tracker.create import create_tracker
pid = int(sys.argv[1])
tracker = create_tracker(sys.argv[2], pid, os.pidfd_open(pid))
tracker.arm()
tracker.collect(final=False)
print(tracker._reader.reader_pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("name", "reader_stopped"), [("log", True), ("bitmap", False)])
def test_killed_agent_lets_the_target_go_on(name: str, reader_stopped: bool) -> None:
    with closing(Target()) as child:
        base = child.fill(NR_PAGES)
        child.wait_idle()
        argv = [sys.executable, "-c", AGENT, str(child.pid), name]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent:
            assert agent.stdout is not None
            reader = int(agent.stdout.readline())
            if reader_stopped:
                os.kill(reader, signal.SIGSTOP)
            child.start("store_everywhere", base, 1)
            agent.kill()
        child.finish()
        wait_for(lambda: not os.path.exists(f"/proc/{reader}"), "the reader to end")
        wait_for(lambda: not _is_registered(child.pid), "the registrations to go")


def test_disarm_leaves_nothing_behind() -> None:
    with tracked() as target:
        reader = target.tracker._reader
        assert reader is not None
        own = set(os.listdir("/proc/self/fd"))
        target.tracker.disarm()
        target.tracker.disarm()
        assert not os.path.exists(f"/proc/{reader.reader_pid}")
        assert not _is_registered(target.child.pid)
        assert len(own - set(os.listdir("/proc/self/fd"))) >= 4  # socket, pidfd, pipe, userfaultfd...
        links = [read_fd_link(target.child.pid, fd) for fd in list_fds(target.child.pid)]
        assert not any("userfaultfd" in link for link in links)
        target.child.run("poke", target.base, "goes on")


def test_threads_end_while_they_are_tracked() -> None:
    # Each round protects; an exiting thread's last store must not meet a protected page.
    with tracked() as target:
        target.child.start("make_threads", 300)
        while _is_busy(target.child):
            target.round()
        assert target.child.finish() == 300


def test_agent_can_write_a_protected_page() -> None:
    with tracked() as target, TargetMemory(target.child.pid) as memory:
        memory.write(target.base + 3 * PAGE, b"by the agent")
        assert target.child.run("peek", target.base + 3 * PAGE, 12) == "by the agent"
        assert target.dirty_pages(target.round()) == [3]
        with pytest.raises(OSError, match="Input/output error"):
            memory.write(0x1000, b"nothing is mapped there")


# -- targets without privileges --------------------------------------------------------------------------------------


@contextmanager
def unprivileged() -> Iterator[tuple[Target, int]]:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd is set: every process may have one")
    with closing(Target()) as child:
        child.run("become", NOBODY)
        child.wait_idle()
        pidfd = os.pidfd_open(child.pid)
        try:
            yield child, pidfd
        finally:
            os.close(pidfd)


@pytest.mark.parametrize("name", ["log", "bitmap"])
def test_unprivileged_target_gets_its_userfaultfd_from_the_device(name: str) -> None:
    if not os.path.exists(create.DEVICE):
        pytest.skip(f"there is no {create.DEVICE} (Linux 6.1)")
    with unprivileged() as (child, pidfd):
        before = list_fds(child.pid)
        base = child.fill(NR_PAGES)
        child.wait_idle()
        tracker = create_tracker(name, child.pid, pidfd)
        try:
            assert list_fds(child.pid) == before
            tracker.arm()
            tracker.collect(final=False)
            child.run("read_over", base)  # the kernel's stores are reported too
            dirty = tracker.collect(final=False)
            assert dirty.pages.covers(base, base + NR_PAGES * PAGE)
        finally:
            tracker.disarm()


def test_without_the_device_an_unprivileged_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create, "DEVICE", "/dev/no-such-device")
    with unprivileged() as (child, pidfd):
        before = list_fds(child.pid)
        with pytest.raises(SetupError, match="/dev/no-such-device cannot be opened") as caught:
            create_tracker("log", child.pid, pidfd)
        assert "--tracker scan" in caught.value.hint
        assert list_fds(child.pid) == before
        create_tracker("scan", child.pid, pidfd).disarm()


def test_trackers_have_their_names() -> None:
    for name, kind in (("log", LogTracker), ("bitmap", BitmapTracker)):
        with tracked(name) as target:
            assert type(target.tracker) is kind
            assert target.tracker.name == name


def test_two_trackers_of_two_processes_do_not_meet() -> None:
    with tracked() as one, tracked("bitmap") as other:
        threads = [threading.Thread(target=t.child.run, args=("poke", t.base, "y")) for t in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert one.dirty_pages(one.round()) == other.dirty_pages(other.round()) == [0]

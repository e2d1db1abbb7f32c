"""Make the skeleton's mappings equal to the source's, again and again while the source still runs.

The skeleton must end up with the same VMAs as the source: mremap(2) over two of them fails where it works on one. The
kernel merges neighbours by itself if they agree in flags, file and anon_vma, which it gives to a private mapping with
its first page. Two things therefore need care on the way (mm/vma.c, mm/mprotect.c):

- the anon_vma: neighbours that differ in protection only share one if the first fault comes before the cut. So runs of
  new private mappings are made in one piece, touched once, and cut by mprotect;
- VM_ACCOUNT ("ac" of smaps): a private mapping that was once writable and written to counts as committed for ever.
  One made without write permission does not, and one never touched loses it again with its write permission.

What still comes out as several VMAs, because rounds built it from pieces that the source never had, is made anew with
its contents. Contents are never given up for a difference in flags: the tracker counts on what was sent.
Must never touch a mapping that is not in the layout: the injector's scratch lives between them.

Addresses are target addresses in bytes.
"""

from __future__ import annotations

import enum
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from agent.kernel import syscalls as nr
from agent.kernel.mman import (
    MADV_DONTNEED,
    MADV_GUARD_INSTALL,
    MADV_POPULATE_WRITE,
    MAP_ANONYMOUS,
    MAP_DROPPABLE,
    MAP_FIXED,
    MAP_GROWSDOWN,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    MLOCK_ONFAULT,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
)
from agent.kernel.prctl import PR_SET_VMA, PR_SET_VMA_ANON_NAME
from agent.pages.keep import KeptPages
from agent.procfs.maps import parse_bounds, read_maps
from agent.ranges import RangeSet
from agent.state.mempolicy import policy_call
from agent.state.vma import ADVICE_BY_FLAG, MAP_FLAGS, plain
from agent.target.inject import Batch, Call
from agent.types import PAGE_SIZE, Pid
from protocol.state.vma import BackingFile, LayoutState, VmaKind, VmaState

MAX_TAKEN_FDS = 32
"""Descriptors that the skeleton has open at a time: many mappings show one file, and a limit may be low."""
CALLS_AT_ONCE = 1 << 11
"""Calls of a layout that run together: each takes half a kilobyte of the agent, and there may be 100,000."""
_RW = PROT_READ | PROT_WRITE
_FINISHED_FLAGS = ADVICE_BY_FLAG.keys() | {"lo", "sl"}


class Fate(enum.Enum):
    """What becomes of a part of a wanted mapping."""

    KEEP = "keep"
    MAP = "map"
    """Nothing of use is there."""
    REMAKE = "remake"
    """The contents are right, the kind of mapping is not."""


@dataclass(frozen=True, slots=True)
class Part:
    """[start, end) of a wanted mapping, and the old mapping there when it is of use."""

    start: int
    end: int
    fate: Fate
    old: VmaState | None = None


@dataclass(slots=True)
class Plan:
    """How one layout becomes another; all lists are in address order.

    The parts of a wanted mapping cover it; there are none where nothing of use is there.
    """

    wanted: list[tuple[VmaState, Sequence[Part]]]
    unmap: list[tuple[int, int]]

    @property
    def remade(self) -> list[tuple[int, int]]:
        return [
            (part.start, part.end)
            for _, parts in self.wanted
            for part in parts
            if part.fate is Fate.REMAKE
        ]


def make_plan(before: LayoutState, after: LayoutState) -> Plan:
    """Compare two layouts; mappings that are in both do not appear."""
    old = {vma.start: vma for vma in plain(before.vmas)}
    come = []
    for vma in plain(after.vmas):
        if old.get(vma.start) == vma and not _file_moved(vma, before, after):
            del old[vma.start]
        else:
            come.append(vma)
    gone = list(old.values())
    del old
    wanted: list[tuple[VmaState, Sequence[Part]]] = []
    index = 0
    for vma in come:
        while index < len(gone) and gone[index].end <= vma.start:
            index += 1
        parts: list[Part] = []
        position, at = vma.start, index
        while at < len(gone) and gone[at].start < vma.end:
            rest = gone[at]
            at += 1
            if _content(rest, before.files) != _content(vma, after.files):
                continue
            start, end = max(rest.start, vma.start), min(rest.end, vma.end)
            if position < start:
                parts.append(Part(position, start, Fate.MAP))
            parts.append(Part(start, end, _fate(rest, vma), rest))
            position = end
        if parts and position < vma.end:
            parts.append(Part(position, vma.end, Fate.MAP))
        wanted.append((vma, parts or ()))
    kept = RangeSet.of(
        (part.start, part.end) for _, parts in wanted for part in parts if part.fate is Fate.KEEP
    )
    unmap = RangeSet.of((vma.start, vma.end) for vma in gone).subtract(kept)
    return Plan(wanted=wanted, unmap=[(start, end) for start, end in unmap])


def _file_moved(vma: VmaState, mine: LayoutState, other: LayoutState) -> bool:
    # The same index must mean the same file.
    index = vma.file_index
    return vma.kind is VmaKind.FILE and mine.files[index : index + 1] != other.files[index : index + 1]


def _content(vma: VmaState, files: Sequence[BackingFile]) -> tuple[object, ...]:
    # What must be equal for the pages of one mapping to serve another at the same addresses.
    backed = vma.kind in (VmaKind.FILE, VmaKind.OBJECT)
    return (
        vma.kind,
        vma.shared,
        vma.object_id,
        files[vma.file_index] if vma.kind is VmaKind.FILE else None,
        vma.offset - vma.start if backed else 0,
    )


def _fate(old: VmaState, new: VmaState) -> Fate:
    # What cannot be changed in a mapping that stands.
    fixed = MAP_FLAGS if not new.shared else MAP_FLAGS | {"mw"}
    if fixed.intersection(old.flags) != fixed.intersection(new.flags):
        return Fate.REMAKE
    if is_private_anonymous(new) and "ac" in old.flags and "ac" not in new.flags:
        return Fate.REMAKE
    return Fate.KEEP


def is_private_anonymous(vma: VmaState) -> bool:
    return vma.kind is VmaKind.ANON and not vma.shared


def open_protection(vma: VmaState) -> int:
    """Return the protection to make a mapping with, so that it counts as committed memory where the source's does."""
    return _RW if "ac" in vma.flags and not vma.shared and not vma.prot & PROT_WRITE else vma.prot


class LayoutMirror:
    """The layout as it stands in the skeleton; :meth:`follow` moves it on to a newer one.

    ``agent_fd(vma, backing)`` returns the agent's descriptor for what a mapping shows. The skeleton takes
    descriptors with pidfd_getfd(2) through ``agent_pidfd``, its own descriptor of the agent. ``run`` makes a batch of
    calls in it; ``memory_fd`` is the agent's descriptor of its /proc/PID/mem.
    """

    def __init__(
        self,
        pid: Pid,
        agent_pidfd: int,
        agent_fd: Callable[[VmaState, BackingFile | None], int],
        run: Callable[[Batch], None],
        memory_fd: int,
    ) -> None:
        self._pid = pid
        self._agent_pidfd = agent_pidfd
        self._agent_fd = agent_fd
        self._run = run
        self._memory_fd = memory_fd
        self._built: LayoutState = LayoutState(files=(), vmas=())
        self._unfinished: list[VmaState] = []

    @property
    def layout(self) -> LayoutState:
        """The layout that the skeleton has now."""
        return self._built

    def follow(self, layout: LayoutState) -> None:
        """Give the skeleton ``layout``. Pages of ranges that stay are kept; special mappings are not touched.

        :raises InjectError: a mapping cannot be made.
        """
        plan = make_plan(self._built, layout)
        kept = KeptPages(self._pid)
        if plan.remade:
            kept.save(RangeSet.of(plan.remade))
        self._built = layout
        self._unfinished = [vma for vma in plain(layout.vmas) if _needs_finish(vma)]
        builder = _Builder(self._run, layout.files, self._agent_pidfd, self._agent_fd, self._memory_fd)
        builder.build(plan)
        kept.put()
        anonymous = [vma for vma, _ in plan.wanted if is_private_anonymous(vma)]
        if anonymous and not self._weld(anonymous, all_pieces=False):
            self._weld(anonymous, all_pieces=True)

    def _weld(self, vmas: Sequence[VmaState], *, all_pieces: bool) -> bool:
        # Join what the skeleton has in several VMAs: the largest stays (or none), the rest is made anew beside it.
        torn = find_torn(vmas, parse_bounds(read_maps(self._pid)))
        if not torn:
            return True
        kept = KeptPages(self._pid)
        calls = _Calls(self._run)
        for vma, pieces in torn:
            largest = max(pieces, key=lambda piece: piece[1] - piece[0])
            anew = pieces if all_pieces else [piece for piece in pieces if piece != largest]
            kept.save(RangeSet.of(anew))
            prot = open_protection(vma)
            if not all_pieces and prot != vma.prot:
                start, end = largest
                calls.batch.call(nr.NR_mprotect, start, end - start, prot, name="mprotect")
            for start, end in RangeSet.of(anew):
                _map_anonymous(calls.batch, vma, start, end, prot)
            calls.run_many()
        calls.run()
        kept.put()
        for vma, _ in torn:
            if open_protection(vma) != vma.prot:
                length = vma.end - vma.start
                calls.batch.call(nr.NR_mprotect, vma.start, length, vma.prot, name="mprotect")
                calls.run_many()
        calls.run()
        return False

    def finish(self, batch: Batch, guards: Iterable[tuple[int, int]]) -> None:
        """Add advice, names, guard pages, locks, memory policies and seals: all that must follow the last page."""
        for vma in self._unfinished:
            length = vma.end - vma.start
            for flag in vma.flags:
                advice = ADVICE_BY_FLAG.get(flag)
                if advice is not None:
                    batch.call(nr.NR_madvise, vma.start, length, advice, name=f"madvise({flag})")
            if vma.name and vma.kind in (VmaKind.ANON, VmaKind.OBJECT):
                text = batch.data(vma.name.encode() + b"\0")
                batch.call(
                    nr.NR_prctl, PR_SET_VMA, PR_SET_VMA_ANON_NAME, vma.start, length, text,
                    name="prctl(PR_SET_VMA_ANON_NAME)",
                )
        for start, end in guards:
            batch.call(nr.NR_madvise, start, end - start, MADV_GUARD_INSTALL, name="madvise(GUARD_INSTALL)")
        for vma in self._unfinished:
            length = vma.end - vma.start
            if "lo" in vma.flags:
                how = MLOCK_ONFAULT if "lf" in vma.flags else 0
                batch.call(nr.NR_mlock2, vma.start, length, how, name="mlock2")
            policy_call(batch, vma)
            if "sl" in vma.flags:
                batch.call(nr.NR_mseal, vma.start, length, 0, name="mseal")


def _needs_finish(vma: VmaState) -> bool:
    # Tens of thousands of mappings may have nothing of the sort, and finish() is downtime.
    return bool(vma.name or vma.policy or not _FINISHED_FLAGS.isdisjoint(vma.flags))


def find_torn(vmas: Sequence[VmaState], bounds: array[int]) -> list[tuple[VmaState, list[tuple[int, int]]]]:
    """Return the mappings that are several VMAs, each with its pieces; ``bounds`` are those of all VMAs, flat."""
    starts, ends = bounds[0::2], bounds[1::2]
    torn = []
    for vma in vmas:
        index = bisect_right(starts, vma.start) - 1
        if index < 0 or ends[index] >= vma.end:
            continue
        pieces = []
        while index < len(starts) and starts[index] < vma.end:
            pieces.append((max(starts[index], vma.start), min(ends[index], vma.end)))
            index += 1
        torn.append((vma, pieces))
    return torn


def _map_anonymous(batch: Batch, vma: VmaState, start: int, end: int, prot: int) -> None:
    flags = _map_flags(vma) | MAP_ANONYMOUS
    batch.call(nr.NR_mmap, start, end - start, prot, flags, -1, 0, name="mmap")


def _map_flags(vma: VmaState) -> int:
    flags = MAP_FIXED | (MAP_SHARED if vma.shared else MAP_PRIVATE)
    if "gd" in vma.flags:
        flags |= MAP_GROWSDOWN
    if "nr" in vma.flags:
        flags |= MAP_NORESERVE
    if "dp" in vma.flags:
        flags = flags & ~MAP_PRIVATE | MAP_DROPPABLE
    return flags


class _Calls:
    """Calls that are made in order, many at a time but never all."""

    def __init__(self, run: Callable[[Batch], None]) -> None:
        self._run = run
        self.batch = Batch()

    @property
    def are_many(self) -> bool:
        """Whether it is time to run what is in the batch."""
        return len(self.batch) >= CALLS_AT_ONCE

    def run_many(self) -> None:
        """Run what is in the batch if there is much."""
        if self.are_many:
            self.run()

    def run(self) -> None:
        """Run what is in the batch; calls after it cannot use results of those before."""
        if len(self.batch):
            batch, self.batch = self.batch, Batch()
            self._run(batch)


class _Builder:
    """Makes the calls of one plan."""

    def __init__(
        self,
        run: Callable[[Batch], None],
        files: Sequence[BackingFile],
        agent_pidfd: int,
        agent_fd: Callable[[VmaState, BackingFile | None], int],
        memory_fd: int,
    ) -> None:
        self._calls = _Calls(run)
        self._files = files
        self._agent_pidfd = agent_pidfd
        self._agent_fd = agent_fd
        self._memory_fd = memory_fd
        self._taken: dict[int, Call] = {}  # agent's descriptor -> the skeleton's

    def build(self, plan: Plan) -> None:
        for start, end in plan.unmap:
            self._batch.call(nr.NR_munmap, start, end - start, name="munmap")
            self._run_many()
        run: list[VmaState] = []
        for vma, parts in plan.wanted:
            if not parts or len(parts) == 1 and parts[0].fate is not Fate.KEEP:
                if _may_run(vma):
                    if run and not (run[-1].end == vma.start and _map_flags(run[-1]) == _map_flags(vma)):
                        self._make_run(run)
                        run = []
                    run.append(vma)
                    continue
                parts = (Part(vma.start, vma.end, Fate.MAP),)
            if len(parts) == 1 and parts[0].fate is Fate.KEEP and parts[0].old is not None:
                self._adjust(vma, parts[0].old, parts[0])
            elif is_private_anonymous(vma):
                self._compose(vma, parts)
            else:
                for part in parts:
                    if part.fate is not Fate.KEEP:
                        self._map(vma, part.start, part.end)
                    elif part.old is not None:
                        self._adjust(vma, part.old, part)
            self._run_many()
        if run:
            self._make_run(run)
        self._run()

    @property
    def _batch(self) -> Batch:
        return self._calls.batch

    def _run_many(self) -> None:
        if self._calls.are_many:
            self._run()

    def _run(self) -> None:
        for fd in self._taken.values():
            self._batch.call(nr.NR_close, fd, name="close")
        self._taken.clear()
        self._calls.run()

    def _protect(self, start: int, end: int, prot: int) -> None:
        self._batch.call(nr.NR_mprotect, start, end - start, prot, name="mprotect")

    def _adjust(self, vma: VmaState, old: VmaState, part: Part) -> None:
        start, end = part.start, part.end
        committed = is_private_anonymous(vma) and "ac" in vma.flags and "ac" not in old.flags
        if committed and not vma.prot & PROT_WRITE:
            self._protect(start, end, _RW)
            self._batch.call(
                nr.NR_madvise, start, PAGE_SIZE, MADV_POPULATE_WRITE, name="madvise(POPULATE_WRITE)"
            )
            self._protect(start, end, vma.prot)
        elif old.prot != vma.prot:
            self._protect(start, end, vma.prot)

    def _compose(self, vma: VmaState, parts: Sequence[Part]) -> None:
        # Of several parts, or alone of its kind: the parts merge while they have the same protection.
        prot = open_protection(vma)
        for part in parts:
            if part.fate is not Fate.KEEP:
                _map_anonymous(self._batch, vma, part.start, part.end, prot)
            elif part.old is not None and part.old.prot != prot:
                self._protect(part.start, part.end, prot)
        if prot != vma.prot:
            self._batch.call(
                nr.NR_madvise, vma.start, PAGE_SIZE, MADV_POPULATE_WRITE, name="madvise(POPULATE_WRITE)"
            )
            self._protect(vma.start, vma.end, vma.prot)

    def _make_run(self, run: Sequence[VmaState]) -> None:
        # Neighbours from one mmap: one anon_vma for all, whatever is done to them later.
        if len(run) == 1 and open_protection(run[0]) == run[0].prot:
            _map_anonymous(self._batch, run[0], run[0].start, run[0].end, run[0].prot)
            return
        self._run_many()
        batch, start, end = self._batch, run[0].start, run[-1].end
        _map_anonymous(batch, run[0], start, end, PROT_NONE)
        # The first page comes through /proc/PID/mem, which needs no write permission: with it, a reservation of many
        # GiB would count as committed.
        memory = self._take(self._memory_fd)
        zero = batch.data(b"\0")
        batch.call(nr.NR_pwrite64, memory, zero, 1, start, name="pwrite64(mem)", check=False)
        batch.call(nr.NR_madvise, start, PAGE_SIZE, MADV_DONTNEED, name="madvise(DONTNEED)")
        for vma in run:
            prot = open_protection(vma)
            if prot != PROT_NONE:
                self._protect(vma.start, vma.end, prot)
            if prot != vma.prot:
                self._protect(vma.start, vma.end, vma.prot)
            self._run_many()

    def _map(self, vma: VmaState, start: int, end: int) -> None:
        # A file mapping keeps its commitment without a page of its own.
        prot = open_protection(vma)
        if vma.kind is VmaKind.ANON:
            _map_anonymous(self._batch, vma, start, end, prot)
        else:
            backing = self._files[vma.file_index] if vma.kind is VmaKind.FILE else None
            fd = self._take(self._agent_fd(vma, backing))
            offset = vma.offset + start - vma.start
            flags = _map_flags(vma)
            self._batch.call(nr.NR_mmap, start, end - start, prot, flags, fd, offset, name="mmap")
        if prot != vma.prot:
            self._protect(start, end, vma.prot)

    def _take(self, agent_fd: int) -> Call:
        taken = self._taken.get(agent_fd)
        if taken is None:
            if len(self._taken) == MAX_TAKEN_FDS:
                oldest = self._taken.pop(next(iter(self._taken)))
                self._batch.call(nr.NR_close, oldest, name="close")
            taken = self._taken[agent_fd] = self._batch.call(
                nr.NR_pidfd_getfd, self._agent_pidfd, agent_fd, 0, name="pidfd_getfd"
            )
        return taken


def _may_run(vma: VmaState) -> bool:
    return is_private_anonymous(vma) and "gd" not in vma.flags and "dp" not in vma.flags

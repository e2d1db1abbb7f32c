"""Deliberately broken trackers, one fault each: what the conformance suite must find.

`FAULTS` break what any tracker answers; `TRACKER_FAULTS` break one tracker inside.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

from agent.kernel.pagemap import PM_SCAN_CHECK_WPASYNC, PagemapScanner
from agent.ranges import RangeSet
from agent.tracker.base import DirtySet, SharedKey, Tracker, Witness
from agent.tracker.compare import CompareTracker
from agent.tracker.layout import classify
from agent.tracker.log import LogTracker
from agent.tracker.scan import ScanTracker
from agent.tracker.shared import SharedWatch
from agent.tracker.softdirty import SoftDirtyTracker

Breaks = Callable[[Any], Tracker]
"""Takes a working tracker and returns the broken one."""


class Fault(NamedTuple):
    """What is broken, and the single situation that shows it; "": only seeds do, since it takes a race."""

    breaks: Breaks
    situation: str = ""


class Edited:
    """A tracker whose answers are tampered with by `edit`, from the second round on."""

    def __init__(self, tracker: Tracker, edit: Callable[[DirtySet], None]) -> None:
        self._tracker = tracker
        self._edit = edit
        self._rounds = 0

    @property
    def name(self) -> str:
        return self._tracker.name

    @property
    def shared_watch(self) -> SharedWatch:
        return self._tracker.shared_watch

    def arm(self) -> None:
        self._tracker.arm()

    def collect(self, *, final: bool) -> DirtySet:
        dirty = self._tracker.collect(final=final)
        self._rounds += 1
        if self._rounds > 1:
            self._edit(dirty)
        return dirty

    def forget(self, ranges: RangeSet) -> None:
        self._tracker.forget(ranges)

    def disarm(self) -> None:
        self._tracker.disarm()


class EditedWitness(Edited):
    """The same for one that wants to see what is delivered."""

    def delivered(self, key: SharedKey | None, pairs: array[int], content: memoryview) -> None:
        assert isinstance(self._tracker, Witness)
        self._tracker.delivered(key, pairs, content)

    def dropped(self, key: SharedKey, absent: RangeSet) -> None:
        assert isinstance(self._tracker, Witness)
        self._tracker.dropped(key, absent)


def _edited(edit: Callable[[DirtySet], None]) -> Breaks:
    def breaks(tracker: Tracker) -> Tracker:
        return (EditedWitness if isinstance(tracker, Witness) else Edited)(tracker, edit)

    return breaks


def _without_first(ranges: RangeSet) -> RangeSet:
    return RangeSet(ranges.pairs[2:])


def _lose_absent(dirty: DirtySet) -> None:
    dirty.absent = _without_first(dirty.absent)


def _lose_unmapped(dirty: DirtySet) -> None:
    dirty.absent = dirty.absent.intersect(classify(dirty.maps, ()).private)


def _lose_dirty(dirty: DirtySet) -> None:
    dirty.pages = _without_first(dirty.pages)


def _lose_guard(dirty: DirtySet) -> None:
    dirty.guards = _without_first(dirty.guards)


def _lose_objects(dirty: DirtySet) -> None:
    dirty.shared = {}


FAULTS: dict[str, Fault] = {
    "loses an absent record": Fault(_edited(_lose_absent), "change: dropped"),
    "loses what is unmapped": Fault(_edited(_lose_unmapped), "change: unmapped"),
    "loses a dirty range": Fault(_edited(_lose_dirty), "change: zeroed"),
    "loses a guard page": Fault(_edited(_lose_guard), "change: guards"),
    "loses shared objects": Fault(_edited(_lose_objects), "store: memfd"),
}


def _patched(**replacements: Any) -> Callable[[Any], Any]:
    # Replaces methods of this one object.
    def fault(tracker: Any) -> Any:
        for name, replacement in replacements.items():
            setattr(tracker, name, replacement)
        return tracker

    return fault


class _Unchecked(PagemapScanner):
    # Untracked memory yields nothing instead of an error.
    def scan_each(
        self, ranges: Iterable[tuple[int, int]], *, flags: int = 0, **masks: Any
    ) -> tuple[array[int], list[tuple[int, int]]]:
        return super().scan_each(ranges, flags=flags & ~PM_SCAN_CHECK_WPASYNC, **masks)


def _unregistered(tracker: ScanTracker) -> Tracker:
    tracker._scanner.close()
    tracker._scanner = _Unchecked(tracker.pid)
    return tracker


def _looks_too_early(tracker: ScanTracker) -> Tracker:
    # What the final round takes for its look ahead is of the time of the round before.
    collect = tracker.collect
    early: Future[Any] = Future()

    def broken(*, final: bool) -> DirtySet:
        nonlocal early
        dirty = collect(final=final)
        early = Future()
        early.set_result(tracker._look())
        return dirty

    def look_ahead(executor: Executor) -> None:
        tracker._ahead = early

    tracker.collect = broken  # type: ignore[method-assign]
    tracker.look_ahead = look_ahead  # type: ignore[method-assign]
    return tracker


def _no_suspects(tracker: ScanTracker) -> Tracker:
    take = tracker._take

    def broken(*args: Any, **named: Any) -> Any:
        result = take(*args, **named)
        tracker._suspect = RangeSet()
        return result

    tracker._take = broken  # type: ignore[method-assign]
    return tracker


def _blind_to_descriptors(tracker: Tracker) -> Tracker:
    watch: Any = tracker.shared_watch
    watch._stamp_changed = lambda known: False
    watch._notified = lambda: set()
    return tracker


def _remembers(tracker: CompareTracker) -> Tracker:
    book: Any = tracker._book
    book.distrust = lambda ranges: None
    return tracker


def _loses_holes(tracker: CompareTracker) -> Tracker:
    look = tracker._objects._look

    def broken(book: Any, fd: int) -> tuple[RangeSet, RangeSet]:
        differing, _ = look(book, fd)
        return differing, book.held

    tracker._objects._look = broken  # type: ignore[method-assign]
    return tracker


def _zero_page_is_clean(tracker: SoftDirtyTracker) -> Tracker:
    read = tracker._source.read

    def exclusive(start: int, end: int) -> bytes:
        entries = array("Q", read(start, end))
        return array("Q", [entry | 1 << 56 if entry >> 63 else entry for entry in entries]).tobytes()

    tracker._source.read = exclusive  # type: ignore[method-assign]
    return tracker


def _deaf(kind: str, nothing: Callable[[], Any] = RangeSet) -> Breaks:
    # The reader's records of one kind are lost.
    def breaks(tracker: LogTracker) -> Tracker:
        arm = tracker.arm

        def armed() -> None:
            arm()
            reader: Any = tracker._reader
            take = reader.take
            reader.take = lambda: replace(take(), **{kind: nothing()})

        tracker.arm = armed  # type: ignore[method-assign]
        return tracker

    return breaks


LOG_FAULTS: dict[str, Fault] = {
    "loses records of stores": Fault(_deaf("stored"), "nothing changed is nothing to send"),
    "loses records of drops": Fault(_deaf("dropped"), "change: dropped"),
    "loses records of unmapping and moves": Fault(_deaf("replaced"), "change: mapped again at the same place"),
    "loses records of forks": Fault(_deaf("nr_forks", int), "forks are counted where there are events"),
    "ignores what was not delivered": Fault(
        _patched(forget=lambda ranges: None), "what could not be delivered comes again"
    ),
}
TRACKER_FAULTS: dict[str, dict[str, Fault]] = {
    "scan": {
        "takes untracked memory for clean": Fault(
            _unregistered, "what is mapped over is reported by the next round"
        ),
        "leaves stale protection": Fault(
            _patched(_lift_stale=lambda new: None),
            "stores show after a move merged with a tracked neighbour",
        ),
        "looks ahead while the target runs": Fault(_looks_too_early, "store: anonymous"),
        "does not check copied file pages": Fault(
            _patched(_check_copied=lambda held, pages, absent: None), "private file page dropped is absent"
        ),
        "does not scan lost reports again": Fault(_no_suspects),
        "is blind to writes by descriptor": Fault(_blind_to_descriptors, "object written by descriptor"),
        "ignores what was not delivered": LOG_FAULTS["ignores what was not delivered"],
    },
    "log-stall": LOG_FAULTS,
    "bitmap": LOG_FAULTS,
    "compare": {
        "keeps what was dropped for known": Fault(_remembers, "dropped and later written as it was"),
        "loses holes of objects": Fault(_loses_holes, "object loses a page"),
    },
    "soft-dirty": {
        "takes the zero page for clean": Fault(_zero_page_is_clean, "change: dropped and read"),
        "does not stop the target": Fault(_patched(_pause=lambda pid: nullcontext())),
    },
}

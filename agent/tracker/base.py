"""What a dirty-page tracker is: the interface, and what one look at the target yields.

A tracker answers one question per round: which memory must be sent so that the destination, which got everything the
earlier rounds reported, holds what the target holds? Running rounds may report too much and may leave a change that
happened during the round to the next one; the final round, with the target frozen, must be exact (a superset of what
differs, and nothing that differs is missing).

Addresses are target addresses, ranges `[start, end)` in bytes, page aligned. Offsets are offsets into shared objects.
The tracker keeps the book of what the destination holds: the caller must send everything a DirtySet names, in
the same round, or give up the migration.
"""

from __future__ import annotations

from array import array
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from agent.procfs.maps import MapsEntry
from agent.ranges import RangeSet

if TYPE_CHECKING:
    from agent.tracker.shared import SharedWatch


class SharedKey(NamedTuple):
    """Identity of a shared memory object: st_dev and st_ino, as fstat(2) and /proc/PID/maps show them."""

    dev: int
    ino: int


@dataclass(slots=True)
class TrackerStats:
    """What one collect() cost and met. Seconds and counts; from `nr_records` on for trackers that read events."""

    seconds: float = 0.0
    nr_scans: int = 0
    nr_passes: int = 0
    nr_vmas: int = 0
    nr_registered: int = 0
    maps_changed: bool = False
    nr_records: int = 0
    nr_forks: int = 0
    nr_stalls: int = 0
    stall_s: float = 0.0
    nr_spills: int = 0
    pages_unlogged: int = 0
    """Changes that only the final round's look at page tables told."""


@dataclass(slots=True)
class DirtySet:
    """One round's answer.

    `pages` and `absent` never overlap. `absent` may name addresses that are no longer mapped: the destination forgets
    what it holds there. `guards` is filled in the final round only. `shared` maps an object to dirty offsets, or to
    None for all of it (then also drop what the object no longer has: see agent.state.shmem.shared_extents).
    """

    maps_text: bytes
    maps: list[MapsEntry]
    pages: RangeSet = field(default_factory=RangeSet)
    absent: RangeSet = field(default_factory=RangeSet)
    guards: RangeSet = field(default_factory=RangeSet)
    shared: dict[SharedKey, RangeSet | None] = field(default_factory=dict)
    stats: TrackerStats = field(default_factory=TrackerStats)


class Tracker(Protocol):
    """One way to learn of writes."""

    @property
    def name(self) -> str:
        """The word --tracker takes."""

    @property
    def shared_watch(self) -> SharedWatch:
        """The shared objects: the caller names those that are open, and reads content through its descriptors."""

    def arm(self) -> None:
        """Start to watch; the target may run."""

    def collect(self, *, final: bool) -> DirtySet:
        """Look once. `final`: the target is frozen and the answer must be complete.

        :raises TargetGone: the target exited or called exec.
        :raises DumpError: final, and something could not be looked at.
        """

    def forget(self, ranges: RangeSet) -> None:
        """Count `ranges` as not delivered: what is populated there is dirty in the next round."""

    def disarm(self) -> None:
        """Leave the target as if never watched. Idempotent; a target that is gone is no error."""


@runtime_checkable
class Foresighted(Protocol):
    """What a tracker has whose last look can begin while the agent does something else."""

    def look_ahead(self, executor: Executor) -> None:
        """Begin the final look in another thread of the agent.

        From now to collect(final=True), which must follow, nothing of the target runs, nor of the agent in it.
        """


@runtime_checkable
class Witness(Protocol):
    """What a tracker that compares contents needs besides: to see what was delivered, as it was delivered."""

    def delivered(self, key: SharedKey | None, pairs: array[int], content: memoryview) -> None:
        """The ranges `pairs`, of the process or of object `key`, were read as `content`, and that is sent."""

    def dropped(self, key: SharedKey, absent: RangeSet) -> None:
        """The destination is told to drop what it holds of the object's `absent` ranges."""

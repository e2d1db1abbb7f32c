"""One round on the source: turn what the tracker found into sections and page batches.

The same code sends the rounds while the target runs and the last one with the target frozen. Order matters
to the destination: shared objects and mappings come before the pages that go into them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor

from agent.check import Target
from agent.errors import DumpError, RefusedError
from agent.link import Link
from agent.pages.sender import OnRead, PageCounters, PageSender
from agent.procfs.maps import MapsEntry, parse_maps, read_maps
from agent.procfs.status import read_status
from agent.ranges import RangeSet
from agent.report import RoundReport
from agent.spaces import PROCESS_SPACE
from agent.state.mempolicy import Policy, has_several_nodes
from agent.state.shmem import content_to_send, dump_shared, mapped_size
from agent.tracker.base import DirtySet, Foresighted, SharedKey, Tracker, Witness
from agent.tracker.layout import is_shared_object, shared_key
from protocol.messages import RoundPlaced
from protocol.sections import encode_section
from protocol.state.files import FilesChange, FilesState
from protocol.state.shmem import SharedObject, SharedObjects


class RoundSender:
    """Sends rounds over a link; remembers which objects and which layout the destination has."""

    def __init__(
        self,
        link: Link,
        target: Target,
        tracker: Tracker,
        sender: PageSender,
        on_progress: Callable[[int, int, int], None],
    ) -> None:
        self._link = link
        self._target = target
        self._tracker = tracker
        self._witness = tracker if isinstance(tracker, Witness) else None
        self._sender = sender
        self._on_progress = on_progress
        self._described: dict[int, SharedObject] = {}
        self._maps_text = b""
        self._object_entries: list[MapsEntry] = []
        self._objects_text = b""
        self._flags: Mapping[int, frozenset[str]] = {}
        self._flags_text = b""
        self._sent_flags: Mapping[int, frozenset[str]] = self._flags
        self._sent_policies: Mapping[int, Policy] = {}
        self._flagged: Sequence[MapsEntry] = ()

    def learn_flags(self) -> None:
        """Read the VmFlags of all mappings, and whether there are memory policies, while the target runs.

        Each walks the page tables, 13 ms per GiB in small pages. What madvise(2) or mlock(2) has done to a whole
        mapping since the last look shows nowhere else.
        """
        text = read_maps(self._target.pid)
        self._read_flags(parse_maps(text))
        self._flags_text = text
        if self._target.policy_nodes is not None or has_several_nodes():
            self._target.learn_policies()

    def _read_flags(self, entries: Sequence[MapsEntry]) -> None:
        flags = self._target.vm_flags()
        if flags != self._flags:
            self._flags = flags
        self._flagged = entries

    def _need_flags(self, dirty: DirtySet) -> None:
        """Make sure that the flags of these mappings are known: one that only grew has what it had."""
        if dirty.maps_text == self._flags_text:
            return
        # Lines that did not change gave the same entries: only what lies between the first and the last change differs.
        before, now = self._flagged, dirty.maps
        head = _nr_same(before, now)
        tail = min(_nr_same(reversed(before), reversed(now)), len(before) - head, len(now) - head)
        seen = {(e.start, e.perms, e.path) for e in before[head : len(before) - tail]}
        if not all((e.start, e.perms, e.path) in seen for e in now[head : len(now) - tail]):
            self._read_flags(now)

    def watch_open_objects(self) -> None:
        """Have the tracker watch the shared objects that the target has open, mapped or not."""
        for key, fd in self._target.open_objects.items():
            # Closed, or another file by now: the final look at the descriptors finds what there is.
            with contextlib.suppress(OSError):
                self._tracker.shared_watch.add(key, self._target.ctx.fetch_fd(fd))
        self._target.ctx.drop_fetched()

    def collect(self, *, final: bool) -> DirtySet:
        """Have the tracker look, at what is open too."""
        self.watch_open_objects()
        return self._tracker.collect(final=final)

    def look_ahead(self, executor: Executor) -> None:
        """Have the tracker begin the final look, if it can: the target is frozen, no call is made in it any more."""
        if isinstance(self._tracker, Foresighted):
            self._tracker.look_ahead(executor)

    def send_files(self, files: FilesState | FilesChange) -> None:
        """Send the final open files, and before them what the destination needs to make them.

        It starts on them as soon as they arrive, while the last round is on its way.
        """
        self.watch_open_objects()
        self._describe({key: [] for key in self._target.open_objects})
        kind = "files_change" if isinstance(files, FilesChange) else "files"
        self._link.send(encode_section(kind, self._target.ns_pid, files))

    def send_round(
        self, number: int, dirty: DirtySet, *, final: bool = False, is_awaited: bool = True
    ) -> RoundReport:
        """Send one round; the report says what it was and took. ``is_awaited``: when it is placed, unless it is final.

        :raises RefusedError: a mapping appeared that cannot be carried.
        """
        started = time.monotonic()
        sent_before = self._link.channel.bytes_sent
        self._send_objects(dirty)
        self._send_layout(dirty)
        session = self._link.session
        self._link.send(session.round_begin())
        if dirty.absent:
            self._sender.send_absent(PROCESS_SPACE, dirty.absent)
        if number == 0 and read_status(self._target.pid).thp_enabled:
            self._sender.send_expected(PROCESS_SPACE, dirty.pages)
        expected = dirty.pages.nr_bytes
        self._on_progress(number, 0, expected)
        counters = self._sender.send_process_pages(
            PROCESS_SPACE, self._target.pid, dirty.pages, final=final, on_read=self._witnessed(None)
        )
        self._tracker.forget(counters.gone)
        pages_dirty = dirty.pages.nr_pages
        for key, ranges in dirty.shared.items():
            pages_dirty += self._send_shared(key, ranges, final=final)
        totals = session.round_end()
        self._link.send(totals)
        if is_awaited and not final and not self._link.recorded:
            # Buffers on the way hold megabytes: what is still there when the target freezes is downtime.
            self._link.expect(RoundPlaced)
        return RoundReport(
            round=number,
            pages_dirty=pages_dirty,
            pages_sent=totals.pages_raw + totals.pages_zero,
            pages_zero=totals.pages_zero,
            pages_absent=totals.pages_absent,
            bytes_sent=self._link.channel.bytes_sent - sent_before,
            seconds=time.monotonic() - started + dirty.stats.seconds,
        )

    def _send_layout(self, dirty: DirtySet) -> None:
        self._need_flags(dirty)
        flags, policies = self._flags, self._target.policies
        as_sent = flags is self._sent_flags and policies == self._sent_policies
        if as_sent and dirty.maps_text == self._maps_text:
            return
        obstacles = self._target.layout.check(dirty.maps, flags, watched=True)
        if obstacles:
            raise RefusedError(
                f"Process {self._target.pid} got a mapping that cannot be moved: {obstacles[0]}",
                obstacles,
            )
        layout = self._target.layout.dump(dirty.maps, flags, policies)
        self._link.send(encode_section("layout", self._target.ns_pid, layout))
        self._maps_text, self._sent_flags, self._sent_policies = dirty.maps_text, flags, policies

    def _send_objects(self, dirty: DirtySet) -> None:
        """Describe the shared objects that the destination does not know, or knows otherwise."""
        if dirty.maps_text != self._objects_text:
            self._object_entries = [entry for entry in dirty.maps if is_shared_object(entry)]
            self._objects_text = dirty.maps_text
        mapped: dict[SharedKey, list[MapsEntry]] = {key: [] for key in dirty.shared}
        for entry in self._object_entries:
            mapped.setdefault(shared_key(entry), []).append(entry)
        self._describe(mapped)

    def _describe(self, objects: Mapping[SharedKey, list[MapsEntry]]) -> None:
        changed: dict[int, SharedObject] = {}
        for key, entries in objects.items():
            object_id = self._target.object_id(key)
            path = entries[0].path if entries else self._target.open_path(key)
            state = dump_shared(
                object_id, self._tracker.shared_watch.fd_of(key), path, size=mapped_size(entries)
            )
            if self._described.get(object_id) != state:
                self._described[object_id] = changed[object_id] = state
        if changed:
            described = SharedObjects(objects=tuple(changed.values()))
            self._link.send(encode_section("shmem", self._target.ns_pid, described))

    def _send_shared(self, key: SharedKey, ranges: RangeSet | None, *, final: bool) -> int:
        """Send dirty content of an object; returns how many pages that was."""
        fd = self._tracker.shared_watch.fd_of(key)
        if fd is None:
            raise DumpError(
                "Cannot read a shared memory object",
                hint="CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN is needed",
            )
        object_id = self._target.object_id(key)
        pages, absent = content_to_send(fd, ranges)
        if absent:
            self._sender.send_absent(object_id, absent)
            if self._witness is not None:
                self._witness.dropped(key, absent)
        sent: PageCounters = self._sender.send_file_pages(
            object_id, fd, pages, final=final, on_read=self._witnessed(key)
        )
        return sent.pages_sent

    def _witnessed(self, key: SharedKey | None) -> OnRead | None:
        return functools.partial(self._witness.delivered, key) if self._witness is not None else None


def _nr_same(left: Iterable[object], right: Iterable[object]) -> int:
    """Return how many are the same objects, one by one, before the first that is not."""
    return sum(1 for _ in itertools.takewhile(bool, map(operator.is_, left, right)))

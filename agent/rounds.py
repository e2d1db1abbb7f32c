"""One round on the source: turn what the tracker found into sections and page batches.

The same code sends the rounds while the target runs and the last one with the target frozen. Order matters
to the destination: shared objects and mappings come before the pages that go into them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from agent.check import Target
from agent.errors import RefusedError
from agent.link import Link
from agent.pages.sender import PageSender
from agent.ranges import RangeSet
from agent.report import RoundReport
from agent.spaces import PROCESS_SPACE
from agent.state.shmem import SharedDumper
from agent.tracker.base import DirtySet
from agent.tracker.layout import is_shared_object, shared_key
from protocol.state import encode_section


class RoundSender:
    """Sends rounds over a link; remembers which objects and which layout the destination has."""

    def __init__(
        self,
        link: Link,
        target: Target,
        sender: PageSender,
        shared: SharedDumper,
        on_progress: Callable[[int, int, int], None],
    ) -> None:
        self._link = link
        self._target = target
        self._sender = sender
        self._shared = shared
        self._on_progress = on_progress
        self._known_objects: set[int] = set()
        self._maps_text = b""
        self._flags: Mapping[int, frozenset[str]] = {}
        self._flags_text = b""

    def learn_flags(self, dirty: DirtySet) -> None:
        """Read the VmFlags that belong to a layout. Walks page tables: done while the target runs."""
        if dirty.maps_text != self._flags_text:
            self._flags = self._target.vm_flags()
            self._flags_text = dirty.maps_text

    def send_layout(self, dirty: DirtySet) -> None:
        """Send the mappings, and the shared objects they show, if they changed since the last time.

        :raises RefusedError: a mapping appeared that cannot be carried.
        """
        if dirty.maps_text == self._maps_text:
            return
        self.learn_flags(dirty)
        obstacles = self._target.layout.check(dirty.maps, self._flags)
        if obstacles:
            raise RefusedError(
                f"Process {self._target.pid} got a mapping that cannot be moved: {obstacles[0]}",
                obstacles,
            )
        for entry in dirty.maps:
            if is_shared_object(entry):
                self.send_object(self._target.object_id(shared_key(entry)))
        layout = self._target.layout.dump(dirty.maps, self._flags)
        self._link.send(encode_section("layout", self._target.ns_pid, layout))
        self._maps_text = dirty.maps_text

    def send_object(self, object_id: int) -> None:
        """Describe a shared object to the destination, once."""
        if object_id not in self._known_objects:
            self._known_objects.add(object_id)
            self._link.send(encode_section("shared", object_id, self._shared.describe(object_id)))

    def send_round(self, number: int, dirty: DirtySet) -> RoundReport:
        """Send one round; the report says what it was and took."""
        started = time.monotonic()
        sent_before = self._link.channel.bytes_sent
        self.send_layout(dirty)
        for key in dirty.shared:
            self.send_object(self._target.object_id(key))
        session = self._link.session
        self._link.send(session.round_begin())
        if dirty.absent:
            self._sender.send_absent(PROCESS_SPACE, dirty.absent)
        self._sender.send_process_pages(PROCESS_SPACE, self._target.pid, dirty.pages)
        for key, ranges in dirty.shared.items():
            self._send_shared(self._target.object_id(key), ranges)
        totals = session.round_end()
        self._link.send(totals)
        pages_dirty = dirty.pages.nr_pages + sum(
            ranges.nr_pages for ranges in dirty.shared.values() if ranges is not None
        )
        return RoundReport(
            round=number,
            pages_dirty=max(pages_dirty, totals.pages_raw + totals.pages_zero),
            pages_sent=totals.pages_raw + totals.pages_zero,
            pages_zero=totals.pages_zero,
            pages_absent=totals.pages_absent,
            bytes_sent=self._link.channel.bytes_sent - sent_before,
            seconds=time.monotonic() - started + dirty.stats.seconds,
        )

    def _send_shared(self, object_id: int, ranges: RangeSet | None) -> None:
        fd = self._shared.fd(object_id)
        present, absent = self._shared.extents(object_id)
        if ranges is None:
            if absent:
                self._sender.send_absent(object_id, absent)
            self._sender.send_file_pages(object_id, fd, present)
        else:
            self._sender.send_file_pages(object_id, fd, ranges.intersect(present))

"""Shared objects by comparison of their content: for trackers whose kernel tells nothing of them that can be relied on.

Exact whoever writes, through whichever mapping or descriptor. Reads only what SEEK_DATA shows, so nothing is populated.
Offsets are offsets into objects. Costs a read of every object in every round.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection

from agent.pages.chunks import Stream
from agent.pages.extents import shared_extents
from agent.pages.sender import CHUNK_BYTES, PageReader
from agent.procfs.maps import MapsEntry
from agent.ranges import RangeSet
from agent.tracker.base import SharedKey
from agent.tracker.content import Book
from agent.tracker.shared import SharedWatch


class ObjectBooks:
    """A book for each object that `watch` knows."""

    def __init__(self, watch: SharedWatch, reader: PageReader) -> None:
        self._watch = watch
        self._reader = reader
        self._books: dict[SharedKey, Book] = {}

    def changed(
        self, mapped: Collection[tuple[MapsEntry, SharedKey]]
    ) -> dict[SharedKey, RangeSet | None]:
        """Return what differs from what was delivered, as DirtySet.shared has it."""
        result: dict[SharedKey, RangeSet | None] = {}
        keys = self._watch.current(mapped)
        for key in self._books.keys() - set(keys):
            del self._books[key]
        for key in keys:
            fd = self._watch.fd_of(key)
            if fd is None:
                result[key] = None
                continue
            book = self._books.get(key)
            differing, extents = self._look(book or Book(), fd)
            if book is None:
                self._books[key] = Book()
            # What is held and no longer there goes with the holes of the object, which the caller sends by itself; it
            # says so by dropped(): the object may have changed again by then.
            if book is None or differing or book.held.subtract(extents):
                result[key] = differing
        return result

    def _look(self, book: Book, fd: int) -> tuple[RangeSet, RangeSet]:
        extents = shared_extents(fd)
        differing = RangeSet()
        for pairs in Stream(extents.pairs).chunks(CHUNK_BYTES):
            got = self._reader.read_file(fd, pairs, RangeSet())  # beyond the end by now: truncated meanwhile
            length = sum(got[1::2]) - sum(got[0::2])
            differing.update(book.differing(got, self._reader.view[:length]))
        return differing, extents

    def deliver(self, key: SharedKey, pairs: array[int], content: memoryview) -> None:
        """See Witness.delivered()."""
        if key in self._books:
            self._books[key].deliver(pairs, content)

    def drop(self, key: SharedKey, absent: RangeSet) -> None:
        """See Witness.dropped()."""
        if key in self._books:
            self._books[key].drop(absent)

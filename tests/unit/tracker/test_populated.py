"""Pagemap entries, recorded and made up, and what is read from them."""

from __future__ import annotations

from array import array

from agent.ranges import RangeSet
from agent.tracker.populated import CHUNK_PAGES, Look

PAGE = 4096
PRESENT, SWAP, FILE, GUARD, WP, EXCLUSIVE, SOFT = (1 << bit for bit in (63, 62, 61, 58, 57, 56, 55))


class Recorded:
    """A source that knows some entries; the others are of memory that is not there."""

    def __init__(self, entries: dict[int, int]) -> None:
        self.entries = entries

    def read(self, start: int, end: int) -> bytes:
        assert (end - start) // PAGE <= CHUNK_PAGES
        return array("Q", [self.entries.get(page // PAGE, 0) for page in range(start, end, PAGE)]).tobytes()

    def clear(self) -> None:
        raise AssertionError("a look changes nothing")

    def close(self) -> None:
        pass


def pages(*numbers: int) -> RangeSet:
    return RangeSet.of((number * PAGE, (number + 1) * PAGE) for number in numbers)


ENTRIES = {
    # As a kernel with soft-dirty bits shows them (pagemap.rst), the frame numbers hidden.
    1: PRESENT | EXCLUSIVE | SOFT,  # stored to
    2: PRESENT | EXCLUSIVE,  # not since
    3: PRESENT,  # the zero page, or shared with a child
    4: PRESENT | FILE,  # the file's own
    5: PRESENT | FILE | EXCLUSIVE | SOFT,  # the file's own still, though new
    6: SWAP | 0x1234,  # swapped out
    7: SWAP | SOFT | 0x1234,
    8: SWAP | GUARD,  # a guard page
    9: SOFT,  # nothing there, in a new mapping
    10: PRESENT | EXCLUSIVE | WP,
}


def look(entries: dict[int, int], ranges: RangeSet) -> Look:
    return Look(Recorded(entries), ranges)


def test_what_has_content_of_its_own() -> None:
    assert look(ENTRIES, RangeSet((0, 20 * PAGE))).copied == pages(1, 2, 3, 6, 7, 10)


def test_what_may_have_changed() -> None:
    assert look(ENTRIES, RangeSet((0, 20 * PAGE))).changed == pages(1, 3, 7)


def test_guards() -> None:
    assert look(ENTRIES, RangeSet((0, 20 * PAGE))).guards == pages(8)


def test_only_the_ranges_asked_for() -> None:
    assert look(ENTRIES, pages(2, 6)).copied == pages(2, 6)


def test_large_ranges_are_read_in_pieces() -> None:
    last = 3 * CHUNK_PAGES + 5
    found = look({CHUNK_PAGES - 1: PRESENT, CHUNK_PAGES: PRESENT, last: PRESENT}, RangeSet((0, (last + 1) * PAGE)))
    assert found.copied == pages(CHUNK_PAGES - 1, CHUNK_PAGES, last)

"""The bounded log and the bitmap behind it."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from agent.kernel.uffd import (
    UFFD_EVENT_FORK,
    UFFD_EVENT_REMAP,
    UFFD_EVENT_REMOVE,
    UFFD_EVENT_UNMAP,
)
from agent.ranges import RangeSet
from agent.tracker import eventlog
from agent.tracker.eventlog import EVENT_WORDS, EventLog, Overflow, PageBitmap, Touched, page_ranges

PAGE = 4096
PAGES = st.lists(st.integers(0, (1 << 35) - 1).map(PAGE.__mul__), max_size=60)


def test_sequence_numbers_go_on_over_the_halves() -> None:
    log = EventLog(4)
    log.add_stores([PAGE, 2 * PAGE])
    log.add_event(UFFD_EVENT_UNMAP, 0, PAGE, 0)
    assert log.room == 1
    half, first, nr_stores, nr_events = log.flip()
    assert (first, nr_stores, nr_events, log.room) == (0, 2, 1, 4)
    log.add_stores([7 * PAGE])  # goes into the other half
    stores, events = log.read(half, nr_stores, nr_events)
    assert stores.tolist() == [PAGE, 2 * PAGE]
    assert events.tolist() == [2, UFFD_EVENT_UNMAP, 0, PAGE, 0]  # after two stores
    half, first, nr_stores, nr_events = log.flip()
    assert (first, nr_stores, nr_events) == (3, 1, 0)
    assert log.read(half, nr_stores, nr_events)[0].tolist() == [7 * PAGE]
    assert log.flip()[1] == 4


def test_log_can_be_full_of_stores_or_of_events() -> None:
    log = EventLog(3)
    log.add_stores([0, PAGE, 2 * PAGE])
    assert not log.room
    log.flip()
    for number in range(3):
        log.add_event(UFFD_EVENT_REMOVE, number, number + 1, 0)
    assert not log.room
    half, _, nr_stores, nr_events = log.flip()
    assert len(log.read(half, nr_stores, nr_events)[1]) == 3 * EVENT_WORDS


@given(PAGES)
def test_bitmap_returns_what_was_set(pages: list[int]) -> None:
    bitmap = PageBitmap()
    bitmap.add(pages)
    assert bitmap.ranges() == RangeSet.of((page, page + PAGE) for page in pages)
    assert bitmap.ranges() == page_ranges(array("Q", pages))


def test_bitmap_takes_a_bit_for_a_page() -> None:
    bitmap = PageBitmap()
    bitmap.add(list(range(0, 1 << 28, PAGE)))
    assert sum(map(len, bitmap.regions.values())) == (1 << 28) // 32768


@given(PAGES, PAGES)
def test_overflow_arrives_whole(stored: list[int], removed: list[int]) -> None:
    overflow = Overflow()
    overflow.add_stores(stored)
    for page in removed:
        overflow.add_event(UFFD_EVENT_REMOVE, page, page + PAGE, 0)
    overflow.add_event(UFFD_EVENT_REMAP, PAGE, 9 * PAGE, 2 * PAGE)
    loaded = Overflow.load(overflow.dump())
    assert loaded.bitmap.ranges() == page_ranges(array("Q", stored))
    assert loaded.touched.dropped == page_ranges(array("Q", removed))
    assert loaded.touched.replaced == RangeSet((PAGE, 3 * PAGE, 9 * PAGE, 11 * PAGE))


def test_events_touch_what_they_name() -> None:
    touched = Touched()
    touched.add_event(UFFD_EVENT_FORK, 7, 0, 0)
    touched.add_event(UFFD_EVENT_REMOVE, PAGE, 2 * PAGE, 0)
    touched.add_event(UFFD_EVENT_UNMAP, 4 * PAGE, 6 * PAGE, 0)
    touched.add_event(UFFD_EVENT_REMAP, 10 * PAGE, 20 * PAGE, PAGE)
    assert touched.dropped == RangeSet((PAGE, 2 * PAGE))
    assert touched.replaced == RangeSet(
        (4 * PAGE, 6 * PAGE, 10 * PAGE, 11 * PAGE, 20 * PAGE, 21 * PAGE)
    )


def test_many_events_are_joined_but_none_is_forgotten() -> None:
    overflow = Overflow()
    places = range(0, 3 * eventlog.MAX_EVENT_RANGES * 4 * PAGE, 4 * PAGE)
    for place in places:
        overflow.add_event(UFFD_EVENT_UNMAP, place, place + PAGE, 0)
    overflow.touched.bound()
    replaced = overflow.touched.replaced
    assert replaced.nr_ranges <= eventlog.MAX_EVENT_RANGES
    assert all(replaced.covers(place, place + PAGE) for place in places)

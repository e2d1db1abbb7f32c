"""RangeSet against sets of page numbers."""

from __future__ import annotations

import time
import tracemalloc
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.ranges import AddressRange, RangeSet

RANGES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda r: (r[0], r[0] + r[1])), max_size=14
)
FEW = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 9)).map(lambda r: (r[0], r[0] + r[1])))
MANY = st.lists(
    st.tuples(st.integers(0, 400), st.integers(1, 3)).map(lambda r: (r[0], r[0] + r[1])), min_size=60
)


def numbers(ranges: list[tuple[int, int]]) -> set[int]:
    return {n for start, end in ranges for n in range(start, end)}


def members(found: RangeSet) -> set[int]:
    pairs = found.pairs
    assert list(pairs) == sorted(set(pairs)), "not sorted, or touching ranges were not joined"
    return numbers([(r.start, r.end) for r in found])


@given(RANGES, RANGES)
def test_operations_agree_with_sets_of_numbers(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    a, b = RangeSet.of(left), RangeSet.of(right)
    assert members(a) == numbers(left)
    assert members(a.union(b)) == numbers(left) | numbers(right)
    assert members(a.intersect(b)) == numbers(left) & numbers(right)
    assert members(a.subtract(b)) == numbers(left) - numbers(right)
    assert a.nr_bytes == len(numbers(left))


@given(MANY, FEW)
def test_small_against_large(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    a, b = RangeSet.of(left), RangeSet.of(right[:2])
    few = numbers(right[:2])
    assert members(a.intersect(b)) == numbers(left) & few
    assert members(a.subtract(b)) == numbers(left) - few
    assert members(b.subtract(a)) == few - numbers(left)


@given(RANGES, st.integers(0, 70), st.integers(0, 20))
def test_clip_and_covers(ranges: list[tuple[int, int]], start: int, length: int) -> None:
    a = RangeSet.of(ranges)
    window = set(range(start, start + length))
    assert members(a.clip(start, start + length)) == numbers(ranges) & window
    assert a.covers(start, start + length) == (window <= numbers(ranges))
    assert (start in a) == (start in numbers(ranges))


@given(RANGES)
def test_adding_one_by_one_gives_the_same(ranges: list[tuple[int, int]]) -> None:
    a = RangeSet()
    for start, end in ranges:
        a.add(start, end)
    assert a == RangeSet.of(ranges)


def test_reversed_ranges_are_rejected() -> None:
    with pytest.raises(ValueError):
        RangeSet((5, 4))
    with pytest.raises(ValueError):
        RangeSet((1,))
    with pytest.raises(ValueError):
        RangeSet().add(2, 1)


def test_whole_address_space() -> None:
    top = (1 << 64) - 1
    whole = RangeSet((0, top))
    assert not whole.subtract(whole)
    assert whole.subtract(RangeSet((0, 4096))) == RangeSet((4096, top))
    assert list(RangeSet((0, 1, 1, 2))) == [AddressRange(0, 2)]


def test_a_hundred_thousand_ranges_are_fast() -> None:
    starts = array("Q", range(0, 100_000 * 8192, 8192))
    a = RangeSet.of(zip(starts, map((4096).__add__, starts)))
    b = RangeSet.of(zip(map((4096).__add__, starts), map((8192).__add__, starts)))
    began = time.process_time()
    assert len(a.union(b)) == 1
    assert not a.intersect(b)
    assert a.subtract(b) == a
    assert time.process_time() - began < 1.5  # about 0.2 s; a loop with a bad order would take minutes


def test_touches_agrees_with_clipping() -> None:
    ranges = RangeSet((10, 20, 30, 40))
    for start in range(50):
        for end in range(start, 50):
            assert ranges.touches(start, end) == bool(ranges.clip(start, end))


@given(MANY, MANY, FEW)
def test_operations_in_pieces_agree_with_sets_of_numbers(
    left: list[tuple[int, int]], right: list[tuple[int, int]], few: list[tuple[int, int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agent.ranges.PIECE_RANGES", 3)
        a, b = RangeSet.of(left), RangeSet.of(right)
        grown = RangeSet.of(few)
        for start, end in left:
            grown.add(start, end)
        grown.update(b)
        assert members(a) == numbers(left)
        assert members(a.union(b)) == numbers(left) | numbers(right)
        assert members(a.intersect(b)) == numbers(left) & numbers(right)
        assert members(a.subtract(b)) == numbers(left) - numbers(right)
        assert members(grown) == numbers(left) | numbers(right) | numbers(few)


def test_the_last_address_survives_being_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.ranges.PIECE_RANGES", 2)
    top = (1 << 64) - 1
    many = RangeSet.of((n, n + 1) for n in range(0, 40, 2))
    ends = RangeSet.of([(0, 1), (top - 5, top)])
    assert many.union(ends).subtract(many) == RangeSet((top - 5, top))
    assert many.union(ends).intersect(RangeSet((0, top))) == many.union(ends)


def test_large_sets_take_no_more_than_a_few_copies_of_memory() -> None:
    nr, copies = 100_000, 6
    even = RangeSet(array("Q", range(0, 4 * nr, 2)))
    scattered = RangeSet(array("Q", range(1, 4 * nr + 1, 2)))
    one_copy = 16 * nr
    tracemalloc.start()
    try:
        for operation in (even.union, even.intersect, even.subtract, even.copy().update):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            operation(scattered)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < copies * one_copy, f"{operation.__name__}: {peak - before} bytes"
    finally:
        tracemalloc.stop()

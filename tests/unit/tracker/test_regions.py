"""What comes back from scans, sorted into sets of ranges: as an obvious way does it, wherever the pieces are cut."""

from __future__ import annotations

import random
import tracemalloc
from array import array
from collections.abc import Callable

import pytest

from agent import ranges
from agent.ranges import RangeSet
from agent.tracker import regions
from agent.tracker.regions import all_regions, select, windows

_PAGE = 4096
_GAP = 3 * _PAGE


@pytest.fixture(params=[1, 2, 5, 1 << 13])
def piece_ranges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    size: int = request.param
    monkeypatch.setattr(ranges, "PIECE_RANGES", size)
    monkeypatch.setattr(regions, "PIECE_RANGES", size)


def _triples(chance: random.Random) -> list[tuple[int, int, int]]:
    found = []
    position = 0
    for _ in range(chance.randrange(30)):
        position += chance.choice([0, 1, 2, 3, 4, 9]) * _PAGE
        end = position + chance.randrange(1, 4) * _PAGE
        found.append((position, end, chance.randrange(8)))
        position = end
    return found


def _flat(triples: list[tuple[int, int, int]]) -> array[int]:
    return array("Q", [word for triple in triples for word in triple])


@pytest.mark.usefixtures("piece_ranges")
@pytest.mark.parametrize("seed", range(50))
def test_regions_are_chosen_by_category(seed: int) -> None:
    triples = _triples(random.Random(seed))
    flat = _flat(triples)
    assert all_regions(flat) == RangeSet.of((start, end) for start, end, _ in triples)
    for wanted, mask in ((0, 0), (0, 4), (2, 2), (1, 3)):
        expected = RangeSet.of((start, end) for start, end, word in triples if word & mask == wanted)
        assert select(flat, wanted, mask) == expected
    assert flat == _flat(triples)


@pytest.mark.usefixtures("piece_ranges")
@pytest.mark.parametrize("seed", range(50))
def test_neighbours_share_a_window(seed: int) -> None:
    found = RangeSet.of((start, end) for start, end, _ in _triples(random.Random(seed)))
    expected: list[list[int]] = []
    for start, end in found:
        if expected and start - expected[-1][1] <= _GAP:
            expected[-1][1] = end
        else:
            expected.append([start, end])
    before = found.pairs[:]
    assert [list(window) for window in windows(found, _GAP)] == expected
    assert found.pairs == before


@pytest.mark.usefixtures("piece_ranges")
@pytest.mark.parametrize("seed", range(50))
def test_what_comes_in_order_or_not_adds_up(seed: int) -> None:
    chance = random.Random(seed)
    whole = RangeSet()
    model: set[int] = set()
    for _ in range(8):
        shift = chance.choice([0, 0, 50, 100]) * _PAGE
        more = RangeSet.of((start + shift, end + shift) for start, end, _ in _triples(chance))
        before = more.pairs[:]
        whole.update(more)
        model.update(page for start, end in more for page in range(start, end, _PAGE))
        assert more.pairs == before
        if chance.random() < 0.5:
            assert {page for start, end in whole for page in range(start, end, _PAGE)} == model
    assert {page for start, end in whole for page in range(start, end, _PAGE)} == model
    assert whole == RangeSet.of((page, page + _PAGE) for page in model)


def test_hundreds_of_thousands_take_little_beside_themselves() -> None:
    count = 200_000
    triples = _flat([(2 * number * _PAGE, (2 * number + 1) * _PAGE, number % 4) for number in range(count)])
    found = all_regions(triples)
    ways: dict[str, Callable[[], RangeSet]] = {
        "all_regions": lambda: all_regions(triples),
        "select": lambda: select(triples, 1, 1),
        "windows": lambda: windows(found, 0),
    }
    for name, sort in ways.items():
        tracemalloc.start()
        try:
            sort()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2 * found.pairs.itemsize * len(found.pairs), name

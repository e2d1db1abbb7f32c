"""Which pages a workload writes, in which order: known to the writer and to who judges the tracker's answer.

Page numbers count from the start of the memory under measurement.
"""

from __future__ import annotations

import random
from array import array

from agent.ranges import RangeSet
from agent.types import PAGE_SIZE

WORKLOADS = {
    "sequential": "a quarter of the memory, in address order",
    "sparse": "one page in 64, at random places in random order",
    "hot": "a sixteenth of the memory in random order, each page eight times",
    "whole": "every page, in address order",
}
HOT_WRITES = 8
_SEED = 20230


def page_numbers(workload: str, nr_pages: int) -> range | array[int]:
    """Return the pages in the order of their first writes, each once. `share:0.01` is a random hundredth."""
    chance = random.Random(_SEED)
    if workload == "whole":
        return range(nr_pages)
    if workload == "sequential":
        return range(nr_pages // 8, nr_pages // 8 + max(nr_pages // 4, 1))
    if workload == "hot":
        first = nr_pages // 2
        chosen = list(range(first, first + max(nr_pages // 16, 1)))
        chance.shuffle(chosen)
        return array("Q", chosen)
    share = 1 / 64 if workload == "sparse" else float(workload.removeprefix("share:"))
    return array("Q", chance.sample(range(nr_pages), max(round(nr_pages * share), 1)))


def repeats(workload: str) -> int:
    """How often each page is written."""
    return HOT_WRITES if workload == "hot" else 1


def pages_at(address: int, numbers: range | array[int]) -> RangeSet:
    """Return the same pages as ranges of a memory at `address`."""
    if isinstance(numbers, range):
        return RangeSet((address + numbers.start * PAGE_SIZE, address + numbers.stop * PAGE_SIZE))
    starts = [address + number * PAGE_SIZE for number in numbers]
    return RangeSet.of([(start, start + PAGE_SIZE) for start in starts])

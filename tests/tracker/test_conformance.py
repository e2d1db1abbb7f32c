"""Every tracker against a victim that changes its memory in every way, seed by seed; see tests/tracker/harness.py.

FERRY_SOAK=N runs N seeds of each tracker instead of a few; FERRY_SEEDS=A,B or A-B runs these:

    FERRY_SEEDS=17 tools/check tests/tracker/test_conformance.py -k scan
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.tracker.harness import run_seed
from tests.tracker.trackers import TRACKERS

FEW = 2


def _seeds() -> list[int]:
    chosen = os.environ.get("FERRY_SEEDS")
    if chosen is None:
        return list(range(int(os.environ.get("FERRY_SOAK", FEW))))
    seeds: list[int] = []
    for part in chosen.split(","):
        first, _, last = part.partition("-")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


@pytest.mark.parametrize("seed", _seeds())
@pytest.mark.parametrize("name", TRACKERS)
def test_replica_equals_the_victim_which_notices_nothing(name: str, seed: int, tmp_path: Path) -> None:
    wrong = run_seed(TRACKERS[name], seed, tmp_path)
    replay = f"FERRY_SEEDS={seed} tools/check {Path(__file__).name} -k '{name}'"
    assert not wrong, "\n".join([f"replay: {replay}", *wrong[:20], f"{len(wrong)} in all"])

"""The conformance suite itself: does it find a tracker that is broken?

Each fault of tests/tracker/mutants.py must be found by the situation that is meant for it or, where only a race shows
it, by one of a few seeds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tracker.harness import run_seed
from tests.tracker.mutants import FAULTS, TRACKER_FAULTS
from tests.tracker.situations import SITUATIONS
from tests.tracker.target import Target
from tests.tracker.trackers import SITUATED, TRACKERS, Kind

SEEDS = range(40)
"""Most are found by the first or the second."""


def _broken(kind: Kind, fault: str, name: str) -> Kind:
    breaks = {**FAULTS, **TRACKER_FAULTS[name]}[fault].breaks
    return kind._replace(make=lambda pid, fd: breaks(kind.make(pid, fd)))


def _fails_a_seed(kind: Kind, directory: Path) -> bool:
    for seed in SEEDS:
        inside = directory / str(seed)
        inside.mkdir()
        if run_seed(kind, seed, inside, untracked=False):
            return True
    return False


@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, fault) for name, faults in TRACKER_FAULTS.items() for fault in [*FAULTS, *faults]],
)
def test_broken_tracker_is_found(name: str, fault: str, tmp_path: Path) -> None:
    kind = _broken(TRACKERS[name], fault, name)
    situation = {**FAULTS, **TRACKER_FAULTS[name]}[fault].situation
    if not situation:
        assert _fails_a_seed(kind, tmp_path), f"{name} that {fault} passes {len(SEEDS)} seeds"
        return
    target = Target(kind)
    try:
        with pytest.raises(AssertionError):
            SITUATIONS[situation](target)
    finally:
        target.close()


def test_every_tracker_is_broken() -> None:
    assert TRACKER_FAULTS.keys() == set(SITUATED)

"""The conformance suite itself: does it find a tracker that is broken?

Each fault of tests/tracker/mutants.py must be found by a single situation or, failing that, by one of a few seeds.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tracker.harness import run_seed
from tests.tracker.mutants import FAULTS, TRACKER_FAULTS, Fault
from tests.tracker.situations import SITUATIONS
from tests.tracker.target import Target
from tests.tracker.trackers import TRACKERS, Kind

SEEDS = range(12)
FAULTY = [
    *((name, fault) for name in TRACKERS for fault in FAULTS),
    *((name, fault) for name, faults in TRACKER_FAULTS.items() for fault in faults),
]


def broken(name: str, fault: str) -> Kind:
    breaks: Fault = {**FAULTS, **TRACKER_FAULTS.get(name, {})}[fault]
    kind = TRACKERS[name]
    return kind._replace(make=lambda pid, fd: breaks(kind.make(pid, fd)))


def found_by_situation(kind: Kind) -> str:
    """The first single situation that fails."""
    for title, situation in SITUATIONS.items():
        target = Target(kind)
        try:
            situation(target)
        except AssertionError:
            return title
        finally:
            target.close()
    return ""


@pytest.mark.parametrize(("name", "fault"), FAULTY)
def test_broken_tracker_is_found(name: str, fault: str, tmp_path: Path) -> None:
    kind = broken(name, fault)
    if found_by_situation(kind):
        return
    for seed in SEEDS:
        directory = tmp_path / str(seed)
        directory.mkdir()
        if run_seed(kind, seed, directory, untracked=False):
            return
    pytest.fail(f"{name} that {fault} passes the suite")

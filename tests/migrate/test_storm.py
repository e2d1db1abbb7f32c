"""Concurrent remaps, unmaps, drops and protection changes: every page arrives as it was last written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts import Host
from tests.migrate.crossing import migrate, start_workload


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_page_survives_the_storm(
    source: Host, destination: Host, tmp_path: Path, seed: int
) -> None:
    workload = start_workload(source, tmp_path, "storm", seed, "STATUS")
    # Slow enough that many operations fall into every round.
    migrate(workload, destination, tmp_path, send=["--verify", "--bandwidth-limit=50M"])
    workload.assert_healthy(destination, count=30)


@pytest.mark.parametrize(
    ("tracker", "options"),
    [("log", ["--bandwidth-limit=100M", "--log-capacity=5000"]), ("bitmap", []), ("compare", [])],
)
def test_every_page_survives_the_storm_under_another_tracker(
    source: Host, destination: Host, tmp_path: Path, tracker: str, options: list[str]
) -> None:
    workload = start_workload(source, tmp_path, "storm", 4, "STATUS")
    run = migrate(
        workload, destination, tmp_path, send=["--verify", f"--tracker={tracker}", *options]
    )
    assert run.completed["tracker"] == tracker
    workload.assert_healthy(destination)


def test_calm_writes_and_drops_survive(source: Host, destination: Host, tmp_path: Path) -> None:
    workload = start_workload(source, tmp_path, "storm", 9, "STATUS", "--calm", "--pause=0.0002")
    migrate(workload, destination, tmp_path, send=["--verify"])
    workload.assert_healthy(destination, count=30)


def test_storm_survives_two_crossings(source: Host, destination: Host, tmp_path: Path) -> None:
    workload = start_workload(source, tmp_path, "storm", 5, "STATUS")
    migrate(workload, destination, tmp_path, send=["--verify"])
    workload.assert_healthy(destination)
    migrate(workload, source, tmp_path, send=["--verify"])
    workload.assert_healthy(source, count=30)

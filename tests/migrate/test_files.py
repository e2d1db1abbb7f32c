"""Every kind of file descriptor, one exhibit of tests/workloads/fdzoo.py at a time and all together."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts import Host
from tests.migrate.crossing import Workload, migrate, start_workload
from tests.workloads.fdzoo import EXHIBITS

# Enough checks on the destination for what needs some turns (the half-closed pipe).
TURNS = 40


def start_zoo(source: Host, directory: Path, kinds: str) -> tuple[Workload, Path]:
    zoo = directory / "zoo"
    zoo.mkdir()
    workload = start_workload(source, directory, "fdzoo", zoo, "STATUS", "--only", kinds)
    (zoo / "still").touch()
    # A turn that began before the file was there may still be at work: wait for two that saw it.
    workload.wait_for_notes(3)
    assert workload.last()["still"]
    return workload, zoo / "still"


@pytest.mark.parametrize("kind", sorted(EXHIBITS))
def test_descriptor_kind_is_carried(
    source: Host, destination: Host, tmp_path: Path, kind: str
) -> None:
    workload, still = start_zoo(source, tmp_path, kind)
    migrate(workload, destination, tmp_path)
    still.unlink()
    workload.assert_healthy(destination, count=TURNS if kind == "pipe" else 8)


def test_whole_zoo_is_carried_there_and_back(source: Host, destination: Host, tmp_path: Path) -> None:
    kinds = ",".join(EXHIBITS)
    workload, still = start_zoo(source, tmp_path, kinds)
    migrate(workload, destination, tmp_path, send=["--verify"])
    workload.assert_healthy(destination, count=3)
    migrate(workload, source, tmp_path)
    still.unlink()
    workload.assert_healthy(source, count=TURNS)

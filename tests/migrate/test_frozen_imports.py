"""Nothing is imported while the process stands still: that takes longer than most steps of a freeze.

Modules that few processes need are imported late (agent.state.registry), but never that late (agent.warmup).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.hosts import Host
from tests.migrate import crossing
from tests.migrate.crossing import migrate, start_workload


@pytest.mark.parametrize("rounds", ["--max-rounds=30", "--max-rounds=0"])
def test_nothing_is_imported_in_the_freeze(
    source: Host, destination: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: str
) -> None:
    sides = {"AGENT_SEND": "agent.cli.send", "AGENT_RECV": "agent.cli.recv"}
    for name, module in sides.items():
        argv = [sys.executable, "-m", "tests.migrate.import_watch", str(tmp_path / name), module]
        monkeypatch.setattr(crossing, name, argv)
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    (zoo / "still").touch()
    workload = start_workload(source, tmp_path, "fdzoo", zoo, "STATUS")
    done = migrate(workload, destination, tmp_path, send=[rounds])
    frozen = [span for span in done.completed["timeline"] if span["frozen"]]
    begin_ns = min(span["monotonic_ns"] for span in frozen)
    end_ns = max(span["monotonic_ns"] + 1e9 * (span["end_s"] - span["start_s"]) for span in frozen)
    assert end_ns - begin_ns >= done.completed["downtime_s"] * 1e9 / 2
    for name in sides:
        seen = json.loads((tmp_path / name).read_text())
        assert len(seen) > 100
        assert [module for when_ns, module in seen if begin_ns <= when_ns <= end_ns] == []
    (zoo / "still").unlink()
    workload.assert_healthy(destination, count=3)

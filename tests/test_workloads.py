"""The workloads without a migration: they find nothing wrong, and they do find what is wrong.

The control experiment of tests/migrate: an error there is the migration's, not the workload's.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.hosts import Host, wait_until
from tests.migrate.crossing import start_workload
from tests.workloads.blocked import MODES


@pytest.mark.parametrize("module", ["selfcheck", "timers", "signals", "storm", "fdzoo", "sharedmem", "threadchurn"])
def test_undisturbed_workload_finds_nothing_wrong(source: Host, tmp_path: Path, module: str) -> None:
    arguments: dict[str, list[str]] = {
        "storm": ["7", "STATUS"],
        "fdzoo": [str(tmp_path), "STATUS"],
        "sharedmem": ["STATUS", str(tmp_path / "data")],
    }
    workload = start_workload(source, tmp_path, module, *arguments.get(module, ["STATUS"]))
    workload.assert_healthy(source, count=8)


def test_every_blocked_mode_ends_as_planned(source: Host, tmp_path: Path) -> None:
    workloads = [
        start_workload(
            source, tmp_path, "blocked", mode, 0.5, "STATUS", status=tmp_path / f"{mode}.status", wait=False
        )
        for mode in MODES
    ]
    for workload in workloads:
        wait_until(lambda: workload.last().get("state") == "idle", f"{workload.status.name} to end")
        end = next(note for note in workload.notes() if note.get("state") == "end")
        assert end["result"] == end["expected"], end
        assert 0.49 < end["elapsed_s"] < 10, end
        assert workload.errors() == []


def test_storm_notices_a_page_that_changed_by_itself(source: Host, tmp_path: Path) -> None:
    workload = start_workload(source, tmp_path, "storm", 4, "STATUS")

    def spoil() -> None:
        """Overwrites the start of every page that carries a tag of a storm thread."""
        with open(source.proc(workload.pid) / "mem", "r+b", buffering=0) as memory:
            for line in (source.proc(workload.pid) / "maps").read_text().splitlines():
                span = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0 *$", line)
                if not span or int(span[2], 16) - int(span[1], 16) > 96 * 4096:
                    continue
                for address in range(int(span[1], 16), int(span[2], 16), 4096):
                    try:
                        memory.seek(address)
                        if memory.read(8)[6:8] in (b"\1\0", b"\2\0", b"\3\0"):
                            memory.seek(address)
                            memory.write(b"spoilt!!")
                    except OSError:
                        continue  # unmapped meanwhile

    def noticed() -> bool:
        spoil()
        return any("holds" in error for error in workload.errors())

    wait_until(noticed, "the storm to notice")

"""tools/dirtyrate: what it counts of a load that writes known pages, what it foretells, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.policy import FIXED_DOWNTIME_S, PolicyLimits
from agent.procfs.maps import MapsEntry, parse_maps, read_maps
from agent.procfs.smaps import read_vm_flags
from agent.procfs.status import read_status
from agent.ranges import RangeSet
from tests.hosts import REPOSITORY
from tests.prerequisites import require_root
from tools.dirtyrate_analysis import (
    Look,
    WorkingSet,
    WorkingSetCurve,
    hot_ranges,
    predict,
    working_sets,
)
from tools.dirtyrate_measure import measure

PAGE = 4096
OWN_PAGES = 500
"""What the load's interpreter may write beside the pages it is told to write; the kernel may join the mappings."""


def pages(*numbers: int) -> RangeSet:
    return RangeSet.of([(number * PAGE, (number + 1) * PAGE) for number in numbers])


class Load:
    """A running tests/tools/steady_writer.py."""

    def __init__(self, pid: int, status: Path) -> None:
        self.pid = pid
        self.status = status

    def notes(self) -> list[dict[str, Any]]:
        text = self.status.read_text() if self.status.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def wait_for_note(self, since_ns: int) -> None:
        deadline = time.monotonic() + 60
        while not any(note["realtime_ns"] > since_ns for note in self.notes()):
            assert time.monotonic() < deadline, "the load writes nothing"
            time.sleep(0.01)

    def memory(self) -> MapsEntry:
        """The mapping that it writes to: the largest."""
        maps = parse_maps(read_maps(self.pid))
        return max((e for e in maps if not e.path), key=lambda e: e.end - e.start)


@contextlib.contextmanager
def load(directory: Path, *, megabytes: int, rate: int) -> Iterator[Load]:
    require_root()
    status = directory / "status"
    program = [sys.executable, str(Path(__file__).with_name("steady_writer.py"))]
    program += [str(status), str(megabytes), str(rate)]
    with subprocess.Popen(program) as process:
        try:
            made = Load(process.pid, status)
            made.wait_for_note(0)
            yield made
        finally:
            process.kill()


def test_as_many_pages_are_counted_as_were_written(tmp_path: Path) -> None:
    # Every write goes to another page, so writes and dirty pages are the same number.
    with load(tmp_path, megabytes=128, rate=2000) as writer:
        seconds = 1.0
        while True:
            measured = measure(writer.pid, seconds, 0.2)
            writer.wait_for_note(measured.ended_ns)
            notes = writer.notes()
            inside = [n for n in notes if measured.began_ns <= n["realtime_ns"] <= measured.ended_ns]
            if len(inside) > 1:
                break
            seconds *= 2  # a busy machine
        memory = writer.memory()
        counted = sum(look.pages.clip(memory.start, memory.end).nr_pages for look in measured.looks)
        before = [n for n in notes if n["realtime_ns"] < measured.began_ns]
        after = [n for n in notes if n["realtime_ns"] > measured.ended_ns]
        assert counted >= inside[-1]["pages_written"] - inside[0]["pages_written"] > 0
        assert counted <= after[0]["pages_written"] - before[-1]["pages_written"] + OWN_PAGES


def test_hot_set_is_found_and_the_process_left_as_it_was(tmp_path: Path) -> None:
    with load(tmp_path, megabytes=16, rate=40_000) as writer:
        memory = writer.memory()
        fds = sorted(path.name for path in Path(f"/proc/{writer.pid}/fd").iterdir())
        answer = subprocess.run(
            [
                *(str(REPOSITORY / "tools/dirtyrate"), str(writer.pid), "--json"),
                *("--seconds=1", "--interval=0.25", "--bandwidth=1G", "--bandwidth", "1k"),
            ],
            check=True,
            stdout=subprocess.PIPE,
        )
        result = json.loads(answer.stdout)
        hottest = result["hot_ranges"][0]
        assert memory.start <= hottest["start"] and hottest["end"] <= memory.end
        inside = [hot for hot in result["hot_ranges"] if memory.start <= hot["start"] < memory.end]
        assert 16 << 20 <= sum(hot["end"] - hot["start"] for hot in inside) <= memory.end - memory.start
        assert sum(hot["share"] for hot in inside) > 0.8
        assert 4096 <= result["working_set"][-1]["pages_max"] < result["pages_populated"]
        fast, slow = result["predictions"]
        assert fast["action"] == "switchover" and fast["total_s"] < slow["total_s"]
        assert slow["extrapolated"] and slow["downtime_s"] > 100
        assert sorted(path.name for path in Path(f"/proc/{writer.pid}/fd").iterdir()) == fds
        assert read_status(writer.pid).tracer_pid == 0
        assert not any({"uw", "um"} & entry.flags for entry in read_vm_flags(writer.pid))
        writer.wait_for_note(time.time_ns())


def test_process_that_is_not_there_is_refused() -> None:
    program = [sys.executable, str(REPOSITORY / "tools/dirtyrate_measure.py")]
    answer = subprocess.run([*program, "4194304"], stderr=subprocess.PIPE, text=True)
    assert answer.returncode == 1
    assert answer.stderr.startswith("dirtyrate: Cannot watch process 4194304")


def test_working_set_counts_different_pages() -> None:
    looks = [Look(1.0, 1.0, pages(1, 2)), Look(2.0, 1.0, pages(2, 3)), Look(3.0, 1.0, pages(1))]
    assert working_sets(looks) == [
        WorkingSet(1.0, 5 / 3, 2),
        WorkingSet(2.0, 3.0, 3),
        WorkingSet(3.0, 3.0, 3),
    ]


@pytest.mark.parametrize(
    "seconds, expected", [(0.0, 0), (0.5, 50), (1.0, 100), (1.5, 110), (2.0, 120), (4.0, 160), (100, 200)]
)
def test_working_set_between_and_beyond_what_was_measured(seconds: float, expected: float) -> None:
    curve = WorkingSetCurve([WorkingSet(1.0, 100, 100), WorkingSet(2.0, 120, 120)], nr_pages=200)
    assert curve.pages(seconds) == pytest.approx(expected)


def test_hot_and_cold_parts_of_a_mapping_are_told_apart() -> None:
    mapping = MapsEntry(0, 512 * PAGE, "rw-p", 0, 0, 0, 0, "")
    elsewhere = MapsEntry(1000 * PAGE, 1001 * PAGE, "rw-p", 0, 0, 0, 0, "[heap]")
    hot = RangeSet((0, 64 * PAGE))
    looks = [Look(i, 1.0, hot.union(pages(100 + 8 * i, 1000))) for i in range(10)]
    first, second, *cold = hot_ranges(looks, [mapping, elsewhere], 20)
    assert (first.start, first.end, first.density, first.name) == (0, 64 * PAGE, 1.0, "anonymous")
    assert first.share == pytest.approx(640 / 660)
    assert (second.name, second.density) == ("[heap]", 1.0)
    assert sum(part.share for part in cold) == pytest.approx(10 / 660)


def test_hot_set_that_fits_the_link_converges_to_it() -> None:
    # 10,000 pages in all, 100 of them written all the time; the link takes 10,000 pages a second.
    curve = WorkingSetCurve([WorkingSet(0.001, 100, 100), WorkingSet(10.0, 100, 100)], nr_pages=10_000)
    made = predict(curve, 10_000, 10_000 * PAGE, PolicyLimits())
    assert {one.pages_dirty for one in made.rounds} == {10_000, 100}
    assert made.action == "switchover"
    assert made.downtime_s == pytest.approx(FIXED_DOWNTIME_S + 0.01)
    assert made.total_s == pytest.approx(1 + (len(made.rounds) - 1) * 0.01 + made.downtime_s)


def test_target_that_writes_faster_than_the_link_takes_is_foretold_as_such() -> None:
    curve = WorkingSetCurve([WorkingSet(1.0, 5000, 5000), WorkingSet(2.0, 10000, 10000)], 100_000)
    made = predict(curve, 100_000, 1000 * PAGE, PolicyLimits(strict=True))
    assert made.action == "give up"
    assert made.downtime_s > 10

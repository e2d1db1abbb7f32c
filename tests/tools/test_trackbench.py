"""tools/trackbench: a smoke run has a record for everything, loses nothing and leaves nothing; what is made of figures.

No figure of time is looked at: they are the machine's.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from agent.kernel.features import kernel_features
from agent.ranges import RangeSet
from tests.hosts import REPOSITORY
from tests.prerequisites import require_root
from tools.trackbench_experiments import EVENTS, EXPERIMENTS, PAGE_KINDS, SCALES, VARIANTS
from tools.trackbench_page import page
from tools.trackbench_patterns import WORKLOADS, page_numbers, pages_at
from tools.trackbench_results import Record, Results, bytes_text, significant
from tools.trackbench_target import percentiles

SMOKE = SCALES["smoke"]
VOID = {"meta"}

pytestmark = pytest.mark.timeout(300)  # some seconds on an idle machine


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """The JSON document, the HTML page and what was printed."""
    require_root()
    directory = tmp_path_factory.mktemp("trackbench")
    files = directory / "out.json", directory / "out.html"
    with subprocess.Popen(
        [
            *(str(REPOSITORY / "tools/trackbench"), "--smoke"),
            *("--json", str(files[0]), "--html", str(files[1])),
        ],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        printed, _ = process.communicate()
    assert process.returncode == 0
    assert not list(members(process.pid)), "processes are left over"
    return json.loads(files[0].read_text()), files[1].read_text(), printed


def members(session: int) -> Iterable[int]:
    """The processes of a session."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(path.name)) == session:
                yield int(path.name)
        except ProcessLookupError:
            continue


def records_of(document: dict[str, Any], experiment: str) -> list[Record]:
    return [one for one in document["records"] if one["experiment"] == experiment]


def test_every_tracker_was_measured_in_every_experiment(smoke: tuple[dict[str, Any], str, str]) -> None:
    document = smoke[0]
    lacking = set() if kernel_features().has_soft_dirty else {"soft-dirty"}
    assert set(document["unavailable"]) == lacking
    variants = set(VARIANTS) - lacking
    expected: dict[str, set[tuple[object, ...]]] = {
        "first-write": {(w, kind) for kind, names in PAGE_KINDS.items() for w in names},
        "memory-size": {(size,) for size in SMOKE.sizes},
        "dirty-share": {(share,) for share in SMOKE.shares},
        "events": {(event,) for event in EVENTS},
        "running": {(name,) for name in ("hot set", "mmap churn", "fork server")},
    }
    axes = {
        "first-write": ("workload", "pages"),
        "memory-size": ("bytes",),
        "dirty-share": ("share",),
        "events": ("event",),
        "running": ("workload",),
    }
    for experiment, cases in expected.items():
        found = {
            (one["variant"], *(one[axis] for axis in axes[experiment]))
            for one in records_of(document, experiment)
        }
        assert found == {(name, *case) for name in variants for case in cases}, experiment
    logs = {(one["variant"], one["capacity"]) for one in records_of(document, "log-capacity")}
    assert logs == {
        *((name, size) for name in ("log-stall", "log-spill") for size in SMOKE.capacities),
        *((name, 0) for name in ("none", "scan", "bitmap")),
    }


def test_no_tracker_missed_a_page_and_none_named_another(smoke: tuple[dict[str, Any], str, str]) -> None:
    judged = [one for one in smoke[0]["records"] if "missing" in one]
    assert {one["variant"] for one in judged} == set(smoke[0]["variants"]) - {"none"}
    for one in judged:
        assert one["missing"] == 0, one
        assert one["pages_reported"] >= one["pages_written"] > 0
        if one["variant"] != "soft-dirty":
            assert one["needless"] == 0, one


def test_counts_are_those_of_each_design(smoke: tuple[dict[str, Any], str, str]) -> None:
    for one in smoke[0]["records"]:
        kind = one["variant"]
        if kind != "log-stall":
            assert one["stalls"] == 0 and one["stall_s"] == 0
        if kind != "log-spill":
            assert one["spills"] == 0
        if not kind.startswith("log"):
            assert one["records"] == 0
        elif one["experiment"] == "first-write":
            assert one["records"] >= one["pages_written"]
        if one["experiment"] == "log-capacity" and one["capacity"]:
            assert one["records"] <= one["rounds"] * one["capacity"]
        if one["experiment"] == "events" and one["event"] == "fork" and kind in ("log-stall", "bitmap"):
            assert one["forks"] == one["events"]
        if "p50_ns" in one:
            assert 0 < one["p50_ns"] <= one["p99_ns"] <= one["p99.9_ns"] <= one["max_ns"]


def test_stalling_log_holds_what_it_may_and_the_rest_waits(smoke: tuple[dict[str, Any], str, str]) -> None:
    smallest = min(SMOKE.capacities)
    (stalling,) = (
        one
        for one in records_of(smoke[0], "log-capacity")
        if one["variant"] == "log-stall" and one["capacity"] == smallest
    )
    assert stalling["rounds"] >= SMOKE.burst_pages // smallest
    assert stalling["records"] >= SMOKE.burst_pages


class Checker(HTMLParser):
    """Notes what does not belong into a page that stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.charts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object"):
            self.wrong.append(tag)
        self.wrong += [f"{k}={v}" for k, v in attrs if k in ("src", "href") or "//" in (v or "")]
        self.charts += tag == "svg" and dict(attrs).get("role") == "img"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"/{tag}")


def test_page_stands_alone_with_all_charts_in_both_colour_schemes(smoke: tuple[dict[str, Any], str, str]) -> None:
    document, text, printed = smoke
    checker = Checker()
    checker.feed(text)
    assert not checker.wrong and not checker.open
    assert checker.charts == len(EXPERIMENTS)
    assert "prefers-color-scheme: dark" in text and "url(" not in text and "@import" not in text
    assert "load average" in text and document["machine"]["kernel"] in text
    for table in Results(document["records"]).tables():
        assert table.title in printed
        assert all(len(row) == len(table.columns) for row in table.rows)


# Pure parts


def record(variant: str, repetition: int, **values: object) -> Record:
    return {"variant": variant, "repetition": repetition, **values}


def test_cost_is_the_difference_to_the_floor_of_the_same_repetition() -> None:
    made = [
        record(
            variant,
            repetition,
            **{"experiment": "first-write", "workload": "sparse", "pages": "4 KiB"},
            **{"p50_ns": p50, "p99_ns": p50, "p99.9_ns": p50, "max_ns": p50},
            **{"writer_cpu_s": cpu, "agent_cpu_s": 1e-6, "pages_written": 1},
        )
        for variant, repetition, p50, cpu in [
            ("none", 0, 100.0, 1e-6),
            ("scan", 0, 1100.0, 3e-6),
            ("none", 1, 900.0, 2e-6),  # a busy moment
            ("scan", 1, 1900.0, 4e-6),
        ]
    ]
    results = Results(made)
    waits, cpu = results.first_write_waits(), results.first_write_cpu()
    assert waits.rows == [["none", "0.5"], ["scan", "1"]]
    assert cpu.rows == [["scan", "3"]]


def test_crossover_is_where_the_walk_costs_what_the_faults_cost() -> None:
    gib = 1 << 30
    made = [
        record(
            name,
            0,
            **{"experiment": "memory-size", "bytes": size * gib, "agent_cpu_s": cpu, "agent_bytes": 0},
            **{"writer_cpu_s": writer, "pages_written": 100},
        )
        for name, size, cpu, writer in [
            ("none", 1, 0.0, 0.0),
            ("none", 9, 0.0, 0.0),
            ("scan", 1, 0.001, 0.0),
            ("scan", 9, 0.009, 0.0),  # a millisecond per GiB
            ("log-spill", 1, 0.004, 0.001),
            ("log-spill", 9, 0.004, 0.001),
        ]
    ]
    results = Results(made)
    assert results.slope_us_per_gib("scan") == pytest.approx(1000)
    assert results.crossover_gib() == pytest.approx(5)  # 1 + (4 + 1 - 1) / 1
    assert any("fewer than about 20 pages per GiB" in text for text in results.findings())
    assert Results(made[:4]).crossover_gib() is None


def test_page_of_no_records_is_a_page() -> None:
    assert page(["nothing"], Results([])).endswith("</html>\n")


@pytest.mark.parametrize("workload", [*WORKLOADS, "share:0.05"])
def test_workloads_write_different_pages_of_the_memory(workload: str) -> None:
    numbers = page_numbers(workload, 4096)
    assert len(set(numbers)) == len(numbers) > 0
    assert 0 <= min(numbers) and max(numbers) < 4096
    assert list(numbers) == list(page_numbers(workload, 4096))
    ranges = pages_at(1 << 30, numbers)
    assert ranges.nr_pages == len(numbers)
    assert ranges.intersect(RangeSet((1 << 30, (1 << 30) + 4096 * 4096))) == ranges


def test_percentiles_are_by_nearest_rank() -> None:
    assert percentiles(range(1, 1001)) == {"p50": 500, "p99": 990, "p99.9": 999, "max": 1000}
    assert percentiles([7]) == {"p50": 7, "p99": 7, "p99.9": 7, "max": 7}


def test_numbers_are_short() -> None:
    assert [significant(x) for x in (0, 0.01234, 1.0, 12.34, 1234.5, 0.000012345)] == [
        *("0", "0.0123", "1", "12.3", "1234", "0.000012"),
    ]
    assert [bytes_text(x) for x in (4 << 20, 1 << 30)] == ["4 MiB", "1 GiB"]

"""tools/bench: its smoke run measures what it says, its results fit together. No figure is compared with a time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import REPOSITORY, Host
from tests.prerequisites import require_namespaces, require_program
from tools.benchmark.compare import compare, verdict
from tools.benchmark.samples import (
    Sample,
    SampleWriter,
    Window,
    around,
    latencies,
    longest_gap_s,
    percentile,
    rate_per_s,
    read_samples,
)
from tools.benchmark.scenarios import SETS, expand, parse_scenario
from tools.benchmark.shaping import NoShaping, shape

MS = 1_000_000
pytestmark = pytest.mark.timeout(300)  # on a busy machine


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tools.benchmark", *map(str, arguments)]
    return subprocess.run(argv, cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True)


# -- the smoke run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str, Path]:
    """(document, page, what was printed, the JSON file) of one smoke run."""
    require_namespaces()
    require_program("redis-server", "redis-server")
    directory = tmp_path_factory.mktemp("bench")
    done = bench("--smoke", f"--json={directory}/r.json", f"--html={directory}/r.html")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((directory / "r.json").read_text())
    return document, (directory / "r.html").read_text(), done.stdout, directory / "r.json"


def test_smoke_measures_every_scenario_once(smoke: tuple[dict[str, Any], str, str, Path]) -> None:
    document, _, printed, _ = smoke
    assert document["not_measured"] == []
    assert [result["scenario"] for result in document["results"]] == SETS["smoke"]
    for name in SETS["smoke"]:
        assert re.search(rf"^{name} +1 ", printed, re.MULTILINE)
    assert document["startup"].keys() == {"python", "help", "check"}
    assert all(times["min_s"] > 0 for times in document["startup"].values())


def test_smoke_results_fit_together(smoke: tuple[dict[str, Any], str, str, Path]) -> None:
    for result in smoke[0]["results"]:
        name = result["scenario"]
        assert 0 < result["downtime_s"] < result["total_s"] < result["wall_s"], name
        assert result["gap_s"] == max(result["gaps_s"][part] for part in ("precopy", "switchover", "after")), name
        assert result["latency_ms"]["before"] and result["latency_ms"]["after"], name
        for part in filter(None, result["latency_ms"].values()):
            assert part["count"] > 0 and part["p50"] <= part["p90"] <= part["p99"] <= part["max"], name
        assert len(result["rounds"]) >= 2 and result["pages_total"] > 0, name
        for side in ("send", "recv"):
            assert result["cpu"][side]["user_s"] > 0 and result["peak_rss_kib"][side] > 4096, (name, side)


def test_smoke_phases_of_both_sides_lie_on_one_axis(smoke: tuple[dict[str, Any], str, str, Path]) -> None:
    for result in smoke[0]["results"]:
        phases = {
            side: {span["name"]: span for span in result["phases"][side]} for side in ("send", "recv")
        }
        frozen = [span for span in phases["send"].values() if span["frozen"]]
        assert min(span["start_ms"] for span in frozen) == 0
        for spans in phases.values():
            assert all(span["start_ms"] <= span["end_ms"] for span in spans.values())
        # The source can only hear of the release after it: the clocks are one, and so are the axes.
        assert phases["recv"]["restore"]["end_ms"] < phases["send"]["commit"]["end_ms"]
        assert [step["phase"] for step in result["freeze"]["send"]][0] == "freeze"
        assert sum(step["microseconds"] for step in result["freeze"]["send"]) > 0


def test_smoke_client_followed_the_server(smoke: tuple[dict[str, Any], str, str, Path]) -> None:
    (redis,) = (result for result in smoke[0]["results"] if result["kind"] == "redis")
    answered_by = [int(value) for _, _, value in redis["answers"]]
    assert answered_by[0] == 0 and answered_by[-1] == 1
    assert answered_by == sorted(answered_by), "the source answered after the destination had"
    for part in ("before", "after"):
        assert redis["writes_per_s"][part] > 0


def test_smoke_floor_moved_the_very_bytes(smoke: tuple[dict[str, Any], str, str, Path]) -> None:
    (raw,) = (result for result in smoke[0]["results"] if result["kind"] == "raw")
    assert raw["floors"]
    for floor in raw["floors"].values():
        assert floor["bytes"] == 16 << 20 and floor["seconds"] > 0
    assert raw["bytes_total"] > 16 << 20, "random bytes were sent in fewer bytes than they are"


def test_page_is_self_contained_and_its_plots_are_well_formed(
    smoke: tuple[dict[str, Any], str, str, Path],
) -> None:
    document, page, _, _ = smoke
    assert not re.search(r"<script|<link|<img|src=|url\(|https?:", page)
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    # Four for each scenario, and two curves against the number of mappings.
    assert len(plots) == 4 * len(document["results"]) + 2
    for plot in plots:
        root = ElementTree.fromstring(plot)
        assert not re.search(r"\b(nan|inf)\b", plot)
        assert root.findall(".//text") and (root.findall(".//rect") or root.findall(".//path"))
    for name in SETS["smoke"]:
        assert f'<h2 id="{name}">' in page


def test_results_do_not_differ_from_themselves(smoke: tuple[dict[str, Any], str, str, Path]) -> None:
    path = smoke[3]
    done = bench("--compare", path, path)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "runs)" in line]
    assert len(rows) >= 5 * len(SETS["smoke"])
    assert all(" 1.00  within the spread" in row for row in rows), done.stdout


def test_failed_migration_is_reported_and_not_counted(tmp_path: Path) -> None:
    require_namespaces()
    done = bench("--smoke", "vmas-10+no-such-option", f"--json={tmp_path}/r.json")
    assert done.returncode == 1, done.stdout + done.stderr
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["results"] == []
    (entry,) = document["not_measured"]
    assert "no-such-option" in entry["reason"]


# -- its parts -------------------------------------------------------------------------------------------


def test_link_is_limited_or_the_reason_told(hosts: tuple[Host, Host]) -> None:
    require_program("tc", "iproute2")
    assert shape(hosts, "1gbit")["rate"] == "1gbit"
    for host in hosts:
        assert b"tbf" in host.run(["tc", "qdisc", "show"]).stdout
    with pytest.raises(NoShaping, match="of source to fast"):
        shape(hosts, "fast")


def test_samples_survive_the_file_and_are_counted_by_window(tmp_path: Path) -> None:
    path = tmp_path / "samples"
    writer = SampleWriter(str(path))
    for number in range(100):
        answered = number * MS + (50 * MS if number >= 40 else 0)
        writer.add(answered - MS // 2, answered, 3)
    samples = read_samples(path)
    assert len(samples) == 96  # whole batches of 32
    assert samples[1] == Sample(MS // 2, MS, 3)
    assert longest_gap_s(samples, Window(0, 39 * MS)) == 0.001
    assert longest_gap_s(samples, Window(50 * MS, 60 * MS)) == 0.051, "it lasts longer than the window"
    assert [sample.answered_ns // MS for sample in around(samples, Window(38 * MS, 60 * MS))] == [37, 38, 39, 90]
    assert rate_per_s(samples, Window(0, 40 * MS)) == 3 * 40 / 0.04
    assert latencies(samples, Window(0, 10 * MS))["max"] == 0.5
    assert latencies(samples, Window(50 * MS, 80 * MS)) == {}
    assert read_samples(tmp_path / "none") == []


@pytest.mark.parametrize("share, expected", [(0.5, 50.0), (0.99, 99.0), (0.999, 100.0), (1.0, 100.0), (0.0, 1.0)])
def test_percentile_is_the_nearest_rank(share: float, expected: float) -> None:
    assert percentile([float(number) for number in range(1, 101)], share) == expected
    assert percentile([7.0], share) == 7.0


def test_scenario_names_say_all() -> None:
    redis = parse_scenario("redis-1024-10k+compress=none+max-rounds=3")
    assert (redis.megabytes, redis.rate, redis.options) == (1024, 10_000, ("--compress=none", "--max-rounds=3"))
    vmas = parse_scenario("vmas-30k")
    assert (vmas.number, vmas.program) == (30_000, "subject")
    assert [scenario.name for scenario in expand(["threads", "threads-64", "fds-7"])] == [*SETS["threads"], "fds-7"]
    for name in {name for names in SETS.values() for name in names}:
        assert parse_scenario(name).needed_bytes > 0


@pytest.mark.parametrize("name", ["redisx", "redis-", "mysql-5", "threads-4-10k", "redis-1024+", "vmas-x"])
def test_what_is_no_scenario_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        parse_scenario(name)


def test_wrong_arguments_end_with_status_2() -> None:
    done = bench("mysql-5")
    assert done.returncode == 2 and "'mysql-5' is no scenario" in done.stderr


def test_a_difference_within_the_spread_is_none() -> None:
    assert verdict([5.0, 6.0], [3.0, 4.9]) == "better"
    assert verdict([5.0, 6.0], [6.1, 9.0]) == "worse"
    assert verdict([5.0, 6.0], [4.0, 5.1]) == "within the spread"


def test_comparison_names_what_only_one_file_has() -> None:
    about = {"revision": "r", "began": "today"}
    run = {"scenario": "a", "downtime_s": 0.004, "gap_s": 0.01, "total_s": 1.0, "bytes_total": 10}
    run |= {"writes_per_s": {}, "latency_ms": {"before": {}, "precopy": {}}, "cpu_s_per_gib": None, "peak_rss_kib": {}}
    old = {"about": about, "results": [run, run | {"scenario": "b"}]}
    new = {"about": about, "results": [run | {"downtime_s": 0.002}, run | {"scenario": "c"}]}
    lines = compare(old, new)
    assert any(re.search(r"^a +downtime +4.00 +2.00 +0.50  better", line) for line in lines)
    assert "only in the old one: b" in lines and "only in the new one: c" in lines

"""Measures migrations between two namespace hosts, and what the machine itself would allow.

    tools/bench                              the quick set
    tools/bench redis --runs 10 --json r.json --html r.html
    tools/bench redis-1024-10k threads-64 --runs 3 --phases -- --compress=zstd
    tools/bench compress --link 1gbit        the same over a slower link (tc tbf in the network namespaces)
    tools/bench --compare OLD.json NEW.json  is it faster?
    tools/bench --render r.json --html r.html
    tools/bench --smoke                      a bit of everything, in seconds; for tests

Wants root. Scenarios are named KIND-NUMBER[-RATE][+OPTION...], KIND one of redis, memory, raw, threads, vmas, fds (for
instance redis-1024-10k+max-rounds=3); sets of them: {sets}. Options after -- go to agent-send. docs/performance.md says
what the figures mean. Numbers of a busy machine mean little: compare within one run of the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.hosts import REPOSITORY, HostError
from tools.benchmark import table
from tools.benchmark.compare import compare, load
from tools.benchmark.floors import FLOORS
from tools.benchmark.page import render
from tools.benchmark.run import BenchError, measure
from tools.benchmark.scenarios import SETS, Scenario, expand
from tools.benchmark.shaping import NoShaping
from tools.benchmark.startup import compile_agents, measure_startup, startup_text

FORMAT = 1
"""Of the JSON file."""
WATCH_S, SMOKE_WATCH_S = 1.5, 0.2
STARTUP_RUNS, SMOKE_STARTUP_RUNS = 9, 1
FAILURES = (BenchError, NoShaping, HostError, AssertionError, RuntimeError, TimeoutError, subprocess.SubprocessError)
"""What makes one run fail, from the helpers of the tests, too, and no more than that run."""


def about_this_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one has to know to make sense of the figures."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    revision = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    model = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].split("\n")[0]
    return {
        "format": FORMAT,
        "revision": revision,
        "kernel": platform.release(),
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "python": platform.python_version(),
        "began": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "load_average_at_begin": os.getloadavg()[0],
        "scenarios": arguments.scenarios,
        "runs": arguments.runs,
        "link": arguments.link,
        "options": arguments.options,
    }


def run_once(scenario: Scenario, number: int, arguments: argparse.Namespace, document: dict[str, Any]) -> None:
    """One run of one scenario, into the document."""
    try:
        result = measure(
            scenario,
            options=arguments.options,
            watch_s=SMOKE_WATCH_S if arguments.smoke else WATCH_S,
            link=arguments.link,
            floors=FLOORS[:2] if arguments.smoke else FLOORS,
        )
    except FAILURES as err:
        reason = f"{type(err).__name__}: {err}"
        document["not_measured"].append({"scenario": scenario.name, "run": number, "reason": reason})
        print(f"{scenario.name}: not measured: {reason}", flush=True)
        return
    document["results"].append(result)
    if arguments.runs > 1 or arguments.phases:
        print(table.row(f"{scenario.name} #{number}", [result]), flush=True)
    if arguments.phases:
        print("\n".join(table.phases_text(result)), flush=True)


def write_files(arguments: argparse.Namespace, document: dict[str, Any]) -> None:
    """Written again after each run: one that is interrupted leaves what it has."""
    if arguments.json:
        arguments.json.write_text(json.dumps(document) + "\n")
    if arguments.html:
        arguments.html.write_text(render(document))


def parse(argv: list[str]) -> argparse.Namespace:
    assert __doc__
    sets = "; ".join(f"{name}: {len(names)}" for name, names in SETS.items())
    # Only the first "--" is ours.
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description=__doc__.replace("{sets}", sets),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenarios", nargs="*", help="scenarios and sets of them (default: quick)")
    parser.add_argument("--runs", type=int, default=1, help="how often each is measured, in turn (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots there")
    parser.add_argument("--render", type=Path, metavar="JSON", help="make the page from older results")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="compare results")
    parser.add_argument("--link", metavar="RATE", help="limit the link to that, as tc has it: 1gbit, 200mbit")
    parser.add_argument("--phases", action="store_true", help="the phases of each run's freeze, too")
    parser.add_argument("--smoke", action="store_true", help="the smoke set, in seconds")
    arguments = parser.parse_args(argv[:split])
    arguments.options = argv[split + 1 :]
    arguments.scenarios = arguments.scenarios or ["smoke" if arguments.smoke else "quick"]
    if arguments.render and not arguments.html:
        parser.error("--render needs --html")
    try:
        arguments.expanded = expand(arguments.scenarios)
    except ValueError as err:
        parser.error(str(err))
    if any(scenario.program == "redis" for scenario in arguments.expanded) and not shutil.which("redis-server"):
        parser.error("redis-server is not installed")
    return arguments


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    try:
        if arguments.compare:
            print("\n".join(compare(*map(load, arguments.compare))))
            return 0
        if arguments.render:
            write_files(arguments, load(arguments.render))
            return 0
    except (OSError, ValueError) as err:
        print(f"tools/bench: {err}", file=sys.stderr)
        return 2
    return run_all(arguments)


def run_all(arguments: argparse.Namespace) -> int:
    """Measure everything that was asked for."""
    if os.geteuid() != 0:
        print("tools/bench makes namespaces and moves processes: run it as root", file=sys.stderr)
        return 2
    # Ended, by whatever signal, it takes along what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    document: dict[str, Any] = {"about": about_this_run(arguments), "results": [], "not_measured": [], "startup": {}}
    compile_agents()
    document["startup"] = measure_startup(SMOKE_STARTUP_RUNS if arguments.smoke else STARTUP_RUNS)
    print(startup_text(document["startup"]))
    print(table.header(), flush=True)
    for number in range(arguments.runs):
        # In turn: what the machine does besides meets every scenario alike.
        for scenario in arguments.expanded:
            run_once(scenario, number, arguments, document)
            write_files(arguments, document)
    for name, runs in table.by_scenario(document["results"]).items():
        print(table.row(name, runs))
    print(table.LEGEND, end="")
    document["about"]["load_average_at_end"] = os.getloadavg()[0]
    write_files(arguments, document)
    return 1 if document["not_measured"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Compares the trackers: every one on the same workloads, in one run, with the untracked process as the floor.

Usage: tools/trackbench [--smoke|--quick] [--json FILE] [--html FILE] [--trackers NAMES] [--only EXPERIMENTS]

For each workload and tracker: what the writer waits and pays at the first write to a page in a round, latency
percentiles, stalls, what a round costs the agent, what it reports, what was sent twice without need, and memory.
Prints tables; --json has every single measurement, --html the tables and charts in one file without references.

--smoke takes seconds and shows that it works; --quick some two minutes; without either it takes about ten, and 12 GiB
of memory for its largest size. The figures are differences to the untracked process in the same run, and medians of
repetitions in which the trackers take turns. Compare within a run, not between machines. Needs what agent-send needs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.trackbench_child import ChildFailed  # noqa: E402 - needs the repository on the path
from tools.trackbench_experiments import (  # noqa: E402
    EXPERIMENTS,
    SCALES,
    VARIANTS,
    Bench,
    available_bytes,
    unavailable,
)
from tools.trackbench_page import page  # noqa: E402
from tools.trackbench_results import GIB, Results, render  # noqa: E402

FORMAT = 1


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in fields.items()}
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "kernel": platform.release(),
        "cpu": facts.get("model name", "unknown"),
        "cpus": len(os.sched_getaffinity(0)),
        "virtual": "hypervisor" in facts.get("flags", "").split(),
        "memory_available_bytes": available_bytes(),
        "huge_pages": huge.read_text().strip() if huge.exists() else "none",
        "python": platform.python_version(),
    }


def names(text: str, known: Sequence[str]) -> list[str]:
    """Parse a list with commas."""
    chosen: list[str] = text.split(",")
    for name in chosen:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(known)}")
    return chosen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="trackbench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", dest="scale", action="store_const", const="smoke", help="some seconds")
    size.add_argument("--quick", dest="scale", action="store_const", const="quick", help="some minutes")
    parser.add_argument("--json", metavar="FILE", help="write every measurement there")
    parser.add_argument("--html", metavar="FILE", help="write tables and charts there")
    parser.add_argument(
        "--trackers",
        type=lambda text: names(text, list(VARIANTS)),
        default=list(VARIANTS),
        help=f"some of {', '.join(VARIANTS)}; none is always there",
    )
    parser.add_argument(
        "--only",
        type=lambda text: names(text, list(EXPERIMENTS)),
        default=list(EXPERIMENTS),
        metavar="EXPERIMENTS",
        help=f"some of {', '.join(EXPERIMENTS)}",
    )
    return parser.parse_args()


def run(scale: str, trackers: Sequence[str], only: Sequence[str]) -> dict[str, Any]:
    """Measure; returns the document for --json.

    :raises ChildFailed: a measurement failed.
    """
    missing = {name: why for name, why in unavailable().items() if name in trackers}
    variants = [n for n in VARIANTS if n == "none" or (n in trackers and n not in missing)]
    bench = Bench(SCALES[scale], variants, lambda text: print(text, file=sys.stderr))
    began, load = time.time(), os.getloadavg()
    records = list(bench.run(only))
    return {
        "format": FORMAT,
        "scale": scale,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds": time.time() - began,
        "load_average": {"before": load[0], "after": os.getloadavg()[0]},
        "machine": machine(),
        "variants": variants,
        "unavailable": missing,
        "notes": bench.notes,
        "records": records,
    }


def heading(document: dict[str, Any]) -> list[str]:
    """Say where, when and under which conditions this was measured."""
    facts, load = document["machine"], document["load_average"]
    kind = "virtual machine" if facts["virtual"] else "no hypervisor seen"
    lines = [
        f"{facts['cpus']} CPUs ({facts['cpu']}, {kind}), Linux {facts['kernel']}, "
        f"{facts['memory_available_bytes'] / GIB:.1f} GiB of memory available, Python {facts['python']}",
        f"{document['scale']} run of {document['seconds']:.0f} s, begun {document['began']}; load average "
        f"{load['before']:.1f} before, {load['after']:.1f} after",
    ]
    lines += [f"not measured: {name}: {why}" for name, why in document["unavailable"].items()]
    return [*lines, *document["notes"]]


def main() -> int:
    options = parse()
    try:
        document = run(options.scale or "full", options.trackers, options.only)
    except ChildFailed as err:
        print(f"trackbench: {err}", file=sys.stderr)
        return 1
    results = Results(document["records"])
    document["findings"] = results.findings()
    print("\n".join(heading(document)))
    for table in results.tables():
        print(f"\n{render(table)}")
    print("\n" + "\n".join(results.findings()))
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=1))
    if options.html:
        Path(options.html).write_text(page(heading(document), results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

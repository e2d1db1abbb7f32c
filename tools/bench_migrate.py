"""Measures migrations of tools/dirty_memory.py between two namespace hosts and prints one row each.

Usage: python tools/bench_migrate.py [--megabytes 64,256] [--rate 0,10000] [--runs N] [-- AGENT-SEND OPTIONS]

For each size, rate and run: rounds, bytes, total time, reported downtime, and the longest gap the load itself saw.
One JSON object per line with --json. Run it on an idle machine; numbers of a busy one mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.hosts import (  # noqa: E402 - needs the repository on the path
    REPOSITORY,
    host_pair,
    wait_until,
)
from tests.migrate.crossing import migrate, start_program  # noqa: E402


def measure(megabytes: int, rate: int, options: list[str]) -> dict[str, Any]:
    """One migration between fresh hosts."""
    with tempfile.TemporaryDirectory(prefix="ferry-bench-") as name, host_pair() as (source, destination):
        directory = Path(name)
        status = directory / "load"
        load = [sys.executable, str(REPOSITORY / "tools" / "dirty_memory.py"), f"--megabytes={megabytes}"]
        load += [f"--rate={rate}", f"--status={status}"]
        workload = start_program(source, directory, load, status=status, wait=False)
        wait_until(workload.last, "the load to be warm")
        moved = len(workload.notes())
        address = f"tcp://{destination.addresses[0]}:7000"
        report = migrate(workload, destination, directory, send=options, address=address).completed
        # The gap is in the first line that the load writes over there.
        seen = len(workload.notes())
        wait_until(lambda: len(workload.notes()) > seen + 1, "the load to go on")
        return {
            "megabytes": megabytes,
            "rate": rate,
            "rounds": len(report["rounds"]),
            "bytes_total": report["bytes_total"],
            "total_s": report["total_s"],
            "downtime_s": report["downtime_s"],
            "longest_gap_s": max(note["worst_s"] for note in workload.notes()[moved:]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", default="64,256")
    parser.add_argument("--rate", default="0,10000")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("options", nargs="*", help="passed to agent-send, after --")
    arguments = parser.parse_args()
    if not arguments.json:
        print(f"{'MiB':>6} {'pages/s':>8} {'rounds':>6} {'MB sent':>9} {'total s':>8} {'down ms':>8} {'gap ms':>8}")
    for megabytes in map(int, arguments.megabytes.split(",")):
        for rate in map(int, arguments.rate.split(",")):
            for _ in range(arguments.runs):
                row = measure(megabytes, rate, arguments.options)
                if arguments.json:
                    print(json.dumps(row), flush=True)
                    continue
                print(
                    f"{megabytes:>6} {rate:>8} {row['rounds']:>6} {row['bytes_total'] / 1e6:>9.1f} "
                    f"{row['total_s']:>8.3f} {row['downtime_s'] * 1e3:>8.1f} {row['longest_gap_s'] * 1e3:>8.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

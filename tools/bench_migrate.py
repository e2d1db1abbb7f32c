"""Measures migrations between two namespace hosts and prints one row each.

Usage: python tools/bench_migrate.py [--load memory|redis] [--megabytes 64,256] [--rate 0,10000] [--runs N]
           [--phases] [-- AGENT-SEND OPTIONS]

memory: tools/dirty_memory.py, one anonymous mapping; rate in pages written per second. redis: redis-server filled to
the size, and tools/redis_load.py writing to it (rate 0: nobody does, and no gap is seen). For each size, rate and run:
rounds, bytes, total time, downtime, the longest gap that the load itself or the client saw, and the peak memory of
both agents. --phases adds what the downtime consists of, on either side. One JSON object per line with --json.

Session records go to a tmpfs, as by default. Run it on an idle machine; numbers of a busy one mean little: look at
minima and medians of several runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.hosts import (  # noqa: E402 - needs the repository on the path
    REPOSITORY,
    Host,
    host_pair,
    wait_until,
)
from tests.migrate.crossing import Workload, migrate, start_program  # noqa: E402

TMPFS = "/run"
REDIS_PORT = 6379
VALUE_BYTES = 1000
BYTES_PER_KEY = 1124
"""What one key of VALUE_BYTES costs Redis, all in all."""


class PeakMemory(threading.Thread):
    """Samples the peak resident memory of the agents on two hosts until stopped."""

    def __init__(self, hosts: tuple[Host, ...]) -> None:
        super().__init__(daemon=True)
        self.hosts = hosts
        self.peaks: dict[str, int] = {}
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.02):
            for host in self.hosts:
                for process in list(host._started):
                    self._look(process.outer)

    def _look(self, pid: int) -> None:
        with contextlib.suppress(OSError, IndexError, ValueError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"agent.cli.send" in words or b"agent.cli.recv" in words:
                side = "send" if b"agent.cli.send" in words else "recv"
                text = Path(f"/proc/{pid}/status").read_text()
                peak = int(text.partition("VmHWM:")[2].split()[0])
                self.peaks[side] = max(self.peaks.get(side, 0), peak)

    def stop(self) -> dict[str, int]:
        """Peak KiB by side."""
        self._stopped.set()
        self.join()
        return self.peaks


def frozen_phases(outcome: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each phase in which the target stood still."""
    return {
        span["name"]: round((span["end_s"] - span["start_s"]) * 1e3, 2)
        for span in outcome["timeline"]
        if span["frozen"]
    }


@contextlib.contextmanager
def memory_load(
    source: Host, destination: Host, directory: Path, megabytes: int, rate: int
) -> Iterator[tuple[Workload, Workload | None, str, list[str]]]:
    """A process that writes to its own memory, and notes how late it was."""
    status = directory / "load"
    argv = [sys.executable, str(REPOSITORY / "tools" / "dirty_memory.py"), f"--megabytes={megabytes}"]
    argv += [f"--rate={rate}", f"--status={status}"]
    workload = start_program(source, directory, argv, status=status, wait=False)
    wait_until(workload.last, "the load to be warm")
    yield workload, workload, "worst_s", []


@contextlib.contextmanager
def redis_load(
    source: Host, destination: Host, directory: Path, megabytes: int, rate: int
) -> Iterator[tuple[Workload, Workload | None, str, list[str]]]:
    """A Redis server of that size, and a client on the source host."""
    argv = ["redis-server", "--port", str(REDIS_PORT), "--save", "", "--dir", str(directory)]
    argv += ["--bind", "0.0.0.0", "--protected-mode", "no", "--enable-debug-command", "yes"]
    server = start_program(source, directory, argv, status=directory / "redis", wait=False)
    wait_until(lambda: source.listens_on_tcp(REDIS_PORT), "Redis to listen")
    keys = megabytes * (1 << 20) // BYTES_PER_KEY
    populate = ["redis-cli", "debug", "populate", str(keys), "key", str(VALUE_BYTES)]
    source.run(populate, timeout_s=120)
    client = None
    if rate:
        argv = [sys.executable, str(REPOSITORY / "tools" / "redis_load.py"), str(directory / "client")]
        argv += [f"127.0.0.1:{REDIS_PORT}", f"{destination.addresses[0]}:{REDIS_PORT}"]
        argv += [f"--rate={rate}", f"--keys={keys}"]
        client = start_program(source, directory, argv, status=directory / "client", wait=False)
        wait_until(lambda: len(client.notes()) > 10, "the client to be at it")
    yield server, client, "longest_gap_s", ["--tcp-close"]


LOADS = {"memory": memory_load, "redis": redis_load}


def measure(load: str, megabytes: int, rate: int, options: list[str]) -> dict[str, Any]:
    """One migration between fresh hosts."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ferry-bench-", dir=TMPFS)))
        source, destination = hosts = stack.enter_context(host_pair())
        made = LOADS[load](source, destination, directory, megabytes, rate)
        workload, observer, gap, needed = stack.enter_context(made)
        peak = PeakMemory(hosts)
        peak.start()
        moved = len(observer.notes()) if observer else 0
        address = f"tcp://{destination.addresses[0]}:7000"
        crossing = migrate(workload, destination, directory, send=[*needed, *options], address=address)
        peaks = peak.stop()
        longest_gap_s = None
        if observer:
            # The gap is in the first line that is written after the switchover.
            seen = len(observer.notes())
            wait_until(lambda: len(observer.notes()) > seen + 2, "the load to go on")
            longest_gap_s = max(note[gap] for note in observer.notes()[moved:])
        report = crossing.completed
        return {
            "load": load,
            "megabytes": megabytes,
            "rate": rate,
            "rounds": len(report["rounds"]),
            "bytes_total": report["bytes_total"],
            "total_s": report["total_s"],
            "downtime_s": report["downtime_s"],
            "longest_gap_s": longest_gap_s,
            "peak_kib": peaks,
            "round_0_s": report["rounds"][0]["seconds"],
            "last_round_pages": report["rounds"][-1]["pages_dirty"],
            "send_ms": frozen_phases(report),
            "recv_ms": frozen_phases(crossing.recv.outcome),
        }


HEADER = (
    f"{'MiB':>6} {'rate/s':>7} {'rounds':>6} {'MB sent':>8} {'total s':>8} {'down ms':>8} {'gap ms':>8} "
    f"{'last pages':>10} {'RSS MiB':>9}"
)


def row_text(row: dict[str, Any]) -> str:
    gap = "-" if row["longest_gap_s"] is None else f"{row['longest_gap_s'] * 1e3:.1f}"
    peaks = "/".join(f"{row['peak_kib'].get(side, 0) / 1024:.0f}" for side in ("send", "recv"))
    return (
        f"{row['megabytes']:>6} {row['rate']:>7} {row['rounds']:>6} {row['bytes_total'] / 1e6:>8.1f} "
        f"{row['total_s']:>8.3f} {row['downtime_s'] * 1e3:>8.1f} {gap:>8} {row['last_round_pages']:>10} {peaks:>9}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", choices=LOADS, default="memory")
    parser.add_argument("--megabytes", default="64,256")
    parser.add_argument("--rate", default="0,10000")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--phases", action="store_true", help="add the phases of the freeze, in ms")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("options", nargs="*", help="passed to agent-send, after --")
    arguments = parser.parse_args()
    if arguments.load == "redis" and not shutil.which("redis-server"):
        parser.error("redis-server is not installed")
    if not arguments.json:
        print(HEADER)
    for megabytes in map(int, arguments.megabytes.split(",")):
        for rate in map(int, arguments.rate.split(",")):
            for _ in range(arguments.runs):
                row = measure(arguments.load, megabytes, rate, arguments.options)
                print(json.dumps(row) if arguments.json else row_text(row), flush=True)
                if arguments.phases and not arguments.json:
                    print(f"       source {row['send_ms']}\n       destination {row['recv_ms']}", flush=True)
                time.sleep(0.2)


if __name__ == "__main__":
    main()

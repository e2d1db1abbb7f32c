"""One measured migration: fresh hosts, a load, both agents, and what everybody saw of it.

Ends nothing but what it started. Figures are in seconds unless named otherwise; instants are CLOCK_MONOTONIC, which
both hosts share, so that the phases of both sides and the client's answers lie on one axis.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hosts import Host, host_pair, wait_until
from tests.migrate.crossing import COMPLETED, Receiver, Workload, start_agent_send, start_program
from tools.benchmark.floors import Floor, measure_floors, warm_memory
from tools.benchmark.samples import (
    FLUSH_SAMPLES,
    Sample,
    Window,
    around,
    count_samples,
    latencies,
    longest_gap_s,
    rate_per_s,
    read_samples,
)
from tools.benchmark.scenarios import Scenario
from tools.benchmark.shaping import shape

TMPFS = "/dev/shm"
"""For the records of sessions and the samples: no disk in between."""
REDIS_PORT = 6379
FERRY_PORT = 7000
VALUE_BYTES = 1000
BYTES_PER_KEY = 1124
"""What one key of VALUE_BYTES costs Redis, all in all."""
START_S = 300.0
"""For filling memory: a virtual machine hands out 0.25 GB/s of fresh memory."""
LAUNCHER = ("setsid",)
"""Each agent in a session of its own, as ssh or a service manager starts it: see agent.niceness."""
SETTLE_NS = 200_000_000
"""After the release: what comes later counts as afterwards."""
AROUND_NS = 60_000_000
"""So much before the freeze and after the release the answers are kept one by one."""
BIN_NS = 50_000_000
MORE_SAMPLES = 3 * FLUSH_SAMPLES
"""Whoever watches has noted so much in any stretch that is looked at."""


class BenchError(Exception):
    """A scenario could not be measured."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A load that runs: the process to move, and who notes what of it."""

    workload: Workload
    beats: Path
    """Samples of the client that pings, or of the process itself."""
    writes: Path | None = None
    options: tuple[str, ...] = ()


class PeakMemory(threading.Thread):
    """Samples the peak resident memory of processes, by name, until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.pids: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self._statuses: dict[str, int] = {}
        self._stopped = threading.Event()

    def run(self) -> None:
        # With few system calls: the CPU that it takes is one of the two that the agents have.
        while not self._stopped.wait(0.02):
            for name, pid in list(self.pids.items()):
                with contextlib.suppress(OSError, IndexError, ValueError):
                    if name not in self._statuses:
                        if b"--json" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                            continue  # still nsenter's
                        self._statuses[name] = os.open(f"/proc/{pid}/status", os.O_RDONLY)
                    text = os.pread(self._statuses[name], 4096, 0)
                    peak = int(text.partition(b"VmHWM:")[2].split(None, 1)[0])
                    self.peaks[name] = max(self.peaks.get(name, 0), peak)

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()
        for fd in self._statuses.values():
            os.close(fd)


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Both reports, and what the agents used up."""

    send: dict[str, Any]
    recv: dict[str, Any]
    wall_s: float
    cpu: dict[str, dict[str, float]]
    peak_rss_kib: dict[str, int]


# -- loads -----------------------------------------------------------------------------------------------


def _inside(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"tools.benchmark.{module}", *map(str, arguments)]


@contextlib.contextmanager
def start_load(scenario: Scenario, source: Host, destination: Host, directory: Path) -> Iterator[Watched]:
    """The process of a scenario, warm, and everybody who watches it."""
    start = _start_redis if scenario.program == "redis" else _start_subject
    watched = start(scenario, source, destination, directory)

    _wait_for_samples(watched)
    yield watched


def _wait_for_samples(watched: Watched) -> None:
    """Until everybody who watches has noted some more."""
    files = [watched.beats] if watched.writes is None else [watched.beats, watched.writes]
    before = [count_samples(file) for file in files]

    def noted() -> bool:
        if not watched.workload.host.outer_pid(watched.workload.pid):
            raise BenchError(f"the load ended: {watched.workload.printed()}")
        return all(count_samples(file) >= count + MORE_SAMPLES for file, count in zip(files, before))

    wait_until(noted, "the load to be at it", START_S)


def _watch(watched: Watched, seconds: float) -> Window:
    """Let it be for so long, or longer where it is slow; returns when that was."""
    start_ns = time.monotonic_ns()
    time.sleep(seconds)
    _wait_for_samples(watched)
    return Window(start_ns, time.monotonic_ns())


def _start_subject(scenario: Scenario, source: Host, _destination: Host, directory: Path) -> Watched:
    beats = directory / "beats"
    argv = _inside("subject", beats, f"--megabytes={scenario.megabytes}", f"--rate={scenario.rate}")
    argv.append("--fill=random" if scenario.kind == "raw" else "--fill=half")
    if scenario.kind in ("threads", "vmas", "fds"):
        argv.append(f"--{scenario.kind}={scenario.number}")
    return Watched(workload=start_program(source, directory, argv, status=beats, wait=False), beats=beats)


def _start_redis(scenario: Scenario, source: Host, destination: Host, directory: Path) -> Watched:
    argv = ["redis-server", "--port", str(REDIS_PORT), "--save", "", "--dir", str(directory)]
    argv += ["--bind", "0.0.0.0", "--protected-mode", "no", "--enable-debug-command", "yes"]
    server = start_program(source, directory, argv, status=directory / "redis", wait=False)
    wait_until(lambda: source.listens_on_tcp(REDIS_PORT), "Redis to listen")
    keys = scenario.megabytes * (1 << 20) // BYTES_PER_KEY
    populate = ["redis-cli", "debug", "populate", str(keys), "key", str(VALUE_BYTES)]
    source.run(populate, timeout_s=START_S)
    addresses = [f"{host.addresses[0]}:{REDIS_PORT}" for host in (source, destination)]
    beats, writes = directory / "pings", directory / "writes"
    start_program(
        source, directory, _inside("client", "ping", beats, *addresses), status=beats, wait=False
    )
    if scenario.rate:
        argv = _inside("client", "write", writes, *addresses, f"--rate={scenario.rate}", f"--keys={keys}")
        start_program(source, directory, argv, status=writes, wait=False)
    return Watched(
        workload=server, beats=beats, writes=writes if scenario.rate else None, options=("--tcp-close",)
    )


# -- the migration ---------------------------------------------------------------------------------------


def _cpu_since(before: resource.struct_rusage) -> dict[str, float]:
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "user_s": round(now.ru_utime - before.ru_utime, 4),
        "system_s": round(now.ru_stime - before.ru_stime, 4),
    }


def move(watched: Watched, source: Host, destination: Host, directory: Path, options: list[str]) -> Moved:
    """Run both agents to their ends.

    Nobody else may be waited for meanwhile: what the agents used is what the children did that ended.
    :raises BenchError: the migration failed, with what both sides said.
    """
    address = f"tcp://{destination.addresses[0]}:{FERRY_PORT}"
    with PeakMemory() as memory:
        receiver = Receiver(destination, directory, address=address, launcher=LAUNCHER)
        memory.pids["recv"] = receiver.process.outer
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process, _argv = start_agent_send(
            source, directory, *watched.options, *options, watched.workload.pid, address, launcher=LAUNCHER
        )
        memory.pids["send"] = process.outer
        stdout, stderr = process.communicate(START_S)
        wall_s, send_cpu = time.monotonic() - began, _cpu_since(before)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.wait() != COMPLETED:
            receiver.process.kill()
            raise BenchError(f"agent-send failed: {stdout!r} {stderr!r} {receiver.finish()}")
        received = receiver.finish(START_S)
        if received.status != COMPLETED:
            raise BenchError(f"agent-recv failed: {received}")
        return Moved(
            send=_last_event(stdout),
            recv=received.outcome,
            wall_s=wall_s,
            cpu={"send": send_cpu, "recv": _cpu_since(before)},
            peak_rss_kib=dict(memory.peaks),
        )


def _last_event(stdout: bytes) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(stdout.decode().splitlines()[-1])
    return event


def measure(
    scenario: Scenario,
    *,
    options: list[str],
    watch_s: float,
    link: str | None = None,
    floors: tuple[Floor, ...] = (),
) -> dict[str, Any]:
    """One migration between fresh hosts; `watch_s`: how long to look before and after it.

    :raises BenchError: it could not be done.
    """
    available = _available_bytes()
    if available < scenario.needed_bytes:
        raise BenchError(
            f"needs {scenario.needed_bytes >> 20} MiB of memory, {available >> 20} MiB are available"
        )
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ferry-bench-", dir=TMPFS)))
        source, destination = stack.enter_context(host_pair())
        watched = stack.enter_context(start_load(scenario, source, destination, directory))
        shaped = shape((source, destination), link) if link else None
        result: dict[str, Any] = {}
        if scenario.kind == "raw" and floors:
            result["floors"] = measure_floors(
                floors, source, destination, watched.workload.pid, directory, nr_bytes=scenario.megabytes << 20
            )
        load_before = os.getloadavg()[0]
        before = _watch(watched, watch_s)
        if scenario.megabytes:
            warm_memory(scenario.megabytes << 20)
        moved = move(watched, source, destination, directory, [*scenario.options, *options])
        watched.workload.host = destination
        time.sleep(SETTLE_NS / 1e9)
        after = _watch(watched, watch_s)
        result |= {
            "scenario": scenario.name,
            "kind": scenario.kind,
            "number": scenario.number,
            "megabytes": scenario.megabytes,
            "rate": scenario.rate,
            "link": shaped,
            "load_average": round(load_before, 2),
        }
        return result | summary(moved, watched, before, after)


def _available_bytes() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0]) << 10


# -- what it meant ---------------------------------------------------------------------------------------


def summary(moved: Moved, watched: Watched, before: Window, after: Window) -> dict[str, Any]:
    """Everything that is kept of one migration."""
    began_ns = min(span["monotonic_ns"] for span in moved.send["timeline"])
    frozen_ns = min(span["monotonic_ns"] for span in moved.send["timeline"] if span["frozen"])
    released_ns = frozen_ns + int(moved.send["downtime_s"] * 1e9)
    spans = {
        "before": before,
        "precopy": Window(began_ns, frozen_ns),
        "switchover": Window(frozen_ns, released_ns + SETTLE_NS),
        "after": after,
    }
    beats = read_samples(watched.beats)
    writes = read_samples(watched.writes) if watched.writes else []
    moved_gib = moved.send["pages_total"] * 4096 / (1 << 30)
    cpu_s = sum(sum(side.values()) for side in moved.cpu.values())
    # Around the switchover: the silences that the downtime is a part of, or that begin right after it.
    stop = {"switchover": Window(frozen_ns, released_ns + SETTLE_NS // 10)}
    gaps = {name: round(longest_gap_s(beats, window), 6) for name, window in (spans | stop).items()}
    return {
        "downtime_s": moved.send["downtime_s"],
        "downtime_basis": moved.send["downtime_basis"],
        "gap_s": max(gap for name, gap in gaps.items() if name != "before"),
        "gaps_s": gaps,
        "latency_ms": {name: latencies(beats, window) for name, window in spans.items()},
        "writes_per_s": {name: round(rate_per_s(writes, window), 1) for name, window in spans.items()}
        if writes
        else {},
        "write_latency_ms": {name: latencies(writes, window) for name, window in spans.items()} if writes else {},
        "total_s": moved.send["total_s"],
        "wall_s": round(moved.wall_s, 4),
        "bytes_total": moved.send["bytes_total"],
        "pages_total": moved.send["pages_total"],
        "rounds": moved.send["rounds"],
        "cpu": moved.cpu,
        "cpu_s_per_gib": round(cpu_s / moved_gib, 3) if moved_gib else None,
        "peak_rss_kib": moved.peak_rss_kib,
        "phases": {
            side: [_relative(span, frozen_ns) for span in report["timeline"] if span["monotonic_ns"]]
            for side, report in (("send", moved.send), ("recv", moved.recv))
        },
        "freeze": {"send": moved.send["freeze"], "recv": moved.recv["freeze"]},
        "answers": _answers(beats, Window(frozen_ns, released_ns)),
        "series": _series(beats, writes, spans, frozen_ns),
    }


def _relative(span: dict[str, Any], frozen_ns: int) -> dict[str, Any]:
    start_ms = (span["monotonic_ns"] - frozen_ns) / 1e6
    return {
        "name": span["name"],
        "start_ms": round(start_ms, 3),
        "end_ms": round(start_ms + (span["end_s"] - span["start_s"]) * 1e3, 3),
        "frozen": span["frozen"],
    }


def _answers(beats: list[Sample], frozen: Window) -> list[list[float]]:
    """[ms after the freeze began, latency in ms, value] of each answer around the switchover."""
    return [
        [
            round((sample.answered_ns - frozen.start_ns) / 1e6, 3),
            round((sample.answered_ns - sample.asked_ns) / 1e6, 3),
            sample.value,
        ]
        for sample in around(beats, Window(frozen.start_ns - AROUND_NS, frozen.end_ns + AROUND_NS))
    ]


def _series(
    beats: list[Sample], writes: list[Sample], spans: dict[str, Window], frozen_ns: int
) -> list[list[float]]:
    """[ms after the freeze began, longest latency in ms, writes/s] for each BIN_NS from before to after."""
    first, last = spans["before"].start_ns, spans["after"].end_ns
    length = max(BIN_NS, (last - first) // 600)
    slowest: dict[int, float] = {}
    counted: dict[int, int] = {}
    for sample in Window(first, last).of(beats):
        index = (sample.answered_ns - first) // length
        slowest[index] = max(slowest.get(index, 0.0), (sample.answered_ns - sample.asked_ns) / 1e6)
    for sample in Window(first, last).of(writes):
        index = (sample.answered_ns - first) // length
        counted[index] = counted.get(index, 0) + sample.value
    return [
        [
            round((first + index * length - frozen_ns) / 1e6, 1),
            round(slowest.get(index, 0.0), 3),
            round(counted.get(index, 0) / (length / 1e9)),
        ]
        for index in range((last - first) // length)
    ]

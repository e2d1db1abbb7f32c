"""The experiments of tools/trackbench: each shows the trackers one thing, and one of its axes separates them.

    first-write   workload x page size: what the first write to a page in a round costs the writer
    memory-size   the same few dirty pages in ever more memory: what a round costs where nearly all is clean
    dirty-share   more and more dirty pages in the same memory: what each of them costs all parties
    events        unmap, move, drop, fork: what each costs the process, one by one
    running       hot set, mmap churn, fork server, with rounds taken all the while: latency, stalls, pages sent twice
    log-capacity  one burst of writes, rounds meanwhile, logs of different sizes: waiting against spilling

Every experiment goes through all trackers in one repetition before the next begins, in another order each time, and
`none` is one of them: what a record is compared with was measured moments before or after on the same process.
A record is a flat dictionary: what was done, by which variant, in which repetition, and what came out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from agent.errors import MigrationError
from agent.kernel.features import kernel_features
from agent.options import DEFAULT_LOG_CAPACITY
from agent.tracker.choose import choose_tracker
from agent.types import PAGE_SIZE
from tools.trackbench_child import Child
from tools.trackbench_patterns import WORKLOADS

Record = dict[str, Any]


class Variant(NamedTuple):
    """A tracker and how it is set."""

    tracker: str
    when_full: str = "spill"


VARIANTS = {
    "none": Variant("none"),
    "scan": Variant("scan"),
    "log-stall": Variant("log", "stall"),
    "log-spill": Variant("log", "spill"),
    "bitmap": Variant("bitmap"),
    "soft-dirty": Variant("soft-dirty"),
    "compare": Variant("compare"),
}
EVENTS = ("unmap", "move", "drop", "protect", "fork")
PAGE_KINDS: dict[str, tuple[str, ...]] = {"4 KiB": tuple(WORKLOADS), "huge": ("sparse", "whole")}
"""And the workloads that are run on them."""
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much of everything."""

    repetitions: int
    first_write_bytes: int
    samples: int
    """Writes of a workload that are timed one by one."""
    sizes: tuple[int, ...]
    """Bytes, for memory-size."""
    dirty_pages: int
    """For memory-size."""
    share_bytes: int
    shares: tuple[float, ...]
    events: int
    forks: int
    running_bytes: int
    running_s: float
    pause_s: float
    """Between rounds that run all the while."""
    burst_pages: int
    capacities: tuple[int, ...]
    """Records, for log-capacity."""


SCALES = {
    "smoke": Scale(
        repetitions=1,
        first_write_bytes=8 * MIB,
        samples=100,
        sizes=(4 * MIB, 16 * MIB),
        dirty_pages=64,
        share_bytes=8 * MIB,
        shares=(0.01, 1.0),
        events=8,
        forks=3,
        running_bytes=4 * MIB,
        running_s=0.05,
        pause_s=0.001,
        burst_pages=512,
        capacities=(64, 4096),
    ),
    "quick": Scale(
        repetitions=3,
        first_write_bytes=64 * MIB,
        samples=1000,
        sizes=(64 * MIB, 256 * MIB, 1024 * MIB),
        dirty_pages=256,
        share_bytes=256 * MIB,
        shares=(0.0001, 0.001, 0.01, 0.1, 1.0),
        events=200,
        forks=20,
        running_bytes=32 * MIB,
        running_s=0.5,
        pause_s=0.02,
        burst_pages=8192,
        capacities=(256, 2048, 16384),
    ),
    "full": Scale(
        repetitions=3,
        first_write_bytes=256 * MIB,
        samples=4000,
        sizes=(64 * MIB, 256 * MIB, 1024 * MIB, 4096 * MIB, 8192 * MIB),
        dirty_pages=256,
        share_bytes=1024 * MIB,
        shares=(0.0001, 0.001, 0.01, 0.1, 1.0),
        events=500,
        forks=50,
        running_bytes=64 * MIB,
        running_s=1.5,
        pause_s=0.02,
        burst_pages=32768,
        capacities=(256, 1024, 4096, 16384, 65536),
    ),
}


def unavailable() -> dict[str, str]:
    """Return the variants that this kernel does not carry, with the reason."""
    missing: dict[str, str] = {}
    for name, variant in VARIANTS.items():
        if variant.tracker != "none":
            try:
                choose_tracker(variant.tracker, kernel_features())
            except MigrationError as err:
                missing[name] = str(err)
    return missing


def available_bytes() -> int:
    """How much memory the machine can spare."""
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        fields = dict(line.split(":") for line in meminfo)
    return int(fields["MemAvailable"].split()[0]) << 10


class Bench:
    """One target process and the agents that take turns with it."""

    def __init__(self, scale: Scale, variants: Sequence[str], say: Callable[[str], None]) -> None:
        self.scale = scale
        self.variants = list(variants)
        self._say = say
        self._agents: dict[str, Child] = {}
        self.notes: list[str] = []

    def run(self, experiments: Sequence[str]) -> Iterator[Record]:
        """Carry out experiments on one process, which must end well: nobody killed it."""
        with contextlib.ExitStack() as stack:
            # An agent for each variant, so that none inherits what another has left in memory.
            for name in self.variants:
                self._agents[name] = stack.enter_context(Child("trackbench_agent.py"))
            target = stack.enter_context(Child("trackbench_target.py"))
            for name in experiments:
                for record in EXPERIMENTS[name](self, target):
                    yield {"experiment": name, **record}
            target.process.stdin.close()  # type: ignore[union-attr]  # it ends
            if target.process.wait(60):
                raise RuntimeError(f"the measured process ended with status {target.process.returncode}")

    def turns(self, what: str, variants: Sequence[str] = ()) -> Iterator[tuple[int, str]]:
        """Yield (repetition, variant) so that all variants have their turn in each repetition."""
        order = list(variants or self.variants)
        for repetition in range(self.scale.repetitions):
            self._say(f"{what}: repetition {repetition + 1} of {self.scale.repetitions}")
            for name in order:
                yield repetition, name
            order = order[1:] + order[:1]

    @contextlib.contextmanager
    def tracked(
        self, target: Child, name: str, capacity: int = DEFAULT_LOG_CAPACITY
    ) -> Iterator[Child]:
        """The agent of a variant, which tracks the target; if anything fails the end of its input disarms it."""
        tracker, when_full = VARIANTS[name]
        agent = self._agents[name]
        agent.ask("arm", pid=target.pid, tracker=tracker, capacity=capacity, when_full=when_full)
        yield agent
        agent.ask("disarm")

    def first_write(self, target: Child) -> Iterator[Record]:
        nr_bytes = self.scale.first_write_bytes
        for kind, workloads in PAGE_KINDS.items():
            huge = kind == "huge"
            for repetition, name in self.turns(f"first-write, {kind} pages"):
                # Huge pages are split by tracking, so each turn gets new memory.
                memory = target.ask("map", nr_bytes=nr_bytes, huge=huge)
                with self.tracked(target, name) as agent:
                    for workload in workloads:
                        if huge:
                            memory = target.ask("map", nr_bytes=nr_bytes, huge=True)
                            agent.ask("round")
                        yield {
                            "workload": workload,
                            "pages": kind,
                            "bytes": nr_bytes,
                            "huge_bytes": memory["huge_bytes"],
                            "variant": name,
                            "repetition": repetition,
                            **self._write_and_look(target, agent, memory["address"], nr_bytes, workload),
                            **self._sample(target, agent, workload, fresh=huge, nr_bytes=nr_bytes),
                        }

    def _write_and_look(
        self, target: Child, agent: Child, address: int, nr_bytes: int, workload: str
    ) -> Record:
        wrote = target.ask("write", workload=workload)
        nr_pages = nr_bytes // PAGE_SIZE
        looked = agent.ask("round", address=address, nr_pages=nr_pages, workload=workload)
        return {
            "writer_wall_s": wrote["wall_s"],
            "writer_cpu_s": wrote["cpu_s"],
            "pages_written": wrote["pages"],
            "writes": wrote["writes"],
            **_round_values(looked),
        }

    def _sample(
        self, target: Child, agent: Child, workload: str, *, fresh: bool, nr_bytes: int
    ) -> Record:
        if fresh:
            target.ask("map", nr_bytes=nr_bytes, huge=True)
            agent.ask("round")
        sampled = target.ask("sample", workload=workload, limit=self.scale.samples)
        agent.ask("round")
        return _latency(sampled)

    def memory_size(self, target: Child) -> Iterator[Record]:
        for nr_bytes in self.scale.sizes:
            if available_bytes() < 1.5 * nr_bytes:
                self.notes.append(f"memory-size: no {nr_bytes // MIB} MiB, the machine has too little to spare")
                continue
            address = target.ask("map", nr_bytes=nr_bytes, huge=False)["address"]
            workload = f"share:{self.scale.dirty_pages * PAGE_SIZE / nr_bytes!r}"
            for repetition, name in self.turns(f"memory-size, {nr_bytes // MIB} MiB"):
                with self.tracked(target, name) as agent:
                    idle = agent.ask("round")
                    values = self._write_and_look(target, agent, address, nr_bytes, workload)
                    yield {
                        "bytes": nr_bytes,
                        "variant": name,
                        "repetition": repetition,
                        **values,
                        "idle_round_s": idle["collect_s"],
                        "idle_round_cpu_s": idle["cpu_s"],
                        **agent.ask("memory"),
                    }

    def dirty_share(self, target: Child) -> Iterator[Record]:
        nr_bytes = self.scale.share_bytes
        address = target.ask("map", nr_bytes=nr_bytes, huge=False)["address"]
        for repetition, name in self.turns("dirty-share"):
            with self.tracked(target, name) as agent:
                for share in self.scale.shares:
                    values = self._write_and_look(target, agent, address, nr_bytes, f"share:{share!r}")
                    yield {
                        "bytes": nr_bytes,
                        "share": share,
                        "variant": name,
                        "repetition": repetition,
                        **values,
                        **agent.ask("memory"),
                    }

    def events(self, target: Child) -> Iterator[Record]:
        target.ask("map", nr_bytes=self.scale.running_bytes, huge=False)
        for repetition, name in self.turns("events"):
            with self.tracked(target, name) as agent:
                for kind in EVENTS:
                    target.ask("areas", count=self.scale.events)
                    agent.ask("round")  # registers them
                    agent.ask("round")
                    count = self.scale.forks if kind == "fork" else self.scale.events
                    changed = target.ask("change", kind=kind, count=count)
                    yield {
                        "event": kind,
                        "variant": name,
                        "repetition": repetition,
                        "writer_wall_s": changed["wall_s"],
                        "writer_cpu_s": changed["cpu_s"],
                        "events": changed["events"],
                        **_latency(changed),
                        **_round_values(agent.ask("round")),
                    }

    def running(self, target: Child) -> Iterator[Record]:
        target.ask("map", nr_bytes=self.scale.running_bytes, huge=False)
        seconds = {"seconds": self.scale.running_s}
        workloads: dict[str, tuple[str, dict[str, object]]] = {
            "hot set": ("busy", {"workload": "hot", **seconds}),
            "mmap churn": ("churn", {**seconds}),
            "fork server": ("forks", {**seconds}),
        }
        for repetition, name in self.turns("running"):
            with self.tracked(target, name) as agent:
                for workload, (what, arguments) in workloads.items():
                    yield {
                        "workload": workload,
                        "variant": name,
                        "repetition": repetition,
                        **self._meanwhile(target, agent, what, arguments),
                    }

    def log_capacity(self, target: Child) -> Iterator[Record]:
        nr_bytes = 4 * self.scale.burst_pages * PAGE_SIZE
        target.ask("map", nr_bytes=nr_bytes, huge=False)
        logs = [name for name in self.variants if VARIANTS[name].tracker == "log"]
        others = [name for name in self.variants if name in ("none", "scan", "bitmap")]
        cases = {f"{name}/{size}": (name, size) for name in logs for size in self.scale.capacities}
        cases.update({name: (name, 0) for name in others})
        for repetition, case in self.turns("log-capacity", list(cases)):
            name, capacity = cases[case]
            with self.tracked(target, name, capacity or DEFAULT_LOG_CAPACITY) as agent:
                yield {
                    "capacity": capacity,
                    "pages_written": self.scale.burst_pages,
                    "variant": name,
                    "repetition": repetition,
                    **self._meanwhile(target, agent, "write", {"workload": "share:0.25"}),
                }

    def _meanwhile(
        self, target: Child, agent: Child, what: str, arguments: dict[str, object]
    ) -> Record:
        """Let the target work while rounds are taken, one after another."""
        agent.tell("rounds", pause_s=self.scale.pause_s)
        did = target.ask(what, **arguments)
        agent.tell("enough")
        took = agent.hear()
        agent.hear()
        return {
            "writer_wall_s": did["wall_s"],
            "writer_cpu_s": did["cpu_s"],
            "writes": did.get("writes", did.get("events")),
            **(_latency(did) if "latency_ns" in did else {}),
            "rounds": took["rounds"],
            **_round_values(took),
        }


EXPERIMENTS: dict[str, Callable[[Bench, Child], Iterator[Record]]] = {
    "first-write": Bench.first_write,
    "memory-size": Bench.memory_size,
    "dirty-share": Bench.dirty_share,
    "events": Bench.events,
    "running": Bench.running,
    "log-capacity": Bench.log_capacity,
}


def _latency(answer: Record) -> Record:
    return {f"{name}_ns": value for name, value in answer["latency_ns"].items()}


def _round_values(answer: Record) -> Record:
    # The agent's side; times of several rounds are sums.
    values = {
        "round_s": answer["collect_s"],
        "agent_cpu_s": answer["cpu_s"],
        "bytes_reported": answer["bytes"],
        "stalls": answer["stalls"],
        "stall_s": answer["stall_s"],
        "spills": answer["spills"],
        "records": answer["records"],
        "forks": answer["forks"],
    }
    for name in ("pages_reported", "missing", "needless"):
        if name in answer:
            values[name] = answer[name]
    return values

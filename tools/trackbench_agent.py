"""The agent's part of tools/trackbench: arms one tracker on a process, takes rounds, and says what they cost.

Which tracker, of which process, it is told when it is asked to arm; `none` tracks nothing: the floor.

A round is what agent-send does without the network: collect(), then every dirty page is read. The reading is the same
for all and counted apart; what a tracker wants to see of it (Witness) is part of its cost. CPU time is of this process
and of those it made (the reader of log and bitmap). Disarms at the end, whatever happened.
"""

from __future__ import annotations

import os
import re
import sys
import time
from array import array
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agent.kernel.features import kernel_features  # noqa: E402 - needs the repository on the path
from agent.pages.chunks import Stream  # noqa: E402
from agent.pages.sender import CHUNK_BYTES, PageReader  # noqa: E402
from agent.ranges import RangeSet  # noqa: E402
from agent.tracker.base import DirtySet, Tracker, TrackerStats, Witness  # noqa: E402
from agent.tracker.choose import choose_tracker  # noqa: E402
from agent.tracker.content import page_digests  # noqa: E402
from agent.tracker.create import create_tracker  # noqa: E402
from agent.types import PAGE_SIZE  # noqa: E402
from tools.trackbench_child import question_waits, serve  # noqa: E402
from tools.trackbench_patterns import page_numbers, pages_at  # noqa: E402

Answer = dict[str, object]


class Agent:
    """One tracker at a time, armed as often as wanted."""

    def __init__(self) -> None:
        self.pid = 0
        self.name = "none"
        self._tracker: Tracker | None = None
        self._reader = PageReader()
        self._delivered: dict[int, int] = {}
        self._memory_before = 0
        self._children_mark_s = 0.0

    def close(self) -> None:
        self.disarm()
        self._reader.close()

    # Questions

    def arm(self, pid: int, tracker: str, capacity: int, when_full: str) -> Answer:
        """Arm, and take the round that copies everything."""
        self.pid, self.name = pid, tracker
        self._memory_before = self._memory()
        self._children_mark_s = 0.0
        began = time.perf_counter()
        if tracker != "none":
            name = choose_tracker(tracker, kernel_features()).name
            pidfd = os.pidfd_open(pid)
            try:
                self._tracker = create_tracker(
                    name, pid, pidfd, log_capacity=capacity, log_when_full=when_full
                )
            finally:
                os.close(pidfd)
            self._tracker.arm()
        arm_s = time.perf_counter() - began
        first = self._round(judge=False)
        return {"arm_s": arm_s, "first_round_s": first["collect_s"]}

    def round(self, address: int = 0, nr_pages: int = 0, workload: str = "") -> Answer:
        """Take one round. With a workload: how many of its pages are missing, and how many others were reported."""
        expected = pages_at(address, page_numbers(workload, nr_pages)) if workload else RangeSet()
        answer = self._round(judge=False)
        del answer["needless"]
        found = self._found.clip(address, address + nr_pages * PAGE_SIZE)
        if workload and self.name != "none":
            answer["missing"] = expected.subtract(found).nr_pages
            answer["needless"] = found.subtract(expected).nr_pages
        answer["pages_reported"] = found.nr_pages
        return answer

    def rounds(self, pause_s: float) -> Answer:
        """Take rounds until asked something else; judges by content what was sent twice without need."""
        totals: dict[str, float] = {}
        self._delivered = {}
        nr_rounds = 0
        while True:
            ends = question_waits()  # one more round then: it sees the rest
            nr_rounds += 1
            for name, value in self._round(judge=True).items():
                if isinstance(value, (int, float)):
                    totals[name] = totals.get(name, 0) + value
            if ends or self.name == "none":
                break
            time.sleep(pause_s)
        return {"rounds": nr_rounds, **totals}

    def enough(self) -> Answer:
        """What ends rounds()."""
        return {}

    def memory(self) -> Answer:
        """What arming and the rounds since cost in memory, processes of the tracker's included."""
        return {"agent_bytes": self._memory() - self._memory_before}

    def disarm(self) -> Answer:
        """Leave the process as it was."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.disarm()
        return {}

    # Rounds

    def _round(self, *, judge: bool) -> Answer:
        self._found = RangeSet()
        cpu, began = time.process_time(), time.perf_counter()
        dirty = self._tracker.collect(final=False) if self._tracker else _nothing()
        collect_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        children_s = self._children_cpu_s()  # since the last round: a reader works between rounds
        cpu_s += children_s - self._children_mark_s
        self._children_mark_s = children_s
        self._found = dirty.pages
        read_s, witness_s, needless = self._deliver(dirty.pages, judge=judge)
        stats = dirty.stats
        return {
            "collect_s": collect_s + witness_s,
            "cpu_s": cpu_s + witness_s,
            "read_s": read_s,
            "pages": dirty.pages.nr_pages,
            "bytes": dirty.pages.nr_bytes,
            "needless": needless,
            "records": stats.nr_records,
            "stalls": stats.nr_stalls,
            "stall_s": stats.stall_s,
            "spills": stats.nr_spills,
            "forks": stats.nr_forks,
        }

    def _deliver(self, pages: RangeSet, *, judge: bool) -> tuple[float, float, int]:
        tracker = self._tracker
        witness: Witness | None = tracker if isinstance(tracker, Witness) else None
        read_s = witness_s = 0.0
        needless = 0
        gone = RangeSet()
        for pairs in Stream(pages.pairs).chunks(CHUNK_BYTES) if judge or witness else ():
            began = time.perf_counter()
            got = self._reader.read_process(self.pid, pairs, gone)
            view = self._reader.view[: sum(got[1::2]) - sum(got[0::2])]
            read_s += time.perf_counter() - began
            if judge:
                needless += self._judge(got, view)
            if witness is not None:
                began = time.thread_time()
                witness.delivered(None, got, view)
                witness_s += time.thread_time() - began
        if tracker is not None:
            tracker.forget(gone)
        return read_s, witness_s, needless

    def _judge(self, pairs: array[int], content: memoryview) -> int:
        # Pages that were delivered with this very content before. Costs no tracker anything: not timed.
        addresses: list[int] = []
        for start, end in zip(pairs[0::2], pairs[1::2]):
            addresses.extend(range(start, end, PAGE_SIZE))
        known = self._delivered
        needless = 0
        for address, digest in zip(addresses, page_digests(content)):
            needless += known.get(address) == digest
            known[address] = digest
        return needless

    # What it costs

    def _children(self) -> list[int]:
        text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        return list(map(int, text.split()))

    def _children_cpu_s(self) -> float:
        # clock_getcpuclockid(3): the CPU clock of another process.
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in self._children())

    def _memory(self) -> int:
        # Proportional: what parent and child share is counted once.
        total = 0
        for pid in (os.getpid(), *self._children()):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            match = re.search(r"^Pss: +(\d+)", text, re.MULTILINE)
            total += int(match[1]) << 10 if match else 0
        return total


def _nothing() -> DirtySet:
    return DirtySet(maps_text=b"", maps=[], stats=TrackerStats())


def main() -> None:
    agent = Agent()
    handlers = (agent.arm, agent.round, agent.rounds, agent.enough, agent.memory, agent.disarm)
    try:
        serve({handler.__name__: handler for handler in handlers})
    finally:
        agent.close()


if __name__ == "__main__":
    main()

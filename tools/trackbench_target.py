"""The process that tools/trackbench measures: writes to its memory, or changes its mappings, as it is told to.

It does not know whether or how it is tracked. Runs of pages are written by one C loop (a strided slice of an mmap),
other orders by a Python loop of some 50 ns a page; the same workload untracked in the same run is what to subtract.
Seconds are wall clock and CPU time of this thread, nanoseconds those of single writes. Ends with its standard input.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agent.kernel import mman  # noqa: E402 - needs the repository on the path
from agent.types import PAGE_SIZE  # noqa: E402
from tools.trackbench_child import serve  # noqa: E402
from tools.trackbench_patterns import page_numbers, repeats  # noqa: E402

BREAK_S = 0.001
"""Between two passes through a hot set."""
AREA_PAGES = 16
"""Size of each mapping that events are made with."""
AREA = AREA_PAGES * PAGE_SIZE
_RW = mman.PROT_READ | mman.PROT_WRITE
_ANONYMOUS = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS

Answer = dict[str, object]


class Target:
    """One memory, and a yard of small mappings beside it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, PAGE_SIZE)
        self._address = 0
        self._nr_pages = 0
        self._pass = 0
        self._yard = 0
        self._yard_bytes = 0
        self._areas: list[int] = []

    # Writes

    def map(self, nr_bytes: int, huge: bool) -> Answer:
        """Replace the memory by another, populated."""
        self._memory.close()
        self._memory = mmap.mmap(-1, nr_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pin = ctypes.c_char.from_buffer(self._memory)
        self._address = ctypes.addressof(pin)
        del pin
        self._nr_pages = nr_bytes // PAGE_SIZE
        mman.madvise(self._address, nr_bytes, mman.MADV_HUGEPAGE if huge else mman.MADV_NOHUGEPAGE)
        mman.madvise(self._address, nr_bytes, mman.MADV_POPULATE_WRITE)
        return {"address": self._address, "huge_bytes": _huge_bytes(self._address)}

    def write(self, workload: str) -> Answer:
        """Write once through a workload."""
        numbers = page_numbers(workload, self._nr_pages)
        self._pass += 1
        value = self._pass % 255 + 1
        memory = self._memory
        again = range(repeats(workload))
        if isinstance(numbers, range):
            begin, end = numbers.start * PAGE_SIZE, numbers.stop * PAGE_SIZE
            values = bytes([value]) * len(numbers)
            cpu, wall = time.thread_time(), time.perf_counter()
            memory[begin:end:PAGE_SIZE] = values
        else:
            offsets = [number * PAGE_SIZE for number in numbers]
            cpu, wall = time.thread_time(), time.perf_counter()
            for _ in again:
                for offset in offsets:
                    memory[offset] = value
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        return {"wall_s": wall, "cpu_s": cpu, "pages": len(numbers), "writes": len(numbers) * len(again)}

    def sample(self, workload: str, limit: int) -> Answer:
        """Time each of up to `limit` first writes of a workload on its own."""
        numbers = page_numbers(workload, self._nr_pages)
        step = max(len(numbers) // limit, 1)
        offsets = [number * PAGE_SIZE for number in numbers[::step][:limit]]
        self._pass += 1
        return {"latency_ns": self._timed_writes(offsets), "pages": len(offsets)}

    def busy(self, workload: str, seconds: float) -> Answer:
        """Write through a workload again and again, with short breaks: for rounds that run meanwhile.

        Each write is timed; wall clock is that of the writing.
        """
        offsets = [number * PAGE_SIZE for number in page_numbers(workload, self._nr_pages)]
        times: array[int] = array("Q")
        end = time.monotonic() + seconds
        cpu, wall = time.thread_time(), 0.0
        while time.monotonic() < end or not times:
            self._pass += 1
            began = time.perf_counter()
            times.extend(self._timed_writes(offsets))
            wall += time.perf_counter() - began
            time.sleep(BREAK_S)
        return {
            "wall_s": wall,
            "cpu_s": time.thread_time() - cpu,
            "latency_ns": times,
            "writes": len(times),
        }

    def _timed_writes(self, offsets: list[int]) -> list[int]:
        memory, clock, value = self._memory, time.perf_counter_ns, self._pass % 255 + 1
        times: list[int] = []
        append = times.append
        for offset in offsets:
            before = clock()
            memory[offset] = value
            append(clock() - before)
        return times

    # Changes of mappings

    def areas(self, count: int) -> Answer:
        """Make `count` small populated mappings, none beside another."""
        if self._yard:
            mman.munmap(self._yard, self._yard_bytes)
        # Twice: the second half is where they are moved to.
        self._yard_bytes = 4 * count * AREA
        self._yard = mman.mmap(0, self._yard_bytes, mman.PROT_NONE, _ANONYMOUS | mman.MAP_NORESERVE)
        self._areas = [self._yard + 2 * index * AREA for index in range(count)]
        for address in self._areas:
            mman.mmap(address, AREA, _RW, _ANONYMOUS | mman.MAP_FIXED | mman.MAP_POPULATE)
        return {"address": self._yard}

    def change(self, kind: str, count: int) -> Answer:
        """Do something to each area, or fork so many times; times each."""
        half = self._yard_bytes // 2
        move = mman.MREMAP_MAYMOVE | mman.MREMAP_FIXED
        one: dict[str, Callable[[int], object]] = {
            "unmap": lambda address: mman.munmap(address, AREA),
            "move": lambda address: mman.mremap(address, AREA, AREA, move, address + half),
            "drop": lambda address: mman.madvise(address, AREA, mman.MADV_DONTNEED),
            "protect": lambda address: mman.mprotect(address, AREA, mman.PROT_READ),
        }
        if kind == "fork":
            return _timed(_fork_and_exit, range(count), after=os.wait)
        return _timed(one[kind], self._areas[:count])

    def churn(self, seconds: float) -> Answer:
        """Map, write to and unmap a small mapping, again and again: for rounds that run meanwhile."""

        def once(_: int) -> None:
            address = mman.mmap(0, AREA, _RW, _ANONYMOUS)
            for offset in range(0, AREA, PAGE_SIZE):
                ctypes.memset(address + offset, 1, 1)
            mman.munmap(address, AREA)

        return _timed(once, _until(seconds))

    def forks(self, seconds: float) -> Answer:
        """Serve requests by a child each, and write down every time (a page of the memory)."""
        memory, nr_pages = self._memory, self._nr_pages

        def once(number: int) -> None:
            _fork_and_exit(number)
            memory[number % nr_pages * PAGE_SIZE] = number % 255 + 1
            os.wait()

        return _timed(once, _until(seconds))


def _until(seconds: float) -> Iterator[int]:
    end = time.monotonic() + seconds
    for number in itertools.count():
        if number and time.monotonic() > end:
            return
        yield number


def _timed(
    action: Callable[[int], object], items: Iterable[int], after: Callable[[], object] = lambda: None
) -> Answer:
    clock = time.perf_counter_ns
    times: list[int] = []
    cpu = time.thread_time()
    for item in items:
        before = clock()
        action(item)
        times.append(clock() - before)
        after()
    return {
        "wall_s": sum(times) / 1e9,
        "cpu_s": time.thread_time() - cpu,
        "latency_ns": times,
        "events": len(times),
    }


def percentiles(times: Iterable[int]) -> dict[str, float]:
    """p50, p99, p99.9 and the maximum of nanoseconds (nearest rank)."""
    ordered = sorted(times)
    return {
        name: float(ordered[max(math.ceil(part * len(ordered)) - 1, 0)])
        for name, part in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0))
    }


def _summarized(handler: Callable[..., Answer]) -> Callable[..., Answer]:
    def answer(**arguments: object) -> Answer:
        result = handler(**arguments)
        times = result.get("latency_ns")
        if isinstance(times, (list, array)):
            result["latency_ns"] = percentiles(times)
        return result

    return answer


def _fork_and_exit(_: int) -> None:
    if not os.fork():
        os._exit(0)


def _huge_bytes(address: int) -> int:
    # Of the mapping, or what the kernel joined with it.
    inside = False
    with open("/proc/self/smaps", encoding="ascii", errors="replace") as smaps:
        for line in smaps:
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                low, high = (int(word, 16) for word in words[0].split("-"))
                inside = low <= address < high
            elif inside and words[0] == "AnonHugePages:":
                return int(words[1]) << 10
    return 0


def main() -> None:
    target = Target()
    handlers = (
        *(target.map, target.write, target.sample, target.busy),
        *(target.areas, target.change, target.churn, target.forks),
    )
    serve({handler.__name__: _summarized(handler) for handler in handlers})


if __name__ == "__main__":
    main()

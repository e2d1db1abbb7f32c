"""A process to be moved, with as much of one thing as asked for, that notes every millisecond that it runs.

Usage: python -m tools.benchmark.subject SAMPLES_FILE [--megabytes N] [--fill random|half] [--rate PAGES_PER_SECOND]
           [--pattern random|linear|hot] [--threads N] [--vmas N] [--fds N]

Memory: one anonymous mapping, filled with random bytes, or half of each page with random bytes and half with text
(which compresses two to one), of which `rate` pages a second get 8 bytes written; the value of a sample is how many
did since the one before. Threads wake ten times a second, except --threads=1. Mappings are single pages in turn
read-write and read-only, which the kernel cannot merge. Descriptors are regular files, pipes and eventfds in turn.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import resource
import threading
import time
from pathlib import Path

from tools.benchmark.samples import SampleWriter

PAGE = 4096
TICK_S = 0.001
FILL_PAGES = 1024


def fill(memory: mmap.mmap, nbytes: int, kind: str) -> None:
    """No two pages are alike, so that neither a compressor nor anybody else finds one in another."""
    text = (b"text " * PAGE)[: PAGE // 2]
    step = FILL_PAGES * PAGE
    for start in range(0, nbytes, step):
        length = min(step, nbytes - start)
        if kind == "random":
            memory[start : start + length] = os.urandom(length)
        else:
            noise = os.urandom(length // 2)
            halves = (noise[at : at + PAGE // 2] for at in range(0, length // 2, PAGE // 2))
            memory[start : start + length] = b"".join(half + text for half in halves)


def make_mappings(count: int) -> mmap.mmap:
    """About `count` mappings: every second page of one is made read-only."""
    memory = mmap.mmap(-1, count * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, count * PAGE, PAGE):
        memory[start : start + 8] = start.to_bytes(8, "little")
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for start in range(0, count * PAGE, 2 * PAGE):
        if libc.mprotect(ctypes.c_void_p(first + start), PAGE, mmap.PROT_READ):
            raise OSError(ctypes.get_errno(), "mprotect")
    return memory


def open_descriptors(count: int, directory: Path) -> list[int]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    opened: list[int] = []
    while len(opened) < count:
        opened.append(os.open(directory / f"file-{len(opened)}", os.O_RDWR | os.O_CREAT, 0o600))
        opened.extend(os.pipe())
        opened.append(os.eventfd(len(opened)))
    for fd in opened[count:]:
        os.close(fd)
    return opened[:count]


def start_threads(count: int) -> None:
    def work() -> None:
        while True:
            time.sleep(0.1)

    for _ in range(count):
        threading.Thread(target=work, daemon=True).start()


def run(samples: SampleWriter, memory: mmap.mmap | None, pages: int, rate: int, pattern: str) -> None:
    """Forever: write what is due, and note how late it became."""
    chance = random.Random(1)
    hot = max(pages // 10, 1)
    written = 0
    begun = time.monotonic_ns()
    while True:
        asked = time.monotonic_ns() + int(TICK_S * 1e9)
        time.sleep(TICK_S)
        now = time.monotonic_ns()
        due = int((now - begun) / 1e9 * rate) - written
        # After a freeze it goes on at its rate, not in a burst.
        if due > rate // 10 + 1:
            begun += int((due - rate // 10 - 1) / rate * 1e9)
            due = rate // 10 + 1
        for number in range(written, written + due):
            page = number % pages if pattern == "linear" else chance.randrange(pages)
            if pattern == "hot" and chance.random() < 0.9:
                page %= hot
            assert memory is not None
            memory[page * PAGE : page * PAGE + 8] = number.to_bytes(8, "little")
        written += due
        samples.add(asked, now, due)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples")
    parser.add_argument("--megabytes", type=int, default=0)
    parser.add_argument("--fill", choices=["random", "half"], default="half")
    parser.add_argument("--rate", type=int, default=0, help="pages written per second")
    parser.add_argument("--pattern", choices=["random", "linear", "hot"], default="random")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vmas", type=int, default=0)
    parser.add_argument("--fds", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.rate and not arguments.megabytes:
        parser.error("--rate needs --megabytes")
    nbytes = arguments.megabytes << 20
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if nbytes else None
    if memory:
        fill(memory, nbytes, arguments.fill)
    kept: list[object] = []
    if arguments.vmas:
        kept.append(make_mappings(arguments.vmas))
    if arguments.fds:
        kept.append(open_descriptors(arguments.fds, Path(arguments.samples).parent))
    start_threads(arguments.threads - 1)
    run(SampleWriter(arguments.samples), memory, nbytes // PAGE, arguments.rate, arguments.pattern)


if __name__ == "__main__":
    main()

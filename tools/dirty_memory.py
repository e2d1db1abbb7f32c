"""A load for measurements: writes to memory at a steady rate and says so.

Usage: python tools/dirty_memory.py --megabytes N --rate PAGES_PER_SECOND [--pattern random|linear|hot] [--status FILE]

One anonymous mapping, filled once with data that does not compress away, then one 8-byte write per page and turn in
batches every millisecond. Prints a line each second: pages written, and the longest time a batch was late (the
stall that a migration causes). Runs until killed.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import time

PAGE = 4096


def fill(memory: mmap.mmap, nbytes: int) -> None:
    """Half random, half text: compresses about two to one, as real heaps do."""
    chunk = os.urandom(PAGE // 2) + (b"text " * PAGE)[: PAGE // 2]
    for start in range(0, nbytes, PAGE * 256):
        block = chunk * min(256, (nbytes - start) // PAGE)
        memory[start : start + len(block)] = block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rate", type=int, default=10_000, help="pages written per second")
    parser.add_argument("--pattern", choices=["random", "linear", "hot"], default="random")
    parser.add_argument("--status", help="append the lines to this file instead of printing them")
    options = parser.parse_args()
    nbytes = options.megabytes << 20
    pages = nbytes // PAGE
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    fill(memory, nbytes)
    fd = os.open(options.status, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if options.status else 1
    chance = random.Random(1)
    hot = max(pages // 10, 1)
    written = 0
    begin = last_note = previous = time.monotonic()
    worst_s = 0.0
    while True:
        time.sleep(0.001)
        now = time.monotonic()
        worst_s = max(worst_s, now - previous)
        previous = now
        # Never more than a tenth of a second of debt: after a freeze it goes on at its rate, not in a burst.
        due = min(int((now - begin) * options.rate) - written, options.rate // 10 + 1)
        if due < int((now - begin) * options.rate) - written:
            begin = now - (written + due) / options.rate
        for number in range(written, written + due):
            page = number % pages if options.pattern == "linear" else chance.randrange(pages)
            if options.pattern == "hot" and chance.random() < 0.9:
                page %= hot
            memory[page * PAGE : page * PAGE + 8] = number.to_bytes(8, "little")
        written += due
        if now - last_note >= 1:
            note = {"pages_written": written, "worst_s": round(worst_s, 6), "realtime_ns": time.time_ns()}
            os.write(fd, json.dumps(note).encode() + b"\n")
            last_note, worst_s = now, 0.0


if __name__ == "__main__":
    main()

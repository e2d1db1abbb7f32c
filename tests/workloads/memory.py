"""A block of anonymous memory of which all pages are there: half of each page (or all of it) is random.

Usage: python -m tests.workloads.memory STATUS_FILE --megabytes N [--random-all] [--no-huge-pages] [--writes N]

Each note says whether the memory is what it was; an "error" is a difference. With --writes so many pages are stored to
every millisecond, one after another, each of which must hold what was stored to it the last time.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import mmap
import random
import time
import zlib

from tests.workloads.status import Status

PR_SET_THP_DISABLE = 41
MEGABYTE = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("status")
    parser.add_argument("--megabytes", type=int, required=True)
    parser.add_argument("--random-all", action="store_true")
    parser.add_argument("--no-huge-pages", action="store_true")
    parser.add_argument("--writes", type=int, default=0)
    options = parser.parse_args()
    if options.no_huge_pages:
        assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
    chance = random.Random(7)
    block = mmap.mmap(-1, options.megabytes * MEGABYTE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, len(block), MEGABYTE):
        part = chance.randbytes(MEGABYTE)
        if not options.random_all:
            part = b"".join(part[at : at + 2048] + bytes(2048) for at in range(0, MEGABYTE, 4096))
        block[start : start + MEGABYTE] = part
    expected = zlib.crc32(block)
    status = Status(options.status)
    if options.writes:
        store(block, options.writes, status)
    while True:
        if zlib.crc32(block) != expected:
            status.error("the memory has changed by itself")
        status.note()
        time.sleep(0.05)


def store(block: mmap.mmap, nr_pages: int, status: Status) -> None:
    pages = memoryview(block).cast("Q")
    at, step, stored = 0, 4096 // 8, dict(enumerate(pages[:: 4096 // 8].tolist()))
    for value in itertools.count():
        for _ in range(nr_pages):
            if pages[at * step] != stored[at]:
                status.error(f"page {at} holds {pages[at * step]:#x} instead of {stored[at]:#x}")
            pages[at * step] = stored[at] = value
            at = (at + 1) % len(stored)
        if value % 50 == 0:
            status.note()
        time.sleep(0.001)


if __name__ == "__main__":
    main()

"""A block of anonymous memory of which all pages are there: half of each page (or all of it) is random.

Usage: python -m tests.workloads.memory STATUS_FILE --megabytes N [--random-all] [--no-huge-pages]

Each note says whether the memory is what it was; an "error" is a difference.
"""

from __future__ import annotations

import argparse
import ctypes
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
    while True:
        if zlib.crc32(block) != expected:
            status.error("the memory has changed by itself")
        status.note()
        time.sleep(0.05)


if __name__ == "__main__":
    main()

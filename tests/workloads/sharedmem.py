"""Shared memory written through every way there is, read back through every other.

Usage: python -m tests.workloads.sharedmem STATUS_FILE DATA_FILE [--megabytes N]

Ways: an anonymous shared mapping; a memfd by two mappings and by write(2); a shared and a private mapping of a regular
file; a private mapping of the memfd, whose copied pages must not follow the object. Standard library only.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import struct
import threading
import time

from tests.workloads.status import Status

_PAGE = 4096


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("status")
    parser.add_argument("data")
    parser.add_argument("--megabytes", type=int, default=8)
    options = parser.parse_args()
    status = Status(options.status)
    nbytes = options.megabytes << 20
    pages = nbytes // _PAGE

    anonymous = mmap.mmap(-1, nbytes, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    memfd = os.memfd_create("ferry-shared")
    os.truncate(memfd, nbytes)
    first = mmap.mmap(memfd, nbytes, mmap.MAP_SHARED)
    second = mmap.mmap(memfd, nbytes // 2, mmap.MAP_SHARED, offset=nbytes // 2)
    copied = mmap.mmap(memfd, nbytes, mmap.MAP_PRIVATE)
    file = os.open(options.data, os.O_RDWR | os.O_CREAT)
    os.truncate(file, 1 << 20)
    by_file = mmap.mmap(file, 1 << 20, mmap.MAP_SHARED)

    # Page -> value it must hold. The private mapping knows only its own copied pages.
    model_anonymous: dict[int, int] = {}
    model_memfd: dict[int, int] = {}
    model_copied: dict[int, int] = {}
    model_file: dict[int, int] = {}
    chance = random.Random(11)
    value = 0
    threading.Thread(target=threading.Event().wait, daemon=True).start()

    def put(memory: mmap.mmap, page: int, word: int) -> None:
        struct.pack_into("Q", memory, page * _PAGE + 64, word)

    def get(memory: mmap.mmap, page: int) -> int:
        found: int = struct.unpack_from("Q", memory, page * _PAGE + 64)[0]
        return found

    def verify() -> None:
        for page, word in model_anonymous.items():
            found = get(anonymous, page)
            status.check(found == word, f"anonymous page {page}: {found}, expected {word}")
        for page, word in model_memfd.items():
            ways = [get(first, page), struct.unpack("Q", os.pread(memfd, 8, page * _PAGE + 64))[0]]
            if page >= pages // 2:
                ways.append(get(second, page - pages // 2))
            status.check(set(ways) == {word}, f"memfd page {page}: {ways}, expected {word}")
        for page, word in model_copied.items():
            found = get(copied, page)
            status.check(found == word, f"private page {page}: {found}, expected {word}")
        for page, word in model_file.items():
            by_read = struct.unpack("Q", os.pread(file, 8, page * _PAGE + 64))[0]
            ways = [get(by_file, page), by_read]
            status.check(set(ways) == {word}, f"file page {page}: {ways}, expected {word}")

    turns = 0
    while True:
        for _ in range(20):
            value += 1
            page = chance.randrange(pages)
            way = chance.randrange(6)
            if way == 0:
                put(anonymous, page, value)
                model_anonymous[page] = value
            elif way == 1:
                put(first, page, value)
                model_memfd[page] = value
            elif way == 2:
                page = chance.randrange(pages // 2, pages)
                put(second, page - pages // 2, value)
                model_memfd[page] = value
            elif way == 3:
                os.pwrite(memfd, struct.pack("Q", value), page * _PAGE + 64)
                model_memfd[page] = value
            elif way == 4:
                put(copied, page, value)
                model_copied[page] = value
            else:
                page = chance.randrange((1 << 20) // _PAGE)
                put(by_file, page, value)
                model_file[page] = value
        turns += 1
        if turns % 10 == 0:
            verify()
        status.note(turns=turns)
        time.sleep(0.01)


if __name__ == "__main__":
    main()

"""A process that changes its memory in every way a tracker must survive; run as a program.

usage: victim.py SEED NR_THREADS DIRECTORY. Makes a userfaultfd, prints "PID FD" and then mutates for ever, each
thread its own slots, from a seeded random generator. Stores go through plain memory where the page is known to be
writable, else through read(2), which answers EFAULT instead of crashing.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
import threading
import time
from collections.abc import Callable

PAGE = 4096
SLOT_PAGES = 256
NR_SLOTS = 6

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p,
)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.pread.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)
libc.sbrk.restype = ctypes.c_void_p
libc.sbrk.argtypes = (ctypes.c_long,)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)

RW, PRIVATE_ANON, SHARED, PRIVATE, FIXED = 3, 0x22, 1, 2, 0x10


class Mutator:
    """One thread's memory and its random walk."""

    def __init__(self, seed: int, directory: str, noise: int) -> None:
        self.random = random.Random(seed)
        self.noise = noise
        size = SLOT_PAGES * PAGE
        # Far below where the kernel places things: nobody else's mapping may land in a hole that we made.
        base = 0x100000000000 + seed % 100 * (1 << 30)
        libc.mmap(base, (NR_SLOTS + 2) * 2 * size, 0, PRIVATE_ANON | FIXED | 0x4000, -1, 0)
        self.slots = [base + (2 * i + 1) * size for i in range(NR_SLOTS)]
        for slot in self.slots[:4]:
            libc.mmap(slot, size, RW, PRIVATE_ANON | FIXED, -1, 0)
        self.file = os.open(f"{directory}/file-{seed}", os.O_RDWR | os.O_CREAT)
        os.write(self.file, random.Random(1).randbytes(64 * PAGE))
        self.mapped = libc.mmap(None, 64 * PAGE, RW, PRIVATE, self.file, 0)
        self.memfd = os.memfd_create(f"victim-{seed}")
        os.ftruncate(self.memfd, 128 * PAGE)
        self.first = libc.mmap(None, 128 * PAGE, RW, SHARED, self.memfd, 0)
        self.second = libc.mmap(None, 64 * PAGE, RW, SHARED, self.memfd, 32 * PAGE)
        self.anonymous = libc.mmap(None, 64 * PAGE, RW, 0x21, -1, 0)
        self.grows = self.slots[4] + 200 * PAGE
        libc.mmap(self.grows, 8 * PAGE, RW, PRIVATE_ANON | FIXED | 0x100, -1, 0)
        self.steady = libc.mmap(None, size, RW, PRIVATE_ANON, -1, 0)
        self.actions: list[tuple[int, Callable[[], object]]] = [
            (40, self.store), (20, self.store_steady), (6, self.remap_fresh), (3, self.unmap),
            (4, self.move), (2, self.grow), (6, self.drop), (6, self.protect), (4, self.guard),
            (2, self.brk), (2, self.stack), (6, self.file_store), (4, self.file_drop),
            (6, self.shared_store), (4, self.shared_write), (2, self.shared_punch), (3, self.shared_anon),
            (1, self.fork), (1, self.replace_same), (1, self.dontunmap), (1, self.shared_moves),
        ]
        self.weights = [weight for weight, _ in self.actions]

    def run(self) -> None:
        while True:
            for _, action in self.random.choices(self.actions, self.weights, k=8):
                action()
            time.sleep(0.0005)  # without it the agent mostly waits for the mmap lock

    def part(self, base: int, pages: int = SLOT_PAGES, most: int = 24) -> tuple[int, int]:
        first = self.random.randrange(pages)
        count = min(self.random.randint(1, most), pages - first)
        return base + first * PAGE, count * PAGE

    def fill(self, address: int, length: int) -> None:
        offset = self.random.randrange(64) * 64
        libc.pread(self.noise, address + offset, max(1, length - offset), self.random.randrange(1 << 16))

    def slot(self) -> int:
        return self.random.choice(self.slots)

    def store(self) -> None:
        self.fill(*self.part(self.slot()))

    def store_steady(self) -> None:
        address, length = self.part(self.steady)
        ctypes.memset(address, self.random.choice((0, 0, 1, 7, 255)), length)

    def remap_fresh(self) -> None:
        address, length = self.part(self.slot())
        libc.mmap(address, length, RW, PRIVATE_ANON | FIXED, -1, 0)
        if self.random.random() < 0.5:
            self.fill(address, length)

    def replace_same(self) -> None:
        slot = self.slot()
        libc.munmap(slot, SLOT_PAGES * PAGE)
        libc.mmap(slot, SLOT_PAGES * PAGE, RW, PRIVATE_ANON | FIXED, -1, 0)

    def unmap(self) -> None:
        address, length = self.part(self.slot())
        libc.munmap(address, length)

    def move(self) -> None:
        address, length = self.part(self.slot())
        target, _ = self.part(self.slot(), SLOT_PAGES - 24)
        if abs(target - address) >= length:
            libc.mremap(address, length, length, 3, target)

    def dontunmap(self) -> None:
        address, length = self.part(self.slot())
        target, _ = self.part(self.slot(), SLOT_PAGES - 24)
        if abs(target - address) >= length:
            libc.mremap(address, length, length, 7, target)

    def grow(self) -> None:
        address, length = self.part(self.slot(), SLOT_PAGES - 32)
        libc.munmap(address + length, 4 * PAGE)
        libc.mremap(address, length, length + 4 * PAGE, 0, None)
        self.fill(address + length, 2 * PAGE)

    def drop(self) -> None:
        libc.madvise(*self.part(self.slot()), self.random.choice((4, 4, 4, 22)))

    def protect(self) -> None:
        libc.mprotect(*self.part(self.slot()), self.random.choice((0, 1, 3, 3)))

    def guard(self) -> None:
        libc.madvise(*self.part(self.slot(), most=4), self.random.choice((102, 103)))

    def brk(self) -> None:
        address = libc.sbrk(8 * PAGE)
        if address != ctypes.c_void_p(-1).value:
            self.fill(address, 4 * PAGE)

    def stack(self) -> None:
        self.grows -= PAGE
        if self.grows > self.slots[4] + 100 * PAGE:
            self.fill(self.grows, 64)

    def file_store(self) -> None:
        self.fill(*self.part(self.mapped, 64, 6))

    def file_drop(self) -> None:
        libc.madvise(*self.part(self.mapped, 64, 6), 4)

    def shared_store(self) -> None:
        base, pages = self.random.choice(((self.first, 128), (self.second, 64)))
        address, length = self.part(base, pages, 6)
        ctypes.memset(address, self.random.randrange(256), length)

    def shared_write(self) -> None:
        offset, length = self.part(0, 128, 4)
        os.pwrite(self.memfd, self.random.randbytes(length), offset)

    def shared_punch(self) -> None:
        offset, length = self.part(0, 128, 4)
        if self.random.random() < 0.5:
            libc.fallocate(self.memfd, 3, offset, length)
        else:
            libc.madvise(*self.part(self.first, 128, 4), 9)

    def shared_anon(self) -> None:
        address, length = self.part(self.anonymous, 64, 6)
        choice = self.random.random()
        if choice < 0.7:
            ctypes.memset(address, self.random.randrange(256), length)
        else:
            libc.madvise(address, length, 9 if choice < 0.85 else 4)

    def shared_moves(self) -> None:
        moved = libc.mremap(self.second, 64 * PAGE, 65 * PAGE, 1, None)
        if moved and moved != ctypes.c_void_p(-1).value:
            self.second = libc.mremap(moved, 65 * PAGE, 64 * PAGE, 1, None)
            ctypes.memset(self.second + 3 * PAGE, 9, PAGE)

    def fork(self) -> None:
        pid = os.fork()
        if not pid:
            os._exit(0)
        ctypes.memset(self.steady, 5, 3 * PAGE)
        os.waitpid(pid, 0)


def main() -> None:
    seed, nr_threads, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    noise = os.open(f"{directory}/noise", os.O_RDWR | os.O_CREAT)
    os.pwrite(noise, random.Random(seed).randbytes(1 << 18), 0)
    uffd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK | 1)
    mutators = [Mutator(seed * 100 + i, directory, noise) for i in range(nr_threads)]
    print(os.getpid(), uffd, flush=True)
    for mutator in mutators:
        threading.Thread(target=mutator.run, daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()

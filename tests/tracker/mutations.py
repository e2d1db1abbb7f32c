"""One thread's memory and its seeded random walk through everything a process can do to it.

Every action answers what its system calls answered, and draws from its generator whatever they answer: the same seed
makes the same calls with the same results, tracked or not (as long as tracking is as invisible as it claims). All
addresses that matter are fixed, far below where the kernel places things: nobody else's mapping lands in a hole.

mremap(2) works within one mapping only, so the walk keeps a model of which pages are certainly one: `ids` has the same
number for neighbours that one call made and no later call told apart.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import random
import socket
import time
import zlib
from collections.abc import Callable, Container

from tests.tracker import calls
from tests.tracker.calls import (
    sys_fallocate,
    sys_madvise,
    sys_mmap,
    sys_mprotect,
    sys_mremap,
    sys_munmap,
    sys_pread,
    sys_pwrite,
    sys_recv,
    sys_sbrk,
)

PAGE = 4096
HUGE = 512
"""Pages in a huge page."""
ARENA_PAGES = 4 * HUGE
ARENA_BASE = 0x100000000000
FILE_PAGES = 64
MEMFD_PAGES = 128

NONE, READ, RW = 0, 1, 3
SHARED, PRIVATE, FIXED, ANONYMOUS, GROWSDOWN, NORESERVE = 1, 2, 0x10, 0x20, 0x100, 0x4000
PRIVATE_ANON = PRIVATE | ANONYMOUS
MAYMOVE, FIXED_MOVE, DONTUNMAP = 1, 3, 7
DONTNEED, FREE, REMOVE, HUGEPAGE, NOHUGEPAGE, COLD, POPULATE_READ, POPULATE_WRITE, COLLAPSE = (
    4, 8, 9, 14, 15, 20, 22, 23, 25,
)
GUARD_INSTALL, GUARD_REMOVE = 102, 103
PUNCH_HOLE = 3
PATIENCE = 20
"""Looks whether a round has mended a seam, before one is said to stay."""

# What a victim does, and how often.
ACTIONS = {
    "store": 24, "store_plain": 16, "store_steady": 12, "store_received": 4, "store_by_debugger": 4, "store_by_mem": 2,
    "count_up": 4, "check": 8, "map_over": 6, "map_object_over": 3, "unmap": 3, "map_again": 2, "move": 4,
    "move_keeping": 2, "move_away_and_back": 3, "grow_in_place": 3, "grow_moving": 3, "shrink": 2, "protect": 6,
    "drop": 8, "remove": 2, "populate": 3, "huge": 2, "collapse": 1, "guard": 5, "grow_stack": 2, "brk": 3,
    "file_store": 5, "file_drop": 4, "file_write": 2, "shared_store": 6, "shared_write": 3, "shared_punch": 2,
    "shared_alias": 2, "shared_resize": 1, "shared_move": 1, "shared_anonymous": 3, "map_elsewhere": 2,
    "resize_elsewhere": 2, "fork": 1,
}


def ok(result: int) -> int:
    """What is left of a result that differs from run to run: whether it worked, and the errno."""
    return min(result, 0)


class Mutator:
    """The memory of thread `index`; run() a number of steps, each answers its record."""

    def __init__(
        self, seed: int, index: int, directory: str, noise: int, *, tracked: bool, unfit: Container[str]
    ) -> None:
        self.tracked = tracked
        self.seams = os.open(f"{directory}/seams", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.random = random.Random(f"{seed}/{index}")
        self.index = index
        self.noise = noise
        self.base = ARENA_BASE + (index << 30)
        self.next_id = itertools.count(1).__next__
        self.ids = [0] * ARENA_PAGES  # 0: nothing of ours there
        self.kinds: dict[int, str] = {}  # of an id: anonymous, file, shared
        self.plain = bytearray(ARENA_PAGES)  # 1: certainly writable
        self.map_reservation()
        for slot in range(0, ARENA_PAGES, HUGE // 2):
            if slot % HUGE == 0 or self.random.random() < 0.5:
                sys_mmap(self.base + slot * PAGE, HUGE // 2 * PAGE, RW, PRIVATE_ANON | FIXED, -1, 0)
                self.made(slot, HUGE // 2, "anonymous", plain=True)
        self.map_files(seed, directory)
        self.grows = self.base + (ARENA_PAGES + 400) * PAGE
        self.grows_least = self.grows - 100 * PAGE
        sys_munmap(self.grows - 380 * PAGE, 380 * PAGE)  # the kernel keeps 256 pages clear of what is below
        sys_mmap(self.grows, 8 * PAGE, RW, PRIVATE_ANON | FIXED | GROWSDOWN, -1, 0)
        self.steady = self.base + (ARENA_PAGES + 600) * PAGE
        sys_mmap(self.steady, 256 * PAGE, RW, PRIVATE_ANON | FIXED, -1, 0)
        self.elsewhere: list[tuple[int, int]] = []
        self.children: list[int] = []
        self.ends = socket.socketpair()
        self.mem = os.open("/proc/self/mem", os.O_RDWR)
        self.buffer = ctypes.create_string_buffer(64 * PAGE)
        self.brk_end = 0
        self.brk_pages = 0
        self.actions: list[Callable[[], int]] = [getattr(self, name) for name in ACTIONS]
        self.weights = [0 if name in unfit else weight for name, weight in ACTIONS.items()]
        if index:
            self.weights[list(ACTIONS).index("brk")] = 0  # the heap is everybody's

    def map_reservation(self) -> None:
        length = (ARENA_PAGES + 2 * HUGE) * PAGE
        sys_mmap(self.base - HUGE * PAGE, length, NONE, PRIVATE_ANON | FIXED | NORESERVE, -1, 0)

    def map_files(self, seed: int, directory: str) -> None:
        self.file = os.open(f"{directory}/file-{self.index}", os.O_RDWR | os.O_CREAT)
        os.pwrite(self.file, random.Random(1).randbytes(FILE_PAGES * PAGE), 0)
        self.mapped = sys_mmap(None, FILE_PAGES * PAGE, RW, PRIVATE, self.file, 0)
        self.memfd = os.memfd_create(f"victim-{seed}-{self.index}")
        self.memfd_pages = MEMFD_PAGES
        os.ftruncate(self.memfd, MEMFD_PAGES * PAGE)
        self.first = sys_mmap(None, MEMFD_PAGES * PAGE, RW, SHARED, self.memfd, 0)
        self.second = sys_mmap(None, 64 * PAGE, RW, SHARED, self.memfd, 32 * PAGE)
        self.anonymous = sys_mmap(None, 64 * PAGE, RW, SHARED | ANONYMOUS, -1, 0)

    def step(self) -> tuple[int, int]:
        """Do one thing; answers which and what came out."""
        (number,) = self.random.choices(range(len(self.actions)), self.weights)
        return number, self.actions[number]()

    # The model

    def part(self, pages: int = ARENA_PAGES, most: int = 24) -> tuple[int, int]:
        """Some pages of `pages`: the first and how many."""
        first = self.random.randrange(pages)
        return first, min(self.random.randint(1, most), pages - first)

    def at(self, first: int) -> int:
        return self.base + first * PAGE

    def made(self, first: int, count: int, kind: str, *, plain: bool) -> None:
        """One mapping of `kind` stands here now."""
        number = self.next_id()
        self.kinds[number] = kind
        self.ids[first : first + count] = [number] * count
        self.plain[first : first + count] = bytes([plain]) * count

    def gone(self, first: int, count: int) -> None:
        self.ids[first : first + count] = [0] * count
        self.plain[first : first + count] = bytes(count)

    def split(self, first: int, count: int) -> None:
        """These pages got other flags than their neighbours: no longer one mapping with them for certain."""
        at = first
        for number, pages in itertools.groupby(self.ids[first : first + count]):
            length = len(list(pages))
            if number:
                fresh = self.next_id()
                self.kinds[fresh] = self.kinds[number]
                self.ids[at : at + length] = [fresh] * length
            at += length

    def whole(self, most: int = 24) -> tuple[int, int]:
        """Some pages that are certainly one mapping; (0, 0) if chance found none."""
        first, count = self.part(most=most)
        number = self.ids[first]
        length = 0
        while number and length < count and self.ids[first + length] == number:
            length += 1
        return (first, length) if length else (0, 0)

    def room(self, source: int, count: int, needed: int) -> int:
        """A place for `needed` pages that does not overlap [source, source + count); always drawn."""
        first = self.random.randrange(ARENA_PAGES - needed)
        if first < source + count and source < first + needed:
            first = source + count if source + count + needed <= ARENA_PAGES else source - needed
        return max(first, 0)

    def moved(self, source: int, count: int, target: int, length: int) -> None:
        number, plain = self.ids[source], self.plain[source : source + count]
        self.made(target, length, self.kinds[number], plain=False)
        # Further pages come from growth: writable where the last one is, if only it is not a guard. Not worth knowing.
        self.plain[target : target + min(count, length)] = plain[: min(count, length)]

    def mremap(self, address: int, old: int, new: int, flags: int, target: int | None) -> int:
        """mremap(2), in parts where tracking has cut what would be one mapping: a limitation that README names.

        Untracked no call here meets EFAULT: it would show in the records.
        """
        result = sys_mremap(address, old, new, flags, target)
        if result != -errno.EFAULT or not self.tracked:
            return result
        for _ in range(PATIENCE):
            time.sleep(0.002)
            result = sys_mremap(address, old, new, flags, target)
            if result != -errno.EFAULT:
                self.note_seam("mended", address, old)
                return result
        self.note_seam("stays", address, old)
        parts = self.parts(address, address + old)
        for start, end in parts[:-1]:
            to = None if target is None else target + start - address
            if flags & MAYMOVE:
                sys_mremap(start, end - start, end - start, flags, to)
        start, end = parts[-1]
        to = None if target is None else target + start - address
        result = sys_mremap(start, end - start, new - (start - address), flags, to)
        return result if result < 0 else result - (start - address)

    def parts(self, start: int, end: int) -> list[tuple[int, int]]:
        """The mappings in a range that has no holes, as the kernel has them."""
        for _ in range(100):
            found = []
            with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
                for line in maps:
                    low, high = (int(bound, 16) for bound in line.split()[0].split("-"))
                    if low < end and start < high:
                        found.append((max(low, start), min(high, end)))
            # Linux 6.18 may leave out a mapping that is cut or joined just then, as registering does.
            if sum(high - low for low, high in found) == end - start:
                break
        return found

    def note_seam(self, what: str, start: int, length: int) -> None:
        parts = " ".join(f"{low:x}-{high:x}" for low, high in self.parts(start, start + length))
        os.write(self.seams, f"{what} {start:x}-{start + length:x}: {parts}\n".encode())

    # Stores

    def fill(self, address: int, length: int) -> int:
        """read(2) noise into memory: answers EFAULT, or less, where a store would crash."""
        offset = self.random.randrange(64) * 64
        return sys_pread(
            self.noise, address + offset, max(1, length - offset), self.random.randrange(1 << 16)
        )

    def store(self) -> int:
        first, count = self.part()
        return self.fill(self.at(first), count * PAGE)

    def store_plain(self) -> int:
        first, count = self.part()
        value = self.random.choice((0, 0, 1, 7, 255))
        stored = 0
        for page in range(first, first + count):
            if self.plain[page]:
                ctypes.memset(self.at(page), value, PAGE if value else 64)
                stored += 1
        return stored

    def store_steady(self) -> int:
        first, count = self.part(256)
        ctypes.memset(self.steady + first * PAGE, self.random.choice((0, 0, 1, 7, 255)), count * PAGE)
        return 0

    def store_received(self) -> int:
        first, count = self.part(most=4)
        data = self.random.randbytes(count * PAGE)
        self.ends[0].send(data)
        result = sys_recv(self.ends[1].fileno(), self.at(first), len(data), 0)
        self.ends[1].setblocking(False)
        left = 0
        try:
            while rest := self.ends[1].recv(1 << 16):  # what did not fit must not come next time
                left += len(rest)
        except BlockingIOError:
            pass
        self.ends[1].setblocking(True)
        return result * 100000 + left

    def store_by_debugger(self) -> int:
        first, count = self.part(most=8)
        self.buffer.raw = self.random.randbytes(count * PAGE)
        return calls.vm_write(self.buffer, self.at(first), count * PAGE)

    def store_by_mem(self) -> int:
        # Writes to read-only private memory too, as breakpoints are set.
        first, count = self.part(most=4)
        self.buffer.raw = self.random.randbytes(count * PAGE)
        if any(self.kinds.get(number) == "shared" for number in self.ids[first : first + count]):
            return 0  # may answer EIO or EFAULT
        return sys_pwrite(self.mem, ctypes.addressof(self.buffer), count * PAGE, self.at(first))

    def count_up(self) -> int:
        first, count = self.part(256)
        calls.hammer(self.steady + first * PAGE, PAGE, count, 3)
        return 0

    def check(self) -> int:
        """Look at what is there: tracking must not change it."""
        first, count = self.part(most=64)
        length = calls.vm_read(self.buffer, self.at(first), count * PAGE)
        return length if length < 0 else zlib.crc32(self.buffer.raw[:length]) << 20 | length

    # Mappings

    def map_over(self) -> int:
        first, count = self.part(most=64)
        prot = self.random.choice((RW, RW, RW, READ, NONE))
        result = sys_mmap(self.at(first), count * PAGE, prot, PRIVATE_ANON | FIXED, -1, 0)
        self.made(first, count, "anonymous", plain=prot == RW)
        if self.random.random() < 0.5:
            result += self.fill(self.at(first), count * PAGE)
        return result

    def map_object_over(self) -> int:
        first, count = self.part(most=16)
        offset = self.random.randrange(FILE_PAGES - 16) * PAGE
        shared = self.random.random() < 0.5
        flags, fd = (SHARED, self.memfd) if shared else (PRIVATE, self.file)
        result = sys_mmap(self.at(first), count * PAGE, RW, flags | FIXED, fd, offset)
        self.made(first, count, "shared" if shared else "file", plain=True)
        return result + self.fill(self.at(first), count // 2 * PAGE)

    def unmap(self) -> int:
        first, count = self.part()
        self.gone(first, count)
        return sys_munmap(self.at(first), count * PAGE)

    def map_again(self) -> int:
        first, count = self.part(most=200)
        result = sys_munmap(self.at(first), count * PAGE)
        result += sys_mmap(self.at(first), count * PAGE, RW, PRIVATE_ANON | FIXED, -1, 0)
        self.made(first, count, "anonymous", plain=True)
        return result

    def move(self) -> int:
        first, count = self.whole(most=64)
        target = self.room(first, count, max(count, 1))
        if not count:
            return 0
        result = self.mremap(self.at(first), count * PAGE, count * PAGE, FIXED_MOVE, self.at(target))
        self.moved(first, count, target, count)
        self.gone(first, count)
        return result

    def move_keeping(self) -> int:
        first, count = self.whole()
        target = self.room(first, count, max(count, 1))
        if not count:
            return 0
        result = self.mremap(self.at(first), count * PAGE, count * PAGE, DONTUNMAP, self.at(target))
        self.moved(first, count, target, count)
        return result

    def move_away_and_back(self) -> int:
        # Back beside its old neighbours, with which it may merge.
        first, count = self.whole(most=64)
        target = self.room(first, count, max(count, 1))
        pause = self.random.random()
        if not count:
            return 0
        result = self.mremap(self.at(first), count * PAGE, count * PAGE, FIXED_MOVE, self.at(target))
        if pause < 0.5:
            time.sleep(0.002)  # a round may look
        result += self.mremap(self.at(target), count * PAGE, count * PAGE, FIXED_MOVE, self.at(first))
        self.gone(target, count)
        self.split(first, count)
        return result + self.fill(self.at(first), count // 2 * PAGE)

    def grow_in_place(self) -> int:
        first, count = self.whole()
        more = self.random.randint(1, 8)
        offset = self.random.randrange(more)
        if not count or first + count + more > ARENA_PAGES:
            return 0
        result = sys_munmap(self.at(first + count), more * PAGE)
        result += self.mremap(self.at(first), count * PAGE, (count + more) * PAGE, 0, None)
        number = self.ids[first]
        self.made(first + count, more, self.kinds[number], plain=False)
        self.split(first, count)  # what is before may be one with it or not
        return result + self.fill(self.at(first + count + offset), PAGE)

    def grow_moving(self) -> int:
        first, count = self.whole()
        more = self.random.randint(1, 8)
        target = self.room(first, count, count + more)
        if not count:
            return 0
        length = count + more
        result = self.mremap(self.at(first), count * PAGE, length * PAGE, FIXED_MOVE, self.at(target))
        self.moved(first, count, target, length)
        self.gone(first, count)
        return result + self.fill(self.at(target + count), PAGE)

    def shrink(self) -> int:
        first, count = self.whole()
        if count < 2:
            return 0
        keep = count // 2
        self.gone(first + keep, count - keep)
        return self.mremap(self.at(first), count * PAGE, keep * PAGE, 0, None)

    def protect(self) -> int:
        first, count = self.part(most=40)
        prot = self.random.choice((NONE, READ, RW, RW))
        result = sys_mprotect(self.at(first), count * PAGE, prot)
        self.split(first, count)
        self.plain[first : first + count] = bytes(count)
        return result

    # Advice

    def drop(self) -> int:
        first, count = self.part()
        advice = self.random.choice((DONTNEED, DONTNEED, DONTNEED, FREE, COLD))
        result = sys_madvise(self.at(first), count * PAGE, advice)
        if self.random.random() < 0.2:
            result += 1000 * calls.vm_read(self.buffer, self.at(first), count * PAGE)
        return result

    def remove(self) -> int:
        first, count = self.part(most=8)
        return sys_madvise(self.at(first), count * PAGE, REMOVE)

    def populate(self) -> int:
        first, count = self.part(most=40)
        advice = self.random.choice((POPULATE_READ, POPULATE_WRITE))
        return sys_madvise(self.at(first), count * PAGE, advice)

    def huge(self) -> int:
        first = self.random.randrange(ARENA_PAGES // HUGE) * HUGE
        afresh = self.random.random() < 0.5
        advice = self.random.choice((HUGEPAGE, HUGEPAGE, NOHUGEPAGE))
        result = 0
        if afresh:
            result = sys_mmap(self.at(first), HUGE * PAGE, RW, PRIVATE_ANON | FIXED, -1, 0)
            self.made(first, HUGE, "anonymous", plain=True)
        result += sys_madvise(self.at(first), HUGE * PAGE, advice)
        self.split(first, HUGE)
        page, count = self.part(HUGE - 1)
        return result + self.fill(self.at(first + page), count * PAGE)

    def collapse(self) -> int:
        # Advice that may be declined for reasons outside: the result says nothing.
        first = self.random.randrange(ARENA_PAGES // HUGE) * HUGE
        sys_madvise(self.at(first), HUGE * PAGE, COLLAPSE)
        return 0

    def guard(self) -> int:
        first, count = self.part(most=4)
        advice = self.random.choice((GUARD_INSTALL, GUARD_REMOVE))
        kinds = {self.kinds.get(number) for number in self.ids[first : first + count]}
        if "shared" in kinds:
            return 0  # of a mapping, not of the object's content: no tracker's business
        self.plain[first : first + count] = bytes(count)
        return sys_madvise(self.at(first), count * PAGE, advice)

    # Heap, stack, elsewhere

    def brk(self) -> int:
        pages = self.random.randint(1, 16)
        if self.brk_end and sys_sbrk(0) == self.brk_end and self.random.random() < 0.4:
            sys_sbrk(-self.brk_pages * PAGE)
            self.brk_end = 0
            return 0
        start = sys_sbrk(pages * PAGE)
        if start < 0:
            return start
        self.brk_end, self.brk_pages = start + pages * PAGE, pages
        ctypes.memset(start, self.random.randrange(256), pages * PAGE // 2)
        return 0

    def grow_stack(self) -> int:
        self.grows -= PAGE
        if self.grows < self.grows_least:
            return 0
        return self.fill(self.grows, 64)

    def map_elsewhere(self) -> int:
        # Where the kernel likes: beside others, and merged with them where it can.
        pages = self.random.randint(1, 32)
        value = self.random.randrange(256)
        address = sys_mmap(None, pages * PAGE, RW, PRIVATE_ANON, -1, 0)
        if address > 0:
            ctypes.memset(address, value, pages * PAGE - 1)
            self.elsewhere.append((address, pages))
        return ok(address)

    def resize_elsewhere(self) -> int:
        # As realloc(3) does with large blocks.
        choice, pages = self.random.random(), self.random.randint(1, 48)
        if not self.elsewhere:
            return 0
        address, length = self.elsewhere.pop(int(choice * len(self.elsewhere)))
        if choice < 0.4:
            return ok(sys_munmap(address, length * PAGE))
        address = self.mremap(address, length * PAGE, pages * PAGE, MAYMOVE, None)
        if address > 0:
            ctypes.memset(address + (pages - 1) * PAGE, 77, 100)
            self.elsewhere.append((address, pages))
        return ok(address)

    # Private files

    def file_store(self) -> int:
        first, count = self.part(FILE_PAGES, 6)
        return self.fill(self.mapped + first * PAGE, count * PAGE)

    def file_drop(self) -> int:
        first, count = self.part(FILE_PAGES, 6)
        return sys_madvise(self.mapped + first * PAGE, count * PAGE, DONTNEED)

    def file_write(self) -> int:
        first, count = self.part(FILE_PAGES, 2)
        return os.pwrite(self.file, self.random.randbytes(count * PAGE), first * PAGE)

    # Shared objects

    def shared_store(self) -> int:
        base, pages = self.random.choice(((self.first, MEMFD_PAGES), (self.second, 64)))
        first, count = self.part(pages, 6)
        ctypes.memset(base + first * PAGE, self.random.randrange(256), count * PAGE)
        return 0

    def shared_write(self) -> int:
        first, count = self.part(MEMFD_PAGES, 4)
        return os.pwrite(self.memfd, self.random.randbytes(count * PAGE - 100), first * PAGE)

    def shared_punch(self) -> int:
        first, count = self.part(MEMFD_PAGES, 4)
        if self.random.random() < 0.5:
            return sys_fallocate(self.memfd, PUNCH_HOLE, first * PAGE, count * PAGE)
        return sys_madvise(self.first + first * PAGE, count * PAGE, REMOVE)

    def shared_alias(self) -> int:
        # A third mapping that comes and goes between two looks.
        first, count = self.part(64, 8)
        value = self.random.randrange(256)
        length = 64 * PAGE
        alias = self.mremap(self.second, 0, length, MAYMOVE, None)
        if alias > 0:
            ctypes.memset(alias + first * PAGE, value, count * PAGE)
            sys_munmap(alias, length)
        return ok(alias)

    def shared_resize(self) -> int:
        # Beyond what is mapped: a store past the end would be a SIGBUS.
        self.memfd_pages = MEMFD_PAGES + self.random.randrange(32)
        os.ftruncate(self.memfd, self.memfd_pages * PAGE)
        return os.pwrite(self.memfd, b"x" * 99, MEMFD_PAGES * PAGE) if self.memfd_pages > MEMFD_PAGES else 0

    def shared_move(self) -> int:
        moved = self.mremap(self.second, 64 * PAGE, 65 * PAGE, MAYMOVE, None)
        if moved < 0:
            return moved
        self.second = self.mremap(moved, 65 * PAGE, 64 * PAGE, MAYMOVE, None)
        ctypes.memset(self.second + 3 * PAGE, 9, PAGE)
        return 0

    def shared_anonymous(self) -> int:
        first, count = self.part(64, 6)
        choice, value = self.random.random(), self.random.randrange(256)
        address, length = self.anonymous + first * PAGE, count * PAGE
        if choice < 0.7:
            ctypes.memset(address, value, length)
            return 0
        return sys_madvise(address, length, REMOVE if choice < 0.85 else DONTNEED)

    # Children

    def fork(self) -> int:
        """A child that lives a while and writes to its copy."""
        lives_s = self.random.choice((0, 0.002, 0.01))
        value = self.random.randrange(256)
        for pid in self.children[:]:
            if os.waitpid(pid, os.WNOHANG)[0]:
                self.children.remove(pid)
        pid = os.fork()
        if not pid:
            ctypes.memset(self.steady, 99, 20 * PAGE)
            time.sleep(lives_s)
            ctypes.memset(self.steady + 10 * PAGE, 98, 20 * PAGE)
            os._exit(0)
        self.children.append(pid)
        ctypes.memset(self.steady + 5 * PAGE, value, 10 * PAGE)
        return 0

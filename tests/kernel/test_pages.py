"""PageSender to PagePlacer between two live processes; zero detection, chunks, digests."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
from array import array
from collections.abc import Iterator
from ctypes import addressof, c_char

import pytest
import zstandard

from agent.errors import DumpError, RestoreError, TransferError
from agent.pages.chunks import Stream
from agent.pages.compress import Compressor, Decompressor
from agent.pages.digest import digest_process
from agent.pages.place import PagePlacer
from agent.pages.sender import CHUNK_BYTES, PageSender
from agent.pages.zero import gaps, zero_runs
from agent.procfs.maps import parse_maps, read_maps
from agent.ranges import RangeSet
from protocol.codec import Buffer
from protocol.framing import FrameDecoder
from protocol.pages import parse_batch

PAGE = 4096
BASE = 0x100000000000
NR_PAGES = 1024
PROGRAM = f"""
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mmap({BASE}, {NR_PAGES * PAGE}, 3, 0x32, -1, 0)
print(os.getpid(), flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Child:
    """A process with a megabyte-sized playground at BASE that runs lines of Python on request."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.pid = int(self.process.stdout.readline())
        self.mem = os.open(f"/proc/{self.pid}/mem", os.O_RDWR)

    def run(self, line: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"

    def read(self, page: int, count: int = 1) -> bytes:
        return os.pread(self.mem, count * PAGE, BASE + page * PAGE)

    def write(self, page: int, data: bytes) -> None:
        os.pwrite(self.mem, data, BASE + page * PAGE)

    def close(self) -> None:
        os.close(self.mem)
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def pair() -> Iterator[tuple[Child, Child]]:
    source, destination = Child(), Child()
    yield source, destination
    source.close()
    destination.close()


def joined(placer: PagePlacer, *, method: str = "none") -> PageSender:
    """A sender whose frames arrive in `placer`."""

    def carry(buffers: list[Buffer]) -> None:
        decoder = FrameDecoder()
        decoder.receive_data(b"".join(buffers))
        frame = decoder.next_frame()
        assert frame is not None
        placer.place(parse_batch(memoryview(bytearray(frame.payload))))

    return PageSender(carry, compress=Compressor(method))


def pages(*numbers: int) -> RangeSet:
    return RangeSet.of((BASE + n * PAGE, BASE + (n + 1) * PAGE) for n in numbers)


@pytest.mark.parametrize("method", ["none", "zstd"])
def test_scattered_and_zero_pages_arrive(pair: tuple[Child, Child], method: str) -> None:
    source, destination = pair
    rng = random.Random(3)
    for page in range(0, NR_PAGES, 2):
        if rng.random() < 0.7:
            source.write(page, bytes([page % 251 + 1]) * PAGE)
    source.write(1, bytes(PAGE - 1) + b"x")  # all zero but its last byte
    source.write(3, bytes(PAGE // 2 + 8) + b"x")
    placer = PagePlacer()
    placer.add_process_space(7, destination.pid)
    counters = joined(placer, method=method).send_process_pages(
        7, source.pid, RangeSet((BASE, BASE + NR_PAGES * PAGE)), final=True
    )
    assert counters.pages_sent == NR_PAGES and counters.pages_zero > 0
    assert source.read(0, NR_PAGES) == destination.read(0, NR_PAGES)
    placer.close()


def test_zeros_overwrite_what_is_held_and_skip_what_is_not(pair: tuple[Child, Child]) -> None:
    source, destination = pair
    placer = PagePlacer()
    placer.add_process_space(7, destination.pid)
    placer.set_anonymous(7, RangeSet((BASE, BASE + NR_PAGES * PAGE)))
    sender = joined(placer)
    source.write(0, b"a" * PAGE)
    sender.send_process_pages(7, source.pid, pages(0))
    source.write(0, bytes(PAGE))
    sender.send_process_pages(7, source.pid, pages(0, 5))
    assert destination.read(0) == bytes(PAGE)
    assert placer.held(7) == pages(0)


def test_no_access_pages_are_carried(pair: tuple[Child, Child]) -> None:
    source, destination = pair
    source.write(2, b"secret".ljust(3 * PAGE, b"."))
    source.run(f"libc.mprotect({BASE + 3 * PAGE}, {PAGE}, 0)")
    destination.run(f"libc.mprotect({BASE + 3 * PAGE}, {PAGE}, 0)")
    placer = PagePlacer()
    placer.add_process_space(7, destination.pid)
    joined(placer).send_process_pages(7, source.pid, pages(2, 3, 4), final=True)
    assert source.read(2, 3) == destination.read(2, 3)


def test_pages_gone_are_reported_and_fatal_only_at_the_end(pair: tuple[Child, Child]) -> None:
    source, destination = pair
    source.write(0, b"a" * 8 * PAGE)
    source.run(f"libc.munmap(ctypes.c_void_p({BASE + 2 * PAGE}), {PAGE})")
    placer = PagePlacer()
    placer.add_process_space(7, destination.pid)
    sender = joined(placer)
    counters = sender.send_process_pages(7, source.pid, pages(1, 2, 4, 6))
    assert pages(2).subtract(counters.gone) == RangeSet()
    assert destination.read(1) == destination.read(4) == destination.read(6) == b"a" * PAGE
    with pytest.raises(DumpError):
        sender.send_process_pages(7, source.pid, pages(2), final=True)


def test_absent_is_pending_until_taken_less_later_writes(pair: tuple[Child, Child]) -> None:
    source, destination = pair
    placer = PagePlacer()
    placer.add_process_space(7, destination.pid)
    sender = joined(placer)
    source.write(0, b"a" * 4 * PAGE)
    sender.send_process_pages(7, source.pid, pages(0, 1, 2))
    sender.send_absent(7, pages(0, 1))
    sender.send_process_pages(7, source.pid, pages(1))
    assert placer.take_absent(7) == pages(0)
    assert not placer.take_absent(7)
    assert placer.held(7) == pages(1, 2)


def test_unmapped_destination_is_an_error(pair: tuple[Child, Child]) -> None:
    source, destination = pair
    source.write(0, b"a" * PAGE)
    destination.run(f"libc.munmap(ctypes.c_void_p({BASE}), {PAGE})")
    placer = PagePlacer()
    placer.add_process_space(7, destination.pid)
    with pytest.raises(RestoreError):
        joined(placer).send_process_pages(7, source.pid, pages(0))


def test_unknown_space_is_rejected(pair: tuple[Child, Child]) -> None:
    source, _ = pair
    source.write(0, b"a" * PAGE)
    with pytest.raises(TransferError):
        joined(PagePlacer()).send_process_pages(9, source.pid, pages(0))


def test_objects_are_copied_with_their_holes() -> None:
    source, destination = os.memfd_create("a"), os.memfd_create("b")
    os.ftruncate(source, 10 * PAGE + 5)
    os.ftruncate(destination, 10 * PAGE + 5)
    os.pwrite(source, b"x" * PAGE, 2 * PAGE)
    os.pwrite(source, b"end..", 10 * PAGE)
    placer = PagePlacer()
    placer.add_file_space(3, destination)
    sender = joined(placer)
    os.pwrite(destination, b"", 0)
    sender.send_file_pages(3, source, RangeSet((0, 11 * PAGE)))
    os.ftruncate(destination, 10 * PAGE + 5)
    assert os.pread(source, 1 << 20, 0) == os.pread(destination, 1 << 20, 0)
    assert os.fstat(destination).st_blocks == 2 * 8
    sender.send_absent(3, RangeSet((2 * PAGE, 3 * PAGE)))
    assert os.pread(destination, PAGE, 2 * PAGE) == bytes(PAGE)


def test_zero_runs_agree_with_a_loop() -> None:
    rng = random.Random(1)
    for _ in range(30):
        nr = rng.randrange(1, 128)
        data = bytearray()
        for _ in range(nr):
            page = bytearray(PAGE)
            if rng.random() < 0.5:
                page[rng.randrange(PAGE)] = 1
            data += page
        pin = (c_char * len(data)).from_buffer(data)
        runs = zero_runs(memoryview(data).cast("B").cast("Q"), addressof(pin), len(data))
        found = {n for low, high in runs for n in range(low // PAGE, high // PAGE)}
        assert found == {n for n in range(nr) if not any(data[n * PAGE : (n + 1) * PAGE])}
        assert sum(h - lo for lo, h in runs + gaps(runs, len(data))) == len(data)
        del pin


def test_chunks_lose_nothing() -> None:
    rng = random.Random(2)
    ranges = RangeSet.of(
        (n * PAGE, (n + rng.randrange(1, 300)) * PAGE) for n in range(0, 9000, 301)
    )
    chunks = list(Stream(ranges.pairs).chunks(CHUNK_BYTES))
    assert RangeSet(array("Q", [v for chunk in chunks for v in chunk])) == ranges
    assert all(sum(c[1::2]) - sum(c[0::2]) == CHUNK_BYTES for c in chunks[:-1])


def test_decompression_is_bounded() -> None:
    packed = Compressor("zstd").compress(bytes(1 << 20))
    assert packed is not None
    assert Decompressor().decompress(memoryview(packed), 1 << 20) == bytes(1 << 20)
    with pytest.raises(TransferError):
        Decompressor().decompress(memoryview(packed), 4096)
    with pytest.raises(TransferError):
        Decompressor().decompress(memoryview(b"garbage"), 4096)


@pytest.mark.parametrize("level", [1, 4, 19, 22])
def test_only_exactly_the_expected_content_decompresses(level: int) -> None:
    content = random.Random(level).randbytes(PAGE) * 64
    decompressor = Decompressor()
    for with_size in (True, False):
        stream = zstandard.ZstdCompressor(level=level).compressobj(size=len(content) if with_size else -1)
        packed = stream.compress(content) + stream.flush()
        if not with_size and level == 22:  # asks for a window of 128 MiB
            with pytest.raises(TransferError):
                decompressor.decompress(memoryview(packed), len(content))
            continue
        assert decompressor.decompress(memoryview(packed), len(content)) == content
        for wrong in (len(content) - PAGE, len(content) + PAGE):
            with pytest.raises(TransferError, match="expected"):
                decompressor.decompress(memoryview(packed), wrong)
        with pytest.raises(TransferError):
            decompressor.decompress(memoryview(packed)[: len(packed) // 2], len(content))
        # What failed leaves nothing behind.
        assert decompressor.decompress(memoryview(packed), len(content)) == content


def test_digest_sees_content_and_not_population(pair: tuple[Child, Child]) -> None:
    source, _ = pair

    def digest(**more: object) -> str:
        maps = [e for e in parse_maps(read_maps(source.pid)) if BASE <= e.start < BASE + (1 << 30)]
        return digest_process(source.pid, maps, **more)  # type: ignore[arg-type]

    empty = digest()
    source.write(5, bytes(PAGE))  # populated, zero
    assert digest() == empty
    source.write(6, b"x" * PAGE)
    full = digest()
    assert full != empty
    assert digest(skip=pages(6)) == empty
    assert digest(masks=[(BASE + 6 * PAGE, PAGE)]) == empty
    source.write(6, bytes(PAGE))
    source.write(7, b"x" * PAGE)
    assert digest() not in (full, empty)  # the same bytes elsewhere
    assert ctypes.sizeof(ctypes.c_void_p) == 8

"""Read pages of a target, or of a shared object, and send them as batches.

One warm buffer that fits L2 is filled by process_vm_readv, searched for zero pages and sent before the next fill. Where
the target could not read itself (PROT_NONE), /proc/PID/mem does. Pages that went away meanwhile are ordinary
while the target runs: they are left out and reported as `gone`, and the tracker is to be told (ScanTracker.forget).
Must never write to the target. Addresses are target addresses or object offsets, ranges [start, end) in bytes.
"""

from __future__ import annotations

import errno
import itertools
import operator
import os
from array import array
from collections.abc import Callable
from ctypes import addressof, c_char
from dataclasses import dataclass, field

from agent.errors import DumpError, TargetGone
from agent.kernel import process_vm
from agent.pages.chunks import Stream, to_iovecs
from agent.pages.compress import Compressor
from agent.pages.zero import gaps, zero_runs
from agent.ranges import RangeSet
from agent.types import PAGE_SIZE
from protocol.codec import Buffer
from protocol.framing import FrameType, encode_frame
from protocol.limits import MAX_BATCH_RANGES
from protocol.pages import PageBatch, PageEncoding, batch_buffers, check_batch

CHUNK_BYTES = 512 << 10
"""Bytes read at a time: large enough to hide a call's cost, small enough to stay in L2 with what is sent."""

EXPECT_BYTES = 2 << 20
"""Shorter ranges are not announced: no huge page fits in."""

_UNREADABLE = (errno.EFAULT, errno.EIO)

OnRead = Callable[["array[int]", memoryview], object]
"""Sees each chunk that is about to be sent: flat ranges, and their content one after another."""


@dataclass(slots=True)
class PageCounters:
    """What one call sent. `gone` could not be read any more."""

    pages_raw: int = 0
    pages_zero: int = 0
    pages_absent: int = 0
    bytes_payload: int = 0
    gone: RangeSet = field(default_factory=RangeSet)

    @property
    def pages_sent(self) -> int:
        return self.pages_raw + self.pages_zero


class PageReader:
    """A warm buffer and the ways to fill it. Not thread safe; close() it."""

    def __init__(self) -> None:
        self._buffer = bytearray(CHUNK_BYTES)
        self._pin = (c_char * CHUNK_BYTES).from_buffer(self._buffer)
        self.address = addressof(self._pin)
        self.view = memoryview(self._buffer)
        self.words = self.view.cast("Q")
        self._mem: dict[int, int] = {}
        self._adopted: list[int] = []

    def close(self) -> None:
        """Close the descriptors of /proc/PID/mem and the adopted ones."""
        while self._mem:
            os.close(self._mem.popitem()[1])
        while self._adopted:
            os.close(self._adopted.pop())

    def adopt(self, fd: int | None) -> int | None:
        """Take over a descriptor: closed by close()."""
        if fd is not None:
            self._adopted.append(fd)
        return fd

    def read_process(self, pid: int, pairs: array[int], gone: RangeSet) -> array[int]:
        """Fill the buffer with `pairs` (at most CHUNK_BYTES) and return the pairs that were there; adds to `gone`."""
        vectors = to_iovecs(pairs)
        nr = len(vectors) // 2
        moved = self._readv(pid, 0, vectors, 0, nr)
        if moved == sum(vectors[1::2]):
            return pairs
        return self._read_piecewise(pid, vectors, moved, gone)

    def _readv(self, pid: int, at: int, vectors: array[int], first: int, nr: int) -> int:
        try:
            return process_vm.readv(
                pid, self.address + at, CHUNK_BYTES - at, vectors, first, nr - first
            )
        except OSError as err:
            if err.errno == errno.ESRCH:
                raise TargetGone("The target exited", pid=pid) from err
            if err.errno not in _UNREADABLE:
                raise DumpError(f"Cannot read memory of process {pid}", pid=pid) from err
            return 0

    def _read_piecewise(
        self, pid: int, vectors: array[int], moved: int, gone: RangeSet
    ) -> array[int]:
        # Something on the way could not be read: go on behind it, by /proc/PID/mem first. What that cannot read
        # either costs the rest of its range (within this chunk): the next round looks again.
        got: array[int] = array("Q")
        at, index, nr = 0, 0, len(vectors) // 2
        while True:
            while index < nr and moved >= vectors[2 * index + 1]:
                length = vectors[2 * index + 1]
                got.extend((vectors[2 * index], vectors[2 * index] + length))
                at += length
                moved -= length
                index += 1
            if index == nr:
                return got
            start, length = vectors[2 * index], vectors[2 * index + 1]
            done = moved - moved % PAGE_SIZE
            done += self._read_mem(pid, start + done, at + done, length - done)
            if done:
                got.extend((start, start + done))
                at += done
            if done < length:
                gone.add(start + done, start + length)
            index += 1
            moved = self._readv(pid, at, vectors, index, nr) if index < nr else 0

    def _read_mem(self, pid: int, start: int, at: int, length: int) -> int:
        fd = self._mem.get(pid)
        if fd is None:
            try:
                fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, ProcessLookupError) as err:
                raise TargetGone("The target exited", pid=pid) from err
            self._mem[pid] = fd
        done = 0
        while done < length:
            try:
                moved = os.preadv(fd, [self.view[at + done : at + length]], start + done)
            except OSError as err:
                if err.errno not in _UNREADABLE:
                    raise DumpError(f"Cannot read memory of process {pid}", pid=pid) from err
                break
            if not moved:
                break
            done += moved
        return done - done % PAGE_SIZE

    def read_file(self, fd: int, pairs: array[int], gone: RangeSet) -> array[int]:
        """The same from an object; offsets."""
        got: array[int] = array("Q")
        at = 0
        for start, end in zip(pairs[0::2], pairs[1::2]):
            done = 0
            while done < end - start:
                moved = os.preadv(fd, [self.view[at + done : at + end - start]], start + done)
                if not moved:
                    break
                done += moved
            if done % PAGE_SIZE:  # the last page of an object whose size is no multiple
                padded = done + -done % PAGE_SIZE
                self.view[at + done : at + padded] = bytes(padded - done)
                done = padded
            if done:
                got.extend((start, start + done))
                at += done
            if done < end - start:
                gone.add(start + done, end)
        return got


class PageSender:
    """Sends batches as whole PAGES frames through `send_buffers`, which must be done with them when it returns.

    `on_batch` sees each batch before it is sent (the session counts there). `limiter`, if any, is called with the
    number of bytes about to be sent and may sleep; it returns the seconds.
    """

    def __init__(
        self,
        send_buffers: Callable[[list[Buffer]], None],
        *,
        compress: Compressor | None = None,
        on_batch: Callable[[PageBatch], object] | None = None,
        limiter: Callable[[int], float] | None = None,
    ) -> None:
        self._send_buffers = send_buffers
        self._compress = compress or Compressor("none")
        self._on_batch = on_batch
        self._limiter = limiter
        self._reader = PageReader()

    def close(self) -> None:
        """Close the descriptors of /proc/PID/mem."""
        self._reader.close()

    def send_process_pages(
        self,
        space_id: int,
        pid: int,
        pages: RangeSet,
        *,
        final: bool = False,
        on_read: OnRead | None = None,
    ) -> PageCounters:
        """Send pages of process `pid`.

        :raises DumpError: final, and a page cannot be read.
        :raises TargetGone: the process exited.
        """
        counters = PageCounters()
        zeros = RangeSet()
        self._compress.begin(final=final)
        for pairs in Stream(pages.pairs).chunks(CHUNK_BYTES):
            got = self._reader.read_process(pid, pairs, counters.gone)
            self._show(on_read, got)
            self._send_chunk(space_id, got, zeros, counters)
        if final and counters.gone:
            raise DumpError(
                f"Cannot read memory {next(iter(counters.gone))} of stopped process {pid}", pid=pid
            )
        self._send_bare(space_id, PageEncoding.ZERO, zeros, counters)
        return counters

    def send_file_pages(
        self,
        space_id: int,
        fd: int,
        pages: RangeSet,
        *,
        final: bool = False,
        on_read: OnRead | None = None,
    ) -> PageCounters:
        """Send pages of the object `fd`. Those beyond its end are left out and reported as gone."""
        counters = PageCounters()
        zeros = RangeSet()
        self._compress.begin(final=final)
        for pairs in Stream(pages.pairs).chunks(CHUNK_BYTES):
            got = self._reader.read_file(fd, pairs, counters.gone)
            self._show(on_read, got)
            self._send_chunk(space_id, got, zeros, counters)
        self._send_bare(space_id, PageEncoding.ZERO, zeros, counters)
        return counters

    def send_mapped_pages(
        self, space_id: int, pid: int, pages: RangeSet, shift: int
    ) -> PageCounters:
        """Send pages of an object as process `pid` maps them: `pages` are offsets, `shift` makes them addresses.

        For objects without a descriptor; reading populates them.
        """
        counters = PageCounters()
        zeros = RangeSet()
        self._compress.begin()
        for pairs in Stream(pages.pairs).chunks(CHUNK_BYTES):
            gone = RangeSet()
            got = self._reader.read_process(pid, array("Q", map(shift.__add__, pairs)), gone)
            counters.gone.update(RangeSet(map((-shift).__add__, gone.pairs)))
            self._send_chunk(space_id, array("Q", map((-shift).__add__, got)), zeros, counters)
        self._send_bare(space_id, PageEncoding.ZERO, zeros, counters)
        return counters

    def send_expected(self, space_id: int, pages: RangeSet) -> None:
        """Announce what is long enough for the destination to get huge pages ready for it."""
        starts, ends = pages.starts, pages.ends
        is_long = map(EXPECT_BYTES.__le__, map(operator.sub, ends, starts))
        ranges = RangeSet.of(itertools.compress(zip(starts, ends), is_long))
        self._send_bare(space_id, PageEncoding.EXPECT, ranges, PageCounters())

    def send_absent(self, space_id: int, ranges: RangeSet) -> PageCounters:
        """Tell the destination to drop what it holds in `ranges`."""
        counters = PageCounters()
        self._send_bare(space_id, PageEncoding.ABSENT, ranges, counters)
        return counters

    # Sending

    def _show(self, on_read: OnRead | None, got: array[int]) -> None:
        if on_read is not None and got:
            on_read(got, self._reader.view[: sum(got[1::2]) - sum(got[0::2])])

    def _send_chunk(
        self, space_id: int, pairs: array[int], zeros: RangeSet, counters: PageCounters
    ) -> None:
        if not pairs:
            return
        stream = Stream(pairs)
        runs = zero_runs(self._reader.words, self._reader.address, stream.length)
        payload: Buffer
        if not runs:
            payload, ranges = self._reader.view[: stream.length], pairs
        else:
            for low, high in runs:
                zeros.update(RangeSet(stream.part(low, high)))
                counters.pages_zero += (high - low) // PAGE_SIZE
            rest = gaps(runs, stream.length)
            if not rest:
                return
            ranges = array("Q")
            for low, high in rest:
                ranges.extend(stream.part(low, high))
            if len(rest) == 1:
                payload = self._reader.view[rest[0][0] : rest[0][1]]
            else:
                payload = b"".join([self._reader.view[low:high] for low, high in rest])
        packed = self._compress.compress(payload)
        counters.pages_raw += len(payload) // PAGE_SIZE
        if packed is None:
            self._send(space_id, PageEncoding.RAW, ranges, payload, counters)
        else:
            self._send(space_id, PageEncoding.ZSTD, ranges, packed, counters)

    def _send_bare(
        self, space_id: int, encoding: PageEncoding, ranges: RangeSet, counters: PageCounters
    ) -> None:
        pairs = ranges.pairs
        for first in range(0, len(pairs), 2 * MAX_BATCH_RANGES):
            self._send(space_id, encoding, pairs[first : first + 2 * MAX_BATCH_RANGES], b"", counters)
        if encoding is PageEncoding.ABSENT:
            counters.pages_absent += ranges.nr_pages

    def _send(
        self,
        space_id: int,
        encoding: PageEncoding,
        ranges: array[int],
        payload: Buffer,
        counters: PageCounters,
    ) -> None:
        batch = check_batch(space_id, encoding, ranges, payload)
        nr_bytes = len(payload)
        counters.bytes_payload += nr_bytes
        limited_s = 0.0
        if self._limiter is not None:
            limited_s = self._limiter(nr_bytes + 16 * len(ranges))
        if self._on_batch is not None:
            self._on_batch(batch)
        self._compress.sending()
        self._send_buffers(encode_frame(FrameType.PAGES, *batch_buffers(batch)))
        if nr_bytes:
            self._compress.sent(batch.nr_bytes, nr_bytes, limited_s)

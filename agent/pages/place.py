"""Put received pages where they belong: into skeleton processes and shared objects.

A process is written by process_vm_writev, and by /proc/PID/mem where the mapping is not writable (that copies pages of
private mappings as a debugger's write would). Objects are written through their descriptor.

`held` is a superset of what was ever placed and not dropped since. It decides about ZERO batches: where nothing was
placed and an untouched page reads as zero (`set_anonymous`), nothing need be done. Elsewhere zeros are written: a
page of a private file mapping that became zero must not show the file.
Must never write outside the ranges of a batch. Ranges are [start, end) bytes.
"""

from __future__ import annotations

import errno
import os
from array import array
from ctypes import addressof, c_char, c_int, c_long

from agent.errors import RestoreError, TransferError
from agent.kernel import process_vm
from agent.kernel.libc import check, libc
from agent.pages.chunks import Stream, to_iovecs
from agent.pages.compress import Decompressor
from agent.pages.huge import HugePages
from agent.ranges import RangeSet
from protocol.pages import PageBatch, PageEncoding

_ZERO_CHUNK_BYTES = 512 << 10
_FALLOC_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02

_fallocate = libc["fallocate"]
_fallocate.argtypes = (c_int, c_int, c_long, c_long)
_fallocate.restype = c_int


def local_address(buffer: memoryview) -> tuple[int, object]:
    """Return where a buffer lies, and an object that must live as long as the address is used."""
    if buffer.readonly:
        buffer = memoryview(bytearray(buffer))
    pin = (c_char * buffer.nbytes).from_buffer(buffer)
    return addressof(pin), pin


class _Space:
    """What is known of one destination address space or object."""

    __slots__ = ("absent", "anonymous", "fd", "held", "huge", "pid", "written")

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid  # 0: an object
        self.fd = fd  # /proc/PID/mem, or the object (the caller's)
        self.held = RangeSet()
        self.absent = RangeSet()  # to be dropped, less what is in `written`
        self.written = RangeSet()  # placed since the last ABSENT batch
        self.anonymous = RangeSet()
        self.huge = HugePages(pid) if pid else None

    def outstanding(self) -> RangeSet:
        if self.absent and self.written:  # in this order: a set that grew merges its parts when it is looked at
            self.absent = self.absent.subtract(self.written)
        self.written = RangeSet()
        return self.absent


class PagePlacer:
    """Places batches. Not thread safe; close() it."""

    def __init__(self) -> None:
        self._spaces: dict[int, _Space] = {}
        self._decompressor = Decompressor()
        self._zeros = bytearray(_ZERO_CHUNK_BYTES)
        self._zeros_view = memoryview(self._zeros)

    def close(self) -> None:
        for space in self._spaces.values():
            if space.huge is not None:
                space.huge.close()
                os.close(space.fd)
        self._spaces.clear()

    def add_process_space(self, space_id: int, pid: int) -> None:
        """Batches of `space_id` go into process `pid`, at the addresses they name."""
        self._spaces[space_id] = _Space(pid, os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC))

    def add_file_space(self, space_id: int, fd: int) -> None:
        """Batches of `space_id` go into the object `fd`, which stays the caller's and starts empty."""
        self._spaces[space_id] = _Space(0, fd)

    def knows(self, space_id: int) -> bool:
        return space_id in self._spaces

    def set_anonymous(self, space_id: int, ranges: RangeSet) -> None:
        """Tell which ranges of a process read as zero while untouched. Call again when mappings change."""
        self._spaces[space_id].anonymous = ranges

    def held(self, space_id: int) -> RangeSet:
        return self._spaces[space_id].held

    def take_absent(self, space_id: int) -> RangeSet:
        """Return what must be dropped now (MADV_DONTNEED) and count it as dropped. Objects: done already."""
        space = self._spaces[space_id]
        absent = space.outstanding()
        if absent:
            space.absent = RangeSet()
            space.held = space.held.subtract(absent)
        return absent

    def settle(self) -> None:
        """Do the bookkeeping of a round now, while nobody waits: it takes tens of ms after many scattered pages."""
        for space in self._spaces.values():
            space.outstanding()
            bool(space.held)

    def place(self, batch: PageBatch) -> None:
        """Carry out one batch.

        :raises TransferError: the batch names an unknown space or does not decompress.
        :raises RestoreError: the memory cannot be written.
        """
        space = self._spaces.get(batch.space_id)
        if space is None:
            raise TransferError(f"Page batch for unknown space {batch.space_id}")
        if batch.encoding is PageEncoding.EXPECT:
            # Once something is held, touching a page may be one write too many; the first round is the large one.
            if space.huge is not None and not space.held:
                space.huge.expect(RangeSet(batch.ranges).intersect(space.anonymous))
        elif batch.encoding is PageEncoding.ABSENT:
            self._place_absent(space, RangeSet(batch.ranges))
        elif batch.encoding is PageEncoding.ZERO:
            self._place_zero(space, RangeSet(batch.ranges))
        else:
            payload = batch.payload
            if batch.encoding is PageEncoding.ZSTD:
                payload = self._decompressor.decompress(payload, batch.nr_bytes)
            self._write(space, batch.ranges, payload)
            placed = RangeSet(batch.ranges)
            space.held.update(placed)
            space.written.update(placed)

    def _place_absent(self, space: _Space, ranges: RangeSet) -> None:
        if space.pid:
            space.outstanding()
            space.absent.update(ranges)
        else:
            self._punch(space, ranges)

    def _punch(self, space: _Space, ranges: RangeSet) -> None:
        for start, end in ranges.intersect(space.held):
            result = _fallocate(space.fd, _FALLOC_KEEP_SIZE_PUNCH_HOLE, start, end - start)
            check(result, "fallocate", start, end)
        space.held = space.held.subtract(ranges)

    def _place_zero(self, space: _Space, ranges: RangeSet) -> None:
        if not space.pid:
            self._punch(space, ranges)
            return
        untouched = ranges.intersect(space.anonymous).subtract(space.held)
        rest = ranges.subtract(untouched)
        for pairs in Stream(rest.pairs).chunks(_ZERO_CHUNK_BYTES):
            length = sum(pairs[1::2]) - sum(pairs[0::2])
            self._write(space, pairs, self._zeros_view[:length])
        space.held.update(rest)
        space.written.update(rest)

    def _write(self, space: _Space, pairs: array[int], payload: memoryview) -> None:
        if space.huge is None:
            offset = 0
            for start, end in zip(pairs[0::2], pairs[1::2]):
                _write_all(space.fd, payload[offset : offset + end - start], start)
                offset += end - start
            return
        space.huge.prepare(pairs)
        address, pin = local_address(payload)
        vectors = to_iovecs(pairs)
        nr, index, offset = len(vectors) // 2, 0, 0
        while index < nr:
            moved = _writev(space.pid, address + offset, payload.nbytes - offset, vectors, index)
            while index < nr and moved >= vectors[2 * index + 1]:
                moved -= vectors[2 * index + 1]
                offset += vectors[2 * index + 1]
                index += 1
            if index < nr:  # not writable: the rest of this range the other way
                start, length = vectors[2 * index] + moved, vectors[2 * index + 1] - moved
                offset += moved
                _write_all(space.fd, payload[offset : offset + length], start)
                offset += length
                index += 1
        del pin


def _writev(pid: int, address: int, length: int, vectors: array[int], first: int) -> int:
    try:
        return process_vm.writev(pid, address, length, vectors, first, len(vectors) // 2 - first)
    except OSError as err:
        if err.errno == errno.EFAULT:
            return 0
        raise RestoreError(f"Cannot write memory of process {pid}", pid=pid) from err


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < data.nbytes:
        try:
            moved = os.pwritev(fd, [data[done:]], offset + done)
        except OSError as err:
            raise RestoreError(
                f"Cannot place page at {offset + done:#x}: {os.strerror(err.errno or 0)}"
            ) from err
        if not moved:
            raise RestoreError(f"Cannot place page at {offset + done:#x}: nothing is mapped there")
        done += moved

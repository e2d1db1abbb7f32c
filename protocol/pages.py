"""Page batches: the payload of a PAGES frame.

    offset  size  field      (all numbers little-endian)
    0       4     space_id   a process's pid or a shared object's id; 0 is never valid
    4       1     encoding   PageEncoding
    5       3     reserved   0
    8       4     nr_ranges
    12      4     nr_payload bytes of payload
    16      16*n  ranges     start, end as u64 pairs: [start, end) bytes, page aligned, sorted,
                             disjoint
    ...           payload    RAW: the ranges' bytes one after the other; ZSTD: one zstd frame of
                             them; ZERO, ABSENT, EXPECT: nothing

Addresses are target addresses, or byte offsets into a shared object. Nothing here loops over
pages or ranges in Python: a batch costs the same few calls whatever its size. This module must
never compress, decompress or read memory. The receiver of a ZSTD batch must bound decompression
by ``nr_bytes``.
"""

from __future__ import annotations

import enum
import operator
import struct
import sys
from array import array
from dataclasses import dataclass
from functools import reduce

from protocol.codec import Buffer
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.limits import MAX_ADDRESS, MAX_BATCH_BYTES, MAX_BATCH_RANGES, PAGE_SIZE

_HEADER = struct.Struct("<IB3sII")
BATCH_HEADER_BYTES = _HEADER.size
_RESERVED = bytes(3)


class PageEncoding(enum.IntEnum):
    """How a batch carries its pages."""

    RAW = 1
    """The payload is the contents."""
    ZERO = 2
    """Every byte is zero."""
    ABSENT = 3
    """Nothing is there any more: drop what earlier batches brought."""
    ZSTD = 4
    """The payload is the contents, compressed."""
    EXPECT = 5
    """Every page of these ranges is there on the source and about to be sent in this round: the
    receiver may get memory ready for them. It places nothing and promises nothing."""


_ENCODINGS = {int(encoding): encoding for encoding in PageEncoding}
_WITH_CONTENTS = (PageEncoding.RAW, PageEncoding.ZSTD)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageBatch:
    """One validated batch. `ranges` is flat: start, end, start, end..."""

    space_id: int
    encoding: PageEncoding
    ranges: array[int]
    payload: memoryview
    nr_bytes: int
    """Bytes the ranges cover (before compression)."""

    @property
    def nr_pages(self) -> int:
        """Pages the ranges cover."""
        return self.nr_bytes // PAGE_SIZE


def check_batch(
    space_id: int, encoding: PageEncoding, ranges: array[int], payload: Buffer
) -> PageBatch:
    """Return the batch made of these parts.

    :raises ValueError: when they are not a valid batch; the text says what is wrong.
    """
    if not 0 < space_id < 1 << 32:
        raise ValueError(f"space id {space_id} is not valid")
    nr_bytes = _check_ranges(ranges)
    view = memoryview(payload)
    if encoding in _WITH_CONTENTS and nr_bytes > MAX_BATCH_BYTES:
        raise ValueError(f"{nr_bytes} bytes of contents, limit {MAX_BATCH_BYTES}")
    if encoding is PageEncoding.RAW:
        if view.nbytes != nr_bytes:
            raise ValueError(f"{view.nbytes} bytes of payload for ranges of {nr_bytes} bytes")
    elif encoding is PageEncoding.ZSTD:
        # Not smaller means the sender should have sent it raw; it also bounds the receiver's work.
        if not 0 < view.nbytes < nr_bytes:
            raise ValueError(f"{view.nbytes} compressed bytes for ranges of {nr_bytes} bytes")
    elif view.nbytes:
        raise ValueError(f"{view.nbytes} bytes of payload in a batch without contents")
    return PageBatch(
        space_id=space_id, encoding=encoding, ranges=ranges, payload=view, nr_bytes=nr_bytes
    )


def _check_ranges(ranges: array[int]) -> int:
    """Return how many bytes the table covers."""
    count = len(ranges)
    if not count or count % 2:
        raise ValueError(f"range table has {count} numbers")
    if count > 2 * MAX_BATCH_RANGES:
        raise ValueError(f"{count // 2} ranges, limit {MAX_BATCH_RANGES}")
    starts, ends = ranges[0::2], ranges[1::2]
    if not all(map(operator.lt, starts, ends)):
        raise ValueError("range table has an empty or reversed range")
    if not all(map(operator.le, ends, starts[1:])):
        raise ValueError("ranges overlap or are not sorted")
    if reduce(operator.or_, ranges) % PAGE_SIZE:
        raise ValueError("range table has an address that is not page aligned")
    if ends[-1] > MAX_ADDRESS:
        raise ValueError(f"range ends at {ends[-1]:#x}, limit {MAX_ADDRESS:#x}")
    return sum(ends) - sum(starts)


def encode_batch(
    space_id: int, encoding: PageEncoding, ranges: array[int], payload: Buffer = b""
) -> list[Buffer]:
    """Return the payload of a PAGES frame as buffers: header, range table, `payload` uncopied.

    `ranges` must not change before the buffers are sent. Wrap the result with
    ``encode_frame(FrameType.PAGES, *buffers)``.

    :raises LocalProtocolError: when this is not a valid batch.
    """
    try:
        batch = check_batch(space_id, encoding, ranges, payload)
    except ValueError as err:
        raise LocalProtocolError(f"Cannot encode page batch: {err}") from err
    return batch_buffers(batch)


def batch_buffers(batch: PageBatch) -> list[Buffer]:
    """Like encode_batch, for a batch already checked (check_batch)."""
    nr_payload = batch.payload.nbytes
    header = _HEADER.pack(
        batch.space_id, batch.encoding, _RESERVED, len(batch.ranges) // 2, nr_payload
    )
    buffers: list[Buffer] = [header, memoryview(_little_endian(batch.ranges)).cast("B")]
    if nr_payload:
        buffers.append(batch.payload.cast("B"))
    return buffers


def parse_batch(frame: Buffer) -> PageBatch:
    """Parse the payload of a PAGES frame; the batch's payload is a view of `frame`, not a copy.

    :raises RemoteProtocolError: for any bytes that are not a valid batch.
    """
    view = memoryview(frame)
    if view.nbytes < BATCH_HEADER_BYTES:
        raise RemoteProtocolError(f"Page batch has {view.nbytes} bytes, less than its header")
    space_id, number, reserved, nr_ranges, nr_payload = _HEADER.unpack_from(view)
    encoding = _ENCODINGS.get(number)
    if encoding is None:
        raise RemoteProtocolError(f"Page batch has unknown encoding {number}")
    if reserved != _RESERVED:
        raise RemoteProtocolError(f"Page batch has reserved bytes {reserved.hex()}")
    if nr_ranges > MAX_BATCH_RANGES:
        raise RemoteProtocolError(f"Page batch has {nr_ranges} ranges, limit {MAX_BATCH_RANGES}")
    begin = BATCH_HEADER_BYTES + 16 * nr_ranges
    if view.nbytes != begin + nr_payload:
        raise RemoteProtocolError(
            f"Page batch has {view.nbytes} bytes, its header says {begin + nr_payload}"
        )
    ranges = array("Q")
    ranges.frombytes(view[BATCH_HEADER_BYTES:begin])
    try:
        return check_batch(space_id, encoding, _little_endian(ranges), view[begin:])
    except ValueError as err:
        raise RemoteProtocolError(f"Page batch for space {space_id}: {err}") from err


def _little_endian(ranges: array[int]) -> array[int]:
    if sys.byteorder == "little":
        return ranges
    swapped = array("Q", ranges)
    swapped.byteswap()
    return swapped

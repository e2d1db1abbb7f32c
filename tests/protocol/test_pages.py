"""Page batches: what is valid survives, what is not is refused on either side."""

from __future__ import annotations

import struct
import time
from array import array

import pytest

from protocol.codec import Buffer
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.limits import MAX_ADDRESS, MAX_BATCH_BYTES, MAX_BATCH_RANGES
from protocol.pages import (
    BATCH_HEADER_BYTES,
    PageBatch,
    PageEncoding,
    batch_buffers,
    encode_batch,
    parse_batch,
)
from tests.protocol.samples import BATCHES, PAGE

RAW, ZERO, ABSENT, ZSTD, EXPECT = PageEncoding


def wire(
    *ranges: int,
    space_id: int = 1,
    encoding: int = ZERO,
    reserved: bytes = bytes(3),
    nr_ranges: int | None = None,
    nr_payload: int | None = None,
    payload: bytes = b"",
) -> bytes:
    count = len(ranges) // 2 if nr_ranges is None else nr_ranges
    size = len(payload) if nr_payload is None else nr_payload
    head = struct.pack("<IB3sII", space_id, encoding, reserved, count, size)
    return head + struct.pack(f"<{len(ranges)}Q", *ranges) + payload


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_batch_survives_the_wire(batch: PageBatch) -> None:
    again = parse_batch(b"".join(batch_buffers(batch)))
    assert again == batch
    assert again.nr_pages * PAGE == again.nr_bytes


def test_payload_is_neither_copied_out_nor_in() -> None:
    contents = bytearray(PAGE)
    buffers = encode_batch(1, RAW, array("Q", [0x1000, 0x2000]), contents)
    contents[0] = 7
    assert buffers[-1][0] == 7
    frame = bytearray(b"".join(buffers))
    batch = parse_batch(memoryview(frame))
    frame[BATCH_HEADER_BYTES + 16] = 9
    assert batch.payload[0] == 9


def test_touching_ranges_and_the_last_address_are_valid() -> None:
    top = MAX_ADDRESS
    assert parse_batch(wire(0, PAGE, PAGE, 3 * PAGE, top - PAGE, top)).nr_pages == 4


BAD_RANGES = {
    "none": [],
    "empty": [PAGE, PAGE],
    "reversed": [2 * PAGE, PAGE],
    "unsorted": [2 * PAGE, 3 * PAGE, 0, PAGE],
    "overlapping": [0, 2 * PAGE, PAGE, 3 * PAGE],
    "start not aligned": [1, PAGE],
    "end not aligned": [0, PAGE + 8],
    "beyond the last address": [0, MAX_ADDRESS + PAGE],
    "too many": list(range(0, PAGE * 2 * (MAX_BATCH_RANGES + 1), PAGE)),
}


@pytest.mark.parametrize("ranges", BAD_RANGES.values(), ids=BAD_RANGES.keys())
def test_bad_range_table_is_refused(ranges: list[int]) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_batch(wire(*ranges))
    with pytest.raises(LocalProtocolError):
        encode_batch(1, ZERO, array("Q", ranges))


def test_half_a_range_is_refused() -> None:
    with pytest.raises(LocalProtocolError):
        encode_batch(1, ZERO, array("Q", [0, PAGE, 2 * PAGE]))


BAD_FRAMES = {
    "empty": b"",
    "less than a header": wire(0, PAGE)[:15],
    "truncated table": wire(0, PAGE)[:-1],
    "trailing byte": wire(0, PAGE) + b"x",
    "space 0": wire(0, PAGE, space_id=0),
    "encoding 0": wire(0, PAGE, encoding=0),
    "encoding 6": wire(0, PAGE, encoding=6),
    "reserved bytes": wire(0, PAGE, reserved=b"\0\0\1"),
    "more ranges than bytes": wire(0, PAGE, nr_ranges=2),
    "huge range count": wire(0, PAGE, nr_ranges=0xFFFFFFFF),
    "more payload than bytes": wire(0, PAGE, nr_payload=1),
    "zero with payload": wire(0, PAGE, payload=b"x"),
    "absent with payload": wire(0, PAGE, encoding=ABSENT, payload=b"x"),
    "raw without payload": wire(0, PAGE, encoding=RAW),
    "raw too short": wire(0, 2 * PAGE, encoding=RAW, payload=bytes(PAGE)),
    "raw too long": wire(0, PAGE, encoding=RAW, payload=bytes(2 * PAGE)),
    "raw above the limit": wire(
        0, MAX_BATCH_BYTES + PAGE, encoding=RAW, payload=bytes(MAX_BATCH_BYTES + PAGE)
    ),
    "zstd without payload": wire(0, PAGE, encoding=ZSTD),
    "zstd that does not shrink": wire(0, PAGE, encoding=ZSTD, payload=bytes(PAGE)),
    "zstd above the limit": wire(0, MAX_BATCH_BYTES + PAGE, encoding=ZSTD, payload=b"x"),
}


@pytest.mark.parametrize("frame", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_bad_batch_is_refused(frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_batch(frame)


@pytest.mark.parametrize(
    ("space_id", "encoding", "payload"),
    [
        (0, ZERO, b""),
        (-1, ZERO, b""),
        (1 << 32, ZERO, b""),
        (1, RAW, b"short"),
        (1, ZERO, b"x"),
        (1, EXPECT, b"x"),
        (1, ZSTD, b""),
        (1, ZSTD, bytes(PAGE)),
    ],
)
def test_bad_batch_of_ours_is_a_local_error(
    space_id: int, encoding: PageEncoding, payload: Buffer
) -> None:
    with pytest.raises(LocalProtocolError):
        encode_batch(space_id, encoding, array("Q", [0, PAGE]), payload)


def test_largest_table_is_checked_in_milliseconds() -> None:
    flat = range(0, PAGE * 2 * MAX_BATCH_RANGES, PAGE)
    frame = wire(*flat)
    began = time.perf_counter()
    assert parse_batch(frame).nr_pages == MAX_BATCH_RANGES
    # About 3 ms; the bound is loose for busy machines and still far below a Python loop's cost.
    assert time.perf_counter() - began < 0.25

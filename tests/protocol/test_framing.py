"""Frames: any split of the stream gives the same frames, and nothing wrong gets through."""

from __future__ import annotations

import random
import struct

import pytest

from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.framing import (
    HEADER_BYTES,
    MAGIC,
    FrameDecoder,
    FrameType,
    encode_frame,
    parse_header,
)
from protocol.limits import MAX_CONTROL_FRAME_BYTES, MAX_FRAME_BYTES, MAX_PAGES_FRAME_BYTES
from tests.protocol.samples import RECORDED, VECTORS, frame_of

STREAM = VECTORS["v1_image"]


def frames_of(pieces: list[bytes]) -> list[tuple[FrameType, bytes]]:
    decoder = FrameDecoder()
    frames = []
    for piece in pieces:
        decoder.receive_data(piece)
        while (frame := decoder.next_frame()) is not None:
            frames.append(frame)
    decoder.end_of_stream()
    # Looked at only now: a payload must outlive what the decoder does later.
    return [(frame.type, bytes(frame.payload)) for frame in frames]


def header(magic: int = MAGIC, kind: int = 1, flags: int = 0, length: int = 0) -> bytes:
    return struct.pack("<HBBI", magic, kind, flags, length)


def test_header_is_eight_bytes() -> None:
    assert HEADER_BYTES == 8
    assert header(kind=2, length=5).hex() == "55fe020005000000"


def test_buffers_are_passed_on_uncopied() -> None:
    payload = bytearray(b"abc")
    view = memoryview(b"de")
    head, *rest = encode_frame(FrameType.PAGES, payload, view)
    assert rest[0] is payload and rest[1] is view
    assert parse_header(head) == (FrameType.PAGES, 5)


def test_one_byte_at_a_time_gives_the_same_frames() -> None:
    whole = frames_of([STREAM])
    assert len(whole) == len(RECORDED)
    assert frames_of([STREAM[i : i + 1] for i in range(len(STREAM))]) == whole
    rng = random.Random(1)
    for _ in range(50):
        cuts = sorted(rng.sample(range(len(STREAM)), 12))
        pieces = [STREAM[a:b] for a, b in zip([0, *cuts], [*cuts, len(STREAM)], strict=True)]
        assert frames_of(pieces) == whole


@pytest.mark.parametrize(
    "bad",
    [
        header(magic=0),
        header(magic=0x55FE),
        header(kind=0),
        header(kind=3),
        header(kind=255),
        header(flags=1),
        header(kind=1, length=MAX_CONTROL_FRAME_BYTES + 1),
        header(kind=2, length=MAX_PAGES_FRAME_BYTES + 1),
        header(length=0xFFFFFFFF),
    ],
)
def test_bad_header_is_refused_before_its_payload_comes(bad: bytes) -> None:
    decoder = FrameDecoder()
    decoder.receive_data(frame_of(RECORDED[0]) + bad)
    assert decoder.next_frame() is not None
    for _ in range(2):
        with pytest.raises(RemoteProtocolError):
            decoder.next_frame()
        decoder.receive_data(STREAM)


@pytest.mark.parametrize("size", [0, 7, 9])
def test_header_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_header(bytes(size))


def test_stream_that_ends_inside_a_frame_is_refused() -> None:
    for size in (1, 7, 8, 20):
        decoder = FrameDecoder()
        decoder.receive_data(STREAM[:size])
        assert decoder.next_frame() is None
        with pytest.raises(RemoteProtocolError, match="ends inside a frame"):
            decoder.end_of_stream()


def test_largest_frames_are_allowed_and_larger_ones_not_sent() -> None:
    assert parse_header(header(length=MAX_CONTROL_FRAME_BYTES))[1] == MAX_FRAME_BYTES
    with pytest.raises(LocalProtocolError):
        encode_frame(FrameType.PAGES, bytes(MAX_PAGES_FRAME_BYTES), b"x")

"""Frames: the outermost layer of the byte stream, and the parser that cuts a stream into them.

    offset  size  field     (all numbers little-endian)
    0       2     magic     0xFE55; anything else is not our stream, or a reader out of step
    2       1     type      FrameType; 0 is never valid
    3       1     flags     0 in this version
    4       4     length    bytes of payload that follow; limit by type

There is no checksum: TCP, TLS, ssh and file systems have theirs, a copy of every page through a
CRC would cost as much as the copy itself, and ``--verify`` compares digests end to end.

Two ways to read: FrameDecoder takes bytes as they come; a blocking reader that wants to receive
payloads straight into a warm buffer reads HEADER_BYTES, asks parse_header() and reads the rest
itself. This module must never look into a payload.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from protocol.codec import Buffer
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.limits import MAX_CONTROL_FRAME_BYTES, MAX_PAGES_FRAME_BYTES

MAGIC = 0xFE55
_HEADER = struct.Struct("<HBBI")
HEADER_BYTES = _HEADER.size


class FrameType(enum.IntEnum):
    """What a frame's payload is."""

    CONTROL = 1
    """One message: messages.decode_message()."""
    PAGES = 2
    """One page batch: pages.parse_batch()."""


class Frame(NamedTuple):
    """One frame; the payload keeps its memory alive and never changes."""

    type: FrameType
    payload: memoryview


_LIMITS = {
    FrameType.CONTROL: MAX_CONTROL_FRAME_BYTES,
    FrameType.PAGES: MAX_PAGES_FRAME_BYTES,
}
_TYPES = {int(kind): kind for kind in FrameType}


def encode_frame(kind: FrameType, *buffers: Buffer) -> list[Buffer]:
    """Return the header followed by `buffers` themselves, uncopied, ready for sendmsg(2).

    Each buffer must be flat bytes (a memoryview of another format needs ``.cast("B")``).

    :raises LocalProtocolError: when they exceed the limit of `kind`.
    """
    length = sum(map(len, buffers))
    if length > _LIMITS[kind]:
        raise LocalProtocolError(f"{kind.name} frame has {length} bytes, limit {_LIMITS[kind]}")
    return [_HEADER.pack(MAGIC, kind, 0, length), *buffers]


def parse_header(header: Buffer) -> tuple[FrameType, int]:
    """Return the type and payload length announced by `header`, HEADER_BYTES long.

    :raises RemoteProtocolError: when these bytes cannot begin a frame.
    """
    if len(header) != HEADER_BYTES:
        raise RemoteProtocolError(f"Frame header has {len(header)} bytes instead of {HEADER_BYTES}")
    magic, number, flags, length = _HEADER.unpack(header)
    if magic != MAGIC:
        raise RemoteProtocolError(f"Frame begins with {magic:#06x} instead of {MAGIC:#06x}")
    kind = _TYPES.get(number)
    if kind is None:
        raise RemoteProtocolError(f"Frame has unknown type {number}")
    if flags:
        raise RemoteProtocolError(f"{kind.name} frame has unknown flags {flags:#04x}")
    if length > _LIMITS[kind]:
        raise RemoteProtocolError(
            f"{kind.name} frame announces {length} bytes, limit {_LIMITS[kind]}"
        )
    return kind, length


class FrameDecoder:
    """Cuts a stream that arrives in arbitrary pieces into frames.

    After an error the decoder stays in error: a stream out of step has no next frame.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._used = 0
        self._error: RemoteProtocolError | None = None

    def receive_data(self, data: Buffer) -> None:
        """Take over a copy of `data`, the next bytes of the stream."""
        if self._error is not None:
            return
        if self._used:
            # The payloads handed out are views of the old bytearray: leave it to them.
            self._buffer = self._buffer[self._used :]
            self._used = 0
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """Return the next whole frame, or None when more data is needed.

        :raises RemoteProtocolError: when the stream is not a sequence of frames.
        """
        if self._error is not None:
            raise self._error
        begin = self._used + HEADER_BYTES
        if len(self._buffer) < begin:
            return None
        view = memoryview(self._buffer)
        try:
            kind, length = parse_header(view[self._used : begin])
        except RemoteProtocolError as err:
            self._error = err
            raise
        if len(view) < begin + length:
            return None
        self._used = begin + length
        return Frame(kind, view[begin : begin + length].toreadonly())

    def end_of_stream(self) -> None:
        """Say that no more bytes will come.

        :raises RemoteProtocolError: when the stream ends inside a frame.
        """
        rest = len(self._buffer) - self._used
        if self._error is None and rest:
            raise RemoteProtocolError(f"Stream ends inside a frame, {rest} bytes of it received")

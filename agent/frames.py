"""Frames from a channel, read into one warm buffer.

The reader's buffer is reused: a payload is valid until the next read. It holds any page batch from
the start and grows only for a large control frame, whose length parse_header() has checked against
its limit. Reading is unbuffered: no byte beyond the current frame is taken from the channel, so
``poll_readable`` tells exactly whether another frame has begun.
"""

from __future__ import annotations

from agent.channel import Channel
from protocol.framing import HEADER_BYTES, FrameType, parse_header
from protocol.limits import MAX_PAGES_FRAME_BYTES


class FrameReader:
    """Reads frames from a channel into one warm buffer."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.nr_frames = 0
        self._header = bytearray(HEADER_BYTES)
        self._buffer = memoryview(bytearray(MAX_PAGES_FRAME_BYTES))

    def read_frame(self, *, timeout_s: float | None = None) -> tuple[FrameType, memoryview]:
        """Wait for one whole frame; the payload is valid until the next call.

        :raises PeerGone: the stream ended or broke.
        :raises PeerSilent: the peer was silent for longer than ``timeout_s``.
        :raises RemoteProtocolError: what came is not a frame.
        """
        self.channel.recv_exactly_into(self._header, timeout_s=timeout_s)
        frame_type, length = parse_header(self._header)
        if length > self._buffer.nbytes:
            self._buffer = memoryview(bytearray(1 << (length - 1).bit_length()))
        payload = self._buffer[:length]
        self.channel.recv_exactly_into(payload, timeout_s=timeout_s)
        self.nr_frames += 1
        return frame_type, payload

    def poll_frame(self) -> tuple[FrameType, memoryview] | None:
        """A frame if one has begun to arrive, else None at once."""
        return self.read_frame() if self.channel.poll_readable() else None

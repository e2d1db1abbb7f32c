"""Page contents through zstandard; the only importer of it.

Level 1 makes about 0.4 GB/s a thread: it pays only where the link is slower. "auto" therefore measures what the link
takes and compresses while it is slow and the data shrinks.
"""

from __future__ import annotations

import zstandard

from agent.errors import TransferError

FAST_LINK_BYTES_PER_S = 200e6
"""Above this, compressing on one core is slower than sending."""
WORTHWHILE_RATIO = 0.9
"""Compressed size over raw size below which a batch goes compressed."""
MEASURE_BYTES = 4 << 20
"""Sent raw before "auto" judges the link."""
PROBE_EVERY = 16
"""While data does not shrink, "auto" tries one batch in so many."""


class Compressor:
    """Compresses one batch at a time. Method "none", "zstd" or "auto"."""

    def __init__(self, method: str = "none", level: int = 1) -> None:
        if method not in ("none", "zstd", "auto"):
            raise ValueError(f"unknown compression method {method!r}")
        self._method = method
        self._zstd = zstandard.ZstdCompressor(level=level) if method != "none" else None
        self._sent_bytes = 0
        self._sent_s = 0.0
        self._hopeless = 0

    def sent(self, nr_bytes: int, seconds: float) -> None:
        """Tell how long the link took for `nr_bytes`."""
        self._sent_bytes += nr_bytes
        self._sent_s += seconds

    def compress(self, payload: bytes | bytearray | memoryview) -> bytes | None:
        """Return the compressed payload, or None: send it raw."""
        if self._zstd is None or (self._method == "auto" and not self._worth_trying()):
            return None
        packed = self._zstd.compress(payload)
        if len(packed) < WORTHWHILE_RATIO * len(payload):
            self._hopeless = 0
            return packed
        self._hopeless = PROBE_EVERY if self._method == "auto" else 0
        return None

    def _worth_trying(self) -> bool:
        if self._sent_bytes < MEASURE_BYTES:
            return False
        if self._sent_bytes > FAST_LINK_BYTES_PER_S * self._sent_s:
            return False
        if self._hopeless:
            self._hopeless -= 1
            return False
        return True


class Decompressor:
    """Undoes Compressor."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor()

    def decompress(self, payload: memoryview, nr_bytes: int) -> bytes:
        """Return exactly `nr_bytes` bytes. Hostile input costs no more memory than that.

        :raises TransferError: the payload is not a zstd frame of that content.
        """
        try:
            # Without a content size in the frame, max_output_size bounds the output; with one, check it first.
            declared = zstandard.frame_content_size(payload)
            if declared not in (-1, nr_bytes):
                raise TransferError(f"Compressed batch holds {declared} bytes, expected {nr_bytes}")
            data = self._zstd.decompress(payload, max_output_size=nr_bytes)
        except zstandard.ZstdError as err:
            raise TransferError("Cannot decompress a page batch") from err
        if len(data) != nr_bytes:
            raise TransferError(f"Compressed batch holds {len(data)} bytes, expected {nr_bytes}")
        return data

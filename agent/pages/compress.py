"""Page contents through zstandard; the only importer of it.

Level 1 makes over 0.5 GB/s a thread: it pays only where the link is slower, and where the data shrinks. "auto" finds
that out (auto.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import zstandard

from agent.errors import TransferError
from agent.kernel.tcp_info import LinkProgress
from agent.pages.auto import LEVELS, AutoLevel
from protocol.limits import MAX_BATCH_BYTES

WORTHWHILE_RATIO = 0.9
"""Compressed size over raw size below which a batch goes compressed."""
MAX_WINDOW_BYTES = 8 << 20
"""What a frame may have the decompressor keep of what went before; RFC 8878 has every decompressor take that much."""
PROBE_EVERY = 16
"""While data does not shrink, "auto" tries one batch in so many."""


class Compressor:
    """Compresses one batch at a time. Method "none", "zstd" or "auto".

    ``progress`` says how far the link has got; None: it cannot tell.
    """

    def __init__(
        self,
        method: str = "none",
        level: int = 1,
        *,
        progress: Callable[[], LinkProgress | None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        if method not in ("none", "zstd", "auto"):
            raise ValueError(f"unknown compression method {method!r}")
        self._auto = AutoLevel() if method == "auto" else None
        self._progress = progress
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._began_s = self._began_cpu_s = 0.0
        levels = {"none": (), "zstd": (level,), "auto": LEVELS[1:]}[method]
        self._level = level if method == "zstd" else 0
        self._zstd = {each: zstandard.ZstdCompressor(level=each) for each in levels}
        self._hopeless = 0

    def begin(self, *, final: bool = False) -> None:
        """Batches are about to follow one another; ``final``: the target stands still meanwhile."""
        if self._auto is not None:
            self._auto.begin(final=final)

    def sending(self) -> None:
        """A batch is about to be handed to the link."""
        if self._auto is not None and self._auto.watches:
            self._began_s, self._began_cpu_s = self._clock(), self._cpu_clock()

    def sent(self, page_bytes: int, wire_bytes: int, limited_s: float = 0.0) -> None:
        """It was handed over: so many bytes of pages, in so many bytes, `limited_s` before sending() was called.

        What passed since then without work was spent waiting for the link, or for the peer.
        """
        if self._auto is not None and self._auto.watches:
            now_s = self._clock()
            blocked_s = now_s - self._began_s - (self._cpu_clock() - self._began_cpu_s)
            self._auto.sent(
                page_bytes, wire_bytes, now_s, self._progress(), blocked_s=blocked_s, limited_s=limited_s
            )

    def compress(self, payload: bytes | bytearray | memoryview) -> bytes | None:
        """Return the compressed payload, or None: send it raw."""
        level = self._level if self._auto is None else self._auto.level
        if not level:
            return None
        if self._hopeless:
            self._hopeless -= 1
            return None
        began = self._clock()
        packed = self._zstd[level].compress(payload)
        is_smaller = len(packed) < WORTHWHILE_RATIO * len(payload)
        if self._auto is not None:
            self._auto.packed(self._clock() - began, len(payload), len(packed), smaller=is_smaller)
            self._hopeless = 0 if is_smaller else PROBE_EVERY - 1
        return packed if is_smaller else None


class Decompressor:
    """Undoes Compressor. One warm buffer: a new one for each batch costs as much in page faults as decompressing."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._buffer = memoryview(bytearray(MAX_BATCH_BYTES))

    def decompress(self, payload: memoryview, nr_bytes: int) -> memoryview:
        """Return exactly `nr_bytes` bytes, valid until the next call. Hostile input costs no more memory than that.

        :raises TransferError: the payload is not a zstd frame of that content.
        """
        try:
            declared = zstandard.frame_content_size(payload)
            if declared not in (-1, nr_bytes):
                raise TransferError(f"Compressed batch holds {declared} bytes, expected {nr_bytes}")
            with self._zstd.stream_reader(payload) as reader:
                done = reader.readinto(self._buffer[:nr_bytes])
                more = bool(reader.read(1))
        except zstandard.ZstdError as err:
            raise TransferError("Cannot decompress a page batch") from err
        if done != nr_bytes or more:
            size = f"more than {nr_bytes}" if more else done
            raise TransferError(f"Compressed batch holds {size} bytes, expected {nr_bytes}")
        return self._buffer[:nr_bytes]

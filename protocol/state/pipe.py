"""One end of a pipe or FIFO. What the pipe holds travels with one of its ends."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CAPACITY = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeEnd:
    """``pipe_id`` joins the ends of one pipe; the access mode of the description says which end it is.

    ``chunks`` are what reads would return in turn: whole packets when the writer is in packet mode
    (O_DIRECT). Only one end of a pipe has any. ``path`` is that of a FIFO, empty for a pipe(2).
    """

    pipe_id: int
    capacity: int
    path: str = ""
    chunks: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.capacity <= MAX_CAPACITY:
            raise ValueError(f"pipe capacity {self.capacity} is out of range")
        if sum(map(len, self.chunks)) > self.capacity:
            raise ValueError(f"pipe holds more than its capacity {self.capacity}")
        if self.path and (not self.path.startswith("/") or "\0" in self.path):
            raise ValueError(f"FIFO path {self.path!r} is not absolute")

"""An epoll(7) instance: its interest list.

The ready list is found again by adding the interests.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EpollItem:
    """One interest: the number it was added under, and the description it watches.

    The two differ when the number was closed, or given to another file, while a duplicate kept the
    description. ``events`` holds only EPOLLET, EPOLLONESHOT... when a one-shot interest has fired
    and waits to be rearmed.
    """

    fd: int
    file_id: int
    events: int
    data: int

    def __post_init__(self) -> None:
        if self.fd < 0 or not 0 <= self.events < 1 << 32 or not 0 <= self.data < 1 << 64:
            raise ValueError(f"epoll item {self.fd}, {self.events:#x}, {self.data:#x} is impossible")


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoll:
    """All interests of one instance."""

    items: tuple[EpollItem, ...]

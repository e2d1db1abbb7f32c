"""A description that is not carried: the destination puts one of its own in its place (--external)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class External:
    """``fds`` are the numbers by which the user named the description."""

    fds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.fds:
            raise ValueError("an external file has no name")

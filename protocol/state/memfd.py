"""A description of a shared memory object (memfd_create(2)); the object itself travels with shared memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MemFd:
    """``object_id`` names the shared object."""

    object_id: int

    def __post_init__(self) -> None:
        if self.object_id <= 0:
            raise ValueError(f"object id {self.object_id} is not positive")

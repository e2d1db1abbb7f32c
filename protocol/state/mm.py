"""The memory descriptor of a process: brk, argument and environment area, auxv, executable.

Field names are those of the kernel's prctl_mm_map (prctl(2), PR_SET_MM_MAP).
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.state import register


@dataclass(frozen=True, slots=True, kw_only=True)
class MmState:
    """Everything about an address space that is neither a mapping nor a page."""

    start_code: int
    end_code: int
    start_data: int
    end_data: int
    start_brk: int
    brk: int
    start_stack: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    auxv: bytes
    exe: str

    def __post_init__(self) -> None:
        if len(self.auxv) > 4096:
            raise ValueError(f"auxv is {len(self.auxv)} bytes long")


register("mm", MmState, version_id=1, minimum_version_id=1)

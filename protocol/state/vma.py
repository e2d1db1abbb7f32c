"""The layout of an address space: its mappings and the regular files behind them.

A layout is sent whole whenever it changed since the last one. Addresses are bytes in the target's
address space, ranges are ``[start, end)`` and page aligned. Mappings are sorted and do not overlap.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from protocol.state import register
from protocol.state.sched import MAX_NODES_BYTES

PAGE_SIZE = 4096
MAX_ADDRESS = 1 << 47
"""End of user space on x86_64 with four levels of page tables (arch/x86/include/asm/page_64_types.h)."""


class VmaKind(enum.IntEnum):
    """What stands behind a mapping."""

    ANON = 1
    FILE = 2
    """A regular file, ``file_index`` names it."""
    OBJECT = 3
    """A shared object (memfd, shared anonymous memory), ``object_id`` names it."""
    SPECIAL = 4
    """[vdso], [vvar], [vvar_vclock]: made by the kernel, moved into place by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackingFile:
    """A regular file that is mapped: what the destination must find under the same path."""

    path: str
    size: int
    mtime_ns: int
    mode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VmaState:
    """One mapping. ``flags`` are the two-letter VmFlags of proc_pid_smaps(5) that Ferry restores.

    ``policy`` is the mode of mbind(2) with its flags, 0 for a mapping without a memory policy; ``policy_nodes`` a
    little-endian bit mask.
    """

    start: int
    end: int
    prot: int
    shared: bool
    kind: VmaKind
    offset: int = 0
    file_index: int = -1
    object_id: int = 0
    name: str = ""
    flags: tuple[str, ...] = ()
    policy: int = 0
    policy_nodes: bytes = b""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= MAX_ADDRESS:
            raise ValueError(f"range {self.start:#x}-{self.end:#x} is outside user space")
        if self.start % PAGE_SIZE or self.end % PAGE_SIZE:
            raise ValueError(f"range {self.start:#x}-{self.end:#x} is not page aligned")
        if self.prot & ~0x7:
            raise ValueError(f"protection {self.prot:#x} has unknown bits")
        if not 0 <= self.policy < 1 << 31 or len(self.policy_nodes) > MAX_NODES_BYTES:
            raise ValueError(f"memory policy {self.policy:#x} is impossible")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutState:
    """All mappings of one address space."""

    files: tuple[BackingFile, ...]
    vmas: tuple[VmaState, ...]

    def __post_init__(self) -> None:
        previous_end = 0
        for vma in self.vmas:
            if vma.start < previous_end:
                raise ValueError(f"mapping {vma.start:#x}-{vma.end:#x} overlaps the one before")
            if vma.kind is VmaKind.FILE and not 0 <= vma.file_index < len(self.files):
                raise ValueError(f"mapping {vma.start:#x} names file {vma.file_index}")
            previous_end = vma.end


register("layout", LayoutState, version_id=1, minimum_version_id=1)

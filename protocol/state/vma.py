"""The layout of an address space: its mappings and the regular files behind them.

A layout is sent whole whenever it changed since the last one. Addresses are bytes in the target's
address space, ranges are ``[start, end)`` and page aligned. Mappings are sorted and do not overlap.

Mappings travel by columns (``LayoutColumns``): a process may have tens of thousands, nearly all alike,
and what they take while they are written and read is memory of both agents.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
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
        if self.offset and self.kind not in _BACKED:
            raise ValueError(f"mapping {self.start:#x} has the offset {self.offset:#x} in nothing")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class VmaTraits:
    """What mappings mostly have in common: fields of VmaState."""

    prot: int
    shared: bool
    kind: VmaKind
    name: str = ""
    flags: tuple[str, ...] = ()
    policy: int = 0
    policy_nodes: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutColumns:
    """A LayoutState as it travels; each column has the mappings in the same order.

    ``bounds`` has start and end of each, ``traits_of`` a number in ``traits``. ``backing`` has, of those alone that
    show a file or an object, the offset and the index or id.
    """

    files: tuple[BackingFile, ...]
    traits: tuple[VmaTraits, ...]
    traits_of: tuple[int, ...]
    bounds: tuple[int, ...]
    backing: tuple[int, ...]

    def __post_init__(self) -> None:
        count = len(self.traits_of)
        if len(self.bounds) != 2 * count:
            raise ValueError(f"{count} mappings have {len(self.bounds)} bounds")
        if count and not 0 <= min(self.traits_of) <= max(self.traits_of) < len(self.traits):
            raise ValueError(f"a mapping has none of {len(self.traits)} traits")
        backed = [traits.kind in _BACKED for traits in self.traits]
        nr_backed = sum(map(backed.__getitem__, self.traits_of))
        if len(self.backing) != 2 * nr_backed:
            raise ValueError(f"{nr_backed} mappings of files and objects have {len(self.backing)} facts")

    @classmethod
    def of(cls, layout: LayoutState) -> LayoutColumns:
        """Put the mappings of a layout together."""
        numbers: dict[tuple[object, ...], int] = {}
        traits: list[VmaTraits] = []
        traits_of = []
        bounds = []
        backing: list[int] = []
        for vma in layout.vmas:
            # Of an enum's member, which hashes slowly, the plain number.
            key = (vma.prot, vma.shared, +vma.kind, vma.name, vma.flags, vma.policy, vma.policy_nodes)
            number = numbers.setdefault(key, len(traits))
            if number == len(traits):
                traits.append(_traits_of(vma))
            traits_of.append(number)
            bounds.append(vma.start)
            bounds.append(vma.end)
            if vma.kind is VmaKind.FILE:
                backing += (vma.offset, vma.file_index)
            elif vma.kind is VmaKind.OBJECT:
                backing += (vma.offset, vma.object_id)
        return cls(
            files=layout.files,
            traits=tuple(traits),
            traits_of=tuple(traits_of),
            bounds=tuple(bounds),
            backing=tuple(backing),
        )

    def whole(self) -> LayoutState:
        """Return the layout.

        :raises ValueError: a mapping cannot be.
        """
        return LayoutState(files=self.files, vmas=tuple(self._vmas()))

    def _vmas(self) -> Iterator[VmaState]:
        words, facts = iter(self.bounds), iter(self.backing)
        for number in self.traits_of:
            traits = self.traits[number]
            kind = traits.kind
            is_backed = kind is VmaKind.FILE or kind is VmaKind.OBJECT
            offset, source = (next(facts), next(facts)) if is_backed else (0, 0)
            yield VmaState(
                start=next(words),
                end=next(words),
                prot=traits.prot,
                shared=traits.shared,
                kind=kind,
                offset=offset,
                file_index=source if kind is VmaKind.FILE else -1,
                object_id=source if kind is VmaKind.OBJECT else 0,
                name=traits.name,
                flags=traits.flags,
                policy=traits.policy,
                policy_nodes=traits.policy_nodes,
            )


def _traits_of(vma: VmaState) -> VmaTraits:
    return VmaTraits(
        prot=vma.prot,
        shared=vma.shared,
        kind=vma.kind,
        name=vma.name,
        flags=vma.flags,
        policy=vma.policy,
        policy_nodes=vma.policy_nodes,
    )


_BACKED = (VmaKind.FILE, VmaKind.OBJECT)

register(
    "layout", LayoutState, version_id=2, minimum_version_id=2, wire=LayoutColumns, oldest_version_id=2
)

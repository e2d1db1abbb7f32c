"""Mappings: describe the source's layout, and check on the destination that it can be had there.

agent.state.mirror makes it. Sources: proc_pid_maps(5), proc_pid_smaps(5) (VmFlags). Addresses are target addresses
in bytes.
"""

from __future__ import annotations

import heapq
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from agent.errors import RestoreError
from agent.kernel.mman import PROT_EXEC, PROT_READ, PROT_WRITE
from agent.procfs.maps import MapsEntry
from agent.procfs.smaps import PROTECTION_KEY
from agent.state.mempolicy import NO_POLICY, Policy
from agent.state.paths import reach
from agent.tracker.layout import is_shared_object
from agent.types import Obstacle, Pid
from protocol.state.vma import BackingFile, LayoutState, VmaKind, VmaState

SPECIAL_NAMES = ("[vvar]", "[vvar_vclock]", "[vdso]")
"""Kernel-made mappings that the destination's kernel has under the same names."""

UNMAPPED_NAMES = ("[vsyscall]",)
"""Listed in maps, but not part of the address space."""

ADVICE_BY_FLAG: dict[str, int] = {
    # include/uapi/asm-generic/mman-common.h; VmFlags from fs/proc/task_mmu.c.
    "rr": 1,  # MADV_RANDOM
    "sr": 2,  # MADV_SEQUENTIAL
    "dc": 10,  # MADV_DONTFORK
    "mg": 12,  # MADV_MERGEABLE
    "hg": 14,  # MADV_HUGEPAGE
    "nh": 15,  # MADV_NOHUGEPAGE
    "dd": 16,  # MADV_DONTDUMP
    "wf": 18,  # MADV_WIPEONFORK
}
"""The VmFlags that madvise(2) gives back."""

MAP_FLAGS = frozenset({"gd", "nr", "dp"})
"""VmFlags that are fixed when a mapping is made: growsdown, noreserve, droppable."""

CARRIED_FLAGS = MAP_FLAGS | ADVICE_BY_FLAG.keys() | {"lo", "lf", "sl", "mw", "ac"}

UFFD_FLAGS = frozenset({"um", "uw", "ui"})
"""VmFlags of a range that is registered with a userfaultfd."""

NO_FLAGS: frozenset[str] = frozenset()
NO_POLICIES: Mapping[int, Policy] = {}
_NOTHING: tuple[MapsEntry | None, VmaState | None] = (None, None)


@dataclass(slots=True)
class LayoutDumper:
    """Turns /proc/PID/maps into a :class:`LayoutState`; remembers what it has described before.

    ``shared_id`` gives the object id of a mapping of shared memory. File indexes stay the same over
    the whole migration, so that an unchanged mapping compares equal.
    """

    pid: Pid
    shared_id: Callable[[MapsEntry], int]
    _files: dict[str, int] = field(default_factory=dict)
    _backing: list[BackingFile] = field(default_factory=list)
    _entries: Sequence[MapsEntry] = ()
    _vmas: tuple[VmaState, ...] = ()
    """What was described last, and how."""
    _flags: dict[frozenset[str], tuple[str, ...]] = field(default_factory=dict)
    """Of the VmFlags seen so far those that are carried."""

    def check(
        self,
        entries: Sequence[MapsEntry],
        vm_flags: Mapping[int, frozenset[str]],
        *,
        watched: bool = False,
    ) -> list[Obstacle]:
        """Name every mapping that cannot be carried. Opens nothing, stops nothing.

        ``watched``: Ferry's own userfaultfd is registered by now; the tracker finds others.
        """
        obstacles: list[Obstacle] = []
        seen: dict[str, str] = {}
        for entry in entries:
            flags = vm_flags.get(entry.start, NO_FLAGS)
            if watched:
                flags -= UFFD_FLAGS
            reason = _unmovable(entry, flags)
            if not reason and _kind(entry) is VmaKind.FILE:
                if entry.path not in seen:
                    seen[entry.path] = self._file_problem(entry)
                reason = seen[entry.path]
            if reason:
                where = f"{entry.start:#x}-{entry.end:#x} {entry.path}".rstrip()
                obstacles.append(
                    Obstacle(kind="mapping", what=where, detail=reason, hint=_hint(reason))
                )
        return obstacles

    def dump(
        self,
        entries: Sequence[MapsEntry],
        vm_flags: Mapping[int, frozenset[str]],
        policies: Mapping[int, Policy] = NO_POLICIES,
    ) -> LayoutState:
        """Describe a layout; ``vm_flags`` maps a mapping's start to its VmFlags, ``policies`` to its memory policy.

        :raises OSError: when a mapped file cannot be examined.
        """
        # Both in the order of addresses: what is known of an entry is found without looking for it.
        known = zip(self._entries, self._vmas)
        old, found = next(known, _NOTHING)
        mapped = [entry for entry in entries if entry.path not in UNMAPPED_NAMES]
        vmas = []
        for entry in mapped:
            start = entry.start
            while old is not None and old.start < start:
                old, found = next(known, _NOTHING)
            flags = self._carried(vm_flags.get(start, NO_FLAGS))
            policy = policies.get(start, NO_POLICY)
            vma = found if old == entry else None
            if vma is None or vma.flags != flags or (vma.policy, vma.policy_nodes) != policy:
                vma = self._describe(entry, flags, policy)
            vmas.append(vma)
        self._entries, self._vmas = mapped, tuple(vmas)
        return LayoutState(files=tuple(self._backing), vmas=self._vmas)

    def _carried(self, flags: frozenset[str]) -> tuple[str, ...]:
        carried = self._flags.get(flags)
        if carried is None:
            carried = self._flags[flags] = tuple(sorted(flags & CARRIED_FLAGS))
        return carried

    def _describe(self, entry: MapsEntry, flags: tuple[str, ...], policy: Policy) -> VmaState:
        kind = _kind(entry)
        name = ""
        if kind is VmaKind.SPECIAL:
            name = entry.path
        elif entry.path.startswith(("[anon:", "[anon_shmem:")):
            name = entry.path.partition(":")[2][:-1]
        return VmaState(
            start=entry.start,
            end=entry.end,
            prot=protection(entry.perms),
            shared=entry.perms[3] == "s",
            kind=kind,
            offset=entry.offset if kind in (VmaKind.FILE, VmaKind.OBJECT) else 0,
            file_index=self._file_index(entry) if kind is VmaKind.FILE else -1,
            object_id=self.shared_id(entry) if kind is VmaKind.OBJECT else 0,
            name=name,
            flags=flags,
            policy=policy.mode,
            policy_nodes=policy.nodes,
        )

    def _file_index(self, entry: MapsEntry) -> int:
        index = self._files.get(entry.path)
        if index is None:
            info = os.stat(f"/proc/{self.pid}/map_files/{entry.start:x}-{entry.end:x}")
            index = self._files[entry.path] = len(self._backing)
            self._backing.append(
                BackingFile(
                    path=entry.path,
                    size=info.st_size,
                    mtime_ns=info.st_mtime_ns,
                    mode=stat.S_IMODE(info.st_mode),
                )
            )
        return index

    def _file_problem(self, entry: MapsEntry) -> str:
        """Say why the file behind a mapping cannot be found again by its path, or return ''."""
        try:
            mapped = os.stat(f"/proc/{self.pid}/map_files/{entry.start:x}-{entry.end:x}")
            if not stat.S_ISREG(mapped.st_mode):
                return "maps something that is not a regular file"
            named = os.stat(reach(self.pid) + entry.path)
        except FileNotFoundError:
            return "the mapped file no longer exists under its path"
        except OSError as err:
            return f"the mapped file cannot be examined: {os.strerror(err.errno or 0)}"
        if (mapped.st_ino, mapped.st_dev) != (named.st_ino, named.st_dev):
            return "another file stands under the path of the mapped one"
        return ""


def protection(perms: str) -> int:
    """Return the PROT_ bits of a maps(5) permission field such as ``r-xp``."""
    return (
        (PROT_READ if perms[0] == "r" else 0)
        | (PROT_WRITE if perms[1] == "w" else 0)
        | (PROT_EXEC if perms[2] == "x" else 0)
    )


def _kind(entry: MapsEntry) -> VmaKind:
    path = entry.path
    if path in SPECIAL_NAMES:
        return VmaKind.SPECIAL
    if is_shared_object(entry):
        return VmaKind.OBJECT
    if path.startswith("/") and path != "/dev/zero":
        return VmaKind.FILE
    return VmaKind.ANON


def _unmovable(entry: MapsEntry, flags: frozenset[str]) -> str:
    path = entry.path
    if path in SPECIAL_NAMES or path in UNMAPPED_NAMES:
        return ""
    if path.startswith("/SYSV"):
        return "System V shared memory is not carried yet"
    if "ht" in flags or path.startswith("/anon_hugepage"):
        return "hugetlbfs pages are not carried yet"
    if flags & UFFD_FLAGS:
        return "the process has a userfaultfd of its own on this range"
    if "ss" in flags:
        return "a shadow stack is not carried yet"
    if PROTECTION_KEY in flags and entry.perms[:3] != "--x":
        # The kernel itself has a key for what can only be executed.
        return "protection keys are not carried yet"
    if "io" in flags or "pf" in flags:
        return "device memory cannot be moved"
    if "sf" in flags:
        return "synchronous page faults (MAP_SYNC) are not carried yet"
    if path.startswith(("anon_inode:", "/anon_inode:")) or path == "[aio]" or "/[aio]" in path:
        return "memory shared with the kernel (io_uring, aio, perf) is not carried yet"
    if path in ("[uprobes]", "[vectors]") or path.startswith("[vm"):
        return "a kernel-made mapping that cannot be moved"
    if path.endswith(" (deleted)") and _kind(entry) is VmaKind.FILE:
        return "the mapped file was deleted or replaced"
    if path.startswith("/dev/") and not path.startswith(("/dev/zero", "/dev/shm/")):
        return "a device is mapped"
    return ""


def _hint(reason: str) -> str:
    if "deleted" in reason or "no longer" in reason or "another file" in reason:
        return "restart the program after an upgrade of its files"
    return ""


def preflight_layout(layout: LayoutState) -> list[Obstacle]:
    """Check on the destination that every mapped file is there, as the source has it."""
    obstacles = []
    for backing in layout.files:
        try:
            info = os.stat(backing.path)
        except OSError as err:
            detail = f"cannot be opened on the destination: {os.strerror(err.errno or 0)}"
        else:
            found = (info.st_size, info.st_mtime_ns, stat.S_IMODE(info.st_mode))
            expected = (backing.size, backing.mtime_ns, backing.mode)
            writable = any(
                vma.shared and layout.files[vma.file_index] is backing and "mw" in vma.flags
                for vma in layout.vmas
                if vma.kind is VmaKind.FILE
            )
            if found == expected or (writable and found[0] == expected[0]):
                continue
            detail = (
                f"differs on the destination: size {found[0]}, mtime {found[1]} ns, mode "
                f"{found[2]:o}; the source has {expected[0]}, {expected[1]} ns, {expected[2]:o}"
            )
        obstacles.append(
            Obstacle(
                kind="mapped file",
                what=backing.path,
                detail=detail,
                hint="install the same version of the file on both hosts",
            )
        )
    return obstacles


def special_mappings(layout: LayoutState) -> dict[str, VmaState]:
    """Return the kernel-made mappings of a layout by name."""
    return {vma.name: vma for vma in layout.vmas if vma.kind is VmaKind.SPECIAL}


def find_gap(layouts: Iterable[LayoutState], length: int, *, above: int) -> int:
    """Return the lowest page-aligned address past ``above`` with ``length`` bytes free around it.

    Keeps a megabyte of distance to every mapping, so that stacks and heaps may still grow a little.

    :raises RestoreError: when the address space has no such gap.
    """
    margin = 1 << 20
    position = above
    for start, end in heapq.merge(*(((vma.start, vma.end) for vma in layout.vmas) for layout in layouts)):
        if start - position >= length + 2 * margin:
            break
        position = max(position, end)
    if position + length + 2 * margin > (1 << 47):
        raise RestoreError(f"Cannot find {length} free bytes in the target's address space")
    return position + margin


def plain(vmas: Iterable[VmaState]) -> Iterator[VmaState]:
    """Leave out the kernel-made mappings."""
    return (vma for vma in vmas if vma.kind is not VmaKind.SPECIAL)

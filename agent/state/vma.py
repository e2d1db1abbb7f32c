"""Mappings: describe the source's layout, and mirror it in the destination's skeleton.

The destination follows the layout while the source still runs: every mapping is made at once with its
final protection (pages are written through the agent, which needs no write permission over there), so
that nothing but differences is left for the freeze. Advice and locks come last, when all pages are in
place. Must never touch a mapping that is not in the layout: the injector's scratch lives between them.

Sources: proc_pid_maps(5), proc_pid_smaps(5) (VmFlags), mmap(2), madvise(2), mlock2(2),
PR_SET_VMA_ANON_NAME(2const). Addresses are target addresses in bytes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from agent.errors import RestoreError
from agent.kernel import syscalls as nr
from agent.procfs.maps import MapsEntry
from agent.target.inject import Batch
from agent.tracker.layout import is_shared_object
from agent.types import Obstacle, Pid
from protocol.state.vma import BackingFile, LayoutState, VmaKind, VmaState

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_DROPPABLE = 0x08
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_GROWSDOWN = 0x0100
MAP_NORESERVE = 0x4000
MLOCK_ONFAULT = 0x01
PR_SET_VMA = 0x53564D41
PR_SET_VMA_ANON_NAME = 0

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
    _known: dict[tuple[MapsEntry, frozenset[str]], VmaState] = field(default_factory=dict)

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
        self, entries: Sequence[MapsEntry], vm_flags: Mapping[int, frozenset[str]]
    ) -> LayoutState:
        """Describe a layout; ``vm_flags`` maps a mapping's start to its VmFlags.

        :raises OSError: when a mapped file cannot be examined.
        """
        known = self._known
        fresh: dict[tuple[MapsEntry, frozenset[str]], VmaState] = {}
        for entry in entries:
            if entry.path in UNMAPPED_NAMES:
                continue
            key = (entry, vm_flags.get(entry.start, NO_FLAGS))
            fresh[key] = known.get(key) or self._describe(*key)
        self._known = fresh
        return LayoutState(files=tuple(self._backing), vmas=tuple(fresh.values()))

    def _describe(self, entry: MapsEntry, flags: frozenset[str]) -> VmaState:
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
            flags=tuple(sorted(flags & CARRIED_FLAGS)),
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
            named = os.stat(f"/proc/{self.pid}/root{entry.path}")
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
    if "io" in flags or "pf" in flags:
        return "device memory cannot be moved"
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


def preflight_layout(layout: LayoutState, *, root: str = "") -> list[Obstacle]:
    """Check on the destination that every mapped file is there, as the source has it."""
    obstacles = []
    for backing in layout.files:
        try:
            info = os.stat(root + backing.path)
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


class LayoutMirror:
    """The layout as it stands in the skeleton; :meth:`apply` moves it on to a newer one.

    ``agent_fd(vma, backing)`` returns the agent's descriptor for what a mapping shows. The skeleton
    takes descriptors with pidfd_getfd(2) through ``agent_pidfd``, its own descriptor of the agent.
    """

    def __init__(
        self,
        agent_pidfd: int,
        agent_fd: Callable[[VmaState, BackingFile | None], int],
    ) -> None:
        self._agent_pidfd = agent_pidfd
        self._agent_fd = agent_fd
        self._built: LayoutState = LayoutState(files=(), vmas=())

    @property
    def layout(self) -> LayoutState:
        """The layout that the skeleton has now (when every planned batch was run)."""
        return self._built

    def apply(self, layout: LayoutState, batch: Batch) -> None:
        """Add the calls to ``batch`` that turn the mirrored layout into ``layout``.

        Pages of ranges that stay are kept. Special mappings are placed elsewhere and skipped here.
        """
        old, new = set(self._built.vmas), set(layout.vmas)
        gone = sorted(_plain(old - new), key=lambda vma: vma.start)
        come = sorted(_plain(new - old), key=lambda vma: vma.start)
        before, after = self._built.files, layout.files
        self._built = layout
        kept: list[tuple[int, int]] = []
        mapped: list[tuple[VmaState, int, int]] = []
        for vma in come:
            position = vma.start
            for rest in _overlaps(gone, vma):
                start, end = max(rest.start, vma.start), min(rest.end, vma.end)
                if _substance(rest, before) != _substance(vma, after):
                    continue
                if position < start:
                    mapped.append((vma, position, start))
                if rest.prot != vma.prot:
                    batch.call(nr.NR_mprotect, start, end - start, vma.prot, name="mprotect")
                kept.append((start, end))
                position = end
            if position < vma.end:
                mapped.append((vma, position, vma.end))
        for start, end in _minus(((vma.start, vma.end) for vma in gone), kept):
            batch.call(nr.NR_munmap, start, end - start, name="munmap")
        for vma, start, end in mapped:
            self._map(batch, vma, start, end, after)

    def _map(
        self, batch: Batch, vma: VmaState, start: int, end: int, files: Sequence[BackingFile]
    ) -> None:
        flags = MAP_FIXED | (MAP_SHARED if vma.shared else MAP_PRIVATE)
        if "gd" in vma.flags:
            flags |= MAP_GROWSDOWN
        if "nr" in vma.flags:
            flags |= MAP_NORESERVE
        if "dp" in vma.flags:
            flags = flags & ~MAP_PRIVATE | MAP_DROPPABLE
        # A mapping that was once writable counts as committed memory for ever. Made read-only from the
        # start it would not, and never merge with its neighbours again as it does on the source.
        committed = not vma.shared and "ac" in vma.flags and not vma.prot & PROT_WRITE
        prot = PROT_READ | PROT_WRITE if committed else vma.prot
        if vma.kind is VmaKind.ANON:
            batch.call(
                nr.NR_mmap, start, end - start, prot, flags | MAP_ANONYMOUS, -1, 0, name="mmap"
            )
        else:
            self._map_file(batch, vma, start, end, files, prot, flags)
        if committed:
            batch.call(nr.NR_mprotect, start, end - start, vma.prot, name="mprotect")

    def _map_file(
        self,
        batch: Batch,
        vma: VmaState,
        start: int,
        end: int,
        files: Sequence[BackingFile],
        prot: int,
        flags: int,
    ) -> None:
        backing = files[vma.file_index] if vma.kind is VmaKind.FILE else None
        source_fd = self._agent_fd(vma, backing)
        fd = batch.call(nr.NR_pidfd_getfd, self._agent_pidfd, source_fd, 0, name="pidfd_getfd")
        offset = vma.offset + start - vma.start
        batch.call(nr.NR_mmap, start, end - start, prot, flags, fd, offset, name="mmap")
        batch.call(nr.NR_close, fd, name="close")

    def finish(self, batch: Batch, guards: Iterable[tuple[int, int]]) -> None:
        """Add advice, names, guard pages, locks and seals: all that must follow the last page."""
        for vma in _plain(self._built.vmas):
            length = vma.end - vma.start
            for flag in vma.flags:
                advice = ADVICE_BY_FLAG.get(flag)
                if advice is not None:
                    batch.call(nr.NR_madvise, vma.start, length, advice, name=f"madvise({flag})")
            if vma.name and vma.kind in (VmaKind.ANON, VmaKind.OBJECT):
                text = batch.data(vma.name.encode() + b"\0")
                batch.call(
                    nr.NR_prctl, PR_SET_VMA, PR_SET_VMA_ANON_NAME, vma.start, length, text,
                    name="prctl(PR_SET_VMA_ANON_NAME)",
                )
        for start, end in guards:
            batch.call(nr.NR_madvise, start, end - start, 102, name="madvise(GUARD_INSTALL)")
        for vma in _plain(self._built.vmas):
            length = vma.end - vma.start
            if "lo" in vma.flags:
                how = MLOCK_ONFAULT if "lf" in vma.flags else 0
                batch.call(nr.NR_mlock2, vma.start, length, how, name="mlock2")
            if "sl" in vma.flags:
                batch.call(nr.NR_mseal, vma.start, length, 0, name="mseal")


def special_mappings(layout: LayoutState) -> dict[str, VmaState]:
    """Return the kernel-made mappings of a layout by name."""
    return {vma.name: vma for vma in layout.vmas if vma.kind is VmaKind.SPECIAL}


def find_gap(layouts: Iterable[LayoutState], length: int, *, above: int) -> int:
    """Return the lowest page-aligned address past ``above`` with ``length`` bytes free around it.

    Keeps a megabyte of distance to every mapping, so that stacks and heaps may still grow a little.

    :raises RestoreError: when the address space has no such gap.
    """
    margin = 1 << 20
    taken = sorted((vma.start, vma.end) for layout in layouts for vma in layout.vmas)
    position = above
    for start, end in taken:
        if start - position >= length + 2 * margin:
            break
        position = max(position, end)
    if position + length + 2 * margin > (1 << 47):
        raise RestoreError(f"Cannot find {length} free bytes in the target's address space")
    return position + margin


def _plain(vmas: Iterable[VmaState]) -> Iterator[VmaState]:
    return (vma for vma in vmas if vma.kind is not VmaKind.SPECIAL)


def _substance(vma: VmaState, files: Sequence[BackingFile]) -> tuple[object, ...]:
    """What must be equal for the pages of one mapping to serve another at the same addresses."""
    backing = files[vma.file_index] if vma.kind is VmaKind.FILE else None
    return (
        vma.kind,
        vma.shared,
        vma.object_id,
        backing,
        vma.offset - vma.start if vma.kind in (VmaKind.FILE, VmaKind.OBJECT) else 0,
        "mw" in vma.flags if vma.shared else False,
        MAP_FLAGS.intersection(vma.flags),
    )


def _overlaps(sorted_vmas: Sequence[VmaState], vma: VmaState) -> Iterator[VmaState]:
    low, high = 0, len(sorted_vmas)
    while low < high:
        middle = (low + high) // 2
        if sorted_vmas[middle].end <= vma.start:
            low = middle + 1
        else:
            high = middle
    while low < len(sorted_vmas) and sorted_vmas[low].start < vma.end:
        yield sorted_vmas[low]
        low += 1


def _minus(
    ranges: Iterable[tuple[int, int]], holes: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Yield what is left of sorted ``ranges`` outside of sorted ``holes``."""
    index = 0
    for start, end in ranges:
        while index and holes[index - 1][1] > start:
            index -= 1
        while index < len(holes) and holes[index][0] < end:
            hole_start, hole_end = holes[index]
            if hole_end > start:
                if start < hole_start:
                    yield start, hole_start
                start = max(start, hole_end)
            index += 1
        if start < end:
            yield start, end

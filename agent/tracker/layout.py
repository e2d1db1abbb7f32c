"""Sort a target's mappings into what the trackers treat alike.

    anonymous      private, no file: heap, stacks, malloc arenas. Content is sent where populated.
    private file   MAP_PRIVATE of a file: only copied pages are sent, the rest is the file's.
    shared object  memfd, MAP_SHARED|MAP_ANONYMOUS, System V, /dev/shm: content is sent by object and offset.
    other          [vdso], [vvar], [vsyscall], devices, MAP_SHARED of regular files (their content is the file
                   system's), and what userfaultfd refused (`excluded`). Never scanned, never read.

Pure apart from asking once for the device number of the kernel's own tmpfs mount.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Container
from dataclasses import dataclass

from agent.procfs.maps import MapsEntry
from agent.ranges import RangeSet
from agent.tracker.base import SharedKey

LOWEST_ADDRESS = 1 << 16
"""Default of vm.mmap_min_addr: userfaultfd refuses ranges below."""
HIGHEST_ADDRESS = (1 << 47) - (1 << 12)
"""End of user space on x86_64 with four levels of page tables; with five, mappings beyond are asked for by address."""

_POSIX_SHM = "/dev/shm/"
_SPECIAL = frozenset({"[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]", "[vectors]", "[sigpage]"})


@functools.cache
def internal_tmpfs_device() -> int:
    """Return st_dev of the mount that holds memfds, shared anonymous memory and System V segments."""
    fd = os.memfd_create("ferry-probe", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def is_shared_object(entry: MapsEntry) -> bool:
    """Say whether the mapped file is memory of ours to carry, rather than a file system's."""
    if not entry.inode:
        return False
    if os.makedev(entry.dev_major, entry.dev_minor) == internal_tmpfs_device():
        return True
    return entry.path.startswith("/memfd:") or is_posix_shm(entry.path)


def is_posix_shm(path: str) -> bool:
    """Say whether a path is a POSIX shared memory object (shm_overview(7)): those have no folders."""
    return path.startswith(_POSIX_SHM) and "/" not in path[len(_POSIX_SHM) :]


def shared_key(entry: MapsEntry) -> SharedKey:
    return SharedKey(os.makedev(entry.dev_major, entry.dev_minor), entry.inode)


@dataclass(frozen=True, slots=True)
class Layout:
    """The mappings of one maps text, by class. Lists are in address order."""

    anonymous: RangeSet
    private_file: RangeSet
    private: RangeSet
    shared_mappings: list[tuple[MapsEntry, SharedKey]]  # registered ones
    object_mappings: list[tuple[MapsEntry, SharedKey]]  # also read-only (refused) and private ones
    shared: RangeSet
    watched: list[MapsEntry]  # all that should be registered
    wanted: RangeSet  # where they are
    spans: list[tuple[int, int, list[MapsEntry]]]  # runs of watched VMAs with nothing else between them
    rooms: list[tuple[int, int]]  # for each span, the address space around it up to what is not watched


def classify(
    entries: list[MapsEntry],
    excluded: Container[MapsEntry],
    *,
    watch_private_files: bool = True,
) -> Layout:
    """Sort `entries`; those in `excluded` could not be registered and are left alone."""
    anonymous: list[tuple[int, int]] = []
    private_file: list[tuple[int, int]] = []
    shared_mappings: list[tuple[MapsEntry, SharedKey]] = []
    object_mappings: list[tuple[MapsEntry, SharedKey]] = []
    watched: list[MapsEntry] = []
    spans: list[tuple[int, int, list[MapsEntry]]] = []
    rooms: list[tuple[int, int]] = []
    run: list[MapsEntry] = []
    floor = LOWEST_ADDRESS
    for entry in entries:
        private = entry.perms[3] == "p"
        of_object = is_shared_object(entry)
        if of_object:
            object_mappings.append((entry, shared_key(entry)))
        if entry.path in _SPECIAL or entry in excluded:
            wanted = False
        elif private:
            wanted = watch_private_files or not entry.inode
            (private_file if entry.inode else anonymous).append((entry.start, entry.end))
        else:
            wanted = of_object
            if wanted:
                shared_mappings.append((entry, shared_key(entry)))
        if wanted:
            watched.append(entry)
            run.append(entry)
        else:
            if run:
                spans.append((run[0].start, run[-1].end, run))
                rooms.append((min(floor, run[0].start), entry.start))
                run = []
            floor = entry.end
    if run:
        spans.append((run[0].start, run[-1].end, run))
        rooms.append((min(floor, run[0].start), max(HIGHEST_ADDRESS, run[-1].end)))
    rooms = [(start, max(min(end, HIGHEST_ADDRESS), span[1])) for (start, end), span in zip(rooms, spans)]
    anonymous_set, file_set = RangeSet.of(anonymous), RangeSet.of(private_file)
    return Layout(
        anonymous=anonymous_set,
        private_file=file_set,
        private=anonymous_set.union(file_set),
        shared_mappings=shared_mappings,
        shared=RangeSet.of((entry.start, entry.end) for entry, _ in shared_mappings),
        object_mappings=object_mappings,
        watched=watched,
        wanted=RangeSet.of((entry.start, entry.end) for entry in watched),
        spans=spans,
        rooms=rooms,
    )

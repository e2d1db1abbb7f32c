"""Changes of shared memory objects that page tables do not show.

Write protection is per mapping. Content of an object can also change by write(2) and its kin on a descriptor, through
a mapping that came and went between two rounds, or by punching holes. An object counts as changed as a whole when:
- it is new, or the set of its mappings in the target changed (a store through a mapping that is gone left no trace);
- inotify saw it opened or written (works for files with a path and reopened memfds; since Linux 6.14 or so not for
  the description memfd_create(2) returned, and never for mmap stores: so it separates the two);
- its size, blocks or time stamps changed, or were too fresh to trust, and nothing explains that. Stores through a
  mapping explain it (the kernel updates mtime at the first store to a protected page) unless the target also
  holds a descriptor that could have written (F_SEAL_WRITE and F_SEAL_FUTURE_WRITE rule that out), or the object was
  seen to lose pages: a hole that was punched (MADV_REMOVE) and read again before we looked is populated, zero and
  still protected. The caller drops what holes it sees in any case.

Known gap: the first punch ever seen of an object without descriptors, undone by reads of every page of it and hidden
by stores elsewhere in the same round.

Time stamps are taken before the content is read, so a write that comes later shows in the next round.
An object with no descriptor to be had (MAP_SHARED|MAP_ANONYMOUS without CAP_CHECKPOINT_RESTORE) has only its mappings;
there nobody can write(2) either.

Must never hold an object open for writing: that would make F_SEAL_WRITE fail in the target.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import time
from collections.abc import Collection, Iterable

from agent.kernel.libc import libc
from agent.pages.extents import shared_extents
from agent.procfs.maps import MapsEntry
from agent.ranges import RangeSet
from agent.tracker.base import SharedKey

FRESH_NS = 20_000_000
"""Time stamps younger than this may not move at the next write: kernels before 6.13 stamp with the tick."""

_IN_MODIFY = 0x2
_IN_OPEN = 0x20
_IN_Q_OVERFLOW = 0x4000
_NO_WRITE_SEALS = 0x0008 | 0x0010  # F_SEAL_WRITE | F_SEAL_FUTURE_WRITE
_EVENT = struct.Struct("iIII")

Stamp = tuple[int, int, int, int]  # st_mtime_ns, st_ctime_ns, st_size, st_blocks


class _Object:
    """What is known of one object."""

    __slots__ = (
        "extents",
        "fd",
        "fresh",
        "mappings",
        "named",
        "punched",
        "seen",
        "stamp",
        "watch",
        "writable_before",
    )

    def __init__(self, fd: int | None) -> None:
        self.fd = fd
        self.stamp: Stamp | None = None
        self.fresh = True
        self.mappings: frozenset[tuple[int, int, int]] = frozenset()
        self.seen = False  # reported whole once
        self.watch = -1
        self.writable_before = True
        self.extents = RangeSet()
        self.named = False  # the caller says that the target has it open
        self.punched = False  # holes were punched once: it may happen again unseen


def open_mapped(pid: int, entry: MapsEntry) -> int | None:
    """Open the object behind a mapping, read-only; None if that is not allowed or it is gone."""
    try:
        return os.open(
            f"/proc/{pid}/map_files/{entry.start:x}-{entry.end:x}", os.O_RDONLY | os.O_CLOEXEC
        )
    except OSError:
        return None


class SharedWatch:
    """Watches the shared objects of one process. Owns its descriptors; close() it."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._objects: dict[SharedKey, _Object] = {}
        self._by_watch: dict[int, SharedKey] = {}
        init = libc["inotify_init1"]
        init.restype = ctypes.c_int
        self._inotify: int = init(os.O_NONBLOCK | os.O_CLOEXEC)
        self._add_watch = libc["inotify_add_watch"]
        self._add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)

    def close(self) -> None:
        for known in self._objects.values():
            if known.fd is not None:
                os.close(known.fd)
        self._objects.clear()
        if self._inotify >= 0:
            os.close(self._inotify)
            self._inotify = -1

    def knows(self, key: SharedKey) -> bool:
        """Say whether the object is there, with a descriptor or without."""
        return key in self._objects

    def fd_of(self, key: SharedKey) -> int | None:
        """Return the agent's read-only descriptor of an object; it stays this object's."""
        known = self._objects.get(key)
        return known.fd if known else None

    def add(self, key: SharedKey, fd: int) -> None:
        """Watch an object that the target has open, mapped or not; said anew before each look. `fd` is duplicated.

        A descriptor of something else is ignored: the target may have closed the one that was meant.
        """
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != key:
            return
        known = self._objects.get(key)
        if known is None or known.fd is None:
            known = self._insert(key, os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
        known.named = True

    def _insert(self, key: SharedKey, fd: int | None) -> _Object:
        known = _Object(fd)
        self._objects[key] = known
        if fd is not None and self._inotify >= 0:
            path = b"/proc/self/fd/%d" % fd
            known.watch = self._add_watch(self._inotify, path, _IN_MODIFY | _IN_OPEN)
            self._by_watch[known.watch] = key
        return known

    def find(self, mapped: Iterable[tuple[MapsEntry, SharedKey]]) -> None:
        """Open objects not seen before. One whose mapping is gone already is none, unless it shows up again."""
        for entry, key in mapped:
            if key not in self._objects:
                fd, gone = self._open_mapping(entry, key)
                if fd is None:
                    fd = self._open_by_descriptor(key)
                if fd is not None or not gone:
                    self._insert(key, fd)

    def _open_mapping(self, entry: MapsEntry, key: SharedKey) -> tuple[int | None, bool]:
        # Also says whether something else is there by now.
        path = f"/proc/{self._pid}/map_files/{entry.start:x}-{entry.end:x}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None, True
        except OSError:  # no right to
            return None, False
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) == key:
            return fd, False
        os.close(fd)
        return None, True

    def _open_by_descriptor(self, key: SharedKey) -> int | None:
        for path in self._descriptors({key}):
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
        return None

    def _descriptors(self, keys: set[SharedKey]) -> Iterable[str]:
        base = f"/proc/{self._pid}/fd"
        try:
            names = os.listdir(base)
        except OSError:
            return
        for name in names:
            path = f"{base}/{name}"
            try:
                status = os.stat(path)
            except OSError:
                continue
            if (status.st_dev, status.st_ino) in keys:
                yield path

    def _writable_keys(self, keys: set[SharedKey]) -> set[SharedKey]:
        # The symbolic link of a descriptor open for writing has its owner write bit set.
        found: set[SharedKey] = set()
        for path in self._descriptors(keys):
            try:
                status = os.stat(path)
                if os.lstat(path).st_mode & 0o200:
                    found.add(SharedKey(status.st_dev, status.st_ino))
            except OSError:
                continue
        return found

    def _notified(self) -> set[SharedKey]:
        keys: set[SharedKey] = set()
        while self._inotify >= 0:
            try:
                events = os.read(self._inotify, 65536)
            except BlockingIOError:
                break
            offset = 0
            while offset < len(events):
                watch, mask, _, length = _EVENT.unpack_from(events, offset)
                offset += _EVENT.size + length
                if mask & _IN_Q_OVERFLOW:
                    keys.update(self._objects)
                elif watch in self._by_watch:
                    keys.add(self._by_watch[watch])
        return keys

    def current(self, mapped: Collection[tuple[MapsEntry, SharedKey]]) -> list[SharedKey]:
        """Return the objects there are: mapped, or said to be open since the last look. Forgets the others."""
        self.find(mapped)
        self._drop_unused({key for _, key in mapped})
        return list(self._objects)

    def changed(
        self,
        mapped: Collection[tuple[MapsEntry, SharedKey]],
        *,
        stored: set[SharedKey],
        remapped: set[SharedKey],
    ) -> set[SharedKey]:
        """Return the objects whose whole content counts as changed since the last call.

        `stored`: objects with written pages in a mapping. `remapped`: objects with a newly registered mapping.
        """
        places: dict[SharedKey, set[tuple[int, int, int]]] = {}
        for entry, key in mapped:
            places.setdefault(key, set()).add((entry.start, entry.end, entry.offset))
        self.current(mapped)
        result = self._notified() | remapped
        doubtful: set[SharedKey] = set()
        for key, known in self._objects.items():
            mappings = frozenset(places.get(key, ()))
            if not known.seen or mappings != known.mappings:
                result.add(key)
                known.seen = True
                known.mappings = mappings
            if self._stamp_changed(known):
                if key not in stored:
                    result.add(key)
                elif _loses_pages(known):
                    result.add(key)
                elif not _sealed(known):
                    doubtful.add(key)
        if doubtful:
            writable = self._writable_keys(doubtful)
            for key in doubtful:
                known = self._objects[key]
                if key in writable or known.writable_before:
                    result.add(key)
                known.writable_before = key in writable
        return result & set(self._objects)

    def _drop_unused(self, mapped: Collection[SharedKey]) -> None:
        # Neither mapped nor open: nobody can see it, and our descriptor is what keeps its memory.
        for key, known in list(self._objects.items()):
            if key not in mapped and not known.named:
                del self._objects[key]
                self._by_watch.pop(known.watch, None)
                if known.fd is not None:
                    os.close(known.fd)
            known.named = False

    def _stamp_changed(self, known: _Object) -> bool:
        if known.fd is None:
            return False
        status = os.fstat(known.fd)
        stamp = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_blocks)
        changed = stamp != known.stamp or known.fresh
        known.fresh = abs(time.time_ns() - max(stamp[0], stamp[1])) < FRESH_NS
        known.stamp = stamp
        return changed


def _loses_pages(known: _Object) -> bool:
    if known.fd is not None and not known.punched:
        extents = shared_extents(known.fd)
        known.punched = bool(known.extents.subtract(extents))
        known.extents = extents
    return known.punched


def _sealed(known: _Object) -> bool:
    if known.fd is None:
        return True
    try:
        return bool(fcntl.fcntl(known.fd, fcntl.F_GET_SEALS) & _NO_WRITE_SEALS)
    except OSError:
        return False

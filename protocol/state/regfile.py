"""A regular file, directory, or anything else reopened by path (O_PATH, files of /proc and /sys).

Paths are absolute and start at the agent's root, whatever root directory the process has.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RegularFile:
    """What must stand under ``path`` on the destination.

    ``pseudo``: a file of procfs, sysfs or the like, whose size and times mean nothing.
    ``own_proc``: ``path`` is relative to the process's own directory in a procfs, the one at /proc below ``below``
    (the root directory of the process, where it has another one).
    """

    path: str
    mode: int
    size: int
    mtime_ns: int
    pseudo: bool = False
    own_proc: bool = False
    below: str = ""

    def __post_init__(self) -> None:
        if "\0" in self.path:
            raise ValueError("path has a null character")
        if not self.own_proc and not self.path.startswith("/"):
            raise ValueError(f"path {self.path!r} is not absolute")
        if ".." in self.path.split("/"):
            raise ValueError(f"path {self.path!r} climbs")

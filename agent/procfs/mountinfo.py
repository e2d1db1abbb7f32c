"""/proc/PID/mountinfo: the mounts that a process sees.

Source: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple

from agent.procfs.files import read_bytes


class Mount(NamedTuple):
    """One mount, by the names of proc_pid_mountinfo(5); escapes in paths are resolved."""

    mount_id: int
    parent_id: int
    dev_major: int
    dev_minor: int
    root: str
    mount_point: str
    options: str
    optional_fields: tuple[str, ...]
    fstype: str
    source: str
    super_options: str


_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


def _path(text: bytes) -> str:
    if b"\\" in text:
        text = _OCTAL.sub(lambda match: bytes((int(match[1], 8),)), text)
    return os.fsdecode(text)


def parse_mountinfo(data: bytes) -> list[Mount]:
    """Parse the text of a mountinfo file, in the kernel's order.

    :raises ValueError: the text is not such a file.
    """
    mounts = []
    for line in data.split(b"\n"):
        if not line:
            continue
        # The separator follows any number of optional fields; empty sources leave two blanks.
        head, dash, tail = line.partition(b" - ")
        mount_id, parent_id, device, root, point, options, *optional = head.split(b" ")
        fstype, source, super_options = tail.split(b" ", 2)
        major, _, minor = device.partition(b":")
        mounts.append(
            Mount(
                int(mount_id),
                int(parent_id),
                int(major),
                int(minor),
                _path(root),
                _path(point),
                options.decode(),
                tuple(word.decode() for word in optional if word),
                os.fsdecode(fstype),
                _path(source),
                os.fsdecode(super_options),
            )
        )
    return mounts


def read_mountinfo(pid: int) -> list[Mount]:
    """Return the mounts of a process.

    :raises ProcessLookupError: it is gone.
    """
    return parse_mountinfo(read_bytes(f"/proc/{pid}/mountinfo"))

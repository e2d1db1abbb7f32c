"""Character devices that every host has alike: null, zero, full, random, urandom.

All others are refused: a terminal, a GPU or a tun device has state that stays behind.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from agent.errors import RestoreError
from agent.state.openfile import (
    REOPEN_FLAGS,
    Description,
    DumpJob,
    FileKind,
    Item,
    PreflightJob,
    RestoreJob,
    always_unchanged,
)
from protocol.state.chardev import PORTABLE_DEVICES, CharDevice

TTY_MAJORS = frozenset({4, 5, 136, 137, 138, 139, 140, 141, 142, 143, 204})
"""Documentation/admin-guide/devices.txt: virtual consoles, /dev/tty, /dev/ptmx, pseudo-terminals, serial."""


def dump_chardev(job: DumpJob, desc: Description) -> CharDevice | None:
    """Describe a character device, or refuse it."""
    assert desc.info is not None
    device = (os.major(desc.info.st_rdev), os.minor(desc.info.st_rdev))
    if device in PORTABLE_DEVICES:
        path = desc.link.removesuffix(" (deleted)")
        return CharDevice(major=device[0], minor=device[1], path=path)
    if device[0] in TTY_MAJORS:
        job.refuse(
            desc, "terminal", f"{desc.link} is a terminal",
            "start the process with its standard files on /dev/null or a log file (setsid, nohup),"
            " or use --external fd[N]",
        )  # fmt: skip
    else:
        job.refuse(
            desc, "device", f"{desc.link} is character device {device[0]}:{device[1]}",
            "device state cannot be moved; have the process close it, or use --external fd[N]",
        )  # fmt: skip
    return None


def preflight_chardev(job: PreflightJob, items: Sequence[Item[CharDevice]]) -> None:
    """Check that the devices exist."""
    for item in items:
        if not _find(item.body):
            job.refuse(
                item, "device", f"{item.body.path} does not exist or is another device",
                "provide the usual /dev on the destination",
            )  # fmt: skip


def _find(body: CharDevice) -> str:
    for path in (body.path, PORTABLE_DEVICES[body.major, body.minor]):
        try:
            info = os.stat(path)
        except OSError:
            continue
        if stat.S_ISCHR(info.st_mode) and info.st_rdev == os.makedev(body.major, body.minor):
            return path
    return ""


def restore_chardev(job: RestoreJob, items: Sequence[Item[CharDevice]]) -> None:
    """Open the devices again.

    :raises RestoreError: when one does not exist.
    """
    for item in items:
        path = _find(item.body)
        if not path:
            raise RestoreError(f"Cannot restore {item}: no device {item.body.path}")
        job.put(item, os.open(path, item.file.flags & REOPEN_FLAGS | os.O_NOCTTY | os.O_CLOEXEC))


KIND = FileKind(
    name="chardev",
    dump=dump_chardev,
    restore=restore_chardev,
    preflight=preflight_chardev,
    unchanged=always_unchanged,
)

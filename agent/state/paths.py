"""Paths that /proc shows of a process, and how the agent gets to what they name.

The kernel shows every path (links, maps) as it is seen from the root directory of the *reader*, and so do the schemas
of all kinds: a process that has changed its root (chroot) needs no translation, on either host. Two exceptions: the
names of unix sockets are words of the process itself, which mean something below its own root (see
agent.state.unixsk), and the files of /proc, of which it may have one mounted below its root.
"""

from __future__ import annotations

import functools
import os

from agent.procfs.process import read_ns
from agent.types import Obstacle

CAP_SYS_CHROOT = 18


def reach(pid: int) -> str:
    """Return what to put before a path that /proc shows of a process: nothing in the agent's own mount namespace.

    Of a process in another one all shows as from the root of that; it cannot be moved, but what else stands in the way
    can be told.
    """
    try:
        same = read_ns(pid, "mnt") == _own_mnt(os.getpid())
    except FileNotFoundError:
        return ""
    return "" if same else f"/proc/{pid}/root"


@functools.cache
def _own_mnt(pid: int) -> str:
    # Asked for in the freeze too; an agent stays where it is.
    return read_ns(pid, "mnt")


def below_root(path: str, root: str) -> str:
    """Return how a process with the root directory ``root`` calls ``path``, if it can reach it at all."""
    return path[len(root) :] if root != "/" and path.startswith(root + "/") else path


def leads_to(path: str, pid: int, link: str) -> bool:
    """Tell whether ``path`` leads to what the link of a process does: something may be mounted over it."""
    here = os.stat(f"/proc/{pid}/{link}")
    try:
        there = os.stat(reach(pid) + path)
    except OSError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def check_directories(cwd: str, root: str, *, capabilities: int) -> list[Obstacle]:
    """Say on the destination which of the two directories a process cannot have here; nothing is touched."""
    found = []
    for what, path in (("working directory", cwd), ("root directory", root)):
        try:
            os.close(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as err:
            found.append(
                Obstacle(
                    kind="directory",
                    what=what,
                    detail=f"{path}: {err.strerror}",
                    hint="make the same directory available under this path on the destination",
                )
            )
    if root != "/" and not capabilities >> CAP_SYS_CHROOT & 1:
        found.append(
            Obstacle(
                kind="directory",
                what="root directory",
                detail=f"the process has changed its root to {root}, agent-recv may not (no CAP_SYS_CHROOT)",
                hint="run agent-recv as root",
            )
        )
    return found

"""Regular files and directories: dumped by path and offset, opened again by path.

The contents are the file system's, not ours: the destination must have the same file under the same
path. Whatever is opened with O_PATH, and the files of procfs and sysfs, go the same way. Must never
create or truncate a file.

Paths are those that /proc shows, from the agent's root (agent.state.paths): it is checked that each
leads to the inode that is open.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Sequence

from agent.errors import RestoreError
from agent.kernel.many import try_each
from agent.procfs.process import read_root
from agent.state.openfile import (
    O_DIRECTORY,
    O_NOFOLLOW,
    O_PATH,
    REOPEN_FLAGS,
    Candidates,
    Description,
    DumpJob,
    FileKind,
    Item,
    PreflightJob,
    Recheck,
    RestoreJob,
)
from agent.state.paths import below_root, reach
from protocol.state.regfile import RegularFile

PSEUDO_ROOTS = ("/proc/", "/sys/", "/dev/pts/")
DELETED = " (deleted)"


def locate(job: DumpJob, desc: Description) -> str | None:
    """Return the path of ``desc``; None after recording why there is none."""
    info = desc.info
    assert info is not None
    if desc.link.endswith(DELETED) and info.st_nlink == 0:
        job.refuse(
            desc, "deleted file", f"{desc.link[:-len(DELETED)]} no longer exists ({info.st_size} bytes)",
            "have the process close it, or carry it with --external fd[N]",
        )  # fmt: skip
        return None
    with contextlib.suppress(OSError):
        path = _reach(job) + desc.link
        found = os.stat(path, follow_symlinks=not stat.S_ISLNK(info.st_mode))
        if (found.st_dev, found.st_ino) == (info.st_dev, info.st_ino):
            return desc.link
    what = "was deleted or renamed" if desc.link.endswith(DELETED) else "now leads to another file"
    job.refuse(
        desc, "unreachable file", f"{desc.link}: the path {what}",
        "have the process open the file again",
    )  # fmt: skip
    return None


def _reach(job: DumpJob) -> str:
    if "reach" not in job.memo:
        job.memo["reach"] = reach(job.ctx.pid)
    path: str = job.memo["reach"]
    return path


def dump_regular(job: DumpJob, desc: Description) -> RegularFile | None:
    """Describe a regular file, a directory or an O_PATH description."""
    info = desc.info
    assert info is not None
    if "root" not in job.memo:
        job.memo["root"] = read_root(job.ctx.pid)
    inside = below_root(desc.link, job.memo["root"])
    own_proc = f"/proc/{job.ctx.pid}"
    if inside == own_proc or inside.startswith(own_proc + "/"):
        # Named by the pid, which may be another one for those who look from another pid namespace.
        return RegularFile(
            path=inside[len(own_proc) :].lstrip("/"), mode=info.st_mode, size=0, mtime_ns=0,
            pseudo=True, own_proc=True, below=desc.link.removesuffix(inside),
        )  # fmt: skip
    path = locate(job, desc)
    if path is None:
        return None
    return RegularFile(
        path=path,
        mode=info.st_mode,
        size=info.st_size if stat.S_ISREG(info.st_mode) else 0,
        mtime_ns=info.st_mtime_ns if stat.S_ISREG(info.st_mode) else 0,
        pseudo=inside.startswith(PSEUDO_ROOTS),
    )


def regular_unchanged(check: Recheck, found: Candidates[RegularFile]) -> list[int]:
    """See FileKind. The path must still lead to the file, and the file be as it was described."""
    start = _reach(check.now)
    # The files of /proc and /sys may do anything when they are opened; a symbolic link needs a closer look.
    found = [
        (desc, body)
        for desc, body in found
        if not (body.pseudo or body.own_proc or stat.S_ISLNK(body.mode))
    ]
    infos = try_each(os.stat, [start + desc.link for desc, _body in found])
    return [
        desc.id
        for info, (desc, body) in zip(infos, found, strict=True)
        if info is not None and _is_as_described(info, desc, body)
    ]


def _is_as_described(found: os.stat_result, desc: Description, body: RegularFile) -> bool:
    info = desc.info
    return (
        info is not None
        and found.st_ino == info.st_ino
        and found.st_dev == info.st_dev
        and found.st_mode == body.mode
        and (
            not stat.S_ISREG(body.mode)
            or (found.st_size == body.size and found.st_mtime_ns == body.mtime_ns)
        )
    )


def preflight_regular(job: PreflightJob, items: Sequence[Item[RegularFile]]) -> None:
    """Check that every file is there and is the same one."""
    written = _written_paths(items)
    for item in items:
        if item.body.own_proc:
            problem = "" if os.path.isdir(f"{item.body.below}/proc/self") else "procfs is not mounted"
            path = f"{item.body.below}/proc"
        else:
            problem, path = _difference(item, written), item.body.path
        if problem:
            job.refuse(
                item, "file", f"{path}: {problem}",
                "make the same file available under this path on the destination",
            )  # fmt: skip


def _written_paths(items: Iterable[Item[RegularFile]]) -> frozenset[str]:
    # Paths that the process has open for writing, by this description or by another.
    return frozenset(item.body.path for item in items if item.file.flags & os.O_ACCMODE != os.O_RDONLY)


def _difference(item: Item[RegularFile], written: frozenset[str]) -> str:
    # A file that the process writes may have grown since it was described, but can never have
    # become smaller; a file that it only reads must be the very same.
    body = item.body
    try:
        found = os.stat(body.path, follow_symlinks=not stat.S_ISLNK(body.mode))
    except OSError as err:
        return os.strerror(err.errno or 0)
    if stat.S_IFMT(found.st_mode) != stat.S_IFMT(body.mode):
        return "another type of file stands there"
    if body.pseudo or item.file.flags & O_PATH:
        return ""
    if stat.S_IMODE(found.st_mode) != stat.S_IMODE(body.mode):
        return f"its mode is {stat.S_IMODE(found.st_mode):o}, not {stat.S_IMODE(body.mode):o}"
    if not stat.S_ISREG(body.mode):
        return ""
    if body.path not in written:
        if found.st_size != body.size:
            return f"its size is {found.st_size}, not {body.size}"
        if found.st_mtime_ns // 10**9 != body.mtime_ns // 10**9:
            return f"it was modified at {found.st_mtime:.0f}, not {body.mtime_ns / 1e9:.0f}"
    elif found.st_size < body.size and not item.file.flags & os.O_APPEND:
        return f"its size is {found.st_size}, smaller than {body.size}"
    return ""


def restore_regular(job: RestoreJob, items: Sequence[Item[RegularFile]]) -> None:
    """Open every file again at its offset.

    :raises RestoreError: when one is missing or is not the same file.
    """
    # Those that were made ahead are not among ``items``.
    written = _written_paths(item for item in job.items.values() if item.file.kind == "regular")
    for item in items:
        body = item.body
        if body.own_proc:
            path = f"{body.below}/proc/{job.ctx.pid}/{body.path}".rstrip("/")
        else:
            problem = _difference(item, written)
            if problem:
                raise RestoreError(f"Cannot restore {item}: {body.path}: {problem}")
            path = body.path
        flags = item.file.flags & REOPEN_FLAGS
        if not flags & O_PATH:
            # O_NOFOLLOW and O_DIRECTORY change what open(2) does, not what the description is.
            flags |= os.O_NOCTTY | (O_DIRECTORY if stat.S_ISDIR(body.mode) else 0)
        elif stat.S_ISLNK(body.mode):
            flags |= O_NOFOLLOW
        try:
            fd = os.open(path, flags | os.O_CLOEXEC)
        except OSError as err:
            raise RestoreError(f"Cannot restore {item}: {path}: {err.strerror}") from err
        job.put(item, fd)
        if item.file.pos and not flags & O_PATH:
            os.lseek(fd, item.file.pos, os.SEEK_SET)


KIND = FileKind(
    name="regular",
    dump=dump_regular,
    restore=restore_regular,
    preflight=preflight_regular,
    unchanged=regular_unchanged,
)

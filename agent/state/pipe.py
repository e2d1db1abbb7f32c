"""Pipes and FIFOs: both ends must be in the process; what is in the pipe is copied with tee(2).

tee(2) duplicates the contents without consuming them, packet boundaries included, so the target's
pipe is never read from. A reader or writer that no longer exists stays closed on the destination.
Sources: pipe(7), tee(2), fifo(7).
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import struct
import termios
from collections.abc import Iterable, Sequence
from itertools import chain, repeat

from agent.errors import DumpError, RestoreError
from agent.kernel.libc import check, libc
from agent.kernel.many import try_each
from agent.state.context import DumpContext
from agent.state.openfile import (
    AT_ONCE,
    O_DIRECT,
    REOPEN_FLAGS,
    Candidates,
    Description,
    DumpJob,
    FileKind,
    Item,
    PreflightJob,
    Recheck,
    RestoreJob,
    are_nobodys,
    set_status_flags,
)
from agent.state.regfile import locate
from protocol.state.pipe import PipeEnd

F_SETPIPE_SZ = 1031
F_GETPIPE_SZ = 1032
SPLICE_F_NONBLOCK = 0x02
_tee = libc["tee"]


def dump_pipe(job: DumpJob, desc: Description) -> PipeEnd | None:
    """Describe one end; the first readable end of a pipe carries the contents."""
    fd = job.fetch(desc)
    path = ""
    if desc.info is not None and stat.S_ISFIFO(desc.info.st_mode):
        found = locate(job, desc)
        if found is None:
            return None
        path = found
    if job.refuse_if_shared(desc, "pipe"):
        return None
    ends = job.by_link()[desc.link]
    if not _ends_are_here(fd, desc, ends):
        job.refuse(
            desc, "pipe", f"the other end of {desc.link} is not in this process",
            "carry it with --external fd[N], or start the process with a file instead",
        )  # fmt: skip
        return None
    chunks: tuple[bytes, ...] = ()
    if job.content and next((end for end in ends if end.readable), None) is desc:
        chunks = tuple(read_contents(fd))
    return PipeEnd(
        pipe_id=desc.inode, capacity=fcntl.fcntl(fd, F_GETPIPE_SZ), path=path, chunks=chunks
    )


def pipe_unchanged(recheck: Recheck, found: Candidates[PipeEnd]) -> Iterable[int]:
    """See FileKind. An empty pipe with the same ends as before: only all of them together say that it is the same."""
    ends = [(desc, body) for desc, body in found if not body.path]  # A FIFO has a name that others see.
    # A process that runs must not be left with copies for longer than a moment.
    size = AT_ONCE if recheck.now.content else 1
    plain: set[int] = set()
    for low in range(0, len(ends), size):
        plain.update(_plain_ends(recheck.now.ctx, ends[low : low + size]))
    # One end that is gone, new, or not plain, and the pipe is another one.
    descriptions = chain(recheck.before.descriptions, recheck.now.descriptions)
    spoiled = {desc.link for desc in descriptions if desc.id not in plain}
    whole = {desc.link for desc, _body in ends} - spoiled
    if recheck.now is recheck.before:
        # Where an end is that is not here takes a closer look. Those that are here stay what they are.
        whole &= {desc.link for desc, _body in ends if desc.readable}
        whole &= {desc.link for desc, _body in ends if desc.writable}
    return [desc.id for desc, _body in ends if desc.link in whole]


def _plain_ends(ctx: DumpContext, ends: Candidates[PipeEnd]) -> list[int]:
    """Return by id which of the ends have no owner, and are of a pipe that is as described and has nothing in it."""
    try:
        got = ctx.fetch_all([desc.fd for desc, _body in ends])
        fds = [fd for fd in got if fd >= 0]
        # The capacity was read from the running target by its number: another pipe's, perhaps, just then.
        capacities = try_each(fcntl.fcntl, fds, repeat(F_GETPIPE_SZ))
        poller = select.poll()
        try_each(poller.register, fds, repeat(select.POLLIN))
        full = {fd for fd, _events in poller.poll(0)}
        return [
            desc.id
            for fd, (desc, body), capacity, is_nobodys in zip(
                fds, (end for fd, end in zip(got, ends) if fd >= 0), capacities, are_nobodys(fds)
            )
            if capacity == body.capacity and fd not in full and is_nobodys
        ]
    finally:
        ctx.drop_fetched()


def _ends_are_here(fd: int, desc: Description, ends: Sequence[Description]) -> bool:
    # pipe_poll() knows whether any reader or writer exists; if one does and it is not here, it is
    # elsewhere (in flight over a unix socket, for instance).
    poller = select.poll()
    poller.register(fd, 0)
    events = dict(poller.poll(0)).get(fd, 0)
    if desc.writable and not any(end.readable for end in ends) and not events & select.POLLERR:
        return False
    return not (
        desc.readable
        and not any(end.writable for end in ends)
        and not events & select.POLLHUP
        and not desc.link.startswith("/")  # A FIFO never written to shows no hang-up.
    )


def read_contents(fd: int) -> list[bytes]:
    """Return what is in the pipe of the agent descriptor ``fd`` (a read end), without consuming it.

    One element per packet when the writer used packet mode.
    """
    length = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
    if length == 0:
        return []
    copy_read, copy_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.fcntl(copy_write, F_SETPIPE_SZ, fcntl.fcntl(fd, F_GETPIPE_SZ))
        # One call: a second one would start again with the first byte.
        copied = check(_tee(fd, copy_write, length, SPLICE_F_NONBLOCK), "tee", fd)
        chunks = []
        while copied > 0:
            chunk = os.read(copy_read, copied)
            if not chunk:
                break
            chunks.append(chunk)
            copied -= len(chunk)
        if sum(map(len, chunks)) != length:
            raise DumpError(f"Cannot copy a pipe: {length} bytes expected, {sum(map(len, chunks))} found")
        return chunks
    finally:
        os.close(copy_read)
        os.close(copy_write)


def preflight_pipe(job: PreflightJob, items: Sequence[Item[PipeEnd]]) -> None:
    """Check that FIFOs exist and that pipes may be as large as they are."""
    for item in items:
        if item.body.path:
            try:
                mode = os.stat(item.body.path).st_mode
            except OSError:
                mode = 0
            if not stat.S_ISFIFO(mode):
                job.refuse(
                    item, "fifo", f"{item.body.path} is not a FIFO on the destination",
                    f"mkfifo {item.body.path}",
                )  # fmt: skip
    largest = max(items, key=lambda item: item.body.capacity)
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(read_fd, F_SETPIPE_SZ, largest.body.capacity)
    except OSError as err:
        job.refuse(
            largest, "pipe", f"a capacity of {largest.body.capacity} bytes is not allowed: {err.strerror}",
            "raise fs.pipe-max-size on the destination",
        )  # fmt: skip
    finally:
        os.close(read_fd)
        os.close(write_fd)


def restore_pipe(job: RestoreJob, items: Sequence[Item[PipeEnd]]) -> None:
    """Make every pipe, fill it, and give each description its own end.

    :raises RestoreError: when a FIFO is missing or in use, or the contents do not fit.
    """
    pipes: dict[int, list[Item[PipeEnd]]] = {}
    for item in items:
        pipes.setdefault(item.body.pipe_id, []).append(item)
    for ends in pipes.values():
        _restore_one(job, ends)


def _restore_one(job: RestoreJob, ends: Sequence[Item[PipeEnd]]) -> None:
    body = ends[0].body
    if body.path:
        read_fd, write_fd = _open_fifo(body.path, ends[0])
    else:
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if fcntl.fcntl(write_fd, F_GETPIPE_SZ) != body.capacity:
            fcntl.fcntl(write_fd, F_SETPIPE_SZ, body.capacity)
        if not _is_filled(read_fd, ends):
            _fill(write_fd, ends)
        spare = {os.O_RDONLY: read_fd, os.O_WRONLY: write_fd}
        for item in ends:
            mode = item.file.flags & os.O_ACCMODE
            fd = None if body.path else spare.pop(mode, None)
            if fd is None:
                # Without O_NONBLOCK an open of a FIFO may wait for the other end; flags follow.
                flags = item.file.flags & REOPEN_FLAGS & ~O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC
                source = read_fd if mode == os.O_RDONLY else write_fd
                name = body.path or f"/proc/self/fd/{source}"
                fd = os.open(name, flags)
            else:
                read_fd, write_fd = _keep(fd, read_fd, write_fd)
            job.put(item, fd)
            set_status_flags(fd, item.file.flags)
    except OSError as err:
        raise RestoreError(f"Cannot restore {ends[0]}: pipe: {err.strerror}") from err
    finally:
        os.close(read_fd)
        os.close(write_fd)


def _keep(fd: int, read_fd: int, write_fd: int) -> tuple[int, int]:
    # The description keeps this end; later ends are still reopened through a duplicate of it.
    if fd == read_fd:
        return os.dup(read_fd), write_fd
    return read_fd, os.dup(write_fd)


def _open_fifo(path: str, item: Item[PipeEnd]) -> tuple[int, int]:
    try:
        read_fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        write_fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as err:
        raise RestoreError(f"Cannot restore {item}: {path}: {err.strerror}") from err
    return read_fd, write_fd


def _is_filled(read_fd: int, ends: Sequence[Item[PipeEnd]]) -> bool:
    # A FIFO on a file system that both sides see, on one host, is still the source's: what was queued is in it.
    found = read_contents(read_fd)
    if not found:
        return False
    if b"".join(found) != b"".join(chunk for item in ends for chunk in item.body.chunks):
        raise RestoreError(
            f"Cannot restore {ends[0]}: the FIFO {ends[0].body.path} is in use on the destination"
        )
    return True


def _fill(write_fd: int, ends: Sequence[Item[PipeEnd]]) -> None:
    chunks = [chunk for item in ends for chunk in item.body.chunks]
    packets = any(
        item.file.flags & O_DIRECT and item.file.flags & os.O_ACCMODE != os.O_RDONLY for item in ends
    )
    if packets:
        fcntl.fcntl(write_fd, fcntl.F_SETFL, os.O_NONBLOCK | O_DIRECT)
    elif chunks:
        chunks = [b"".join(chunks)]
    for chunk in chunks:
        if os.write(write_fd, chunk) != len(chunk):
            raise RestoreError(f"Cannot restore {ends[0]}: {len(chunk)} bytes do not fit into the pipe")


KIND = FileKind(
    name="pipe",
    dump=dump_pipe,
    restore=restore_pipe,
    preflight=preflight_pipe,
    unchanged=pipe_unchanged,
)

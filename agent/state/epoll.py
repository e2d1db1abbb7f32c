"""epoll(7): the interest list from fdinfo, added again inside the process under the same numbers.

An interest is keyed by the description and the number it was added under, so the calls must be made
by the process itself, when its table stands. Three quirks:
- The number may have been closed, or may name another file now, while a duplicate keeps the
  description: then the description is put at that number for the moment of the call.
- A one-shot interest that has fired shows no events. It is added as one-shot and made to fire once
  more, unseen; one that is not ready just then stays armed for EPOLLERR and EPOLLHUP only, which
  the kernel always adds.
- An edge-triggered interest reports what is ready once more after the restore: never too few edges,
  perhaps one too many.

Sources: epoll_ctl(2), proc_pid_fdinfo(5), kcmp(2) KCMP_EPOLL_TFD.
"""

from __future__ import annotations

import fcntl
import select
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

from agent.kernel import syscalls as nr
from agent.kernel.kcmp import kcmp_epoll_tfd
from agent.procfs import fdinfo
from agent.procfs.fdinfo import EpollTarget
from agent.state.openfile import (
    Candidates,
    Description,
    DumpJob,
    FileKind,
    Item,
    Recheck,
    RestoreJob,
)
from agent.target.batch import Batch, Call
from protocol.state.epoll import Epoll, EpollItem

EPOLL_CTL_ADD, EPOLL_CTL_MOD = 1, 3
EPOLLWAKEUP = 1 << 29
EPOLLEXCLUSIVE = 1 << 28
PRIVATE_BITS = EPOLLWAKEUP | select.EPOLLONESHOT | select.EPOLLET | EPOLLEXCLUSIVE
"""fs/eventpoll.c, EP_PRIVATE_BITS: all that is left of a one-shot interest that has fired."""
ANY_EVENT = select.EPOLLIN | select.EPOLLOUT | select.EPOLLPRI | select.EPOLLRDHUP

_EVENT = struct.Struct("=IQ")  # Packed on x86_64.


def dump_epoll(job: DumpJob, desc: Description) -> Epoll | None:
    """Describe an epoll instance; refuses interests in files that the process cannot reach any more."""
    items = []
    nth: dict[int, int] = {}
    for target in fdinfo.epoll(desc.fdinfo):
        offset = nth.get(target.tfd, 0)
        nth[target.tfd] = offset + 1
        watched = _find(job, desc, target, offset)
        if watched is None:
            job.refuse(
                desc, "epoll", f"watches fd {target.tfd}, which was closed, but lives on elsewhere",
                "have the program remove files from epoll before it closes them",
            )  # fmt: skip
            continue
        items.append(
            EpollItem(fd=target.tfd, file_id=watched.id, events=target.events, data=target.data)
        )
    return Epoll(items=tuple(items))


def _find(
    job: DumpJob, desc: Description, target: EpollTarget, offset: int
) -> Description | None:
    pid = job.ctx.pid
    for candidate in _candidates(job, target):
        try:
            if kcmp_epoll_tfd(pid, pid, candidate.fd, desc.fd, target.tfd, offset) == 0:
                return candidate
        except FileNotFoundError:
            # A running target removed it meanwhile. A stopped one is dumped again, exactly.
            return None
    return None


def _candidates(job: DumpJob, target: EpollTarget) -> Iterator[Description]:
    # Nearly always it is the file under that very number; else those with the same inode.
    table = job.by_fd()
    likely = table.get(target.tfd)
    if likely is not None:
        yield likely
    for other in job.descriptions:
        if other is not likely and other.fdinfo.ino == target.ino:
            yield other


def epoll_unchanged(check: Recheck, found: Candidates[Epoll]) -> Iterable[int]:
    """See FileKind. Whatever it watches must be unchanged, and be the very same description as far as one can tell."""
    kept = dict(check.kept)
    last = list(found)
    while last:
        # Epolls watch each other.
        unchanged = {desc.id: desc for desc, body in last if _watches_the_same(check, kept, desc, body)}
        if not unchanged:
            break
        kept.update(unchanged)
        last = [(desc, body) for desc, body in last if desc.id not in unchanged]
    return kept.keys() - check.kept.keys()


def _watches_the_same(
    check: Recheck, kept: Mapping[int, Description], desc: Description, body: Epoll
) -> bool:
    pid = check.now.ctx.pid
    nth: dict[int, int] = {}
    for item in body.items:
        offset = nth.get(item.fd, 0)
        nth[item.fd] = offset + 1
        watched = kept.get(item.file_id)
        try:
            if watched is None or kcmp_epoll_tfd(pid, pid, watched.fd, desc.fd, item.fd, offset) != 0:
                return False
        except OSError:
            return False
    return True


def restore_epoll(job: RestoreJob, items: Sequence[Item[Epoll]]) -> None:
    """Make every instance, empty."""
    for item in items:
        poller = select.epoll()
        try:
            job.put(item, _take(poller))
        finally:
            poller.close()


def _take(poller: select.epoll) -> int:
    return fcntl.fcntl(poller.fileno(), fcntl.F_DUPFD_CLOEXEC, 0)


def install_epoll(job: RestoreJob, items: Sequence[Item[Epoll]], batch: Batch) -> None:
    """Add every interest by calls made inside the process."""
    table = job.table()
    spent: list[tuple[int, EpollItem, Call]] = []
    # Spent one-shots first: the wait that uses them up must find nothing else ready.
    for item in items:
        for interest in item.body.items:
            if not interest.events & ~PRIVATE_BITS:
                spent.append(_add_spent(job, table, item.fds[0], interest, batch))
    for item in items:
        for interest in item.body.items:
            if interest.events & ~PRIVATE_BITS:
                _add(job, table, item.fds[0], interest, interest.events, batch)
    if spent:
        job.after.append(lambda: _disarm_rest(job, table, spent))


def _add_spent(
    job: RestoreJob, table: dict[int, int], epfd: int, interest: EpollItem, batch: Batch
) -> tuple[int, EpollItem, Call]:
    events = interest.events & ~EPOLLEXCLUSIVE | select.EPOLLONESHOT | ANY_EVENT
    _add(job, table, epfd, interest, events, batch)
    out = batch.buffer(_EVENT.size)
    fired = batch.call(nr.NR_epoll_pwait, epfd, out, 1, 0, 0, 8, name="epoll_pwait")
    return epfd, interest, fired


def _disarm_rest(
    job: RestoreJob, table: dict[int, int], spent: Sequence[tuple[int, EpollItem, Call]]
) -> None:
    batch = Batch()
    for epfd, interest, fired in spent:
        if fired.value == 0:
            _control(job, table, epfd, EPOLL_CTL_MOD, interest, interest.events, batch)
    if len(batch):
        job.ctx.injector.run(batch)


def _add(
    job: RestoreJob,
    table: dict[int, int],
    epfd: int,
    interest: EpollItem,
    events: int,
    batch: Batch,
) -> None:
    _control(job, table, epfd, EPOLL_CTL_ADD, interest, events, batch)


def _control(
    job: RestoreJob,
    table: dict[int, int],
    epfd: int,
    operation: int,
    interest: EpollItem,
    events: int,
    batch: Batch,
) -> None:
    event = batch.data(_EVENT.pack(events, interest.data))
    fd = interest.fd
    here = table.get(fd)
    name = f"epoll_ctl({epfd}, fd {fd})"
    if here == interest.file_id:
        batch.call(nr.NR_epoll_ctl, epfd, operation, fd, event, name=name)
        return
    source = job.items[interest.file_id].fds[0]
    # A number above the table; the temporary copy of what stands at ``fd`` keeps its CLOEXEC flag
    # by hand.
    spare = max(table) + 1
    while spare in job.ctx.reserved_fds or spare == job.ctx.agent_pidfd:
        spare += 1
    if here is not None:
        batch.call(nr.NR_dup3, fd, spare, 0, name="dup3")
        flags = batch.call(nr.NR_fcntl, fd, 1, 0, name="fcntl(F_GETFD)")
    batch.call(nr.NR_dup3, source, fd, 0, name="dup3")
    # An epoll instance at that number must still be reached: it is the spare copy then.
    batch.call(nr.NR_epoll_ctl, spare if epfd == fd else epfd, operation, fd, event, name=name)
    if here is None:
        batch.call(nr.NR_close, fd, name="close")
        return
    batch.call(nr.NR_dup3, spare, fd, 0, name="dup3")
    batch.call(nr.NR_fcntl, fd, 2, flags, name="fcntl(F_SETFD)")
    batch.call(nr.NR_close, spare, name="close")


KIND = FileKind(
    name="epoll",
    dump=dump_epoll,
    restore=restore_epoll,
    install=install_epoll,
    unchanged=epoll_unchanged,
)

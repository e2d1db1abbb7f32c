"""What every kind of state is dumped from and restored into.

Small records that the source and the destination fill in and hand down; the kinds read them. A
context never decides anything. Descriptor numbers are the agent's unless a name says target.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from agent.errors import DumpError, RestoreError
from agent.kernel.pidfd import pidfd_getfd, pidfd_getfds
from agent.types import Pid

if TYPE_CHECKING:
    from agent.target.inject_skeleton import SkeletonInjector


class DumpOptions(Protocol):
    """The part of agent.options.SendOptions that matters to state."""

    @property
    def tcp_close(self) -> bool: ...

    @property
    def file_locks(self) -> bool: ...

    @property
    def leave_running(self) -> bool: ...

    @property
    def external_fds(self) -> frozenset[int]: ...


class RestoreOptions(Protocol):
    """The part of agent.options.RecvOptions that matters to state."""

    @property
    def inherit_fds(self) -> Mapping[int, int]: ...


def _no_shared_id(dev: int, ino: int, fd: int, link: str) -> int:
    raise DumpError(f"Cannot dump shared memory object {dev}:{ino} of fd {fd}: nobody carries it")


def _nothing_to_forget() -> None:
    pass


def _no_shared_fd(object_id: int) -> int:
    raise RestoreError(f"Cannot restore shared memory object {object_id}: nobody carries it")


@dataclass(slots=True)
class DumpContext:
    """One process on the source.

    ``shared_id(st_dev, st_ino, target_fd, link)`` returns the id of a shared memory object that is open, on the wire
    above zero. ``forget_shared()`` says that all that are open will be told anew.
    """

    pid: Pid
    pidfd: int
    options: DumpOptions
    shared_id: Callable[[int, int, int, str], int] = _no_shared_id
    forget_shared: Callable[[], None] = _nothing_to_forget
    private_links: set[str] = field(default_factory=set)
    """Pipes and sockets that no other process was found to hold; not looked for a second time."""
    ranks: dict[int, int] = field(default_factory=dict)
    """The order in which kcmp(2) put descriptors at the last look: where the next sort starts."""
    fetched: dict[int, int] = field(default_factory=dict)

    def fetch_fd(self, target_fd: int) -> int:
        """Return an agent descriptor of the target's file; it stays the context's, until drop_fetched().

        :raises OSError: when the target has no such descriptor, or is gone.
        """
        fd = self.fetched.get(target_fd)
        if fd is None:
            fd = self.fetched[target_fd] = pidfd_getfd(self.pidfd, target_fd)
        return fd

    def fetch_all(self, target_fds: Sequence[int]) -> list[int]:
        """As fetch_fd() of each, for numbers that are not fetched yet; -1 of one that cannot be had."""
        fds = pidfd_getfds(self.pidfd, target_fds)
        self.fetched.update((number, fd) for number, fd in zip(target_fds, fds) if fd >= 0)
        return fds

    def drop_fetched(self) -> None:
        """Close every fetched descriptor.

        A running target must not be left with copies: its own close(2) would then not close the
        connection, and its numbers may mean other files by the next look.
        """
        while self.fetched:
            os.close(self.fetched.popitem()[1])


@dataclass(slots=True)
class RestoreContext:
    """One skeleton process on the destination.

    ``agent_pidfd`` is the skeleton's own descriptor of the agent: through it the skeleton takes
    what the agent has opened. ``reserved_fds`` are the skeleton's numbers that must survive; all
    are above every target fd.
    """

    pid: Pid
    injector: SkeletonInjector
    options: RestoreOptions
    agent_pidfd: int
    reserved_fds: frozenset[int] = frozenset()
    shared_fd: Callable[[int], int] = _no_shared_fd

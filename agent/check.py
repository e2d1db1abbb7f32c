"""The check: what of a process cannot be moved, all of it at once, before anything is touched.

Reads procfs and looks at descriptors through a pidfd; the target runs no call of ours and is never stopped.
``agent-send --check`` prints the result, every migration begins with it.
"""

from __future__ import annotations

import os
import select
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType

from agent.errors import SetupError, TargetGone
from agent.machine import require_machine
from agent.options import SendOptions
from agent.procfs.maps import MapsEntry, parse_maps, read_maps
from agent.procfs.numa import read_policy_nodes
from agent.procfs.smaps import each_vm_flags
from agent.procfs.status import read_status
from agent.report import Reporter
from agent.spaces import FIRST_OBJECT_SPACE
from agent.state.check_task import check_task
from agent.state.context import DumpContext
from agent.state.files import check_files
from agent.state.mempolicy import Policy
from agent.state.mm import check_exe
from agent.state.vma import LayoutDumper
from agent.tracker.base import SharedKey
from agent.tracker.layout import shared_key
from agent.types import Obstacle, Pid

DYING_MS = 100
"""How long a killed process may take to be gone; system calls on it fail before that."""


@dataclass(slots=True)
class Target:
    """The process to be moved, held by a pidfd: another one can never take its place."""

    pid: Pid
    pidfd: int
    ns_pid: int
    options: SendOptions
    objects: dict[SharedKey, int] = field(default_factory=dict)
    open_objects: dict[SharedKey, int] = field(default_factory=dict)
    """Shared memory objects seen by the last look at the descriptor table, with one of their numbers."""
    open_paths: dict[SharedKey, str] = field(default_factory=dict)
    """What the links of those seen so far showed."""
    policy_nodes: int | None = None
    """The NUMA nodes that memory policies of the target name (a bit mask); None while it was not seen to have any."""
    policies: Mapping[int, Policy] = field(default_factory=dict)
    """Those of its mappings by start, known once it is frozen."""
    ctx: DumpContext = field(init=False)
    layout: LayoutDumper = field(init=False)

    def __post_init__(self) -> None:
        self.ctx = DumpContext(
            pid=self.pid,
            pidfd=self.pidfd,
            options=self.options,
            shared_id=self._open_object,
            forget_shared=self.open_objects.clear,
        )
        self.layout = LayoutDumper(self.pid, self._mapped_object)

    def object_id(self, key: SharedKey) -> int:
        """Return the id of a shared memory object; the same one for as long as the migration lasts."""
        return self.objects.setdefault(key, FIRST_OBJECT_SPACE + len(self.objects))

    def _open_object(self, dev: int, ino: int, target_fd: int, link: str) -> int:
        key = SharedKey(dev, ino)
        self.open_objects[key] = target_fd
        self.open_paths[key] = link
        return self.object_id(key)

    def open_path(self, key: SharedKey) -> str:
        """What the link of an object's descriptor showed when it was last seen; it may be closed by now."""
        return self.open_paths[key]

    def _mapped_object(self, entry: MapsEntry) -> int:
        return self.object_id(shared_key(entry))

    def vm_flags(self) -> dict[int, frozenset[str]]:
        """VmFlags of every mapping by its start. Walks the page tables: not for the freeze."""
        return {start: flags for start, _end, flags in each_vm_flags(self.pid)}

    def learn_policies(self) -> None:
        """Look for memory policies. Walks the page tables: not for the freeze."""
        self.policy_nodes = read_policy_nodes(self.pid)

    def maps(self) -> list[MapsEntry]:
        """The mappings as they are now."""
        return parse_maps(read_maps(self.pid))

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.ctx.drop_fetched()
        os.close(self.pidfd)


def check(options: SendOptions, reporter: Reporter) -> int:
    """Carry out one ``agent-send --check``; return the exit status.

    :raises SetupError: there is no such process, or the agent may not look at it.
    """
    require_machine()
    with open_target(options.pid, options) as target:
        return reporter.checked(options.pid, find_obstacles(target))


def open_target(pid: Pid, options: SendOptions) -> Target:
    """Take hold of a process without touching it.

    :raises SetupError: there is no such process, or the agent may not look at it.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError as err:
        raise SetupError(f"Cannot send process {pid}: there is no such process") from err
    except OSError as err:
        raise SetupError(f"Cannot send process {pid}: {err.strerror}") from err
    try:
        # What ptrace access is needed for, tried once where it does no harm.
        os.readlink(f"/proc/{pid}/exe")
        return Target(pid=pid, pidfd=pidfd, ns_pid=read_status(pid).ns_pid[-1], options=options)
    except PermissionError as err:
        os.close(pidfd)
        raise SetupError(
            f"Cannot send process {pid}: not allowed to look into it",
            hint="run agent-send as root, or with CAP_SYS_PTRACE and CAP_CHECKPOINT_RESTORE",
        ) from err
    except (FileNotFoundError, ProcessLookupError) as err:
        os.close(pidfd)
        raise TargetGone(f"Process {pid} is gone") from err
    except BaseException:
        os.close(pidfd)
        raise


def find_obstacles(target: Target) -> list[Obstacle]:
    """Name everything about the target that cannot be moved.

    :raises TargetGone: the target exited meanwhile.
    """
    try:
        target.learn_policies()
        found = check_task(target.ctx)
        found += [
            *check_exe(target.pid),
            *target.layout.check(target.maps(), target.vm_flags()),
            *check_files(target.ctx),
        ]
    except (ProcessLookupError, FileNotFoundError) as err:
        raise TargetGone(f"Process {target.pid} exited during the check") from err
    except PermissionError as err:
        raise SetupError(
            f"Cannot examine process {target.pid}: {err}",
            hint="run agent-send as root, or with CAP_SYS_PTRACE and CAP_CHECKPOINT_RESTORE",
        ) from err
    if found and has_exited(target.pidfd):
        # What a dying process has open or mapped can no longer be examined: no obstacles, no process.
        raise TargetGone(f"Process {target.pid} exited during the check")
    return found


def has_exited(pidfd: int, *, wait_ms: int = DYING_MS) -> bool:
    """Tell whether the process has exited, reaped or not, or is about to."""
    end = select.poll()
    end.register(pidfd, select.POLLIN)
    return bool(end.poll(wait_ms))

"""The memory descriptor: brk, argument and environment area, auxv, executable (PR_SET_MM_MAP).

What /proc shows of it comes from the stat file; only the program break must be asked for inside the
process. Restoring follows the last munmap of the skeleton's own program: the kernel refuses to change the
executable while a mapping of the old one exists. Sources: proc_pid_stat(5), prctl(2).
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from agent.errors import RestoreError
from agent.kernel import syscalls as nr
from agent.kernel.prctl import PR_SET_MM, PR_SET_MM_MAP, prctl_mm_map
from agent.procfs.process import read_auxv, read_exe
from agent.procfs.stat import read_stat
from agent.state.paths import leads_to
from agent.types import Obstacle, Pid
from protocol.state.mm import MmState

if TYPE_CHECKING:
    from agent.target.batch import Batch, Call


def check_exe(pid: Pid) -> list[Obstacle]:
    """Name what keeps the executable from being found again by its path."""
    path = read_exe(pid)
    try:
        if leads_to(path, pid, "exe"):
            return []
    except FileNotFoundError:
        pass  # no executable at all
    return [
        Obstacle(
            kind="executable",
            what=path,
            detail="the running program no longer stands under its path",
            hint="restart the program after an upgrade of its files",
        )
    ]


def plan_brk(batch: Batch) -> Call:
    """Add the call that tells the program break; its value is dump_mm()'s ``brk``."""
    return batch.call(nr.NR_brk, 0, name="brk")


def dump_mm(pid: Pid, *, brk: int) -> MmState:
    """Describe the memory descriptor."""
    fields = read_stat(pid)
    return MmState(
        start_code=fields.start_code,
        end_code=fields.end_code,
        start_data=fields.start_data,
        end_data=fields.end_data,
        start_brk=fields.start_brk,
        brk=brk,
        start_stack=fields.start_stack,
        arg_start=fields.arg_start,
        arg_end=fields.arg_end,
        env_start=fields.env_start,
        env_end=fields.env_end,
        auxv=read_auxv(pid),
        exe=read_exe(pid),
    )


def open_exe(state: MmState) -> int:
    """Open the executable on the destination; the caller owns the descriptor.

    :raises RestoreError: it is not there, or cannot be executed.
    """
    try:
        fd = os.open(state.exe, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise RestoreError(f"Cannot open executable {state.exe}: {err.strerror}") from err
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) or not mode & 0o111:
        os.close(fd)
        raise RestoreError(f"Cannot use executable {state.exe}: mode is {mode:o}")
    return fd


def restore_mm(batch: Batch, state: MmState, *, agent_pidfd: int, exe_fd: int) -> None:
    """Add the calls that set the memory descriptor; ``exe_fd`` is the agent's descriptor."""
    auxv = batch.data(state.auxv)
    taken = batch.call(nr.NR_pidfd_getfd, agent_pidfd, exe_fd, 0, name="pidfd_getfd(exe)")
    # The structure needs the number before the call is made. Where the files stand already, the first one comes right
    # above all others.
    number = agent_pidfd + 2
    batch.call(nr.NR_dup3, taken, number, os.O_CLOEXEC, name="dup3(exe)")
    batch.call(nr.NR_close, taken, name="close(exe)")
    fields = prctl_mm_map(
        start_code=state.start_code,
        end_code=state.end_code,
        start_data=state.start_data,
        end_data=state.end_data,
        start_brk=state.start_brk,
        brk=state.brk,
        start_stack=state.start_stack,
        arg_start=state.arg_start,
        arg_end=state.arg_end,
        env_start=state.env_start,
        env_end=state.env_end,
        auxv_size=len(state.auxv),
        exe_fd=number,
    )
    image = batch.data(bytes(fields))
    image.patch_address(prctl_mm_map.auxv.offset, auxv)
    size = len(bytes(fields))
    batch.call(
        nr.NR_prctl, PR_SET_MM, PR_SET_MM_MAP, image, size, 0, name="prctl(PR_SET_MM_MAP)"
    )
    batch.call(nr.NR_close, number, name="close(exe)")

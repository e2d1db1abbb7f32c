"""Make a tracker: a userfaultfd inside the target, held in the agent, and the class that uses it.

A userfaultfd belongs to the address space of its creator, so the target itself must make it: one injected call. The
agent fetches the descriptor and the target's copy is closed at once: when the agent dies the last reference goes
and the kernel unregisters every range. Must never leave a descriptor in the target's table.

Asynchronous trackers take UFFD_USER_MODE_ONLY: it needs no privilege and no sysctl, and write protection is resolved in
system calls under it too. With synchronous ones a system call of the target that stores to a protected page would fail
with EFAULT: never use it there. A target that may not make an unrestricted one (no CAP_SYS_PTRACE, and
vm.unprivileged_userfaultfd is 0) gets it from /dev/userfaultfd, which the agent opens and hands over through a pair of
sockets.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, Final

from agent.errors import InjectError, SetupError, TooLateError, UsageError
from agent.kernel import uffd
from agent.kernel.pidfd import pidfd_getfd
from agent.kernel.syscalls import NR_close, NR_ioctl, NR_recvmsg, NR_socketpair, NR_userfaultfd
from agent.options import DEFAULT_LOG_CAPACITY
from agent.tracker.base import Tracker
from agent.tracker.log import BitmapTracker, LogTracker
from agent.tracker.scan import ScanTracker

if TYPE_CHECKING:
    from agent.target.inject import Injector
    from agent.target.traced import TracedThread

FEATURES: Final = {
    "scan": uffd.UFFD_FEATURES_SCAN,
    "log": uffd.UFFD_FEATURES_LOG,
    "bitmap": uffd.UFFD_FEATURES_LOG,
}
"""What each tracker that needs a userfaultfd asks of it; the others need none."""
CREATE_FLAGS: Final = {
    "scan": os.O_CLOEXEC | os.O_NONBLOCK | uffd.UFFD_USER_MODE_ONLY,
    "log": os.O_CLOEXEC | os.O_NONBLOCK,
    "bitmap": os.O_CLOEXEC | os.O_NONBLOCK,
}
"""How it is made."""
DEVICE: Final = "/dev/userfaultfd"
LATE_ATTEMPTS: Final = 3
"""How often the target may be asked for a userfaultfd when it does not wait for the agent, which gets no CPU time."""

_log = logging.getLogger(__name__)

# Modules that need no userfaultfd.
_OTHERS: Final = {
    "compare": ("agent.tracker.compare", "CompareTracker"),
    "soft-dirty": ("agent.tracker.softdirty", "SoftDirtyTracker"),
}
_SHORTAGE: Final = (errno.EPERM, errno.EACCES)
_MSGHDR: Final = struct.Struct("<QI4xQQQQi4x")
_CONTROL_BYTES: Final = 24  # CMSG_SPACE of one descriptor
_DESCRIPTOR_AT: Final = 16


def create_tracker(
    name: str,
    pid: int,
    pidfd: int,
    *,
    log_capacity: int = DEFAULT_LOG_CAPACITY,
    log_when_full: str = "spill",
) -> Tracker:
    """Make the tracker `name` for a process; one thread of it is stopped for a moment if that needs a userfaultfd.

    :raises SetupError: the process, the kernel or this agent's rights do not allow it.
    """
    if name in _OTHERS:
        module, kind = _OTHERS[name]
        made: Tracker = getattr(importlib.import_module(module), kind)(pid)
        return made
    uffd_fd = _create_in(pid, pidfd, name)
    if name == "scan":
        return ScanTracker(pid, uffd_fd)
    if name == "bitmap":
        return BitmapTracker(pid, uffd_fd)
    if name == "log":
        return LogTracker(pid, uffd_fd, capacity=log_capacity, when_full=log_when_full)
    raise UsageError(f"There is no tracker {name}")


def _create_in(pid: int, pidfd: int, name: str) -> int:
    from agent.target.inject import Injector
    from agent.target.tracer import Tracer

    attempt = 1
    while True:
        try:
            with Tracer(pid) as tracer:
                thread = tracer.stop_one()
                with Injector(tracer) as injector:
                    return create_uffd(injector, pidfd, thread, name)
        except TooLateError as err:
            if attempt == LATE_ATTEMPTS:
                raise
            _log.info("Arming once more: %s", err)
            attempt += 1


def adopt_uffd(pidfd: int, target_fd: int, features: int = uffd.UFFD_FEATURES_SCAN) -> int:
    """Fetch descriptor `target_fd` of the target and do the UFFDIO_API handshake; the caller owns the result.

    :raises SetupError: the kernel lacks a feature that tracking needs, or this agent a right.
    """
    fd = pidfd_getfd(pidfd, target_fd)
    try:
        uffd.api(fd, features)
    except OSError as err:
        os.close(fd)
        if err.errno == errno.EPERM:
            raise SetupError(
                "Cannot track memory: to be told of forks needs CAP_SYS_PTRACE in the initial user namespace",
                hint="use --tracker scan",
            ) from err
        what = "asynchronous userfaultfd write protection"
        if not features & uffd.UFFD_FEATURE_WP_ASYNC:
            what = "userfaultfd write protection of shared memory, with events"
        raise SetupError(
            f"Cannot track memory: the kernel has no {what}",
            hint="Linux 6.7 or later is needed, with CONFIG_PTE_MARKER_UFFD_WP",
        ) from err
    return fd


def create_uffd(
    injector: Injector, pidfd: int, thread: TracedThread, name: str = "scan"
) -> int:
    """Create a userfaultfd in the stopped target, ready for tracker `name`; the target keeps no copy.

    :raises SetupError: as adopt_uffd(), or the target may not have one.
    """
    from agent.target.inject import Batch

    flags = CREATE_FLAGS[name]
    batch = Batch()
    created = batch.call(NR_userfaultfd, flags, name="userfaultfd", check=False)
    batch.undo(NR_close, created)
    injector.run(batch, thread)
    if -created.result in _SHORTAGE and not flags & uffd.UFFD_USER_MODE_ONLY:
        target_fd = _create_from_device(injector, pidfd, thread, name)
    else:
        target_fd = created.value
    with contextlib.ExitStack() as on_failure:
        try:
            fd = adopt_uffd(pidfd, target_fd, FEATURES[name])
            on_failure.callback(os.close, fd)
        finally:
            _close_in(injector, thread, target_fd)
        on_failure.pop_all()
    return fd


def _create_from_device(
    injector: Injector, pidfd: int, thread: TracedThread, name: str
) -> int:
    # The target may not open the device, but it may use it: so it gets our descriptor, makes a userfaultfd of its own
    # address space with it, and closes everything else again.
    from agent.target.inject import Batch

    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as err:
        raise SetupError(
            f"Cannot track memory by {name}: the process may not use userfaultfd for faults in the kernel, and "
            f"{DEVICE} cannot be opened: {os.strerror(err.errno or errno.EIO)}",
            hint="use --tracker scan, which needs no privilege, or set the sysctl vm.unprivileged_userfaultfd to 1",
        ) from err
    try:
        pair = Batch()
        ends = pair.buffer(8)
        made = pair.call(NR_socketpair, socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0, ends)
        for offset in (0, 4):
            pair.undo(NR_close, ends.cell(offset))
        injector.run(pair, thread)
        assert made.value == 0
        theirs, ours = struct.unpack("<ii", ends.read())
        try:
            with socket.socket(fileno=pidfd_getfd(pidfd, ours)) as link:
                socket.send_fds(link, [b"u"], [device])
            return _receive_and_create(injector, thread, theirs, CREATE_FLAGS[name])
        except InjectError as err:
            raise SetupError(
                f"Cannot track memory by {name}: {DEVICE} does not work in the process: {err}",
                hint="use --tracker scan",
            ) from err
        finally:
            _close_in(injector, thread, theirs, ours)
    finally:
        os.close(device)


def _receive_and_create(
    injector: Injector, thread: TracedThread, receiver: int, flags: int
) -> int:
    from agent.target.inject import Batch

    batch = Batch()
    data, control = batch.buffer(8), batch.buffer(_CONTROL_BYTES)
    vector = batch.data(struct.pack("<QQ", 0, 1))
    vector.patch_address(0, data)
    header = batch.data(_MSGHDR.pack(0, 0, 0, 1, 0, _CONTROL_BYTES, 0))
    header.patch_address(16, vector)
    header.patch_address(32, control)
    batch.call(NR_recvmsg, receiver, header, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
    device = control.cell(_DESCRIPTOR_AT)
    created = batch.call(NR_ioctl, device, uffd.USERFAULTFD_IOC_NEW, flags, name="ioctl(USERFAULTFD_IOC_NEW)")
    batch.call(NR_close, device)
    batch.undo(NR_close, created)
    injector.run(batch, thread)
    return created.value


def _close_in(injector: Injector, thread: TracedThread, *target_fds: int) -> None:
    from agent.target.inject import Batch

    batch = Batch()
    for target_fd in target_fds:
        batch.call(NR_close, target_fd, name="close")
    injector.run(batch, thread)

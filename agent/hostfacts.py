"""What a host says about itself in the handshake.

Gathered once per migration, before anything is touched. Clock values are nanoseconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
import time

from agent.kernel.xstate import host_layout
from agent.procfs.maps import parse_maps, read_maps
from agent.types import Pid
from protocol.messages import HostFacts


def gather_host_facts() -> HostFacts:
    """Describe this host: kernel, processor, clocks and what the agent may do."""
    uname = os.uname()
    return HostFacts(
        hostname=socket.gethostname(),
        machine=uname.machine,
        kernel_release=uname.release,
        page_size=os.sysconf("SC_PAGESIZE"),
        boot_id=_read("/proc/sys/kernel/random/boot_id").strip(),
        vdso_sha256=vdso_sha256(),
        xstate_mask=host_layout().mask,
        xstate_size=host_layout().size,
        monotonic_ns=time.clock_gettime_ns(time.CLOCK_MONOTONIC),
        boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        cpu_flags=_cpu_flags(),
        uid=os.geteuid(),
        capabilities=_effective_capabilities(),
    )


def vdso_sha256() -> str:
    """Digest of this process's vdso, or '' where there is none."""
    for entry in parse_maps(read_maps(Pid(os.getpid()))):
        if entry.path == "[vdso]":
            return hashlib.sha256(
                ctypes.string_at(entry.start, entry.end - entry.start)
            ).hexdigest()
    return ""


def _cpu_flags() -> list[str]:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            return line.partition(":")[2].split()
    return []


def _effective_capabilities() -> int:
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _read(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read()

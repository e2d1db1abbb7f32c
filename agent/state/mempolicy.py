"""Memory policies of mappings (mbind(2)): from which NUMA nodes their pages are to come.

Asked for inside the frozen process, where only a policy of the mapping itself counts, one call for each mapping; so
only of a process that was seen to use any (numa_maps). Set on the destination after the last page: what is there by
then stays where it is, what comes later follows the policy. That of a shared object is carried where it is mapped.

Threads have policies of their own (set_mempolicy(2)): agent.state.sched. The home node of a policy
(set_mempolicy_home_node(2)) cannot be asked for and is lost. Sources: mbind(2), get_mempolicy(2).
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from agent.kernel.syscalls import NR_get_mempolicy, NR_mbind
from agent.procfs.maps import parse_maps, read_maps
from agent.procfs.numa import parse_nodes
from agent.types import Obstacle
from protocol.state.sched import MAX_NODES_BYTES
from protocol.state.vma import VmaState

if TYPE_CHECKING:
    from agent.target.inject import Batch

MPOL_F_ADDR = 2
NODES_BITS = MAX_NODES_BYTES * 8 + 1
"""The kernel leaves out the last bit of as many as it is told."""
NODE_DIRECTORY = "/sys/devices/system/node"


class Policy(NamedTuple):
    """A mode with its flags, and a little-endian bit mask of nodes."""

    mode: int
    nodes: bytes


NO_POLICY = Policy(0, b"")


def plan_policies(batch: Batch, pid: int) -> Callable[[], Mapping[int, Policy]]:
    """Add the calls that ask for the policy of every mapping; the result has those that have one, by start."""
    starts = [entry.start for entry in parse_maps(read_maps(pid)) if entry.path != "[vsyscall]"]
    size = 8 + MAX_NODES_BYTES
    out = batch.buffer(size * len(starts))
    calls = [
        batch.call(
            NR_get_mempolicy, out.at(size * i), out.at(size * i + 8), NODES_BITS, start, MPOL_F_ADDR,
            name="get_mempolicy",
        )  # fmt: skip
        for i, start in enumerate(starts)
    ]

    def collect() -> dict[int, Policy]:
        raw = out.read() if calls else b""
        found = {}
        for i, start in enumerate(starts):
            (mode,) = struct.unpack_from("=i", raw, size * i)
            if mode:
                nodes = raw[size * i + 8 : size * (i + 1)].rstrip(b"\0")
                found[start] = Policy(mode, nodes)
        return found

    return collect


def policy_call(batch: Batch, vma: VmaState) -> None:
    """Add the call that gives a mapping its policy, if it has one."""
    if not vma.policy:
        return
    nodes = batch.data(vma.policy_nodes.ljust(MAX_NODES_BYTES, b"\0")) if vma.policy_nodes else 0
    bits = NODES_BITS if vma.policy_nodes else 0
    batch.call(
        NR_mbind, vma.start, vma.end - vma.start, vma.policy, nodes, bits, 0,
        name=f"mbind({vma.start:#x}, policy {vma.policy:#x})",
    )  # fmt: skip


def has_several_nodes() -> bool:
    """Tell whether a policy would make a difference on this host."""
    return _nodes_with_memory().bit_count() > 1


def check_nodes(named: bytes | None) -> list[Obstacle]:
    """Say on the destination which nodes of policies it does not have; None: there are no policies."""
    missing = int.from_bytes(named or b"", "little") & ~_nodes_with_memory()
    if not missing:
        return []
    return [
        Obstacle(
            kind="memory policy",
            what=f"node {', '.join(str(n) for n in range(missing.bit_length()) if missing >> n & 1)}",
            detail="the process places memory on NUMA nodes that this host does not have",
            hint="start the program without (numactl, a NUMA option), or choose a host with as many nodes",
        )
    ]


@functools.cache
def _nodes_with_memory() -> int:
    try:
        with open(os.path.join(NODE_DIRECTORY, "has_memory"), encoding="ascii") as file:
            return parse_nodes(file.read())
    except FileNotFoundError:
        return 1

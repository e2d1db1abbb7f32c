"""/proc/PID/numa_maps: which memory policies hold for a process. Costs a walk over all page tables.

Each line shows the policy of its mapping, or that of the main thread where the mapping has none. Source:
Documentation/admin-guide/mm/numa_memory_policy.rst, numa(7).
"""

from __future__ import annotations

import re
from typing import Final

from agent.procfs.files import read_bytes

# "7f57ea608000 bind=static:0-1,3 anon=4", "... prefer (many):2", "... weighted interleave:0", "... local", "default"
_POLICY: Final = re.compile(
    rb"^[0-9a-f]+ (?!default)(?:prefer \(many\)|weighted interleave|\w+)(?:=[^ :]+)?(?::([\d,-]+))?",
    re.MULTILINE,
)


def parse_nodes(text: str) -> int:
    """Return the bit mask of a list such as "0-3,8"."""
    mask = 0
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            mask |= (1 << int(last or first) + 1) - (1 << int(first))
    return mask


def parse_numa_maps(data: bytes) -> int | None:
    """Return the mask of all nodes that policies name; None when all is left to the kernel."""
    named = set(_POLICY.findall(data))
    mask = 0
    for nodes in named:
        mask |= parse_nodes(nodes.decode())
    return mask if named else None


def read_policy_nodes(pid: int) -> int | None:
    """Return what parse_numa_maps() does of a process; None, too, with a kernel without NUMA.

    :raises ProcessLookupError: the process is gone.
    """
    try:
        return parse_numa_maps(read_bytes(f"/proc/{pid}/numa_maps"))
    except FileNotFoundError:
        return None

"""The credentials of one thread: ids, groups, capabilities, securebits, no_new_privs.

Part of a thread's section: credentials belong to a thread, even if nearly every program keeps them
equal. Capability sets are bit masks (capabilities(7)). Ids are those that the source agent's user
namespace shows.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_GROUPS = 65536
"""NGROUPS_MAX (include/uapi/linux/limits.h)."""
MAX_ID = 0xFFFFFFFF
MAX_SECUREBITS = 0xFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class CredState:
    """The credentials of one thread; ``uids`` and ``gids`` are real, effective, saved, file
    system.
    """

    uids: tuple[int, ...]
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    cap_inheritable: int
    cap_permitted: int
    cap_effective: int
    cap_bounding: int
    cap_ambient: int
    securebits: int
    no_new_privs: bool

    def __post_init__(self) -> None:
        for name, ids in (("uids", self.uids), ("gids", self.gids)):
            if len(ids) != 4:
                raise ValueError(f"{name} has {len(ids)} elements, not 4")
        if len(self.groups) > MAX_GROUPS:
            raise ValueError(f"{len(self.groups)} supplementary groups")
        for value in (*self.uids, *self.gids, *self.groups):
            if not 0 <= value <= MAX_ID:
                raise ValueError(f"id {value} is outside 32 bits")
        for name in ("inheritable", "permitted", "effective", "bounding", "ambient"):
            value = getattr(self, f"cap_{name}")
            if not 0 <= value < 1 << 64:
                raise ValueError(f"{name} capabilities {value:#x} are outside 64 bits")
        if self.cap_effective & ~self.cap_permitted:
            raise ValueError("effective capabilities are not a part of the permitted ones")
        if self.cap_ambient & ~(self.cap_permitted & self.cap_inheritable):
            raise ValueError("ambient capabilities are not permitted and inheritable")
        if not 0 <= self.securebits <= MAX_SECUREBITS:
            raise ValueError(f"securebits {self.securebits:#x} are unknown")

"""Credentials of one thread.

Dumped from /proc/PID/task/TID/status, which costs less than asking for each capability, plus the
securebits, which only the thread itself can read. Restored by calls inside the thread, in the one
order that works:

1. securebits to NO_SETUID_FIXUP, so that changing ids leaves the capabilities alone;
2. groups, gids, uids (fsuid and fsgid after the ids that would overwrite them);
3. capset with the inheritable set but all permitted ones: afterwards the bounding set would forbid
   some;
4. ambient capabilities: they need 3, and securebits can forbid them;
5. the bounding set, then the final securebits: both need CAP_SETPCAP;
6. the final capset; no_new_privs.

The parent death signal and the dumpable flag are reset by the kernel in step 2 and 6, they come
later (thread.py, process.py). Must never give a thread more than the state says: where the agent
lacks a capability that is an obstacle, except for the bounding set, which may only shrink.
Sources: capabilities(7), credentials(7).
"""

from __future__ import annotations

import functools
import os
import struct
from typing import TYPE_CHECKING, Final

from agent.kernel.prctl import (
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_CAP_AMBIENT_RAISE,
    PR_CAPBSET_DROP,
    PR_GET_SECUREBITS,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_SECUREBITS,
    SECBIT_NO_SETUID_FIXUP,
    prctl,
)
from agent.kernel.syscalls import (
    NR_capset,
    NR_prctl,
    NR_setfsgid,
    NR_setfsuid,
    NR_setgroups,
    NR_setresgid,
    NR_setresuid,
)
from agent.procfs.status import Status, read_status
from agent.types import Obstacle
from protocol.state.creds import CredState

if TYPE_CHECKING:
    from agent.target.inject import Batch, Call

CAP_SETPCAP: Final = 8
_LINUX_CAPABILITY_VERSION_3: Final = 0x20080522


def own_status() -> Status:
    """Return the agent's own status: what a process it creates starts with."""
    return read_status(os.getpid())


def own_securebits() -> int:
    """Return the agent's own securebits."""
    return prctl(PR_GET_SECUREBITS)


def own_capabilities() -> int:
    """Return the agent's effective capabilities."""
    return own_status().cap_eff


@functools.cache
def last_capability() -> int:
    """Return the highest capability this kernel knows."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        return int(file.read())


def creds_of(status: Status, securebits: int) -> CredState:
    """Return the credentials that ``status`` shows."""
    return CredState(
        uids=status.uids,
        gids=status.gids,
        groups=status.groups,
        cap_inheritable=status.cap_inh,
        cap_permitted=status.cap_prm,
        cap_effective=status.cap_eff,
        cap_bounding=status.cap_bnd,
        cap_ambient=status.cap_amb,
        securebits=securebits,
        no_new_privs=status.no_new_privs,
    )


def parse_creds(text: bytes, securebits: int) -> CredState:
    """Return the credentials in the text of a status file.

    Much quicker than parsing all of it, more so for the second thread with the same ones.

    :raises ValueError: that is not such a text.
    """
    ids_at, caps_at = text.find(b"\nUid:"), text.find(b"\nCapInh:")
    # Not more than that, or no two threads would have the same text.
    ids_end, caps_end = text.find(b"\nNStgid:", ids_at), text.find(b"\nSeccomp:", caps_at)
    return _parse_creds(text[ids_at:ids_end], text[caps_at:caps_end], securebits)


@functools.lru_cache(maxsize=64)
def _parse_creds(ids: bytes, caps: bytes, securebits: int) -> CredState:
    fields = dict(line.split(b":", 1) for line in (ids + caps).split(b"\n") if line)
    try:
        return CredState(
            uids=tuple(map(int, fields[b"Uid"].split())),
            gids=tuple(map(int, fields[b"Gid"].split())),
            groups=tuple(map(int, fields[b"Groups"].split())),
            cap_inheritable=int(fields[b"CapInh"], 16),
            cap_permitted=int(fields[b"CapPrm"], 16),
            cap_effective=int(fields[b"CapEff"], 16),
            cap_bounding=int(fields[b"CapBnd"], 16),
            cap_ambient=int(fields[b"CapAmb"], 16),
            securebits=securebits,
            no_new_privs=int(fields[b"NoNewPrivs"]) != 0,
        )
    except KeyError as err:
        raise ValueError(f"Not a status file: field {err} is missing") from err


def securebits_call(batch: Batch) -> Call:
    """Add the call that tells of the thread that runs ``batch`` what parse_creds() does not find in its status."""
    return batch.call(NR_prctl, PR_GET_SECUREBITS, name="prctl(PR_GET_SECUREBITS)")


def _capset(batch: Batch, effective: int, permitted: int, inheritable: int) -> None:
    low = 0xFFFFFFFF
    header = batch.data(struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0))
    sets = (effective, permitted, inheritable)
    words = [value & low for value in sets] + [value >> 32 for value in sets]
    batch.call(NR_capset, header, batch.data(struct.pack("=6I", *words)), name="capset")


def restore_creds_calls(batch: Batch, state: CredState, now: CredState) -> None:
    """Add the calls that turn the credentials ``now`` of the thread that runs ``batch`` into
    ``state``.

    Only what differs is touched, so that an agent without privileges can restore a process like
    itself.
    """
    if state.no_new_privs == now.no_new_privs and _same(state, now):
        return
    ids_differ = (state.uids, state.gids, state.groups) != (now.uids, now.gids, now.groups)
    bounding = state.cap_bounding & now.cap_bounding
    if now.cap_effective >> CAP_SETPCAP & 1:
        _set_securebits(batch, SECBIT_NO_SETUID_FIXUP)
    if ids_differ:
        _ids_calls(batch, state, now)
    _capset(batch, now.cap_permitted, now.cap_permitted, state.cap_inheritable)
    if now.cap_ambient:
        batch.call(NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, name="prctl(PR_CAP_AMBIENT)")
    for capability in range(last_capability() + 1):
        if state.cap_ambient >> capability & 1:
            batch.call(
                NR_prctl,
                PR_CAP_AMBIENT,
                PR_CAP_AMBIENT_RAISE,
                capability,
                name="prctl(PR_CAP_AMBIENT_RAISE)",
            )
    for capability in range(last_capability() + 1):
        if (now.cap_bounding & ~bounding) >> capability & 1:
            batch.call(NR_prctl, PR_CAPBSET_DROP, capability, name="prctl(PR_CAPBSET_DROP)")
    if now.cap_effective >> CAP_SETPCAP & 1:
        _set_securebits(batch, state.securebits)
    _capset(batch, state.cap_effective, state.cap_permitted, state.cap_inheritable)
    if state.no_new_privs and not now.no_new_privs:
        batch.call(NR_prctl, PR_SET_NO_NEW_PRIVS, 1, name="prctl(PR_SET_NO_NEW_PRIVS)")


def _same(state: CredState, now: CredState) -> bool:
    return (
        (state.uids, state.gids, state.groups) == (now.uids, now.gids, now.groups)
        and state.cap_inheritable == now.cap_inheritable
        and state.cap_permitted == now.cap_permitted
        and state.cap_effective == now.cap_effective
        and state.cap_ambient == now.cap_ambient
        and not now.cap_bounding & ~state.cap_bounding
        and state.securebits == now.securebits
    )


def _set_securebits(batch: Batch, bits: int) -> None:
    batch.call(NR_prctl, PR_SET_SECUREBITS, bits, name="prctl(PR_SET_SECUREBITS)")


def _ids_calls(batch: Batch, state: CredState, now: CredState) -> None:
    if state.groups != now.groups:
        groups = batch.data(struct.pack(f"={len(state.groups)}I", *state.groups) or bytes(4))
        batch.call(NR_setgroups, len(state.groups), groups, name="setgroups")
    batch.call(NR_setresgid, *state.gids[:3], name="setresgid")
    batch.call(NR_setfsgid, state.gids[3], name="setfsgid")
    batch.call(NR_setresuid, *state.uids[:3], name="setresuid")
    batch.call(NR_setfsuid, state.uids[3], name="setfsuid")


def _names(bits: int) -> str:
    return " ".join(str(n) for n in range(bits.bit_length()) if bits >> n & 1)


def check_creds_restore(tid: int, state: CredState, here: Status | None = None) -> list[Obstacle]:
    """Say why this agent could not give a thread the credentials in ``state``; nothing is touched.
    """
    here = here or own_status()
    found: list[Obstacle] = []
    now = creds_of(here, state.securebits)
    if _same(state, now) and state.no_new_privs >= now.no_new_privs:
        return found
    what = f"thread {tid}"
    wanted = state.cap_permitted | state.cap_inheritable | state.cap_ambient
    if missing := wanted & ~here.cap_prm:
        found.append(
            Obstacle(
                kind="capabilities",
                what=what,
                detail=f"agent-recv lacks capabilities that the process has: {_names(missing)}",
                hint="run agent-recv with at least the capabilities of the process",
            )
        )
    changes_ids = (state.uids, state.gids, state.groups) != (now.uids, now.gids, now.groups)
    if changes_ids and not here.cap_eff >> CAP_SETPCAP & 1:
        found.append(
            Obstacle(
                kind="credentials",
                what=what,
                detail=f"the process runs as uid {state.uids[1]}, gid {state.gids[1]}",
                hint="run agent-recv as that user, or as root",
            )
        )
    if here.no_new_privs and not state.no_new_privs:
        found.append(
            Obstacle(
                kind="no_new_privs",
                what=what,
                detail="agent-recv runs with no_new_privs, which cannot be taken back",
                hint="start agent-recv outside that sandbox",
            )
        )
    return found

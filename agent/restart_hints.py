"""Hints for a later agent: which call a thread in restart_syscall has made, and when it ends.

A thread that Ferry stopped in nanosleep, poll or a futex wait with a time limit goes on in restart_syscall: what it was
and how long it had to go is known to the kernel alone (agent.target.restart). Whoever stops it next, as in a move there
and back or after a migration that failed, learns it from here, where the agent that let the process go has noted it.

One JSON file per process, next to the session records and under the same rules. A hint is no more than that: writing it
takes place outside the freeze, and a failure costs the exact end of the call, not the call. It is believed only for the
very sleep that it was written for: same process, same registers, and not a context switch since. Pids, tids and times
are as the agent sees them; an agent with another view of pids or time does not read them.

Sources: restart_syscall(2), kernel/signal.c.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from typing import Any

from agent.errors import MigrationError
from agent.session_store import boot_id, check_directory, default_state_dir, start_ticks
from agent.target.restart import KnownCall, learn_calls, sleep_number, take_calls

_log = logging.getLogger(__name__)

MAX_HINTS_BYTES = 16 << 20
FALL_ASLEEP_S = 0.1
"""How long threads that were let go may take to be asleep again."""
_SUFFIX = ".restart.json"
_NAME_RE = re.compile(r"(\d+)\.(\d+)\.restart\.json\Z")
_NAMESPACES = ("pid", "time")


def save(directory: str, pid: int) -> None:
    """Note what the threads of ``pid``, which was let go, have been interrupted in; never fails."""
    calls = take_calls(pid)
    directory = directory or default_state_dir()
    path = _path(directory, pid)
    hints = _asleep(pid, calls) if path else {}
    try:
        if hints:
            os.makedirs(directory, mode=0o700, exist_ok=True)
        check_directory(directory)
        _prune(directory)
        if path and hints:
            _write(path, {"view": _view(), "threads": hints})
        # Otherwise what was noted before may still be true, and if not it will not be believed.
    except FileNotFoundError:
        pass  # nothing was ever noted
    except (OSError, MigrationError) as err:
        _log.debug("Cannot note the interrupted calls of process %d: %s", pid, err)


def load(directory: str, pid: int) -> None:
    """Tell agent.target.restart what is noted about the threads of ``pid``; never fails."""
    directory = directory or default_state_dir()
    path = _path(directory, pid)
    if path is None:
        return
    try:
        check_directory(directory)
        with open(path, encoding="ascii") as file:
            record = json.loads(file.read(MAX_HINTS_BYTES))
        if record["view"] != _view():
            return
        calls = {int(tid): _parse(hint) for tid, hint in record["threads"].items()}
    except FileNotFoundError:
        return
    except (OSError, MigrationError, ValueError, TypeError, LookupError, AttributeError) as err:
        _log.debug("Cannot use %r: %s", path, err)
        return
    learn_calls(
        pid,
        {tid: call for tid, (call, sleep) in calls.items() if sleep_number(pid, tid, call) == sleep},
    )


def _asleep(pid: int, calls: dict[int, KnownCall]) -> dict[int, dict[str, Any]]:
    """Return the hints about the threads that are, or soon will be, asleep again in their calls."""
    hints = {}
    deadline = time.monotonic() + FALL_ASLEEP_S
    while True:
        for tid, call in list(calls.items()):
            sleep = sleep_number(pid, tid, call)
            if sleep is not None:
                hints[tid] = {**call._asdict(), "sleep": sleep}
                del calls[tid]
        if not calls or time.monotonic() > deadline:
            break
        time.sleep(0.005)
    return hints


def _parse(hint: dict[str, Any]) -> tuple[KnownCall, int]:
    numbers = [hint["nr"], hint["rip"], hint["rsp"], hint["sleep"], *hint["args"]]
    deadline_ns = hint["deadline_ns"]
    if not all(isinstance(number, int) for number in (*numbers, deadline_ns or 0)):
        raise ValueError("not all are numbers")
    call = KnownCall(hint["nr"], tuple(hint["args"]), hint["rip"], hint["rsp"], deadline_ns)
    return call, hint["sleep"]


def _view() -> list[str]:
    """What pids, ticks and times in a file mean."""
    return [boot_id(), *(os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES)]


def _path(directory: str, pid: int) -> str | None:
    ticks = start_ticks(pid)
    return None if ticks is None else os.path.join(directory, f"{pid}.{ticks}{_SUFFIX}")


def _write(path: str, record: dict[str, Any]) -> None:
    aside = f"{path}.{os.getpid()}.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(aside)
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with open(fd, "w", encoding="ascii") as file:
            json.dump(record, file)
        os.rename(aside, path)
    except OSError:
        os.unlink(aside)
        raise


def _prune(directory: str) -> None:
    """Remove the files of processes that are gone."""
    for name in os.listdir(directory):
        match = _NAME_RE.match(name)
        if match is None or start_ticks(int(match[1])) == int(match[2]):
            continue
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            with open(path, encoding="ascii") as file:
                view = json.loads(file.read(MAX_HINTS_BYTES))["view"]
            # Of a process that this agent cannot see, only another boot tells that it is gone.
            if view == _view() or view[0] != boot_id():
                os.unlink(path)

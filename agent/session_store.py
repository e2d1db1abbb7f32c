"""Durable records of how sessions ended, one small JSON file each.

The destination prepares a session before the source is frozen: a record of the process that is to be
committed is written and synced. To decide is then one rename(2), which needs no room on the disk; the new
name says what was decided. Only one can succeed, so the first decision stands, whoever makes it, which is
what makes the answer to ``--resolve`` final: to ask about a prepared session that has no decision *makes*
it aborted, and a COMMIT that arrives later finds that out. A session that was never prepared here is
unknown, which is no answer: it may have been committed by an agent with another directory.

The source records a session before it freezes the target, and forgets it once it is settled.

The default directory is on a tmpfs: a record outlives the agent and, like the processes it speaks
of, not a reboot. Session names come from the peer and become file names: nothing but 32 hex digits
passes. Files are complete or absent (written aside, synced, then renamed).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, TypeVar

from agent.errors import SetupError, UsageError

_log = logging.getLogger(__name__)

COMMITTED = "committed"
ABORTED = "aborted"
MAX_RECORD_BYTES = 64 << 10
"""A record is a few hundred bytes; anything larger is not one of ours."""

_SESSION_RE = re.compile(r"[0-9a-f]{32}\Z")
KEEP_DECISIONS_S = 30 * 86400
"""How long a decision can be asked for. A source that asks later is told that it is unknown, and
keeps its frozen original."""
_DECISION_SUFFIXES = {COMMITTED: ".committed.json", ABORTED: ".aborted.json"}
_PREPARED_SUFFIX = ".prepared.json"
_ASIDE_SUFFIX = ".tmp"
_KEEP_ASIDE_S = 3600
"""A file that was written aside and is older belongs to an agent that was killed meanwhile."""
_UNDECIDED_SUFFIX = ".undecided.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRecord:
    """The copy that the destination has built, or builds, for a session.

    ``start_ticks`` and ``boot_id`` as in UndecidedRecord.
    """

    session: str
    pid: int
    start_ticks: int
    boot_id: str
    recorded_at: float = 0.0

    def __post_init__(self) -> None:
        check_session(self.session)

    def still_exists(self) -> bool:
        """Whether the very process of the record is still there."""
        return _is_there(self.pid, self.start_ticks, self.boot_id)


class DecidedRecord(NamedTuple):
    """What was decided, COMMITTED or ABORTED, about which copy."""

    decision: str
    copy: PreparedRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class UndecidedRecord:
    """A frozen original whose COMMIT went unanswered.

    ``start_ticks`` (proc_pid_stat(5), starttime) and ``boot_id`` tell the process from a later one
    with the same pid; ``facts`` is for whatever else the source needs to let it go or end it.
    """

    session: str
    pid: int
    address: str
    start_ticks: int
    boot_id: str
    facts: dict[str, Any]
    recorded_at: float = 0.0

    def __post_init__(self) -> None:
        check_session(self.session)

    def still_exists(self) -> bool:
        """Whether the very process of the record is still there."""
        return _is_there(self.pid, self.start_ticks, self.boot_id)


def _is_there(pid: int, ticks: int, boot: str) -> bool:
    return pid > 0 and boot == boot_id() and ticks == start_ticks(pid)


_Record = TypeVar("_Record", PreparedRecord, UndecidedRecord)


def default_state_dir() -> str:
    """``/run/ferry`` for root, below the user's own run directory for others."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if os.geteuid() and runtime:
        return os.path.join(runtime, "ferry")
    return "/run/ferry" if not os.geteuid() else f"/tmp/ferry-{os.geteuid()}"


def check_directory(directory: str) -> None:
    """Insist on a directory in which nobody else may have had a hand: a record decides whether a process lives.

    :raises UsageError: others may write to it. :raises OSError: it cannot be looked at.
    """
    status = os.stat(directory)
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise UsageError(
            f"Cannot use state directory {directory!r}: others may write to it",
            hint="Name a private one with --state-dir.",
        )


def check_session(session: str) -> str:
    """Return ``session`` if it is the name of one.

    :raises ValueError: it is not 32 lower-case hex digits.
    """
    if not _SESSION_RE.match(session):
        raise ValueError(f"Not a session (32 hex digits): {session!r}")
    return session


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            text = stream.read()
    except OSError:
        return None
    # comm may hold spaces and parentheses; starttime is field 22, the 20th after it.
    return int(text[text.rindex(b")") + 2 :].split()[19])


def boot_id() -> str:
    """This boot of the kernel; empty where it cannot be read."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
            return stream.read().strip()
    except OSError:
        return ""


class SessionStore:
    """The records below one directory, which is made on the first write (mode 0700)."""

    def __init__(self, directory: str = "") -> None:
        self.directory = directory or default_state_dir()

    # -- destination -------------------------------------------------------------------------------

    def prepare(self, session: str, pid: int) -> None:
        """Make ready to commit the session, whose process is being built under ``pid``.

        :raises SetupError: it could not be recorded; the session cannot be committed then.
        """
        self._prune()
        record = PreparedRecord(
            session=session,
            pid=pid,
            start_ticks=start_ticks(pid) or 0,
            boot_id=boot_id(),
            recorded_at=time.time(),
        )
        self._rename(self._write_aside(session, asdict(record)), session, _PREPARED_SUFFIX)

    def commit(self, session: str) -> str:
        """Commit a prepared session, unless it was decided, and return the decision that stands.

        :raises SetupError: as for decide().
        """
        return self.decide(session, COMMITTED)

    def abort(self, session: str) -> str:
        """Record that a prepared session came to nothing, unless it was decided, and return what stands.

        :raises SetupError: as for decide().
        """
        return self.decide(session, ABORTED)

    def decide(self, session: str, decision: str) -> str:
        """Decide a prepared session, unless it was decided, and return the decision that stands.

        :raises SetupError: it could not be recorded, or what stands cannot be read: whoever has tried to commit
            does not know whether the session is committed.
        """
        try:
            # The prepared record goes with it: only one can have it.
            os.rename(
                self._path(session, _PREPARED_SUFFIX),
                self._path(session, _DECISION_SUFFIXES[decision]),
            )
        except FileNotFoundError:
            standing = self.lookup(session)
            if standing is None:
                raise SetupError(f"Session {session} was not prepared here") from None
            decision = standing.decision
        except OSError as err:
            raise SetupError(f"Cannot record session {session}: {err.strerror}") from err
        self._sync_directory()
        return decision

    def lookup(self, session: str) -> DecidedRecord | None:
        """The decision of a session; None if there is none."""
        for decision, suffix in _DECISION_SUFFIXES.items():
            record = self._read(session, suffix, PreparedRecord)
            if record is not None:
                return DecidedRecord(decision, record)
        return None

    def lookup_prepared(self, session: str) -> PreparedRecord | None:
        """What would be committed; None if the session is not prepared, or decided."""
        return self._read(session, _PREPARED_SUFFIX, PreparedRecord)

    # -- source ------------------------------------------------------------------------------------

    def record_undecided(
        self, session: str, pid: int, address: str, **facts: Any
    ) -> UndecidedRecord:
        """Record, before COMMIT is sent, that the original is frozen and why.

        :raises SetupError: it could not be recorded; COMMIT may not be sent then.
        """
        self._prune()
        record = UndecidedRecord(
            session=session,
            pid=pid,
            address=address,
            start_ticks=start_ticks(pid) or 0,
            boot_id=boot_id(),
            facts=facts,
            recorded_at=time.time(),
        )
        self._rename(self._write_aside(session, asdict(record)), session, _UNDECIDED_SUFFIX)
        return record

    def lookup_undecided(self, session: str) -> UndecidedRecord | None:
        """The undecided session of that name; None if there is none."""
        return self._read(session, _UNDECIDED_SUFFIX, UndecidedRecord)

    def list_undecided(self) -> list[UndecidedRecord]:
        """All undecided sessions, oldest first."""
        try:
            names = os.listdir(self.directory)
        except OSError:
            return []
        found = [
            self.lookup_undecided(name.removesuffix(_UNDECIDED_SUFFIX))
            for name in names
            if name.endswith(_UNDECIDED_SUFFIX)
            and _SESSION_RE.match(name.removesuffix(_UNDECIDED_SUFFIX))
        ]
        return sorted((record for record in found if record), key=lambda record: record.recorded_at)

    def forget_undecided(self, session: str) -> None:
        """The session was resolved; no error if it is not recorded, or cannot be removed."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(session, _UNDECIDED_SUFFIX))

    # -- files -------------------------------------------------------------------------------------

    def _path(self, session: str, suffix: str) -> str:
        return os.path.join(self.directory, check_session(session) + suffix)

    def _rename(self, temporary: str, session: str, suffix: str) -> None:
        try:
            os.rename(temporary, self._path(session, suffix))
        except OSError as err:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise SetupError(f"Cannot record session {session}: {err.strerror}") from err
        self._sync_directory()

    def _prune(self) -> None:
        """Remove decisions that nobody will ask for any more, and what killed agents left."""
        now = time.time()
        decided = (*_DECISION_SUFFIXES.values(), _PREPARED_SUFFIX)
        with contextlib.suppress(OSError), os.scandir(self.directory) as entries:
            for entry in entries:
                age_s = now - entry.stat(follow_symlinks=False).st_mtime
                aside = entry.name.startswith(".") and entry.name.endswith(_ASIDE_SUFFIX)
                if (aside and age_s > _KEEP_ASIDE_S) or (
                    entry.name.endswith(decided) and age_s > KEEP_DECISIONS_S
                ):
                    os.unlink(entry.path)

    def _write_aside(self, session: str, record: dict[str, Any]) -> str:
        check_session(session)
        path = os.path.join(self.directory, f".{session}.{os.getpid()}{_ASIDE_SUFFIX}")
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            check_directory(self.directory)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            try:
                with open(fd, "w", encoding="utf-8", errors="surrogateescape") as stream:
                    json.dump(record, stream)
                    stream.flush()
                    os.fsync(fd)
            except OSError:
                os.unlink(path)
                raise
        except OSError as err:
            raise SetupError(
                f"Cannot record session {session} in {self.directory!r}: {err.strerror}",
                hint="Name a writable directory with --state-dir.",
            ) from err
        return path

    def _read(self, session: str, suffix: str, kind: type[_Record]) -> _Record | None:
        path = self._path(session, suffix)
        try:
            check_directory(self.directory)
            with open(path, encoding="utf-8", errors="surrogateescape") as stream:
                values = json.loads(stream.read(MAX_RECORD_BYTES))
            names = {item.name for item in fields(kind)}
            return kind(**{name: value for name, value in values.items() if name in names})
        except FileNotFoundError:
            return None
        except OSError as err:
            raise SetupError(f"Cannot read {path!r}: {err.strerror}") from err
        except (ValueError, TypeError, AttributeError) as err:
            raise SetupError(f"Cannot read {path!r}: it is not a session record") from err

    def _sync_directory(self) -> None:
        try:
            fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as err:
            _log.debug("Cannot sync %s: %s", self.directory, err.strerror)

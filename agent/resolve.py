"""``agent-send --resolve``: learn how an undecided session ended, and act on it.

The frozen original is ended when the destination has committed, and let go when it has aborted. Asking makes
the decision final: a destination that had not decided yet aborts for good. One that has never heard of the
session cannot say how it ended: it may have another --state-dir, or have been started anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal

from agent import net
from agent.errors import SetupError, TargetGone, UndecidedError
from agent.link import Link
from agent.net import parse_address
from agent.options import SendOptions
from agent.report import Reporter
from agent.session_store import SessionStore, UndecidedRecord
from agent.target.hold import release_hold
from protocol.messages import Decision, Resolution, Resolve
from protocol.session import Role

_log = logging.getLogger(__name__)


def resolve(options: SendOptions, reporter: Reporter) -> int:
    """Resolve ``options.resolve``; return the exit status.

    :raises SetupError: the session is not recorded here, or the destination cannot be asked.
    :raises UndecidedError: the destination does not know; the original stays as it is.
    """
    store = SessionStore(options.state_dir)
    record = store.lookup_undecided(options.resolve)
    if record is None:
        raise SetupError(
            f"Session {options.resolve} is not undecided on this host",
            hint="Was it recorded with another --state-dir, or resolved already?",
        )
    decision = _ask(options, record)
    if decision is Decision.UNKNOWN:
        raise UndecidedError(
            f"{options.address or record.address} does not know session {record.session}; process "
            f"{record.pid} stays frozen",
            hint="is this agent-recv on the right host, with the --state-dir of the one that took the process? "
            "Otherwise kill the original, or let it go with SIGCONT, once it is clear whether a copy runs",
        )
    _act(record, committed=decision is Decision.COMMITTED)
    store.forget_undecided(record.session)
    reporter.event(
        "resolved", session=record.session, pid=record.pid, decision=decision.value
    )
    _log.info("Session %s was %s", record.session, decision.value)
    return 0


def _ask(options: SendOptions, record: UndecidedRecord) -> Decision:
    address = options.address or parse_address(record.address)
    with net.connect(
        address,
        timeout_s=options.connect_timeout_s,
        remote_command=options.remote_command,
        tls=options.tls,
    ) as channel:
        channel.phase = "resolve"
        channel.timeout_s = options.io_timeout_s
        link = Link(channel, Role.SOURCE)
        link.send(Resolve(session=record.session))
        return link.expect(Resolution).decision


def _act(record: UndecidedRecord, *, committed: bool) -> None:
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        pidfd = -1
    # Only after the pidfd is held does the comparison of start times hold for what gets the signal.
    if pidfd < 0 or not record.still_exists():
        _log.warning("Process %d of session %s is gone", record.pid, record.session)
    elif committed:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    elif not record.facts.get("was_stopped"):
        with contextlib.suppress(TargetGone):
            release_hold(record.pid)
    if pidfd >= 0:
        os.close(pidfd)

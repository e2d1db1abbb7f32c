"""The session: which message may come when, for either side and both directions.

One table holds all of it. It is role-blind: source and destination walk through the same states,
one by sending what the other receives. A second table says which side each message belongs to.
Session applies both, and checks what only a memory of the session can: versions, round numbers,
totals of pages and sections.

The states around the point of no return, where it matters who knows what:

    RESTORED    the copy is complete but for what its threads stand at, Commit not yet seen here. If
                the link dies, or that fails: FAILED. The destination records "aborted" and drops its
                copy, the source goes on.
    COMMITTED   Commit sent (source) or received (destination). From here no event leads the
                source back to running by itself: if the link dies, or talks nonsense, UNDECIDED.
                Only one thing does: an Abort of the destination. It gave up before Commit reached
                it, and will refuse that, or it failed afterwards: then it may send Abort only
                once its copy is ended and its durable record says "aborted". One that cannot
                tell what its record says keeps silent.
    UNDECIDED   source: both copies frozen until Resolve tells; destination: it has committed and
                runs, only the source does not know yet.

A recorded session is one half of a file: the source's messages without answers. Both the writer
and the reader take Accept, Prepared, RoundPlaced, Restored and Resumed as given the moment they
are due.

This module must never touch bytes of pages, sockets or clocks. It is the only place where a
session's state changes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from protocol.limits import MAX_SECTIONS
from protocol.messages import (
    Abort,
    Accept,
    Commit,
    Hello,
    Message,
    Prepare,
    Prepared,
    Resolution,
    Resolve,
    Restored,
    Resumed,
    RoundBegin,
    RoundEnd,
    RoundPlaced,
    StateEnd,
    StateSection,
    Switchover,
    encode_message,
)
from protocol.pages import PageBatch, PageEncoding


class Role(enum.Enum):
    """Which end of the session this is."""

    SOURCE = "source"
    DESTINATION = "destination"


class SessionState(enum.Enum):
    """Where a session is; both ends agree but for what is on its way."""

    IDLE = "idle"
    NEGOTIATING = "negotiating"
    SETUP = "setup"
    PREPARING = "preparing"
    ACTIVE = "active"
    ROUND = "round"
    PLACING = "placing"
    SWITCHOVER = "switchover"
    FINAL_ROUND = "final round"
    RESTORING = "restoring"
    RESTORED = "restored"
    COMMITTED = "committed"
    COMPLETED = "completed"
    FAILED = "failed"
    UNDECIDED = "undecided"
    RESOLVING = "resolving"
    RESOLVED = "resolved"


class SessionInput(enum.Enum):
    """What can happen to a session: a message or batch in either direction, or the link's end."""

    HELLO = "Hello"
    ACCEPT = "Accept"
    SECTION = "StateSection"
    PREPARE = "Prepare"
    PREPARED = "Prepared"
    REFUSED = "Prepared with obstacles"
    ROUND_BEGIN = "RoundBegin"
    PAGES = "page batch"
    ROUND_END = "RoundEnd"
    ROUND_PLACED = "RoundPlaced"
    SWITCHOVER = "Switchover"
    STATE_END = "StateEnd"
    RESTORED = "Restored"
    COMMIT = "Commit"
    RESUMED = "Resumed"
    ABORT = "Abort"
    LATE_ABORT = "Abort after Commit"
    RESOLVE = "Resolve"
    RESOLUTION = "Resolution"
    LOST = "loss of the peer"


_S = SessionState
_I = SessionInput

TERMINAL = frozenset({_S.COMPLETED, _S.FAILED, _S.UNDECIDED, _S.RESOLVED})
"""States a session does not leave."""

TRANSITIONS: dict[tuple[SessionState, SessionInput], SessionState] = {
    (_S.IDLE, _I.HELLO): _S.NEGOTIATING,
    (_S.NEGOTIATING, _I.ACCEPT): _S.SETUP,
    # The first sections, while the target still runs.
    (_S.SETUP, _I.SECTION): _S.SETUP,
    (_S.SETUP, _I.PREPARE): _S.PREPARING,
    (_S.PREPARING, _I.PREPARED): _S.ACTIVE,
    (_S.PREPARING, _I.REFUSED): _S.FAILED,
    # Rounds. Sections tell what changed since the first ones: mappings, shared objects.
    (_S.ACTIVE, _I.SECTION): _S.ACTIVE,
    (_S.ACTIVE, _I.ROUND_BEGIN): _S.ROUND,
    (_S.ROUND, _I.SECTION): _S.ROUND,
    (_S.ROUND, _I.PAGES): _S.ROUND,
    (_S.ROUND, _I.ROUND_END): _S.PLACING,
    (_S.PLACING, _I.ROUND_PLACED): _S.ACTIVE,
    # The freeze: one more round right before it, if the source likes, then the last one and the last word on every
    # section.
    (_S.ACTIVE, _I.SWITCHOVER): _S.SWITCHOVER,
    (_S.SWITCHOVER, _I.SECTION): _S.SWITCHOVER,
    (_S.SWITCHOVER, _I.ROUND_BEGIN): _S.FINAL_ROUND,
    (_S.FINAL_ROUND, _I.SECTION): _S.FINAL_ROUND,
    (_S.FINAL_ROUND, _I.PAGES): _S.FINAL_ROUND,
    (_S.FINAL_ROUND, _I.ROUND_END): _S.SWITCHOVER,
    (_S.SWITCHOVER, _I.STATE_END): _S.RESTORING,
    (_S.RESTORING, _I.RESTORED): _S.RESTORED,
    # The point of no return.
    (_S.RESTORED, _I.COMMIT): _S.COMMITTED,
    (_S.COMMITTED, _I.RESUMED): _S.COMPLETED,
    (_S.COMMITTED, _I.LATE_ABORT): _S.FAILED,
    (_S.COMMITTED, _I.LOST): _S.UNDECIDED,
    # A connection of its own.
    (_S.IDLE, _I.RESOLVE): _S.RESOLVING,
    (_S.RESOLVING, _I.RESOLUTION): _S.RESOLVED,
    # Two Aborts may cross on the wire.
    (_S.FAILED, _I.ABORT): _S.FAILED,
    # Everywhere else giving up, or losing the peer, leaves the source running.
    **{
        (state, event): _S.FAILED
        for state in _S
        if state not in TERMINAL and state is not _S.COMMITTED
        for event in (_I.ABORT, _I.LOST)
    },
    # What was decided stays decided when the link goes.
    **{(state, _I.LOST): state for state in TERMINAL},
}
"""The whole protocol; what is not here is not allowed."""

_INPUTS: dict[type[Message], SessionInput] = {
    Hello: _I.HELLO,
    Accept: _I.ACCEPT,
    StateSection: _I.SECTION,
    Prepare: _I.PREPARE,
    Prepared: _I.PREPARED,
    RoundBegin: _I.ROUND_BEGIN,
    RoundEnd: _I.ROUND_END,
    RoundPlaced: _I.ROUND_PLACED,
    Switchover: _I.SWITCHOVER,
    StateEnd: _I.STATE_END,
    Restored: _I.RESTORED,
    Commit: _I.COMMIT,
    Resumed: _I.RESUMED,
    Abort: _I.ABORT,
    Resolve: _I.RESOLVE,
    Resolution: _I.RESOLUTION,
}

# Inputs that belong to one side; Abort belongs to both, everything else to the source.
_ANSWERS = frozenset(
    {
        _I.ACCEPT,
        _I.PREPARED,
        _I.REFUSED,
        _I.ROUND_PLACED,
        _I.RESTORED,
        _I.RESUMED,
        _I.LATE_ABORT,
        _I.RESOLUTION,
    }
)

# Where a recorded session goes on without the answer it would wait for.
_IMPLIED = {
    _S.NEGOTIATING: _S.SETUP,
    _S.PREPARING: _S.ACTIVE,
    _S.PLACING: _S.ACTIVE,
    _S.RESTORING: _S.RESTORED,
    _S.COMMITTED: _S.COMPLETED,
}


@dataclass(slots=True)
class _RoundTotals:
    pages_raw: int = 0
    pages_zero: int = 0
    pages_absent: int = 0
    bytes_payload: int = 0

    def count(self, batch: PageBatch) -> None:
        if batch.encoding is PageEncoding.ZERO:
            self.pages_zero += batch.nr_pages
        elif batch.encoding is PageEncoding.ABSENT:
            self.pages_absent += batch.nr_pages
        elif batch.encoding is not PageEncoding.EXPECT:
            self.pages_raw += batch.nr_pages
        self.bytes_payload += batch.payload.nbytes


class Session:
    """One end of one session.

    Call send() with each message before its bytes go out and receive() with each one decoded;
    page batches likewise. Both raise without changing anything but, after RemoteProtocolError,
    ``state``: that session is over as if the peer were lost.
    """

    def __init__(self, role: Role, *, recorded: bool = False) -> None:
        self.role = role
        self.recorded = recorded
        self._state = SessionState.IDLE
        self._hello: Hello | None = None
        self._version = 0
        self._resolving = ""
        self._next_round = 0
        self._totals = _RoundTotals()
        self._nr_sections = 0

    @property
    def state(self) -> SessionState:
        """Where the session is."""
        return self._state

    @property
    def session_id(self) -> str:
        """UUID of the migration, empty before Hello or Resolve."""
        return self._hello.session if self._hello else self._resolving

    @property
    def version(self) -> int:
        """Protocol version agreed on; 0 before Accept."""
        return self._version

    def send(self, message: Message) -> bytes:
        """Return the payload of the CONTROL frame for `message`, which must go out next.

        :raises LocalProtocolError: when the protocol does not allow it now.
        """
        payload = encode_message(message)
        self._advance(message, LocalProtocolError)
        return payload

    def receive(self, message: Message) -> None:
        """Take note of `message`, received and decoded.

        :raises RemoteProtocolError: when the peer was not allowed to send it now.
        """
        try:
            self._advance(message, RemoteProtocolError)
        except RemoteProtocolError:
            self.lost()
            raise

    def page_batch_sent(self, batch: PageBatch) -> None:
        """Take note of a batch that goes out now.

        :raises LocalProtocolError: outside a round.
        """
        self._count(batch, LocalProtocolError)

    def page_batch_received(self, batch: PageBatch) -> None:
        """Take note of a batch, received and parsed.

        :raises RemoteProtocolError: outside a round.
        """
        try:
            self._count(batch, RemoteProtocolError)
        except RemoteProtocolError:
            self.lost()
            raise

    def lost(self) -> SessionState:
        """Take note that the link or either side broke; return what that makes of the session."""
        self._state = TRANSITIONS[self._state, SessionInput.LOST]
        return self._state

    def round_begin(self) -> RoundBegin:
        """Return the RoundBegin that is due next."""
        return RoundBegin(round=self._next_round)

    def round_end(self) -> RoundEnd:
        """Return the RoundEnd that is true now."""
        return RoundEnd(
            round=max(self._next_round - 1, 0),
            pages_raw=self._totals.pages_raw,
            pages_zero=self._totals.pages_zero,
            pages_absent=self._totals.pages_absent,
            bytes_payload=self._totals.bytes_payload,
        )

    def state_end(self, digest: str | None = None) -> StateEnd:
        """Return the StateEnd that is true now."""
        return StateEnd(nr_sections=self._nr_sections, digest=digest)

    # ---- one step, in either direction ----

    def _advance(self, message: Message, error: type[ProtocolError]) -> None:
        outgoing = error is LocalProtocolError
        what = self._input_of(message)
        if what is None:
            raise error(f"{type(message).__name__} does not belong on a control channel")
        state = self._next_state(what, outgoing=outgoing, error=error)
        problem = self._check(message)
        if problem:
            raise error(f"{what.value} in state {self._state.value} is wrong: {problem}")
        self._note(message)
        self._state = _IMPLIED.get(state, state) if self.recorded else state

    def _input_of(self, message: Message) -> SessionInput | None:
        if isinstance(message, Prepared) and message.obstacles:
            return SessionInput.REFUSED
        if isinstance(message, Abort) and self._state is SessionState.COMMITTED:
            return SessionInput.LATE_ABORT
        return _INPUTS.get(type(message))

    def _next_state(
        self, what: SessionInput, *, outgoing: bool, error: type[ProtocolError]
    ) -> SessionState:
        is_ours = outgoing == (self.role is Role.SOURCE)
        verb = "send" if outgoing else "receive"
        if what is not SessionInput.ABORT and is_ours == (what in _ANSWERS):
            raise error(f"Cannot {verb} {what.value} as {self.role.value}: it goes the other way")
        state = TRANSITIONS.get((self._state, what))
        if state is None:
            raise error(
                f"Cannot {verb} {what.value} in state {self._state.value} as {self.role.value}"
            )
        return state

    def _count(self, batch: PageBatch, error: type[ProtocolError]) -> None:
        outgoing = error is LocalProtocolError
        self._state = self._next_state(SessionInput.PAGES, outgoing=outgoing, error=error)
        self._totals.count(batch)

    def _check(self, message: Message) -> str | None:
        """Return what is wrong with `message` after all that came before it, or None."""
        if isinstance(message, Accept) and self._hello is not None:
            hello = self._hello
            if not hello.version_min <= message.version <= hello.version_max:
                return (
                    f"version {message.version} is not in "
                    f"{hello.version_min}..{hello.version_max}"
                )
        elif isinstance(message, RoundBegin) and message.round != self._next_round:
            return f"round is {message.round}, expected {self._next_round}"
        elif isinstance(message, RoundPlaced) and message.round != self._next_round - 1:
            return f"round is {message.round}, expected {self._next_round - 1}"
        elif isinstance(message, RoundEnd) and message != self.round_end():
            return f"got {message}, counted {self.round_end()}"
        elif isinstance(message, StateSection) and self._nr_sections == MAX_SECTIONS:
            return f"more than {MAX_SECTIONS} sections"
        elif isinstance(message, StateEnd) and message.nr_sections != self._nr_sections:
            return f"says {message.nr_sections} sections, counted {self._nr_sections}"
        elif isinstance(message, Resolution) and message.session != self._resolving:
            return f"answers for session {message.session}, asked for {self._resolving}"
        return None

    def _note(self, message: Message) -> None:
        if isinstance(message, Hello):
            self._hello = message
            # A recording has nobody to choose: it is written in the newest version offered.
            self._version = message.version_max if self.recorded else 0
        elif isinstance(message, Accept):
            self._version = message.version
        elif isinstance(message, RoundBegin):
            self._next_round += 1
            self._totals = _RoundTotals()
        elif isinstance(message, StateSection):
            self._nr_sections += 1
        elif isinstance(message, Resolve):
            self._resolving = message.session

"""The session: every state with every input for both roles, and whole migrations in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

import protocol
from protocol import sections
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.framing import FrameDecoder, FrameType, encode_frame
from protocol.limits import MAX_SECTIONS
from protocol.messages import (
    Abort,
    Accept,
    Commit,
    Decision,
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
    Switchover,
    decode_message,
)
from protocol.pages import PageBatch, batch_buffers, parse_batch
from protocol.session import TERMINAL, TRANSITIONS, Role, Session, SessionInput, SessionState
from tests.protocol.samples import BATCHES, MESSAGES, OBSTACLE, RECORDED, SECTION, SESSION

SOURCE, DESTINATION = Role.SOURCE, Role.DESTINATION
HELLO, ACCEPT = MESSAGES["hello"], MESSAGES["accept"]
RESUMED = Resumed(pid=1, released_monotonic_ns=1)
ABORT = Abort(phase="round", reason="operator")
NOTHING_SENT = RoundEnd(round=0, pages_raw=0, pages_zero=0, pages_absent=0, bytes_payload=0)

# What takes a fresh session into each state, as (sender, message) steps.
_SETUP: list[Message] = [HELLO, ACCEPT]
_ACTIVE: list[Message] = [*_SETUP, Prepare(), Prepared()]
_SWITCHOVER: list[Message] = [*_ACTIVE, Switchover()]
_RESTORING: list[Message] = [*_SWITCHOVER, StateEnd(nr_sections=0)]
_RESTORED: list[Message] = [*_RESTORING, Restored()]
_COMMITTED: list[Message] = [*_RESTORED, Commit()]
PATHS: dict[SessionState, list[Message]] = {
    SessionState.IDLE: [],
    SessionState.NEGOTIATING: [HELLO],
    SessionState.SETUP: _SETUP,
    SessionState.PREPARING: [*_SETUP, Prepare()],
    SessionState.ACTIVE: _ACTIVE,
    SessionState.ROUND: [*_ACTIVE, RoundBegin(round=0)],
    SessionState.PLACING: [*_ACTIVE, RoundBegin(round=0), NOTHING_SENT],
    SessionState.SWITCHOVER: _SWITCHOVER,
    SessionState.FINAL_ROUND: [*_SWITCHOVER, RoundBegin(round=0)],
    SessionState.RESTORING: _RESTORING,
    SessionState.RESTORED: _RESTORED,
    SessionState.COMMITTED: _COMMITTED,
    SessionState.COMPLETED: [*_COMMITTED, RESUMED],
    SessionState.FAILED: [HELLO, ABORT],
    SessionState.UNDECIDED: _COMMITTED,
    SessionState.RESOLVING: [Resolve(session=SESSION)],
    SessionState.RESOLVED: [
        Resolve(session=SESSION),
        Resolution(session=SESSION, decision=Decision.ABORTED),
    ],
}
_FROM_DESTINATION = (Accept, Prepared, RoundPlaced, Restored, Resumed, Resolution)
_EVERY_MESSAGE = list(MESSAGES.values())


def belongs_to(message: Message) -> Role:
    return DESTINATION if isinstance(message, _FROM_DESTINATION) else SOURCE


def session_in(state: SessionState, role: Role) -> Session:
    session = Session(role)
    for message in PATHS[state]:
        if belongs_to(message) is role:
            session.send(message)
        else:
            session.receive(message)
    if state is SessionState.UNDECIDED:
        session.lost()
    assert session.state is state
    return session


def fitting(session: Session, message: Message) -> Message:
    """`message` with the numbers that are right for `session`, so that only its place can be wrong."""
    name = type(message).__name__
    if name == "RoundBegin":
        return session.round_begin()
    if name == "RoundEnd":
        return session.round_end()
    if name == "StateEnd":
        return session.state_end()
    return message


def legal_by_the_document() -> dict[str, set[str]]:
    """Message name -> names of states, from the table in the protocol's docstring."""
    rows = re.findall(r"\n {4,5}\d+ {3}(\w+) +(?:->|<-|<->) +(.*)", protocol.__doc__ or "")
    return {name: set(re.findall(r"[A-Z_]{4,}", states)) for name, states in rows}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("state", SessionState)
def test_every_message_in_every_state_and_direction(state: SessionState, role: Role) -> None:
    legal = legal_by_the_document()
    for sample in _EVERY_MESSAGE:
        name = type(sample).__name__
        for outgoing in (True, False):
            session = session_in(state, role)
            message = fitting(session, sample)
            ours = isinstance(sample, Abort) or outgoing == (belongs_to(sample) is role)
            allowed = ours and state.name in legal[name]
            if isinstance(sample, Abort):
                late = state is SessionState.COMMITTED and outgoing == (role is DESTINATION)
                started = state not in TERMINAL and state is not SessionState.COMMITTED
                allowed = started or late or state is SessionState.FAILED
            if outgoing and not allowed:
                with pytest.raises(LocalProtocolError):
                    session.send(message)
                assert session.state is state
            elif outgoing:
                assert decode_message(session.send(message)) == message
            elif not allowed:
                with pytest.raises(RemoteProtocolError):
                    session.receive(message)
                assert session.state is TRANSITIONS[state, SessionInput.LOST]
            else:
                session.receive(message)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("state", SessionState)
def test_page_batches_travel_in_rounds_only_and_from_the_source(
    state: SessionState, role: Role
) -> None:
    in_round = state in (SessionState.ROUND, SessionState.FINAL_ROUND)
    session = session_in(state, role)
    if in_round and role is SOURCE:
        session.page_batch_sent(BATCHES["raw"])
        assert session.state is state
    else:
        with pytest.raises(LocalProtocolError):
            session.page_batch_sent(BATCHES["raw"])
        assert session.state is state
    session = session_in(state, role)
    if in_round and role is DESTINATION:
        session.page_batch_received(BATCHES["raw"])
        assert session.state is state
    else:
        with pytest.raises(RemoteProtocolError):
            session.page_batch_received(BATCHES["raw"])
        assert session.state is TRANSITIONS[state, SessionInput.LOST]


def test_every_state_has_an_answer_to_the_loss_of_the_peer() -> None:
    for state in SessionState:
        after = session_in(state, SOURCE).lost()
        if state is SessionState.COMMITTED:
            assert after is SessionState.UNDECIDED
        else:
            assert after is (state if state in TERMINAL else SessionState.FAILED)


def test_illegal_input_names_state_input_and_role() -> None:
    with pytest.raises(LocalProtocolError, match="send Commit in state active as source"):
        session_in(SessionState.ACTIVE, SOURCE).send(Commit())
    with pytest.raises(RemoteProtocolError, match="receive Commit in state round as destination"):
        session_in(SessionState.ROUND, DESTINATION).receive(Commit())
    with pytest.raises(RemoteProtocolError, match="Commit as source: it goes the other way"):
        session_in(SessionState.RESTORED, SOURCE).receive(Commit())


@pytest.mark.parametrize("message", _EVERY_MESSAGE, ids=MESSAGES.keys())
def test_nothing_received_after_commit_but_an_abort_frees_the_source(message: Message) -> None:
    session = session_in(SessionState.COMMITTED, SOURCE)
    if isinstance(message, (Abort, Resumed)):
        session.receive(message)
        free = isinstance(message, Abort)
        assert session.state is (SessionState.FAILED if free else SessionState.COMPLETED)
    else:
        with pytest.raises(RemoteProtocolError):
            session.receive(message)
        assert session.state is SessionState.UNDECIDED


def test_after_commit_the_destination_may_abort_and_the_source_may_not() -> None:
    destination = session_in(SessionState.COMMITTED, DESTINATION)
    source = session_in(SessionState.COMMITTED, SOURCE)
    with pytest.raises(LocalProtocolError, match="goes the other way"):
        source.send(ABORT)
    source.receive(decode_message(destination.send(ABORT)))
    assert source.state is destination.state is SessionState.FAILED
    with pytest.raises(LocalProtocolError):
        destination.send(RESUMED)
    with pytest.raises(RemoteProtocolError):
        source.receive(RESUMED)


def test_abort_of_the_source_after_its_commit_is_refused() -> None:
    destination = session_in(SessionState.COMMITTED, DESTINATION)
    with pytest.raises(RemoteProtocolError, match="goes the other way"):
        destination.receive(ABORT)
    assert destination.state is SessionState.UNDECIDED


@pytest.mark.parametrize("role", Role)
def test_nothing_is_aborted_once_resumed(role: Role) -> None:
    with pytest.raises(LocalProtocolError):
        session_in(SessionState.COMPLETED, role).send(ABORT)


def test_abort_that_crosses_commit_leaves_exactly_one_side_with_the_process() -> None:
    source = session_in(SessionState.RESTORED, SOURCE)
    destination = session_in(SessionState.RESTORED, DESTINATION)
    commit, abort = source.send(Commit()), destination.send(ABORT)
    source.receive(decode_message(abort))
    with pytest.raises(RemoteProtocolError):
        destination.receive(decode_message(commit))
    assert source.state is destination.state is SessionState.FAILED


class SessionPair:
    """Both ends joined in memory, through real frames."""

    def __init__(self) -> None:
        self.source = Session(SOURCE)
        self.destination = Session(DESTINATION)
        self._decoders = {SOURCE: FrameDecoder(), DESTINATION: FrameDecoder()}

    def exchange(self, sender: Session, item: Message | PageBatch) -> None:
        """Send `item`, deliver it, and see both ends agree."""
        peer = self.destination if sender is self.source else self.source
        if isinstance(item, PageBatch):
            sender.page_batch_sent(item)
            buffers = encode_frame(FrameType.PAGES, *batch_buffers(item))
        else:
            buffers = encode_frame(FrameType.CONTROL, sender.send(item))
        decoder = self._decoders[peer.role]
        decoder.receive_data(b"".join(buffers))
        frame = decoder.next_frame()
        assert frame is not None
        if frame.type is FrameType.PAGES:
            peer.page_batch_received(parse_batch(frame.payload))
        else:
            peer.receive(decode_message(frame.payload))
        assert self.source.state is self.destination.state

    def round(self, *batches: PageBatch) -> None:
        """One whole round."""
        self.exchange(self.source, self.source.round_begin())
        for batch in batches:
            self.exchange(self.source, batch)
        end = self.source.round_end()
        self.exchange(self.source, end)
        if self.source.state is SessionState.PLACING:
            self.exchange(self.destination, RoundPlaced(round=end.round))


def pair_in_setup() -> SessionPair:
    pair = SessionPair()
    pair.exchange(pair.source, HELLO)
    pair.exchange(pair.destination, ACCEPT)
    return pair


def test_whole_migration() -> None:
    pair = pair_in_setup()
    assert pair.source.version == pair.destination.version == 1
    assert pair.source.session_id == pair.destination.session_id == SESSION
    pair.exchange(pair.source, SECTION)
    pair.exchange(pair.source, Prepare())
    pair.exchange(pair.destination, Prepared())
    pair.round(*BATCHES.values())
    pair.round()
    pair.exchange(pair.source, SECTION)
    pair.exchange(pair.source, Switchover())
    pair.round(BATCHES["raw"])
    pair.exchange(pair.source, SECTION)
    assert pair.source.state_end().nr_sections == 3
    pair.exchange(pair.source, pair.source.state_end("ab"))
    pair.exchange(pair.destination, Restored(digest="ab"))
    pair.exchange(pair.source, Commit())
    pair.exchange(pair.destination, RESUMED)
    assert pair.source.state is SessionState.COMPLETED
    assert pair.source.lost() is SessionState.COMPLETED


def test_refused_preflight_ends_the_session() -> None:
    pair = pair_in_setup()
    pair.exchange(pair.source, Prepare())
    pair.exchange(pair.destination, Prepared(obstacles=[OBSTACLE]))
    assert pair.source.state is SessionState.FAILED


def test_resolve_on_a_connection_of_its_own() -> None:
    pair = SessionPair()
    pair.exchange(pair.source, Resolve(session=SESSION))
    assert pair.destination.session_id == SESSION
    pair.exchange(pair.destination, Resolution(session=SESSION, decision=Decision.COMMITTED))
    assert pair.source.state is SessionState.RESOLVED


def test_answer_about_another_session_is_refused() -> None:
    other = Resolution(session="f" * 32, decision=Decision.COMMITTED)
    with pytest.raises(RemoteProtocolError, match="answers for session"):
        session_in(SessionState.RESOLVING, SOURCE).receive(other)


def test_version_that_was_not_offered_is_refused() -> None:
    wrong = Accept(version=2, software="x", host=getattr(HELLO, "host"))
    with pytest.raises(RemoteProtocolError, match=r"version 2 is not in 1\.\.1"):
        session_in(SessionState.NEGOTIATING, SOURCE).receive(wrong)
    with pytest.raises(LocalProtocolError):
        session_in(SessionState.NEGOTIATING, DESTINATION).send(wrong)


@pytest.mark.parametrize("field", ["pages_raw", "pages_zero", "pages_absent", "bytes_payload"])
def test_totals_of_a_round_must_agree(field: str) -> None:
    receiver = session_in(SessionState.ROUND, DESTINATION)
    sender = session_in(SessionState.ROUND, SOURCE)
    for batch in BATCHES.values():
        receiver.page_batch_received(batch)
        sender.page_batch_sent(batch)
    true = sender.round_end()
    assert (true.pages_raw, true.pages_zero, true.pages_absent) == (3, 16, 1)
    assert true.bytes_payload == 8192 + 20
    wrong = replace(true, **{field: getattr(true, field) + 1})
    with pytest.raises(LocalProtocolError, match=field):
        sender.send(wrong)
    sender.send(true)
    with pytest.raises(RemoteProtocolError, match="RoundEnd in state round is wrong: got"):
        receiver.receive(wrong)
    assert receiver.state is SessionState.FAILED


def test_totals_begin_anew_with_each_round() -> None:
    pair = pair_in_setup()
    pair.exchange(pair.source, Prepare())
    pair.exchange(pair.destination, Prepared())
    pair.round(BATCHES["raw"])
    pair.exchange(pair.source, pair.source.round_begin())
    assert pair.source.round_end().pages_raw == 0
    assert pair.source.round_end().round == 1


@pytest.mark.parametrize("number", [1, 2])
def test_rounds_count_from_zero_without_gaps(number: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"round is {number}, expected 0"):
        session_in(SessionState.ACTIVE, DESTINATION).receive(RoundBegin(round=number))


def test_answer_for_another_round_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="round is 3, expected 0"):
        session_in(SessionState.PLACING, SOURCE).receive(RoundPlaced(round=3))


def test_number_of_sections_must_agree() -> None:
    receiver = session_in(SessionState.SWITCHOVER, DESTINATION)
    receiver.receive(SECTION)
    with pytest.raises(RemoteProtocolError, match="says 2 sections, counted 1"):
        receiver.receive(StateEnd(nr_sections=2))


def test_endless_sections_are_refused() -> None:
    receiver = session_in(SessionState.SETUP, DESTINATION)
    for _ in range(MAX_SECTIONS):
        receiver.receive(SECTION)
    with pytest.raises(RemoteProtocolError, match="more than"):
        receiver.receive(SECTION)


def test_unknown_required_section_fails_the_migration_with_its_name() -> None:
    pair = pair_in_setup()
    section = replace(SECTION, kind="quantum-state")
    pair.exchange(pair.source, section)
    with pytest.raises(RemoteProtocolError, match="required section 'quantum-state'"):
        sections.decode_section(section)
    pair.exchange(pair.destination, Abort(phase="setup", reason="quantum-state"))
    assert pair.source.state is SessionState.FAILED


@pytest.mark.parametrize("role", Role)
def test_recorded_session_needs_no_answers(role: Role) -> None:
    session = Session(role, recorded=True)
    for item in RECORDED:
        if isinstance(item, PageBatch):
            step: Callable[[PageBatch], None] = (
                session.page_batch_sent if role is SOURCE else session.page_batch_received
            )
            step(item)
        elif role is SOURCE:
            session.send(item)
        else:
            session.receive(item)
    assert session.state is SessionState.COMPLETED
    assert session.version == 1


def test_answers_in_a_recording_are_refused() -> None:
    reader = Session(DESTINATION, recorded=True)
    reader.receive(HELLO)
    assert reader.state is SessionState.SETUP
    with pytest.raises(LocalProtocolError):
        reader.send(ACCEPT)
    with pytest.raises(RemoteProtocolError):
        reader.receive(ACCEPT)


@pytest.mark.parametrize("length", range(1, len(RECORDED)))
def test_recording_cut_anywhere_is_a_failure(length: int) -> None:
    reader = Session(DESTINATION, recorded=True)
    for item in RECORDED[:length]:
        if isinstance(item, PageBatch):
            reader.page_batch_received(item)
        else:
            reader.receive(item)
    assert reader.lost() is SessionState.FAILED

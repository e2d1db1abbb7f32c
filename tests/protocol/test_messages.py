"""Control messages: each survives the wire, and a bad one cannot be made or received."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from protocol.channel import ChannelAnnouncement, ChannelRole
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.limits import MAX_OBSTACLES, MAX_ROUNDS, MAX_STATE_BYTES, MAX_TEXT_CHARS
from protocol.messages import (
    Abort,
    Message,
    Prepared,
    Resolve,
    Restored,
    Resumed,
    RoundBegin,
    RoundEnd,
    StateEnd,
    decode_message,
    encode_message,
    fit_text,
)
from tests.protocol.samples import HOST, MESSAGES, OBSTACLE, SECTION, SESSION


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES.keys())
def test_message_survives_the_wire(message: Message) -> None:
    payload = encode_message(message)
    assert decode_message(payload) == message
    assert decode_message(memoryview(payload)) == message


def test_tags_are_those_of_the_protocol_document() -> None:
    import protocol

    assert protocol.__doc__ is not None
    for message in MESSAGES.values():
        tag = encode_message(message)[0]
        assert f"\n    {tag:2}   {type(message).__name__} " in protocol.__doc__


@pytest.mark.parametrize("payload", [b"", b"\0", b"\0\x80", b"\x11\x80", b"\xff\x80", b"\x01"])
def test_unknown_tag_or_empty_frame_is_refused(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_message(payload)


def test_something_else_is_not_a_message() -> None:
    thing: Any = OBSTACLE
    with pytest.raises(LocalProtocolError, match="WireObstacle is not a message"):
        encode_message(thing)


def change(name: str, **fields: Any) -> Callable[[], object]:
    return lambda: replace(MESSAGES[name], **fields)


@pytest.mark.parametrize(
    "make",
    [
        change("hello", version_min=0),
        change("hello", version_min=2),
        change("hello", session=SESSION[:-1]),
        change("hello", session=SESSION.upper()),
        change("accept", version=0),
        change("accept", options={"x": "y" * (MAX_TEXT_CHARS + 1)}),
        lambda: replace(HOST, page_size=-1),
        lambda: replace(HOST, cpu_flags=["x"] * (MAX_TEXT_CHARS + 1)),
        lambda: replace(SECTION, kind=""),
        lambda: replace(SECTION, kind="Big Kind"),
        lambda: replace(SECTION, version_id=0),
        lambda: replace(SECTION, minimum_version_id=0),
        lambda: replace(SECTION, minimum_version_id=3),
        lambda: replace(SECTION, owner_id=-1),
        lambda: replace(SECTION, owner_id=1 << 32),
        lambda: replace(SECTION, body=bytes(MAX_STATE_BYTES + 1)),
        lambda: Prepared(obstacles=[OBSTACLE] * (MAX_OBSTACLES + 1)),
        lambda: RoundBegin(round=-1),
        lambda: RoundBegin(round=MAX_ROUNDS),
        lambda: RoundEnd(round=0, pages_raw=-1, pages_zero=0, pages_absent=0, bytes_payload=0),
        lambda: StateEnd(nr_sections=-1),
        lambda: StateEnd(nr_sections=0, digest=""),
        lambda: Restored(digest="xyz"),
        lambda: Resumed(pid=0, released_monotonic_ns=0),
        lambda: Abort(phase="x", reason="y" * (MAX_TEXT_CHARS + 1)),
        lambda: Resolve(session="../../etc/passwd"),
        lambda: ChannelAnnouncement(session=SESSION, role=ChannelRole.CONTROL, index=1),
        lambda: ChannelAnnouncement(session=SESSION, role=ChannelRole.PAGES, index=0),
        lambda: ChannelAnnouncement(session="", role=ChannelRole.PAGES, index=1),
    ],
)
def test_bad_message_cannot_be_made(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError):
        make()


def test_long_text_is_cut_to_fit() -> None:
    assert fit_text("short") == "short"
    cut = fit_text("x" * (MAX_TEXT_CHARS + 1))
    assert len(cut) == MAX_TEXT_CHARS and cut.endswith("x...")
    Abort(phase="x", reason=cut)

"""The link: how messages become writes."""

from __future__ import annotations

from typing import cast

import pytest

from agent.channel import Channel
from agent.link import Link
from protocol.codec import Buffer
from protocol.framing import FrameType, encode_frame
from protocol.messages import Abort
from protocol.session import Role

PAGES = encode_frame(FrameType.PAGES, b"pages")


class Recorder:
    """Stands in for a channel: one list entry for each write."""

    recorded = False
    peer = "nobody"

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def send_buffers(self, buffers: list[Buffer]) -> int:
        self.writes.append(b"".join(buffers))
        return len(self.writes[-1])


@pytest.fixture
def channel() -> Recorder:
    return Recorder()


@pytest.fixture
def link(channel: Recorder, monkeypatch: pytest.MonkeyPatch) -> Link:
    made = Link(cast(Channel, channel), Role.SOURCE)
    # Whatever is sent, whenever: what is allowed is the session's matter.
    monkeypatch.setattr(made.session, "send", lambda message: message.reason.encode())
    return made


def said(text: str) -> Abort:
    return Abort(phase="test", reason=text, obstacles=[])


def test_messages_are_written_at_once(link: Link, channel: Recorder) -> None:
    link.send(said("one"))
    link.send_all([said("two"), said("three")])
    assert [b"one" in write for write in channel.writes] == [True, False]
    assert channel.writes[1].index(b"two") < channel.writes[1].index(b"three")


def test_gathered_messages_are_one_write_in_order(link: Link, channel: Recorder) -> None:
    with link.gathered():
        link.send(said("one"))
        link.send_all([said("two"), said("three")])
        assert not channel.writes
    (write,) = channel.writes
    assert write.index(b"one") < write.index(b"two") < write.index(b"three")


def test_pages_take_along_what_was_kept_back(link: Link, channel: Recorder) -> None:
    with link.gathered():
        link.send(said("before"))
        link.send_raw(list(PAGES))
        link.send(said("after"))
        assert len(channel.writes) == 1 and channel.writes[0].endswith(b"pages")
    assert b"before" in channel.writes[0] and b"after" in channel.writes[1] and len(channel.writes) == 2


def test_a_body_that_fails_sends_nothing_of_what_was_kept_back(link: Link, channel: Recorder) -> None:
    with pytest.raises(ValueError, match="failed"), link.gathered():
        link.send(said("never"))
        raise ValueError("failed")
    link.send(said("abort"))
    (write,) = channel.writes
    assert b"abort" in write and b"never" not in write

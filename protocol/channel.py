"""Extra connections of one session: what each says before anything else.

The first connection begins with Hello and carries the session's control messages. Every further
one begins with a ChannelAnnouncement, so that the destination, which may serve several sessions
on one address, knows where it belongs before it trusts a byte of it. This version opens one
connection only; the announcement is defined so that an old destination refuses by name.
"""

from __future__ import annotations

import enum
import string
from dataclasses import dataclass

MAX_CHANNELS = 64
"""Connections of one session: more never helped a link, and each costs the receiver a thread."""

_HEX_DIGITS = frozenset(string.hexdigits.lower())


def check_session_id(session: str) -> None:
    """Check that `session` is a UUID in hex: it names files and records on both hosts.

    :raises ValueError: when it is anything else.
    """
    if len(session) != 32 or not _HEX_DIGITS.issuperset(session):
        raise ValueError("session is not a UUID in 32 lowercase hex digits")


class ChannelRole(enum.IntEnum):
    """What a connection carries."""

    CONTROL = 1
    PAGES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelAnnouncement:
    """First message on each connection but the first: source -> destination."""

    session: str
    role: ChannelRole
    index: int

    def __post_init__(self) -> None:
        check_session_id(self.session)
        if self.role is ChannelRole.CONTROL:
            raise ValueError("a session has one control channel, the first connection")
        if not 0 < self.index < MAX_CHANNELS:
            raise ValueError(f"channel index {self.index} is not in 1..{MAX_CHANNELS - 1}")

"""Control messages: the payload of a CONTROL frame is one tag byte and the encoded message.

Messages are frozen and checked when made: a bad one cannot exist on either side. Who may send
which when is session.py's business, not this file's. Tags are never reused; 0 is never valid.
"""

from __future__ import annotations

import enum
import string
from dataclasses import dataclass, field
from typing import get_args

from protocol import codec
from protocol.channel import ChannelAnnouncement, check_session_id
from protocol.codec import Buffer
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.limits import (
    MAX_OBSTACLES,
    MAX_ROUNDS,
    MAX_SECTIONS,
    MAX_STATE_BYTES,
    MAX_TEXT_CHARS,
)

_HEX_DIGITS = frozenset(string.hexdigits.lower())
_KIND_CHARS = frozenset(string.ascii_lowercase + string.digits + "_-.")
MAX_KIND_CHARS = 64


def fit_text(text: str) -> str:
    """Return `text` cut to what a message may carry, with a mark where it was cut."""
    if len(text) <= MAX_TEXT_CHARS:
        return text
    return text[: MAX_TEXT_CHARS - 3] + "..."


def _check_text(what: str, text: str) -> None:
    if len(text) > MAX_TEXT_CHARS:
        raise ValueError(f"{what} has {len(text)} characters, limit {MAX_TEXT_CHARS}")


def _check_digest(digest: str | None) -> None:
    if digest is not None and not (0 < len(digest) <= 128 and _HEX_DIGITS.issuperset(digest)):
        raise ValueError("digest is not 1 to 128 lowercase hex digits")


def _check_counts(*counts: int) -> None:
    if min(counts) < 0:
        raise ValueError("a count is negative")


def _check_obstacles(obstacles: list[WireObstacle]) -> None:
    if len(obstacles) > MAX_OBSTACLES:
        raise ValueError(f"{len(obstacles)} obstacles, limit {MAX_OBSTACLES}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WireObstacle:
    """One reason why the migration cannot be done; the agent's Obstacle as it travels."""

    kind: str
    what: str
    detail: str
    hint: str = ""

    def __post_init__(self) -> None:
        for what in ("kind", "what", "detail", "hint"):
            _check_text(what, getattr(self, what))


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What a host says about itself in the handshake; version.py compares two of them."""

    hostname: str
    machine: str
    """As uname -m: x86_64, aarch64."""
    kernel_release: str
    page_size: int
    boot_id: str
    vdso_sha256: str
    """Digest of the vdso image, or empty where there is none."""
    xstate_mask: int
    """XCR0: which register states the processor and kernel keep for a thread."""
    xstate_size: int
    """Bytes of one thread's NT_X86_XSTATE."""
    monotonic_ns: int
    boottime_ns: int
    cpu_flags: list[str]
    """The flags line of /proc/cpuinfo."""
    uid: int
    """Effective uid of the agent."""
    capabilities: int
    """Effective capabilities of the agent, one bit each."""

    def __post_init__(self) -> None:
        for what in ("hostname", "machine", "kernel_release", "boot_id", "vdso_sha256"):
            _check_text(what, getattr(self, what))
        _check_counts(self.page_size, self.xstate_mask, self.xstate_size, self.monotonic_ns,
                      self.boottime_ns, self.uid, self.capabilities)
        if len(self.cpu_flags) > MAX_TEXT_CHARS:
            raise ValueError(f"{len(self.cpu_flags)} cpu flags, limit {MAX_TEXT_CHARS}")
        for flag in self.cpu_flags:
            _check_text("cpu flag", flag)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message of a session: source -> destination."""

    version_min: int
    version_max: int
    software: str
    session: str
    """UUID of the migration in hex; names it in logs, records and --resolve."""
    host: HostFacts

    def __post_init__(self) -> None:
        if not 0 < self.version_min <= self.version_max:
            raise ValueError(f"versions {self.version_min} to {self.version_max} make no range")
        _check_text("software", self.software)
        check_session_id(self.session)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept:
    """The destination agrees to talk: destination -> source."""

    version: int
    software: str
    host: HostFacts
    options: dict[str, str] = field(default_factory=dict)
    """What the destination offers or asks for; unknown names are ignored."""

    def __post_init__(self) -> None:
        if self.version < 1:
            raise ValueError(f"version {self.version} is not valid")
        _check_text("software", self.software)
        for name, value in self.options.items():
            _check_text("option name", name)
            _check_text(f"option {name}", value)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSection:
    """One resource's state, encoded by its schema in protocol/state: source -> destination."""

    kind: str
    version_id: int
    minimum_version_id: int
    """Oldest version whose readers understand this body when they skip fields they do not know."""
    required: bool
    """Whether a destination that does not know `kind` must refuse, rather than skip it."""
    owner_id: int
    """The pid or object id this state belongs to; 0 when it belongs to the session."""
    body: bytes

    def __post_init__(self) -> None:
        if not 0 < len(self.kind) <= MAX_KIND_CHARS or not _KIND_CHARS.issuperset(self.kind):
            raise ValueError(f"kind {self.kind[:MAX_KIND_CHARS]!r} is not a valid name")
        if not 0 < self.minimum_version_id <= self.version_id:
            raise ValueError(f"version {self.version_id} with minimum {self.minimum_version_id}")
        if not 0 <= self.owner_id < 1 << 32:
            raise ValueError(f"owner id {self.owner_id} is not valid")
        if len(self.body) > MAX_STATE_BYTES:
            raise ValueError(f"body has {len(self.body)} bytes, limit {MAX_STATE_BYTES}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Ends the first set of sections and asks for the preflight: source -> destination."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Outcome of the preflight, empty when the rounds may begin: destination -> source."""

    obstacles: list[WireObstacle] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_obstacles(self.obstacles)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundBegin:
    """Page batches follow: source -> destination. Rounds count from 0 without gaps."""

    round: int

    def __post_init__(self) -> None:
        if not 0 <= self.round < MAX_ROUNDS:
            raise ValueError(f"round {self.round} is not in 0..{MAX_ROUNDS - 1}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEnd:
    """All batches of the round are sent; totals over them: source -> destination."""

    round: int
    pages_raw: int
    """Pages sent with contents, compressed or not."""
    pages_zero: int
    pages_absent: int
    bytes_payload: int
    """Bytes of payload as sent, without headers and range tables."""

    def __post_init__(self) -> None:
        _check_counts(
            self.round, self.pages_raw, self.pages_zero, self.pages_absent, self.bytes_payload
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlaced:
    """Every page of the round is where it belongs: destination -> source.

    Answers the RoundEnd of a round while the target runs. The source waits for it: pages that are
    still on their way when it freezes the target would be downtime.
    """

    round: int

    def __post_init__(self) -> None:
        _check_counts(self.round)


@dataclass(frozen=True, slots=True, kw_only=True)
class Switchover:
    """The source is about to freeze its target; the final sections and round follow: source -> destination."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateEnd:
    """Everything was sent: source -> destination."""

    nr_sections: int
    """Sections of the whole session, for a check that none was lost."""
    digest: str | None = None
    """The source's memory digest when --verify asks for one."""

    def __post_init__(self) -> None:
        if not 0 <= self.nr_sections <= MAX_SECTIONS:
            raise ValueError(f"{self.nr_sections} sections, limit {MAX_SECTIONS}")
        _check_digest(self.digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """The copy is complete and stopped, but for what its threads stand at: destination -> source."""

    digest: str | None = None

    def __post_init__(self) -> None:
        _check_digest(self.digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The copy is now the process: source -> destination. The source never runs again by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """The copy runs: destination -> source."""

    pid: int
    """Its pid in the destination agent's pid namespace."""
    released_monotonic_ns: int
    """When its last thread was released, on the destination's CLOCK_MONOTONIC."""

    def __post_init__(self) -> None:
        if self.pid < 1:
            raise ValueError(f"pid {self.pid} is not valid")
        _check_counts(self.released_monotonic_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """The sender gives up; from either side, at any time before Commit."""

    phase: str
    reason: str
    obstacles: list[WireObstacle] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_text("phase", self.phase)
        _check_text("reason", self.reason)
        _check_obstacles(self.obstacles)


class Decision(str, enum.Enum):
    """How a session ended, as the destination recorded it."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"
    """The destination has no record of the session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolve:
    """On a connection of its own, instead of Hello: how did `session` end? source -> destination"""

    session: str

    def __post_init__(self) -> None:
        check_session_id(self.session)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """Answer to Resolve: destination -> source."""

    session: str
    decision: Decision

    def __post_init__(self) -> None:
        check_session_id(self.session)


Message = (
    Hello
    | Accept
    | StateSection
    | Prepare
    | Prepared
    | RoundBegin
    | RoundEnd
    | RoundPlaced
    | Switchover
    | StateEnd
    | Restored
    | Commit
    | Resumed
    | Abort
    | Resolve
    | Resolution
    | ChannelAnnouncement
)

_TAGS: dict[type[Message], int] = {
    Hello: 1,
    Accept: 2,
    StateSection: 3,
    Prepare: 4,
    Prepared: 5,
    RoundBegin: 6,
    RoundEnd: 7,
    Switchover: 8,
    StateEnd: 9,
    Restored: 10,
    Commit: 11,
    Resumed: 12,
    Abort: 13,
    Resolve: 14,
    Resolution: 15,
    ChannelAnnouncement: 16,
    RoundPlaced: 17,
}
_CLASSES: dict[int, type[Message]] = {tag: cls for cls, tag in _TAGS.items()}
assert set(_TAGS) == set(get_args(Message))


def encode_message(message: Message) -> bytes:
    """Return the payload of the CONTROL frame that carries `message`."""
    tag = _TAGS.get(type(message))
    if tag is None:
        raise LocalProtocolError(f"{type(message).__name__} is not a message")
    return bytes((tag,)) + codec.encode(message)


def decode_message(payload: Buffer) -> Message:
    """Return the message in the payload of a CONTROL frame.

    :raises RemoteProtocolError: for any bytes that are not exactly one valid message.
    """
    if not payload:
        raise RemoteProtocolError("Control frame is empty")
    cls = _CLASSES.get(payload[0])
    if cls is None:
        raise RemoteProtocolError(f"Control frame has unknown message tag {payload[0]}")
    message: Message = codec.decode(cls, memoryview(payload)[1:])
    return message

"""The link: one session over one channel, messages and page batches instead of bytes.

Joins the sans-IO session (what is allowed when) to the blocking channel (bytes), for either side. Must
never decide anything about a migration. A peer's Abort, an obstacle list or nonsense on the wire come out
as the agent's own errors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from agent.channel import Channel
from agent.errors import RefusedError, TransferError
from agent.frames import FrameReader
from agent.types import Obstacle
from protocol.codec import Buffer
from protocol.errors import ProtocolError
from protocol.framing import FrameType, encode_frame
from protocol.limits import MAX_OBSTACLES
from protocol.messages import Abort, Message, Prepared, WireObstacle, decode_message, fit_text
from protocol.pages import PageBatch, parse_batch
from protocol.session import Role, Session, SessionState

M = TypeVar("M")

ABORT_LIMIT_S = 2.0
"""How long to wait for a peer to take our Abort; it also notices that the connection ends."""


class Link:
    """Sends and receives for one session; owns neither the channel nor the buffers it is handed."""

    def __init__(self, channel: Channel, role: Role) -> None:
        self.channel = channel
        self.session = Session(role, recorded=channel.recorded)
        self._reader = FrameReader(channel)
        self._kept: list[Buffer] | None = None

    @property
    def recorded(self) -> bool:
        """Whether the peer is a file, which never answers."""
        return self.channel.recorded

    @property
    def state(self) -> SessionState:
        """Where the session is."""
        return self.session.state

    # -- sending ---------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Send one control message.

        :raises TransferError: when the link is broken.
        """
        self.send_raw(encode_frame(FrameType.CONTROL, self.session.send(message)), keep=True)

    def send_all(self, messages: Iterable[Message]) -> None:
        """Send several control messages at once: the peer wakes up only once.

        :raises TransferError: when the link is broken.
        """
        frames = [
            encode_frame(FrameType.CONTROL, self.session.send(message)) for message in messages
        ]
        self.send_raw([buffer for frame in frames for buffer in frame], keep=True)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep control messages back until pages are sent or the body ends: few system calls here, few wakeups there.

        A body that fails has sent nothing of what was kept back.
        """
        assert self._kept is None
        self._kept = []
        try:
            yield
            if self._kept:
                self.channel.send_buffers(self._kept)
        finally:
            self._kept = None

    def send_raw(self, buffers: list[Buffer], *, keep: bool = False) -> None:
        """Send frames that are encoded and counted already (PageSender does both).

        ``keep``: the buffers will not change, so that gathered() may keep them back.
        """
        if self._kept is not None:
            if keep:
                self._kept += buffers
                return
            buffers = [*self._kept, *buffers]
            self._kept.clear()
        self.channel.send_buffers(buffers)

    def abort(self, phase: str, reason: str, obstacles: Sequence[Obstacle] = ()) -> None:
        """Tell the peer that this side gives up, if it can still hear it."""
        if self.recorded or self.state in (SessionState.FAILED, SessionState.COMPLETED):
            return
        # A peer that does not read is not worth waiting for.
        self.channel.timeout_s = min(self.channel.timeout_s or ABORT_LIMIT_S, ABORT_LIMIT_S)
        try:
            self.send(Abort(phase=phase, reason=fit_text(reason), obstacles=to_wire(obstacles)))
        except (TransferError, ProtocolError):
            self.lost()

    def lost(self) -> SessionState:
        """Take note that the link is gone; returns what that makes of the session."""
        return self.session.lost()

    # -- receiving -------------------------------------------------------------------------------------

    def receive(self, *, timeout_s: float | None = None) -> Message | PageBatch:
        """Wait for the next message or page batch; a batch is valid until the next call.

        :raises TransferError: when the link broke or the peer broke the protocol.
        :raises RefusedError: when the peer aborts and names obstacles.
        """
        try:
            kind, payload = self._reader.read_frame(timeout_s=timeout_s)
            if kind is FrameType.PAGES:
                batch = parse_batch(payload)
                self.session.page_batch_received(batch)
                return batch
            message = decode_message(payload)
            self.session.receive(message)
        except ProtocolError as err:
            raise TransferError(f"{self.channel.peer} broke the protocol: {err}") from err
        if isinstance(message, Abort):
            raise aborted(message, self.channel.peer)
        return message

    def expect(self, kind: type[M], *, timeout_s: float | None = None) -> M:
        """Wait for a message of one type.

        :raises TransferError: also when something else comes.
        """
        message = self.receive(timeout_s=timeout_s)
        if not isinstance(message, kind):
            raise TransferError(
                f"{self.channel.peer} sent {type(message).__name__}, expected {kind.__name__}"
            )
        return message

    def check_peer(self) -> None:
        """Notice, without waiting, that the peer gave up or went away.

        :raises TransferError: it did.
        """
        if not self.recorded and self.channel.poll_readable():
            message = self.receive()
            raise TransferError(f"{self.channel.peer} sent {type(message).__name__} out of turn")


def aborted(message: Abort, peer: str) -> TransferError | RefusedError:
    """The error that a peer's Abort means for this side."""
    text = f"{peer} gave up in {message.phase}: {message.reason}"
    if message.obstacles:
        return RefusedError(text, from_wire(message.obstacles))
    return TransferError(text)


def to_wire(obstacles: Sequence[Obstacle]) -> list[WireObstacle]:
    """Obstacles as they travel."""
    return [
        WireObstacle(
            kind=fit_text(obstacle.kind),
            what=fit_text(obstacle.what),
            detail=fit_text(obstacle.detail),
            hint=fit_text(obstacle.hint),
        )
        for obstacle in obstacles[:MAX_OBSTACLES]
    ]


def from_wire(obstacles: Sequence[WireObstacle]) -> list[Obstacle]:
    """Obstacles as the agent has them."""
    return [
        Obstacle(kind=wire.kind, what=wire.what, detail=wire.detail, hint=wire.hint)
        for wire in obstacles
    ]


def refused_by(prepared: Prepared, peer: str) -> RefusedError:
    """The error for a preflight that found obstacles."""
    plural = "" if len(prepared.obstacles) == 1 else "s"
    return RefusedError(
        f"{peer} cannot take the process: {len(prepared.obstacles)} obstacle{plural}",
        from_wire(prepared.obstacles),
    )

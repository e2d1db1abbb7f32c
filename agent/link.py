"""The link: one session over one channel, messages and page batches instead of bytes.

Joins the sans-IO session (what is allowed when) to the blocking channel (bytes), for either side. Must
never decide anything about a migration. A peer's Abort, an obstacle list or nonsense on the wire come out
as the agent's own errors.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TypeVar

from agent.channel import Channel
from agent.errors import RefusedError, TransferError
from agent.frames import FrameReader, FrameWriter
from agent.types import Obstacle
from protocol.codec import Buffer
from protocol.errors import ProtocolError
from protocol.framing import FrameType, encode_frame
from protocol.limits import MAX_OBSTACLES
from protocol.messages import Abort, Message, Prepared, WireObstacle, decode_message, fit_text
from protocol.pages import PageBatch, PageEncoding, batch_buffers, check_batch, parse_batch
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
        self._writer = FrameWriter(channel)

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
        self._writer.write_frame(FrameType.CONTROL, self.session.send(message))

    def send_all(self, messages: Iterable[Message]) -> None:
        """Send several control messages at once: the peer wakes up only once.

        :raises TransferError: when the link is broken.
        """
        frames = [
            encode_frame(FrameType.CONTROL, self.session.send(message)) for message in messages
        ]
        self.channel.send_buffers([buffer for frame in frames for buffer in frame])

    def send_batch(
        self, space_id: int, encoding: PageEncoding, ranges: array[int], payload: Buffer = b""
    ) -> int:
        """Send one page batch; the buffers are free again afterwards. Returns bytes on the wire."""
        batch = check_batch(space_id, encoding, ranges, payload)
        self.session.page_batch_sent(batch)
        return self._writer.write_frame(FrameType.PAGES, *batch_buffers(batch))

    def send_raw(self, buffers: list[Buffer]) -> None:
        """Send a frame that is encoded and counted already (PageSender does both)."""
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

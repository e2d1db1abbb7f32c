"""The destination: take one process, or play an image.

Mirrors the source: handshake, preflight, a skeleton process built early, pages landed in place as they come,
and once the source is frozen the rest of the state, until the copy stands complete and stopped. It runs only
after COMMIT. Before that every failure ends the skeleton and nothing else; after COMMIT the copy is never
given up: it is held so that not even this agent's death ends it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator

from agent import interrupts
from agent.channel import Channel
from agent.errors import (
    MigrationError,
    RefusedError,
    RestoreError,
    TransferError,
)
from agent.hostfacts import gather_host_facts
from agent.link import Link, aborted, from_wire, to_wire
from agent.options import RecvOptions
from agent.preflight import find_restore_obstacles
from agent.rebuild import Rebuild
from agent.report import CompletedReport, PhaseClock, Reporter
from agent.serve import serve
from agent.session_store import ABORTED, COMMITTED, SessionStore
from agent.target.tracer import release_hold
from agent.types import Obstacle, Pid
from agent.version import SOFTWARE
from protocol.errors import ProtocolError
from protocol.messages import (
    Abort,
    Accept,
    Commit,
    Decision,
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
    StateEnd,
    StateSection,
    Switchover,
)
from protocol.pages import PageBatch
from protocol.session import Role, SessionState
from protocol.state import decode_section, load_all
from protocol.version import choose_version, explain_refusal

_log = logging.getLogger(__name__)


def receive(options: RecvOptions, reporter: Reporter) -> int:
    """Carry out ``agent-recv``; return the exit status.

    :raises MigrationError: nothing can be received at the address, or the only migration failed.
    """
    load_all()
    return serve(options, reporter, lambda channel: _handle(channel, options, reporter))


def _handle(channel: Channel, options: RecvOptions, reporter: Reporter) -> int | None:
    channel.phase = "handshake"
    channel.timeout_s = options.io_timeout_s
    link = Link(channel, Role.DESTINATION)
    store = SessionStore(options.state_dir)
    first = link.receive()
    if isinstance(first, Resolve):
        _answer_resolve(link, store, first)
        return None
    assert isinstance(first, Hello)  # The session lets nothing else begin.
    migration = _Migration(link, options, reporter, store, first)
    try:
        return migration.run()
    except BaseException as err:
        migration.give_up(err)
        raise
    finally:
        channel.close_gracefully()


def _answer_resolve(link: Link, store: SessionStore, message: Resolve) -> None:
    """Tell how a session ended; one without a decision is aborted by being asked for."""
    record = store.record_decision(message.session, ABORTED)
    if record.decision == COMMITTED:
        # An agent that died between its decision and the release left the copy held.
        with contextlib.suppress(MigrationError, OSError):
            release_hold(Pid(record.pid))
    link.send(Resolution(session=message.session, decision=Decision(record.decision)))
    link.channel.close_gracefully()


class _Migration:
    """One migration from the destination's point of view."""

    def __init__(
        self,
        link: Link,
        options: RecvOptions,
        reporter: Reporter,
        store: SessionStore,
        hello: Hello,
    ) -> None:
        self.link = link
        self.options = options
        self.reporter = reporter
        self.store = store
        self.hello = hello
        self.clock = PhaseClock()
        self.phase = "handshake"
        self.sections: dict[str, list[object]] = {}
        self.rebuild: Rebuild | None = None

    def run(self) -> int:
        """Go through all phases; return the exit status."""
        self.reporter.connected(self.link.channel.peer, self.hello.session)
        with self._phase("handshake"):
            self._handshake()
        with self._phase("prepare"):
            self._prepare()
        assert self.rebuild is not None
        rebuild = self.rebuild
        with self._phase("rounds"):
            self._receive_rounds(rebuild)
        gc.disable()
        try:
            with self.reporter.deferred():
                with self._phase("restore"):
                    end = self._receive_final(rebuild)
                    digest = self._restore(rebuild, end)
                if not self.link.recorded:
                    self.link.send(Restored(digest=digest))
                with self._phase("commit"), interrupts.shielded(raise_after=False):
                    self._commit(rebuild)
        finally:
            gc.enable()
        self._complete(rebuild, verified=True if end.digest else None)
        return rebuild.wait_exit() if self.options.wait else 0

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.phase = self.link.channel.phase = name
        self.reporter.phase(name)
        with self.clock.phase(name, frozen=name in ("restore", "commit")):
            yield

    def give_up(self, error: BaseException) -> None:
        """End what was built, tell the source, record that this session came to nothing."""
        if self.link.state in (SessionState.COMMITTED, SessionState.COMPLETED):
            return
        if self.rebuild is not None:
            self.rebuild.abandon()
        obstacles = error.obstacles if isinstance(error, RefusedError) else ()
        with contextlib.suppress(MigrationError):
            if not self.link.recorded:
                self.store.record_decision(self.hello.session, ABORTED)
        self.link.abort(self.phase, str(error) or type(error).__name__, obstacles)
        self.reporter.failed(error, phase=self.phase, session=self.hello.session)

    # -- while the source runs -------------------------------------------------------------------------

    def _handshake(self) -> None:
        facts = gather_host_facts()
        try:
            version = choose_version(self.hello.version_min, self.hello.version_max)
        except ProtocolError as err:
            raise TransferError(str(err)) from err
        obstacles = from_wire(explain_refusal(self.hello.host, facts))
        if obstacles:
            raise RefusedError(f"Cannot take a process of this host: {obstacles[0]}", obstacles)
        if not self.link.recorded:
            self.link.send(Accept(version=version, software=SOFTWARE, host=facts))

    def _prepare(self) -> None:
        while not isinstance(message := self._next(), Prepare):
            if not isinstance(message, StateSection):
                raise TransferError(f"Unexpected {type(message).__name__} before Prepare")
            self._keep(message)
        self.rebuild = Rebuild(self.options, self.hello, recorded=self.link.recorded)
        obstacles = find_restore_obstacles(self.sections, self.options)
        if obstacles:
            self._refuse(obstacles)
        self.rebuild.start(self.sections)
        if not self.link.recorded:
            self.link.send(Prepared())

    def _refuse(self, obstacles: list[Obstacle]) -> None:
        if not self.link.recorded:
            self.link.send(Prepared(obstacles=to_wire(obstacles)))
        plural = "" if len(obstacles) == 1 else "s"
        raise RefusedError(
            f"Cannot take the process: {len(obstacles)} obstacle{plural}: {obstacles[0]}", obstacles
        )

    def _keep(self, section: StateSection) -> None:
        self.sections.setdefault(section.kind, []).append(decode_section(section))

    def _next(self) -> Message | PageBatch:
        message = self.link.receive()
        if isinstance(message, Abort):
            raise aborted(message, self.link.channel.peer)
        return message

    def _receive_rounds(self, rebuild: Rebuild) -> None:
        self.sections.clear()
        while not isinstance(message := self._next(), Switchover):
            self._take(rebuild, message)

    def _take(self, rebuild: Rebuild, message: Message | PageBatch) -> None:
        if isinstance(message, PageBatch):
            rebuild.place(message)
        elif isinstance(message, StateSection):
            if message.kind == "layout":
                rebuild.follow_layout(decode_section(message))
            elif message.kind == "shmem":
                for state in decode_section(message).objects:
                    rebuild.describe_object(state)
            else:
                self._keep(message)
        elif not isinstance(message, (RoundBegin, RoundEnd)):
            raise TransferError(f"Unexpected {type(message).__name__} in {self.phase}")

    # -- while the source is frozen --------------------------------------------------------------------

    def _receive_final(self, rebuild: Rebuild) -> StateEnd:
        while not isinstance(message := self._next(), StateEnd):
            self._take(rebuild, message)
        return message

    def _restore(self, rebuild: Rebuild, end: StateEnd) -> str | None:
        rebuild.finish_memory(self.sections)
        digest = None
        if end.digest is not None:
            digest = rebuild.digest()
            if digest != end.digest:
                raise RestoreError(
                    f"Memory of process {rebuild.pid} differs from the source's: digest {digest} "
                    f"instead of {end.digest}"
                )
        rebuild.finish_task(self.sections)
        return digest

    def _commit(self, rebuild: Rebuild) -> None:
        if self.link.recorded:
            self.link.expect(Commit)
            rebuild.release()
            return
        self.link.expect(Commit)
        try:
            rebuild.hold()
            record = self.store.record_decision(self.hello.session, COMMITTED, rebuild.pid)
            if record.decision != COMMITTED:
                raise TransferError(f"Session {self.hello.session} was resolved as aborted")
        except BaseException:
            rebuild.abandon()
            raise
        released_ns = rebuild.release()
        try:
            self.link.send(Resumed(pid=rebuild.ns_pid, released_monotonic_ns=released_ns))
        except TransferError as err:
            # It runs, and the record says so: the source learns it by --resolve.
            _log.warning("Cannot tell the source that process %d runs: %s", rebuild.pid, err)

    def _complete(self, rebuild: Rebuild, *, verified: bool | None) -> None:
        rebuild.write_pidfile()
        self.reporter.completed(
            CompletedReport(
                session=self.hello.session,
                pid=rebuild.pid,
                downtime_s=None,
                total_s=self.clock.elapsed_s,
                bytes_total=self.link.channel.bytes_received,
                pages_total=rebuild.pages_total,
                pages_zero=rebuild.pages_zero,
                address=self.link.channel.peer,
                verified=verified,
                timeline=self.clock.spans,
                notes=rebuild.notes,
            )
        )

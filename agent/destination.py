"""The destination: take one process, or play an image.

Mirrors the source: handshake, preflight, a skeleton process built early, pages landed in place as they come,
and once the source is frozen the rest of the state, until the copy stands complete and stopped. It runs only
after COMMIT. Before that every failure ends the skeleton and nothing else; after COMMIT the copy is never
given up: it is held so that not even this agent's death ends it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator

from agent import interrupts, reaper, restart_hints
from agent.channel import Channel
from agent.errors import (
    MigrationError,
    RefusedError,
    RestoreError,
    TransferError,
)
from agent.hostfacts import gather_host_facts
from agent.link import Link, aborted, from_wire, to_wire
from agent.machine import require_machine
from agent.niceness import Niceness
from agent.options import RecvOptions
from agent.preflight import find_restore_obstacles, only
from agent.rebuild import Rebuild
from agent.report import CompletedReport, PhaseClock, Reporter
from agent.serve import serve
from agent.session_store import ABORTED, COMMITTED, DecidedRecord, SessionStore
from agent.target.hold import release_hold
from agent.types import Obstacle
from agent.version import SOFTWARE
from agent.warmup import urgent, warm_up
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
    RoundPlaced,
    StateEnd,
    StateSection,
    Switchover,
)
from protocol.pages import PageBatch
from protocol.sections import decode_section
from protocol.session import Role, SessionState
from protocol.state import load_all
from protocol.state.guards import GuardsState
from protocol.version import choose_version, explain_refusal

_log = logging.getLogger(__name__)


def receive(options: RecvOptions, reporter: Reporter) -> int:
    """Carry out ``agent-recv``; return the exit status.

    :raises MigrationError: nothing can be received at the address, or the only migration failed.
    """
    require_machine()
    load_all()
    reaper.install()
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
    record = _settle(store, message.session)
    decision = Decision.UNKNOWN if record is None else Decision(record.decision)
    _log.info("Session %s was asked for: %s", message.session, decision.value)
    link.send(Resolution(session=message.session, decision=decision))
    link.channel.close_gracefully()


def _settle(store: SessionStore, session: str) -> DecidedRecord | None:
    """Decide a session and have its copy follow the decision; None: it is not known here.

    An agent that died within the commit left the copy stopped and the rest to do.
    """
    if store.lookup_prepared(session) is not None:
        store.abort(session)
    record = store.lookup(session)
    if record is None or not record.copy.still_exists():
        return record
    if record.decision == COMMITTED:
        try:
            release_hold(record.copy.pid)
        except MigrationError as err:
            _log.warning("Cannot let process %d go: %s", record.copy.pid, err)
    else:
        # Its agent, should it still live, finds the decision when it is about to commit.
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.copy.pid, signal.SIGKILL)
    return record


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
        self._soon = False
        """Whether the round that is on its way is the last one before the freeze."""
        self._niceness = Niceness()
        self._pace = contextlib.ExitStack()
        """Considerate while the source runs, urgent afterwards."""
        self.prepared = False
        """Whether the session store knows of this session."""
        self.committing = False
        """Whether the session may have been recorded as committed."""
        self.committed = False

    def run(self) -> int:
        """Go through all phases; return the exit status."""
        self.reporter.connected(self.link.channel.peer, self.hello.session)
        if not self.link.recorded:
            self._pace.enter_context(self._niceness)
        with self._phase("handshake"):
            self._handshake()
        with self._phase("prepare"):
            self._prepare()
        assert self.rebuild is not None
        rebuild = self.rebuild
        with self._phase("rounds"):
            self._receive_rounds(rebuild)
        with self._pace, self.reporter.deferred():
            self._make_haste()
            with self._phase("restore"):
                end = self._receive_final(rebuild)
                digest = self._restore(rebuild, end)
            if not self.link.recorded:
                self.link.send(Restored(digest=digest))
            with self._phase("commit"):
                # While the source takes its hold. What fails here still fails before anything is decided.
                rebuild.finish_threads()
                if not self.link.recorded:
                    rebuild.prepare_hold()
                # May be interrupted for as long as there is nothing to read.
                self.link.channel.poll_readable(self.options.io_timeout_s)
                with interrupts.shielded(raise_after=False):
                    self._commit(rebuild)
        restart_hints.save(self.options.state_dir, rebuild.pid)
        self._complete(rebuild, verified=True if end.digest else None)
        if self.options.wait:
            return rebuild.wait_exit()
        reaper.adopt(rebuild.pid)
        return 0

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.phase = self.link.channel.phase = name
        self.reporter.phase(name)
        with self.clock.phase(name, frozen=name in ("restore", "commit")):
            yield

    def _make_haste(self) -> None:
        """The source is about to freeze, or has: be urgent until the end of the migration."""
        self._pace.close()
        self._pace.enter_context(urgent())

    def give_up(self, error: BaseException) -> None:
        """Record that this session came to nothing, end what was built, tell the source."""
        self._pace.close()
        if self.committed:
            return
        if self._abandon():
            obstacles = error.obstacles if isinstance(error, RefusedError) else ()
            self.link.abort(self.phase, str(error) or type(error).__name__, obstacles)
        self.reporter.failed(error, phase=self.phase, session=self.hello.session)

    def _abandon(self) -> bool:
        """End the copy, as far as it is certain that it is not the process; return whether the source may hear of it.

        In this order: the record comes first, so that whatever happens next the session can only be found aborted.
        """
        aborted = not self.prepared
        if self.prepared:
            try:
                aborted = self.store.abort(self.hello.session) == ABORTED
            except MigrationError as err:
                level = logging.WARNING if self.committing else logging.DEBUG
                _log.log(level, "Cannot tell what became of session %s: %s", self.hello.session, err)
        if self.rebuild is not None:
            if aborted or not self.committing:
                self.rebuild.abandon()
            else:
                # Both copies stay stopped until the record can be read.
                self.rebuild.leave_held()
        return aborted or self.link.state is not SessionState.COMMITTED

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
        self.rebuild = Rebuild(self.options, self.hello, self.clock, recorded=self.link.recorded)
        obstacles = find_restore_obstacles(self.sections, self.options)
        if obstacles:
            self._refuse(obstacles)
        self.rebuild.start(self.sections)
        if not self.link.recorded:
            # Synced to disk now, so that the commit has only to give it its name.
            self.prepared = True
            self.store.prepare(self.hello.session, self.rebuild.pid)
            self.link.send(Prepared())
        warm_up()

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
            if isinstance(message, RoundEnd):
                if self._soon:
                    self._make_haste()
                rebuild.settle()
                if not self.link.recorded:
                    self.link.send(RoundPlaced(round=message.round))

    def _take(self, rebuild: Rebuild, message: Message | PageBatch) -> None:
        if isinstance(message, PageBatch):
            rebuild.place(message)
            self._niceness.look()
        elif isinstance(message, StateSection):
            if message.kind == "layout":
                rebuild.follow_layout(decode_section(message))
            elif message.kind == "pre_dump":
                self._soon = True
                state = decode_section(message)
                if state is not None:
                    rebuild.prepare_threads(state)
            elif message.kind == "pre_files":
                rebuild.prepare_files(decode_section(message))
            elif message.kind == "shmem":
                for state in decode_section(message).objects:
                    rebuild.describe_object(state)
            else:
                self._keep(message)
        elif not isinstance(message, (RoundBegin, RoundEnd)):
            raise TransferError(f"Unexpected {type(message).__name__} in {self.phase}")

    # -- while the source is frozen --------------------------------------------------------------------

    def _receive_final(self, rebuild: Rebuild) -> StateEnd:
        # What can be made of what is here is made while the rest is still on its way.
        steps = {"mm": rebuild.begin_task, "files": rebuild.restore_files}
        due = list(steps)
        began_s = self.clock.elapsed_s
        while not isinstance(message := self._next(), StateEnd):
            self._take(rebuild, message)
            kind = message.kind.removesuffix("_change") if isinstance(message, StateSection) else ""
            if kind in steps:
                if due[:1] != [kind]:
                    raise TransferError(f"The source sent {kind!r} out of turn")
                self.clock.add("restore: wait", began_s, self.clock.elapsed_s, frozen=True)
                steps[due.pop(0)](self.sections)
                began_s = self.clock.elapsed_s
        if due:
            raise TransferError(f"The source did not send {due[0]!r}")
        self.clock.add("restore: last pages", began_s, self.clock.elapsed_s, frozen=True)
        return message

    def _restore(self, rebuild: Rebuild, end: StateEnd) -> str | None:
        rebuild.finish_memory(only(self.sections, "guards", GuardsState))
        digest = None
        if end.digest is not None:
            digest = rebuild.digest()
            if digest != end.digest:
                raise RestoreError(
                    f"Memory of process {rebuild.pid} differs from the source's: digest {digest} "
                    f"instead of {end.digest}"
                )
        rebuild.finish_task()
        return digest

    def _commit(self, rebuild: Rebuild) -> None:
        self.link.expect(Commit)
        if self.link.recorded:
            self.committed = True
            rebuild.release()
            return
        # In this order: a copy that neither dies with the agent nor is held would run undecided, and one that is
        # committed but dies with the agent would be lost.
        rebuild.hold()
        self.committing = True
        if self.store.commit(self.hello.session) != COMMITTED:
            raise TransferError(f"Session {self.hello.session} was resolved as aborted")
        self.committed = True  # The point of no return: from here on the copy is the process.
        released_ns = rebuild.release()
        try:
            self.link.send(Resumed(pid=rebuild.ns_pid, released_monotonic_ns=released_ns))
        except TransferError as err:
            # It runs, and the record says so: the source learns it by --resolve.
            _log.warning("Cannot tell the source that process %d runs: %s", rebuild.pid, err)

    def _complete(self, rebuild: Rebuild, *, verified: bool | None) -> None:
        try:
            rebuild.write_pidfile()
        except OSError as err:
            # It runs; nothing that goes wrong now may look as if it did not.
            rebuild.notes.append(f"Cannot write {self.options.pidfile!r}: {err.strerror}")
            _log.warning("%s", rebuild.notes[-1])
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

"""The source: send one process to the destination, or write it into an image.

Reads top to bottom as the migration happens: check, connect, handshake, prepare, arm, rounds, freeze,
final state, commit. Before the commit every failure, here or there, leaves the target running as if nothing
had happened; after it the original never runs again by itself, and what fails then is only a warning.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from agent import interrupts, net, restart_hints
from agent.check import Target, find_obstacles, has_exited, open_target
from agent.errors import (
    MigrationError,
    RefusedError,
    SetupError,
    TargetGone,
    TooLateError,
    TransferError,
    UndecidedError,
)
from agent.hostfacts import gather_host_facts
from agent.kernel.features import kernel_features
from agent.link import Link, from_wire, refused_by
from agent.machine import require_machine
from agent.niceness import Niceness
from agent.options import SendOptions
from agent.pages.compress import Compressor
from agent.pages.digest import digest_process
from agent.pages.sender import PageSender
from agent.pages.throttle import BandwidthLimit
from agent.policy import Action, Decision, PolicyLimits, RoundStats, decide
from agent.procfs.process import list_children
from agent.procfs.stat import read_stat
from agent.rehearsal import rehearse_dump
from agent.report import CompletedReport, PhaseClock, Reporter, RoundReport, downtime
from agent.rounds import RoundSender
from agent.session_store import SessionStore
from agent.snapshot import (
    TaskSender,
    send_guards,
    send_plan,
    send_pre_dump,
    send_pre_files,
)
from agent.state.files import dump_files, has_direct_io
from agent.state.inetsk import reset_connections
from agent.state.predump import PreDump
from agent.target.hold import Hold
from agent.target.parking import interrupt_parked
from agent.target.tracer import Tracer
from agent.tracker.base import Tracker
from agent.tracker.choose import REFERENCE, Choice, choose_tracker
from agent.tracker.create import create_tracker
from agent.types import Obstacle
from agent.version import SOFTWARE
from agent.warmup import AHEAD_PRIORITY, make_urgent, urgent, warm_up
from protocol.messages import (
    Accept,
    Commit,
    Hello,
    Prepare,
    Prepared,
    Restored,
    Resumed,
    Switchover,
)
from protocol.pages import PageBatch
from protocol.session import Role, SessionState
from protocol.state import load_all
from protocol.version import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, explain_refusal

_log = logging.getLogger(__name__)

FREEZE_ATTEMPTS = 5
"""How often a target that forks, or does not wait for the agent, at the wrong moment is let go and frozen again."""
CLOSING_ROUNDS = 4
"""How many short rounds there may be right before the freeze."""
FEW_PAGES = 64
"""So many dirty pages cost a freeze next to nothing."""
SOME_PAGES = 1024
"""So many are on their way no longer than it takes to stop all threads."""
CHILDREN_WAIT_S = 10.0
"""How long a target that has just forked a helper (BGSAVE...) may keep it before the migration gives up."""


def send(options: SendOptions, reporter: Reporter) -> int:
    """Carry out one migration or checkpoint; return the exit status.

    :raises MigrationError: the migration failed (its exit code says how), the target is unharmed unless it
        is an UndecidedError.
    """
    require_machine()
    load_all()
    with open_target(options.pid, options) as target:
        obstacles = find_obstacles(target)
        if obstacles:
            plural = "" if len(obstacles) == 1 else "s"
            raise RefusedError(
                f"Process {options.pid} cannot be moved: {len(obstacles)} obstacle{plural}", obstacles
            )
        migration = _Migration(options, reporter, target)
        with interrupts_reported(reporter, migration), _death_explained(target, migration):
            migration.run()
    return 0


@contextlib.contextmanager
def _death_explained(target: Target, migration: _Migration) -> Iterator[None]:
    """Name the cause where a target that exited or was killed shows as some failed call or odd reading."""
    try:
        yield
    except Exception as err:
        if _may_be_death(err) and has_exited(target.pidfd):
            raise TargetGone(f"Process {target.pid} exited in {migration.phase}") from err
        raise


def _may_be_death(error: BaseException) -> bool:
    # Obstacles, too: what a dying process has open or mapped can no longer be examined.
    return isinstance(error, RefusedError) or not isinstance(error, MigrationError)


@contextlib.contextmanager
def interrupts_reported(reporter: Reporter, migration: _Migration) -> Iterator[None]:
    """Turn whatever ends a migration early into one ``failed`` event with its phase and session."""
    try:
        yield
    except BaseException as err:
        reporter.failed(err, phase=migration.phase, session=migration.session)
        raise


class _Migration:
    """One migration from the source's point of view."""

    def __init__(self, options: SendOptions, reporter: Reporter, target: Target) -> None:
        assert options.address is not None
        self.options = options
        self.address = options.address
        self.reporter = reporter
        self.target = target
        self.session = uuid.uuid4().hex
        self.phase = "setup"
        self.verify = options.verify
        """Whether digests are compared: also where stores may go past the tracker (has_direct_io)."""
        self.tracker = Choice(options.tracker, "")
        self.clock = PhaseClock()
        self.reports: list[RoundReport] = []
        self.notes: list[str] = []
        self.store = SessionStore(options.state_dir)
        self.limiter: BandwidthLimit | None = None
        self.link: Link | None = None
        self._made_ahead = contextlib.ExitStack()
        self._niceness = Niceness()
        self.pre_dump: PreDump | None = None
        self._decision: Decision | None = None
        """That rounds are enough; None if there were none."""

    def run(self) -> None:
        """Go through all phases."""
        with self._niceness:
            self._run()

    def _run(self) -> None:
        self.tracker = choose_tracker(self.options.tracker, kernel_features())
        _log.info("Tracker: %s (%s)", *self.tracker)
        with self._phase("connect"):
            channel = net.connect(
                self.address,
                timeout_s=self.options.connect_timeout_s,
                remote_command=self.options.remote_command,
                tls=self.options.tls,
            )
        channel.timeout_s = self.options.io_timeout_s
        link = self.link = Link(channel, Role.SOURCE)
        try:
            self.reporter.connected(str(self.address), self.session)
            with self._phase("handshake"):
                self._handshake(link)
            with self._phase("prepare"):
                self._prepare(link)
            with self._armed() as tracker, self._rounds(link, tracker) as rounds, self._made_ahead:
                self._precopy(link, rounds)
                with self.reporter.deferred():
                    report = self._switch_over(link, tracker, rounds)
        except BaseException as err:
            if not isinstance(err, UndecidedError):
                self.store.forget_undecided(self.session)
                reason = str(err) or type(err).__name__
                obstacles = _obstacles_of(err)
                if _may_be_death(err) and has_exited(self.target.pidfd):
                    reason, obstacles = f"Process {self.target.pid} exited", ()
                link.abort(self.phase, reason, obstacles)
                restart_hints.save(self.options.state_dir, self.target.pid)
            raise
        finally:
            channel.close_gracefully()
        if self.options.leave_running:
            restart_hints.save(self.options.state_dir, self.target.pid)
        self.reporter.completed(report)

    @contextlib.contextmanager
    def _phase(self, name: str, *, frozen: bool = False) -> Iterator[None]:
        self.phase = name
        if self.link is not None:
            self.link.channel.phase = name
        if not frozen:
            self.reporter.phase(name)
        with self.clock.phase(name, frozen=frozen):
            yield

    # -- before anything is touched --------------------------------------------------------------------

    def _handshake(self, link: Link) -> None:
        facts = gather_host_facts()
        link.send(
            Hello(
                version_min=OLDEST_PROTOCOL_VERSION,
                version_max=PROTOCOL_VERSION,
                software=SOFTWARE,
                session=self.session,
                host=facts,
            )
        )
        if link.recorded:
            return
        accept = link.expect(Accept)
        obstacles = from_wire(explain_refusal(facts, accept.host))
        if obstacles:
            raise RefusedError(f"Cannot move to {accept.host.hostname}: {obstacles[0]}", obstacles)
        _log.info("Connected to %s (%s)", accept.host.hostname, accept.software)

    def _prepare(self, link: Link) -> None:
        send_plan(link, self.target)
        link.send(Prepare())
        # While the destination looks for obstacles:
        warm_up()
        rehearse_dump()
        if not link.recorded:
            prepared = link.expect(Prepared)
            if prepared.obstacles:
                raise refused_by(prepared, str(self.address))

    # -- pre-copy: the target runs ---------------------------------------------------------------------

    @contextlib.contextmanager
    def _armed(self) -> Iterator[Tracker]:
        """Watch the target's memory for as long as the body runs; only one thread is stopped, once."""
        with self._phase("arm"):
            restart_hints.load(self.options.state_dir, self.target.pid)
            tracker = create_tracker(
                self.tracker.name,
                self.target.pid,
                self.target.pidfd,
                log_capacity=self.options.log_capacity,
                log_when_full=self.options.log_when_full,
            )
        try:
            tracker.arm()
            yield tracker
        finally:
            tracker.disarm()

    @contextlib.contextmanager
    def _rounds(self, link: Link, tracker: Tracker) -> Iterator[RoundSender]:
        method = self.options.compress
        if self.options.bandwidth_limit:
            self.limiter = BandwidthLimit(self.options.bandwidth_limit)
        sender = PageSender(
            link.send_raw,
            compress=Compressor(method.method.value, method.level, progress=link.channel.progress),
            on_batch=self._before_batch,
            limiter=self.limiter,
        )
        try:
            yield RoundSender(link, self.target, tracker, sender, self.reporter.progress)
        finally:
            sender.close()

    def _before_batch(self, batch: PageBatch) -> None:
        assert self.link is not None
        self.link.session.page_batch_sent(batch)
        self._niceness.look()

    def _precopy(self, link: Link, rounds: RoundSender) -> None:
        limits = PolicyLimits(
            downtime_limit_s=self.options.downtime_limit_s,
            max_rounds=self.options.max_rounds,
            bandwidth_bytes_per_s=self.options.bandwidth_limit,
        )
        self.phase = link.channel.phase = "rounds"
        self.reporter.phase(self.phase)
        decision = self._decision = self._iterate(link, rounds, limits) if self.options.max_rounds else None
        self._wait_for_children()
        rounds.learn_flags()
        self.task_sender = TaskSender(self.target)
        self._made_ahead.callback(self.task_sender.close)
        self._record(link)
        if not link.recorded:
            send_pre_dump(link, self.target)
        if self.options.max_rounds:
            self.pre_dump = send_pre_files(link, self.target)
            self._made_ahead.callback(self.pre_dump.close)
        # What is waited for from here on is the agent.
        self._niceness.restore()
        if decision is not None:
            self._close_in(rounds, decision)

    def _iterate(self, link: Link, rounds: RoundSender, limits: PolicyLimits) -> Decision:
        """Send rounds until what is left is worth a freeze.

        :raises TransferError: it never will be.
        """
        while True:
            number = len(self.reports)
            start_s = self.clock.elapsed_s
            dirty = rounds.collect(final=False)
            report = rounds.send_round(number, dirty)
            link.check_peer()
            self.clock.add(f"round {number}", start_s, self.clock.elapsed_s)
            decision = decide([*map(_stats, self.reports), _stats(report)], limits)
            self._note_round(report, decision)
            if decision.action is Action.GIVE_UP:
                raise TransferError(f"Gave up after round {number}: {decision.reason}")
            if decision.action is Action.SWITCHOVER:
                return decision

    def _close_in(self, rounds: RoundSender, decision: Decision) -> None:
        """Send what was written during all that, then what was during that, until it gets no less.

        What is left is downtime. With next to nothing before it, a round is short, and finds as little as there can be.
        """
        before: int | None = None
        for _ in range(CLOSING_ROUNDS):
            if len(self.reports) >= self.options.max_rounds:
                break
            report = rounds.send_round(len(self.reports), rounds.collect(final=False))
            self._note_round(report, replace(decision, reason="right before the freeze"))
            if report.pages_dirty <= FEW_PAGES or before and report.pages_dirty > before / 2:
                break
            before = report.pages_dirty

    def _note_round(self, report: RoundReport, decision: Decision) -> None:
        report = replace(
            report,
            predicted_downtime_s=decision.predicted_downtime_s,
            decision=f"{decision.action.value}: {decision.reason}",
        )
        self.reports.append(report)
        self.reporter.round(report)
        _log.info("Round %d: %s: %s", report.round, decision.action.value, decision.reason)

    def _wait_for_children(self) -> None:
        deadline = time.monotonic() + CHILDREN_WAIT_S
        while list_children(self.target.pid):
            if time.monotonic() > deadline:
                raise RefusedError(
                    f"Process {self.target.pid} has started a child process",
                    find_obstacles(self.target),
                )
            time.sleep(0.02)

    def _record(self, link: Link) -> None:
        """Record the session as undecided while that costs no downtime: before COMMIT it does no harm."""
        if link.recorded:
            return
        try:
            was_stopped = read_stat(self.target.pid).state == "T"
        except (FileNotFoundError, ProcessLookupError) as err:
            raise TargetGone(f"Process {self.target.pid} is gone") from err
        self.store.record_undecided(
            self.session, self.target.pid, str(self.address), was_stopped=was_stopped
        )

    # -- switchover: the target is frozen --------------------------------------------------------------

    def _switch_over(self, link: Link, tracker: Tracker, rounds: RoundSender) -> CompletedReport:
        if self.limiter is not None:
            self.limiter.enabled = False
        with contextlib.ExitStack() as pace, ThreadPoolExecutor(1, "look") as executor:
            executor.submit(make_urgent, 0, AHEAD_PRIORITY).result()  # makes its thread
            link.send(Switchover())
            for attempt in range(1, FREEZE_ATTEMPTS + 1):
                with Tracer(self.target.pid) as tracer:
                    if attempt == 1:
                        self._send_latest(rounds)
                        pace.enter_context(urgent())
                        self.task_sender.send_ahead(link, tracer)
                    self._freeze(tracer)
                    try:
                        is_sent = self._send_task(link, tracer, partial(rounds.look_ahead, executor))
                    except TooLateError as err:
                        # Nothing was sent, and all of it runs again in a moment.
                        if attempt == FREEZE_ATTEMPTS:
                            raise
                        _log.info("Freezing once more: %s", err)
                        tracer.detach_all()
                        continue
                    if not is_sent:
                        # It forked after the last look: let both go on, and wait for the child again.
                        tracer.detach_all()
                        self._wait_for_children()
                        rounds.learn_flags()
                        continue
                    self._send_final(link, rounds)
                    return self._finish(link, tracer, tracker)
            raise SetupError(f"Process {self.target.pid} keeps starting child processes")

    def _send_latest(self, rounds: RoundSender) -> None:
        """Send, where the target writes a lot, what it has written while this was prepared."""
        decision = self._decision
        may_go_on = len(self.reports) < self.options.max_rounds
        if decision is not None and may_go_on and FEW_PAGES < self.reports[-1].pages_dirty <= SOME_PAGES:
            report = rounds.send_round(len(self.reports), rounds.collect(final=False), is_awaited=False)
            self._note_round(report, replace(decision, reason="with everything ready for the freeze"))

    def _freeze(self, tracer: Tracer) -> None:
        with self._phase("freeze", frozen=True):
            tracer.stop_all()

    def _send_task(self, link: Link, tracer: Tracer, on_dumped: Callable[[], None]) -> bool:
        with self._phase("task", frozen=True):
            return self.task_sender.send(link, tracer, on_dumped)

    def _send_final(self, link: Link, rounds: RoundSender) -> None:
        with self._phase("files", frozen=True), link.gathered():
            # Before the last look at memory: it shows which objects are open.
            has_direct = self._send_files(rounds)
        digest = None
        self.verify |= self.tracker.name != REFERENCE and has_direct
        with link.gathered():
            with self._phase("last round", frozen=True):
                dirty = rounds.collect(final=True)
                send_guards(link, self.target, dirty.guards.pairs)
                self.reports.append(rounds.send_round(len(self.reports), dirty, final=True))
            if self.verify:
                with self._phase("digest", frozen=True):
                    digest = digest_process(self.target.pid, dirty.maps)
            link.send(link.session.state_end(digest))

    def _send_files(self, rounds: RoundSender) -> bool:
        """Returns whether one is open with O_DIRECT."""
        if self.pre_dump is None:
            files = dump_files(self.target.ctx)
            rounds.send_files(files)
            return has_direct_io(files.files)
        change = self.pre_dump.dump_change()
        rounds.send_files(change)
        return self.pre_dump.has_direct_io or has_direct_io(change.files)

    def _finish(self, link: Link, tracer: Tracer, tracker: Tracker) -> CompletedReport:
        if link.recorded:
            return self._finish_image(link, tracer, tracker)
        with self._phase("restore", frozen=True):
            # The hold counts on each thread to look for signals before it runs again: parked ones may sleep till then.
            interrupt_parked(tracer)
            link.expect(Restored)
        hold = Hold(tracer)
        with interrupts.shielded(raise_after=False):
            with self._phase("commit", frozen=True):
                # From here on the target must not run again if this agent dies: the hold outlives it.
                hold.take()
                if not tracer.still_stopped():
                    # Killed while it was frozen: whoever did that does not want a copy that lives on.
                    raise TargetGone(f"Process {self.target.pid} was killed")
                commit_ns = time.monotonic_ns()
                resumed = self._commit(link, hold)
                resumed_ns = time.monotonic_ns()
            self._reset_connections()
            self._kill_original()
            self.store.forget_undecided(self.session)
        seconds, basis = downtime(
            frozen_ns=tracer.stopped_ns,
            commit_sent_ns=commit_ns,
            resumed_received_ns=resumed_ns,
            released_ns=resumed.released_monotonic_ns,
        )
        return self._report(link, tracker, seconds, basis, pid=resumed.pid)

    def _commit(self, link: Link, hold: Hold) -> Resumed:
        """Cross the point of no return.

        :raises UndecidedError: the answer did not come; both copies stay frozen.
        """
        try:
            link.send(Commit())  # The point of no return.
        except BaseException:
            # Not all of it left this host, so the destination will never see it.
            hold.drop()
            raise
        try:
            return link.expect(Resumed)
        except Exception as err:
            if link.state is SessionState.FAILED:
                # The destination has given up and will never run the copy: its record says so.
                hold.drop()
                raise
            link.lost()
            raise UndecidedError(
                f"The link broke with COMMIT in flight; process {self.target.pid} stays frozen: {err}",
                hint=f"agent-send --resolve {self.session} {self.address}",
            ) from err

    def _reset_connections(self) -> None:
        """Tell the clients of the original, which will not run again, before it gives up its memory.

        A dying process does that first, 60 ms and more per GiB, and its connections come after.
        """
        try:
            reset_connections(self.target.ctx)
        except OSError as err:
            _log.debug("Connections of process %d end with it: %s", self.target.pid, err)
        finally:
            self.target.ctx.drop_fetched()

    def _kill_original(self) -> None:
        try:
            signal.pidfd_send_signal(self.target.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            _log.warning("Process %d was gone before it could be ended", self.target.pid)

    def _finish_image(self, link: Link, tracer: Tracer, tracker: Tracker) -> CompletedReport:
        with (
            interrupts.shielded(raise_after=False),
            self._phase("complete", frozen=True),
        ):
            link.send(Commit())
            if self.options.leave_running:
                # Everything is in the image, only not durable yet: the original need not wait for the disk.
                tracer.detach_all()
                seconds = (time.monotonic_ns() - tracer.stopped_ns) / 1e9
                link.channel.complete()
            else:
                link.channel.complete()  # The point of no return: the image is durable.
                self._kill_original()
                seconds = (time.monotonic_ns() - tracer.stopped_ns) / 1e9
        return self._report(link, tracker, seconds, "image", pid=self.target.ns_pid)

    def _report(
        self, link: Link, tracker: Tracker, seconds: float, basis: str, *, pid: int
    ) -> CompletedReport:
        return CompletedReport(
            session=self.session,
            pid=pid,
            downtime_s=seconds,
            downtime_basis=basis,
            total_s=self.clock.elapsed_s,
            tracker=tracker.name,
            tracker_reason=self.tracker.reason,
            rounds=self.reports,
            bytes_total=link.channel.bytes_sent,
            pages_total=sum(report.pages_sent for report in self.reports),
            pages_zero=sum(report.pages_zero for report in self.reports),
            address=str(self.address),
            verified=True if self.verify and not link.recorded else None,
            timeline=self.clock.spans,
            notes=self.notes,
        )


def _stats(report: RoundReport) -> RoundStats:
    return RoundStats(
        pages_dirty=report.pages_dirty,
        pages_sent=report.pages_sent,
        pages_zero=report.pages_zero,
        bytes_sent=report.bytes_sent,
        seconds=report.seconds,
    )


def _obstacles_of(error: BaseException) -> tuple[Obstacle, ...]:
    return error.obstacles if isinstance(error, RefusedError) else ()

"""State of the target as sections: the plan while it runs, everything else once it is frozen.

The frozen part is what the downtime pays for: one injected run asks every thread at once, the rest is
procfs and a few ptrace requests. Nothing here changes the target.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator

from agent.check import Target
from agent.errors import TooLateError
from agent.link import Link
from agent.procfs.limits import read_limits
from agent.procfs.process import (
    list_fds,
    list_tids,
    read_comm,
    read_cwd,
    read_root,
)
from agent.procfs.status import Status, read_task_status
from agent.state.clocks import clock_shift
from agent.state.creds import creds_of
from agent.state.files import dump_files
from agent.state.limits import dump_limits
from agent.state.mempolicy import plan_policies
from agent.state.mm import dump_mm, plan_brk
from agent.state.predump import PreDump
from agent.state.sched import bound_cpus
from agent.state.task import TaskDump, in_sections
from agent.target.inject import Batch, Injector
from agent.target.tracer import Tracer
from protocol.messages import StateSection
from protocol.sections import encode_section
from protocol.state.guards import GuardsState
from protocol.state.limits import NR_LIMITS, RLIM_INFINITY, LimitsState, ResourceLimit
from protocol.state.plan import PlanState
from protocol.state.predump import PreDumpState
from protocol.state.sched import MAX_NODES_BYTES
from protocol.state.thread import ThreadsAheadState

_log = logging.getLogger(__name__)


def send_plan(link: Link, target: Target) -> None:
    """Send what the destination needs for its preflight; the target runs and is not touched."""
    files = dump_files(target.ctx, content=False)
    link.send(encode_section("files", target.ns_pid, files))
    link.send(encode_section("mm", target.ns_pid, dump_mm(target.pid, brk=0)))
    layout = target.layout.dump(target.maps(), target.vm_flags())
    link.send(encode_section("layout", target.ns_pid, layout))
    # Last, since it tells the time.
    link.send(encode_section("plan", target.ns_pid, _plan(target)))


def _plan(target: Target) -> PlanState:
    pid = target.pid
    limits = read_limits(pid)
    unlimited = (RLIM_INFINITY, RLIM_INFINITY)
    shift = clock_shift(pid)
    threads = list(_running_threads(pid))
    nodes = target.policy_nodes
    return PlanState(
        pid=target.ns_pid,
        tids=tuple(thread.ns_pid[-1] for thread in threads),
        affinities=tuple(map(bound_cpus, threads)),
        cwd=read_cwd(pid),
        root=read_root(pid),
        policy_nodes=None if nodes is None else nodes.to_bytes(MAX_NODES_BYTES, "little").rstrip(b"\0"),
        # What of it /proc does not show makes no difference to whether it can be had.
        creds=creds_of(threads[0], 0),
        name=read_comm(pid, pid).decode("utf-8", "replace"),
        highest_fd=max(list_fds(pid), default=-1),
        monotonic_ns=time.clock_gettime_ns(time.CLOCK_MONOTONIC) + shift.monotonic_ns,
        boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME) + shift.boottime_ns,
        realtime_ns=time.clock_gettime_ns(time.CLOCK_REALTIME),
        limits=LimitsState(
            limits=tuple(
                ResourceLimit(resource=number, soft=soft, hard=hard)
                for number in range(NR_LIMITS)
                for soft, hard in [limits.get(number, unlimited)]
            )
        ),
    )


def send_pre_dump(link: Link, target: Target) -> None:
    """Send what the destination may make ahead, as the running target has it now."""
    shift = clock_shift(target.pid)
    state = PreDumpState(
        tids=tuple(thread.ns_pid[-1] for thread in _running_threads(target.pid)),
        monotonic_ns=time.clock_gettime_ns(time.CLOCK_MONOTONIC) + shift.monotonic_ns,
        boottime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME) + shift.boottime_ns,
    )
    link.send(encode_section("pre_dump", target.ns_pid, state))


def send_pre_files(link: Link, target: Target) -> PreDump:
    """Send the open files of the running target that the destination may make ahead; close() what comes back."""
    files = PreDump(target.ctx)
    try:
        link.send(encode_section("pre_files", target.ns_pid, files.state))
    except BaseException:
        files.close()
        raise
    return files


def _running_threads(pid: int) -> Iterator[Status]:
    """The threads of a process that runs; the leader is there for as long as the process is."""
    for tid in list_tids(pid):
        try:
            yield read_task_status(pid, tid)
        except ProcessLookupError:
            if tid == pid:
                raise


class TaskSender:
    """Dumps and sends threads and process; made, at some expense, while the target still runs."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._dump = TaskDump(target.ctx, self._add_calls)
        self._early_limits = dump_limits(target.pid)
        self._limits_section = encode_section("limits", target.ns_pid, self._early_limits)

    def close(self) -> None:
        """Close what is open for the dump; closing twice is harmless."""
        self._dump.close()

    def _add_calls(self, leader: Batch) -> None:
        target = self._target
        self._brk = plan_brk(leader)
        self._policies = dict if target.policy_nodes is None else plan_policies(leader, target.pid)

    def send_ahead(self, link: Link, tracer: Tracer) -> None:
        """Dump the idle threads of the running target, send them, and leave them parked."""
        try:
            threads = self._dump.dump_ahead(tracer)
        except TooLateError as err:
            _log.info("No thread is dumped ahead: %s", err)
            tracer.detach_all()
            return
        for some in in_sections(threads):
            link.send(encode_section("threads_ahead", self._target.ns_pid, ThreadsAheadState(threads=some)))

    def send(self, link: Link, tracer: Tracer, on_dumped: Callable[[], None]) -> bool:
        """Every thread is stopped under this thread's ptrace: dump all, and send it, the memory descriptor too.

        Runs calls in the threads, which changes memory here and there (rseq areas, remainders of sleeps): the last
        look at memory must come later: ``on_dumped`` is called when it may. Notes the memory policies of mappings in
        the target.
        Returns False, and sends nothing, if the target has child processes.

        :raises MigrationError: something cannot be dumped; nothing was changed.
        """
        target, dump = self._target, self._dump
        # Policies are asked for by mapping.
        batches = dump.plan(tracer, anew=target.policy_nodes is not None)
        with Injector(tracer) as injector:
            injector.run_parallel(batches, meanwhile=dump.look())
            if dump.has_children():
                return False
            dump.peek()
            sections: list[StateSection] = []
            injector.close(meanwhile=self._encode(sections), then=on_dumped)
        link.send_all(sections)
        return True

    def _encode(self, sections: list[StateSection]) -> Iterator[object]:
        """Fill a list of what is to be sent, step by step."""
        threads = []
        for thread in self._dump.states():
            threads.append(thread)
            yield thread
        for kind, owner, state in self._dump.put_together(threads).sections():
            as_before = state is self._early_limits
            sections.append(self._limits_section if as_before else encode_section(kind, owner, state))
            yield kind
        target = self._target
        target.policies = self._policies()
        mm = dump_mm(target.pid, brk=self._brk.value)
        sections.append(encode_section("mm", target.ns_pid, mm))


def send_guards(link: Link, target: Target, guards: Iterable[int]) -> None:
    """Send the guard pages, flat (start, end) pairs, of the last look at memory."""
    link.send(encode_section("guards", target.ns_pid, GuardsState(ranges=tuple(guards))))

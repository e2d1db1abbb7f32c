"""Stopping and releasing the threads of one process with ptrace.

Theory of operation. Threads are seized (PTRACE_SEIZE), never attached: seizing sends no SIGSTOP, leaves group-stops
alone, and a tracer that dies lets every thread go on by itself. A thread is then in one of these stops:

- PTRACE_EVENT_STOP, by PTRACE_INTERRUPT: the ordinary case. The kernel takes this stop before it takes any signal from
  the queues, so what is queued stays queued. A system call that was interrupted shows rax = -ERESTART*; when the
  thread is let go with untouched registers the kernel restarts it.
- PTRACE_EVENT_STOP with a stopping signal: the process is in a group-stop (SIGSTOP, ^Z). Letting go restores that.
- signal-delivery-stop: a signal had been taken from its queue just before the interrupt. It is kept in the thread
  (``pending_stop_signal``) and handed over when the thread is let go; if the agent dies the kernel delivers it itself,
  provided that the report of the stop was never taken (see poll_stop()).

Must never be used from more than one thread of the agent (ptrace(2): requests must come from the tracer thread), and
must never let a thread of the source run while a register or the signal mask is not what it was, except through
agent.target.inject. Sources: ptrace(2), kernel/signal.c, kernel/ptrace.c.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, final

from agent.errors import FreezeError, TargetGone
from agent.kernel import ptrace, wait
from agent.procfs.process import list_tids
from agent.procfs.stat import read_stat, read_state, read_task_stat
from agent.procfs.status import read_task_status
from agent.target import restart, sleepers
from agent.target.memory import TargetMemory
from agent.target.tail import wait_healed
from agent.target.traced import Stop, StopKind, TracedThread
from agent.target.waiting import PATIENT_S, Errands, pause

log = logging.getLogger(__name__)

STOP_TIMEOUT_S: Final = 10.0
"""How long a thread may take to stop; only one in uninterruptible sleep takes longer than microseconds."""
_REAP_S: Final = 1.0
"""How long to wait for killed threads to end."""
_LOOK: Final = os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT | wait.WALL
_EVENTS_OF_CHILDREN: Final = (
    ptrace.PTRACE_EVENT_CLONE,
    ptrace.PTRACE_EVENT_FORK,
    ptrace.PTRACE_EVENT_VFORK,
)


@final
class Tracer:
    """The stopped or traced threads of process ``pid``; leaving the context lets all of them go.

    ``kill_on_exit`` is for a skeleton on the destination: it dies with the agent, and threads and processes that it
    makes are traced from their first instruction (see adopt()).

    :raises TargetGone: there is no such process.
    """

    def __init__(self, pid: int, *, kill_on_exit: bool = False) -> None:
        self.pid = pid
        self.kill_on_exit = kill_on_exit
        self.threads: dict[int, TracedThread] = {}
        self._dead: list[int] = []  # threads whose end may still have to be taken from the kernel
        self.new_children: list[int] = []
        """Ids (as the agent sees them) of threads and processes made by traced threads, oldest first."""
        self.errands = Errands()
        """What to do instead of waiting."""
        self.stopped_ns = 0
        """When stop_all() stopped the first thread, by CLOCK_MONOTONIC; or when a parked one was last known to sleep,
        of which it turned out that it did not."""
        self._options = ptrace.PTRACE_O_TRACESYSGOOD
        if kill_on_exit:
            # No exec events: the skeleton may not have left its own exec yet, though its descriptors are closed.
            self._options |= ptrace.PTRACE_O_EXITKILL | ptrace.PTRACE_O_TRACECLONE
            self._options |= ptrace.PTRACE_O_TRACEFORK | ptrace.PTRACE_O_TRACEVFORK
        else:
            self._options |= ptrace.PTRACE_O_TRACEEXEC
        self.memory = TargetMemory(pid)
        self.tail = None if kill_on_exit else wait_healed(pid, self.memory)
        """Where there was room for code when the process was last looked at; for find_tail()."""
        self._program = self._identify_program()

    def __enter__(self) -> Tracer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.detach_all()
        except (OSError, TargetGone) as err:
            # the target may be dead, or killed after the commit: that is no news
            log.debug("letting go of process %d: %s", self.pid, err)
        finally:
            self.memory.close()

    @property
    def leader(self) -> TracedThread:
        """The thread group leader.

        :raises KeyError: it is not traced.
        """
        return self.threads[self.pid]

    # -- attaching and stopping -------------------------------------------------------------------------------------

    def seize(self, tid: int) -> TracedThread:
        """Attach to a thread of the process without stopping it; nothing happens when it is attached already.

        :raises TargetGone: it died. :raises FreezeError: it cannot be traced, with the reason.
        """
        known = self.threads.get(tid)
        if known is not None:
            return known
        try:
            ptrace.seize(tid, self._options)
        except (ProcessLookupError, PermissionError) as err:
            raise self._explain_seize(tid, err) from err
        thread = self.threads[tid] = TracedThread(self.pid, tid)
        return thread

    def stop(self, tid: int) -> TracedThread:
        """Stop one thread, seizing it first if need be; the others are not touched.

        :raises TargetGone: it died meanwhile. :raises FreezeError: it cannot be traced or does not stop.
        """
        thread = self.seize(tid)
        if thread.stopped:
            return thread
        thread.sample = sleepers.sample_sleeper(self.pid, tid)
        try:
            ptrace.interrupt(tid)
        except ProcessLookupError as err:
            raise self._bury(tid) from err
        self.wait_stopped(thread)
        self._heal_eintr(thread)
        return thread

    def stop_one(self) -> TracedThread:
        """Stop the thread that a short stop disturbs least; when it ends before it stops, another one.

        :raises TargetGone: the process died or called exec. :raises FreezeError: as stop().
        """
        while True:
            tid = pick_injection_thread(self.pid)
            try:
                thread = self.stop(tid)
            except TargetGone:
                if tid in self.threads:
                    raise  # alive, in a new program
            else:
                self._check_program()
                return thread

    def stop_some(self, tids: Sequence[int]) -> list[TracedThread]:
        """Stop some threads, of those that do not end meanwhile, and return them; the others are not touched.

        :raises TargetGone: the process called exec. :raises FreezeError: one cannot be traced or does not stop.
        """
        samples, _ = sleepers.sample_sleepers(self.pid, tids)
        threads = []
        for tid in tids:
            with suppress(TargetGone, ProcessLookupError):
                thread = self.seize(tid)
                thread.sample = samples.get(tid)
                ptrace.interrupt(tid)
                threads.append(thread)
        self._check_program()
        for thread in threads:
            self._await_interrupted(thread)
        return [thread for thread in threads if thread.stopped]

    def stop_all(self) -> list[TracedThread]:
        """Stop every thread, those that are made meanwhile too, and return them, the leader first.

        Those that are parked stay so.

        :raises TargetGone: the process died or called exec. :raises FreezeError: a thread cannot be traced or stopped.
        """
        # Sampled and seized before the first thread stops: this part costs no downtime.
        parked = {thread.tid for thread in self.threads.values() if thread.parked}
        running = [tid for tid in self._list_tids() if tid not in parked]
        samples, delicate = sleepers.sample_sleepers(self.pid, running)
        tids = self._seize_listed()
        self._check_program()  # a seized thread tells by itself when it calls exec
        self.stopped_ns = time.monotonic_ns()
        while True:
            # The delicate ones, which most likely serve somebody, last: the others stop while they are looked after.
            interrupted = []
            for tid in sorted(tids, key=delicate.__contains__):
                thread = self.threads[tid]
                if thread.stopped or thread.parked:
                    continue
                thread.sample = samples.get(tid)
                try:
                    ptrace.interrupt(tid)
                except ProcessLookupError:
                    self._bury(tid)
                    continue
                interrupted.append(thread)
                if tid in delicate:
                    # Not after all the others: should the agent die before it is healed, the thread sees EINTR.
                    self._await_interrupted(thread)
            if not interrupted:
                break
            for thread in interrupted:
                if not thread.stopped:
                    self._await_interrupted(thread)
            nr_seized = len(self.threads)
            tids = self._seize_listed()
            if len(self.threads) > nr_seized:
                self._check_program()
        if not self.threads:
            raise TargetGone(f"Process {self.pid} is gone")
        stopped = (thread for thread in self.threads.values() if not thread.parked)
        return sorted(stopped, key=lambda t: (t.tid != self.pid, t.tid))

    def _seize_listed(self) -> list[int]:
        """Seize all threads that there are now; return their ids."""
        seized = []
        for tid in self._list_tids():
            # One that died since it was listed. The end of the whole process shows in the next listing.
            with suppress(TargetGone):
                seized.append(self.seize(tid).tid)
        return seized

    def _await_interrupted(self, thread: TracedThread) -> None:
        try:
            self.wait_stopped(thread)
            self._heal_eintr(thread)
        except TargetGone:
            if thread.tid in self._list_tids():
                raise

    def adopt(self, tid: int) -> TracedThread:
        """Take over a thread (or process) that a traced thread made, and wait for its first stop.

        ``tid`` is the id that the agent's pid namespace sees: in ``new_children`` after the call that made it.
        """
        thread = self.threads.get(tid)
        if thread is None:
            thread = self.threads[tid] = TracedThread(self.pid, tid)
        if tid in self.new_children:
            self.new_children.remove(tid)
        self.wait_stopped(thread)
        return thread

    # -- letting go -------------------------------------------------------------------------------------------------

    def resume(self, thread: TracedThread) -> None:
        """Let a stopped thread run on but stay attached; its signals then need wait_stop(): keep this short."""
        self.before_release(thread)
        sig = thread.pending_stop_signal
        thread.forget()
        thread.stopped = False
        ptrace.cont(thread.tid, sig)

    def resume_all(self) -> None:
        """Let all stopped threads run on but stay attached: see resume()."""
        for thread in list(self.threads.values()):
            if thread.stopped:
                self._ignore_death(thread, self.resume)

    def detach(self, thread: TracedThread) -> None:
        """Let go of a thread: it runs on exactly as before, or stays in its group-stop."""
        if not thread.stopped:
            thread.parked = False
            ptrace.interrupt(thread.tid)
            self.wait_stopped(thread)
        self.before_release(thread)
        del self.threads[thread.tid]
        thread.stopped = False
        ptrace.detach(thread.tid, thread.pending_stop_signal)

    def detach_all(self) -> None:
        """Let go of all threads: the leader after the others, and parked ones, which sleep, last."""
        known = sorted(self.threads.values(), key=lambda t: (t.parked, t.tid == self.pid))
        for thread in known:
            if thread.parked:
                with suppress(ProcessLookupError):
                    ptrace.interrupt(thread.tid)
        for thread in known:
            self._ignore_death(thread, self.detach)
        self._reap(self._dead)

    def forget_all(self) -> None:
        """Drop all threads: the process was killed. Its parent hears of that once the tracer has."""
        self._dead += self.threads
        self.threads.clear()
        self._reap(self._dead)

    def _reap(self, dead: list[int]) -> None:
        # The kernel keeps the end of a traced thread for its tracer, and that of the process until no thread is left.
        deadline = time.monotonic() + _REAP_S
        for tid in sorted(dead, key=lambda t: t == self.pid):
            while time.monotonic() < deadline:
                try:
                    found = os.waitid(os.P_PID, tid, _LOOK)
                    if found is None:
                        time.sleep(0.0005)
                        continue
                    if tid != self.pid or read_stat(tid).ppid != os.getpid():
                        os.waitpid(tid, wait.WALL | wait.WNOHANG)
                    if found.si_code != os.CLD_TRAPPED:
                        break
                except (ChildProcessError, FileNotFoundError, ProcessLookupError):
                    break
        dead.clear()

    def still_stopped(self) -> bool:
        """Tell whether the stopped process is still there: a SIGKILL takes threads out of any stop at once."""
        try:
            return read_state(self.pid) == "t"
        except (FileNotFoundError, ProcessLookupError):
            return False

    def spare_on_exit(self) -> None:
        """Undo kill_on_exit for the stopped threads: a skeleton that was held outlives the agent."""
        options = self._options & ~ptrace.PTRACE_O_EXITKILL
        for thread in self.threads.values():
            ptrace.setoptions(thread.tid, options)

    # -- waiting ----------------------------------------------------------------------------------------------------

    def wait_stop(self, thread: TracedThread, timeout_s: float = STOP_TIMEOUT_S) -> Stop:
        """Wait until the thread stops for whatever reason, and say why.

        :raises TargetGone: it died or called exec. :raises FreezeError: it did not stop in time.
        """
        began = time.monotonic()
        pause_s = 0.0001
        while True:
            stop = self.poll_stop(thread)
            if stop is not None:
                return stop
            waited = time.monotonic() - began
            if self.errands.step():
                continue
            if waited < PATIENT_S:
                pause(waited)
                continue
            self._check_alive(thread)
            if waited > timeout_s:
                raise self._explain_stuck(thread, timeout_s)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.005)

    def poll_stop(self, thread: TracedThread) -> Stop | None:
        """Like wait_stop() but return None at once when the thread has not stopped."""
        # Looked at without taking it (WNOWAIT): the kernel delivers the signal of a signal-delivery-stop when the
        # tracer dies, but only if nobody has taken the report. All other reports are taken.
        try:
            found = os.waitid(os.P_PID, thread.tid, _LOOK)
            if found is None:
                return None
            status = found.si_status << 8 | 0x7F
            if found.si_code != os.CLD_TRAPPED or not _is_signal_stop(found.si_status):
                os.waitpid(thread.tid, wait.WALL | wait.WNOHANG)
        except ChildProcessError as err:
            self.threads.pop(thread.tid, None)
            raise TargetGone(f"Thread {thread.tid} of process {self.pid} is gone") from err
        if found.si_code != os.CLD_TRAPPED:
            self.threads.pop(thread.tid, None)
            raise TargetGone(
                f"Thread {thread.tid} of process {self.pid} died (code {found.si_code}, status {found.si_status})"
            )
        sig = found.si_status & 0xFF
        event = wait.ptrace_event(status)
        thread.stopped = True
        if event == ptrace.PTRACE_EVENT_EXEC:
            raise TargetGone(f"Process {self.pid} called exec meanwhile")
        if event in _EVENTS_OF_CHILDREN:
            self.new_children.append(ptrace.geteventmsg(thread.tid))
            return Stop(StopKind.CHILD, sig)
        if event == ptrace.PTRACE_EVENT_STOP:
            thread.in_group_stop = wait.is_group_stop(status)
            return Stop(StopKind.EVENT_STOP, sig)
        if wait.is_syscall_stop(status):
            return Stop(StopKind.SYSCALL, sig)
        return Stop(StopKind.SIGNAL, sig)

    def wait_stopped(self, thread: TracedThread) -> Stop:
        """Wait for a stop in which a thread can be left alone."""
        while True:
            stop = self.wait_stop(thread)
            if stop.kind is StopKind.EVENT_STOP:
                return stop
            if stop.kind is StopKind.SIGNAL:
                # This stop used up the interrupt; staying here is fine.
                thread.pending_stop_signal = stop.sig
                return stop
            thread.stopped = False
            ptrace.interrupt(thread.tid)
            ptrace.cont(thread.tid, 0)

    def _check_alive(self, thread: TracedThread) -> None:
        # A leader that called pthread_exit() is a zombie without being reported.
        try:
            state = read_task_stat(self.pid, thread.tid).state
        except (FileNotFoundError, ProcessLookupError):
            state = "X"
        if state in "ZX" and wait_nothing(thread.tid):
            raise self._bury(thread.tid)

    def _bury(self, tid: int) -> TargetGone:
        """Forget a thread that died while it was traced: the kernel may keep its end for us."""
        self.threads.pop(tid, None)
        self._dead.append(tid)
        return TargetGone(f"Thread {tid} of process {self.pid} is gone")

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _heal_eintr(self, thread: TracedThread) -> None:
        # At once, and not only when the thread is let go: an agent that dies lets it go without this.
        if not self.kill_on_exit and restart.hide_eintr(thread):
            ptrace.setregs(thread.tid, thread.regs)
            thread._regs_changed = False

    def before_release(self, thread: TracedThread) -> None:
        """Write what a stopped thread goes on with; whoever lets it go calls this first."""
        # EINTR that only our stop caused must not reach a program that did nothing to earn it.
        if not self.kill_on_exit:
            restart.settle(thread, self.memory)
        if thread._regs_changed and thread._regs is not None:
            ptrace.setregs(thread.tid, thread._regs)
            thread._regs_changed = False

    def _ignore_death(
        self, thread: TracedThread, action: Callable[[TracedThread], None]
    ) -> None:
        try:
            action(thread)
        except (ProcessLookupError, TargetGone):
            self._bury(thread.tid)

    def _list_tids(self) -> list[int]:
        try:
            return [int(tid) for tid in list_tids(self.pid)]
        except (FileNotFoundError, ProcessLookupError) as err:
            raise TargetGone(f"Process {self.pid} is gone") from err

    def _check_program(self) -> None:
        program = self._identify_program()
        if program != self._program and any(program):  # all zero: the leader is a zombie
            raise TargetGone(f"Process {self.pid} called exec meanwhile")

    def _identify_program(self) -> tuple[int, ...]:
        # exec() lays these out anew, at random; nothing else but prctl(PR_SET_MM) changes them.
        try:
            stat = read_stat(self.pid)
        except (FileNotFoundError, ProcessLookupError) as err:
            raise TargetGone(f"Process {self.pid} is gone") from err
        return () if self.kill_on_exit else (stat.start_code, stat.start_stack, stat.start_data)

    def _explain_seize(self, tid: int, err: OSError) -> Exception:
        try:
            status = read_task_status(self.pid, tid)
        except (FileNotFoundError, ProcessLookupError):
            return TargetGone(f"Thread {tid} of process {self.pid} is gone")
        if isinstance(err, ProcessLookupError) or status.is_zombie:
            return TargetGone(f"Thread {tid} of process {self.pid} is gone")
        if status.tracer_pid:
            return FreezeError(
                f"Cannot trace thread {tid} of process {self.pid}: process {status.tracer_pid} traces it already",
                hint="end the debugger or strace that is attached to it",
            )
        return FreezeError(
            f"Cannot trace thread {tid} of process {self.pid}: {os.strerror(err.errno or errno.EPERM)}",
            hint="run as the target's user or with CAP_SYS_PTRACE; see /proc/sys/kernel/yama/ptrace_scope",
        )

    def _explain_stuck(self, thread: TracedThread, timeout_s: float) -> FreezeError:
        try:
            state = read_task_stat(self.pid, thread.tid).state
        except (FileNotFoundError, ProcessLookupError):
            state = "?"
        return FreezeError(
            f"Thread {thread.tid} of process {self.pid} did not stop within {timeout_s:g} s (state {state})",
            hint="a thread in uninterruptible sleep (state D: disk, NFS, vfork) cannot be stopped",
        )


def pick_injection_thread(pid: int) -> int:
    """Return the thread that a short stop would disturb least: blocked in a call that restarts well, else running.

    :raises TargetGone: no thread of the process is alive.
    """
    best: tuple[int, int] | None = None
    try:
        tids = list_tids(pid)
    except (FileNotFoundError, ProcessLookupError) as err:
        raise TargetGone(f"Process {pid} is gone") from err
    for tid in tids:
        rank = sleepers.disturbance(pid, tid)
        if rank is None:
            continue
        if best is None or rank < best[0]:
            best = (rank, tid)
        if rank == 0:
            break
    if best is None:
        raise TargetGone(f"Process {pid} has no live thread")
    return best[1]


def wait_nothing(tid: int) -> bool:
    """Tell whether the kernel has no stop of ``tid`` to report, without taking one."""
    try:
        return os.waitid(os.P_PID, tid, _LOOK) is None
    except (ChildProcessError, OSError):
        return True


def _is_signal_stop(status: int) -> bool:
    return status >> 8 == 0 and status != wait.SYSCALL_STOP

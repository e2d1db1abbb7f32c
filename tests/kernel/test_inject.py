"""Injected system calls: results, arguments, traces left, signals that arrive meanwhile, group-stops, skeletons."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from agent.errors import InjectError
from agent.kernel import ptrace
from agent.kernel.syscalls import (
    NR_close,
    NR_getpid,
    NR_gettid,
    NR_mmap,
    NR_openat,
    NR_pipe2,
    NR_read,
    NR_uname,
    NR_write,
)
from agent.target import inject
from agent.target.inject import Batch, Call, Injector
from agent.target.inject_skeleton import SkeletonInjector
from agent.target.tail import TailPlace, find_tail
from agent.target.template import Template
from agent.target.tracer import Tracer
from tests.kernel.support import PAGE, wait_for

THREADED = """
import threading
stop = threading.Event()
for _ in range(8):
    threading.Thread(target=stop.wait, daemon=True).start()
print("up", flush=True)
input()
print("done", flush=True)
"""

# Counts signals on standard output, one byte each, in whatever state the main thread is.
COUNTER = """
import os, signal
signal.signal(signal.SIGRTMIN + 2, lambda *_: None)
signal.siginterrupt(signal.SIGRTMIN + 2, False)
os.set_blocking(1, False)
signal.set_wakeup_fd(1, warn_on_full_buffer=False)
os.write(1, b"up\\n")
while True:
    os.read(0, 1)
"""


@contextlib.contextmanager
def running(program: str) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        wait_for(lambda: state_of(child.pid) == "S", "the child sleeps")
        yield child
    finally:
        child.kill()
        child.wait()


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rsplit(")", 1)[1].split()[0]


def read_maps(pid: int) -> str:
    with open(f"/proc/{pid}/maps", encoding="ascii") as file:
        return file.read()


def test_results_buffers_and_indirect_arguments() -> None:
    with running(THREADED) as child, Tracer(child.pid) as tracer:
        thread = tracer.stop(child.pid)
        before = (thread.regs.copy(), thread.sigmask, read_maps(child.pid))
        with Injector(tracer) as injector:
            batch = Batch()
            pid = batch.call(NR_getpid)
            names = batch.buffer(6 * 65)
            batch.call(NR_uname, names)
            pipe = batch.buffer(8)
            batch.call(NR_pipe2, pipe, os.O_CLOEXEC)
            text = batch.data(b"ferry")
            written = batch.call(NR_write, pipe.cell(4), text.at(1), 4)
            back = batch.buffer(16)
            got = batch.call(NR_read, pipe.cell(0), back, written)
            batch.call(NR_close, pipe.cell(0))
            batch.call(NR_close, pipe.cell(4))
            injector.run(batch)
            assert pid.value == child.pid
            assert names.read().startswith(b"Linux\0")
            assert got.value == 4 and back.read()[:4] == b"erry"
        assert ptrace.getregs(thread.tid) == before[0]
        assert ptrace.getsigmask(thread.tid) == before[1]
        assert read_maps(child.pid) == before[2]
        assert thread.regs == before[0]


def test_failed_call_raises_when_checked_after_the_whole_batch() -> None:
    with running(THREADED) as child, Tracer(child.pid) as tracer:
        tracer.stop(child.pid)
        with Injector(tracer) as injector:
            batch = Batch()
            bad = batch.call(NR_close, 9999)
            later = batch.call(NR_getpid)
            with pytest.raises(InjectError, match="close") as caught:
                injector.run(batch)
            assert caught.value.errno == errno.EBADF
            assert bad.result == -errno.EBADF and later.value == child.pid
            unchecked = Batch()
            call = unchecked.call(NR_openat, -1, unchecked.string("nowhere"), 0, check=False)
            injector.run(unchecked)
            assert call.result == -errno.EBADF


def test_many_and_large_batches_in_one_stop() -> None:
    with running(THREADED) as child, Tracer(child.pid) as tracer:
        thread = tracer.stop(child.pid)
        maps = read_maps(child.pid)
        with Injector(tracer) as injector:
            for nr_bytes in (10, 100_000, 1_000_000, 10, 60_000, 70_000):
                batch = Batch()
                blob = batch.data(bytes(nr_bytes - 1) + b"x")
                calls = [batch.call(NR_getpid) for _ in range(300)]
                injector.run(batch, thread)
                assert calls[-1].value == child.pid
                assert blob.read()[-1:] == b"x"
        assert read_maps(child.pid) == maps


def test_parallel_runs_each_batch_in_its_thread() -> None:
    with running(THREADED) as child:
        with Tracer(child.pid) as tracer:
            threads = tracer.stop_all()
            maps = read_maps(child.pid)
            regs = {t.tid: t.regs.copy() for t in threads}
            with Injector(tracer) as injector:
                for _ in range(3):
                    batches = {thread.tid: Batch() for thread in threads}
                    calls = {tid: batch.call(NR_gettid) for tid, batch in batches.items()}
                    injector.run_parallel(batches)
                    assert all(call.value == tid for tid, call in calls.items())
            assert {t.tid: ptrace.getregs(t.tid) for t in threads} == regs
            assert read_maps(child.pid) == maps
        out, _ = child.communicate(b"\n")
        assert out == b"done\n"


def test_signals_that_arrive_during_injection_are_delivered_once_each() -> None:
    sig = signal.SIGRTMIN + 2
    with running(COUNTER) as child:
        assert child.stdout is not None
        sent = 0
        for _ in range(20):
            os.kill(child.pid, sig)
            with Tracer(child.pid) as tracer:
                os.kill(child.pid, sig)
                tracer.stop(child.pid)
                with Injector(tracer) as injector:
                    batch = Batch()
                    batch.call(NR_getpid)
                    os.kill(child.pid, sig)
                    injector.run(batch)
                    os.kill(child.pid, sig)
            sent += 4
        with open(f"/proc/{child.pid}/status", encoding="ascii") as file:
            assert "SigBlk:\t0000000000000000" in file.read()
        received = b""
        os.set_blocking(child.stdout.fileno(), True)
        while len(received) < sent:
            received += os.read(child.stdout.fileno(), 4096)
        time.sleep(0.05)
        os.set_blocking(child.stdout.fileno(), False)
        assert not child.stdout.read()
        assert len(received) == sent


def test_injection_from_a_signal_delivery_stop_requeues_the_signal() -> None:
    sig = signal.SIGRTMIN + 2
    with running(COUNTER) as child, Tracer(child.pid) as tracer:
        assert child.stdout is not None
        thread = tracer.seize(child.pid)
        os.kill(child.pid, sig)  # takes the thread to a signal-delivery-stop without our interrupt
        tracer.wait_stopped(thread)
        assert thread.pending_stop_signal == sig
        assert int.from_bytes(thread.pending_siginfo[0][:4], "little") == sig
        with Injector(tracer) as injector:
            batch = Batch()
            batch.call(NR_getpid)
            injector.run(batch)
        tracer.detach_all()
        assert os.read(child.stdout.fileno(), 100) == bytes([sig])


def test_group_stopped_process_takes_a_batch_and_stays_stopped() -> None:
    with running(THREADED) as child:
        os.kill(child.pid, signal.SIGSTOP)
        wait_for(lambda: state_of(child.pid) == "T", "the child stops")
        with Tracer(child.pid) as tracer:
            threads = tracer.stop_all()
            assert all(thread.in_group_stop for thread in threads)
            with Injector(tracer) as injector:
                batches = {thread.tid: Batch() for thread in threads}
                calls = {tid: batch.call(NR_gettid) for tid, batch in batches.items()}
                injector.run_parallel(batches)
                assert all(call.value == tid for tid, call in calls.items())
        wait_for(lambda: state_of(child.pid) == "T", "the child is stopped again")
        os.kill(child.pid, signal.SIGCONT)
        out, _ = child.communicate(b"\n")
        assert out == b"done\n"


def test_sigstop_during_injection_takes_effect_afterwards() -> None:
    with running(THREADED) as child:
        with Tracer(child.pid) as tracer:
            tracer.stop_all()
            with Injector(tracer) as injector:
                os.kill(child.pid, signal.SIGSTOP)
                for _ in range(3):
                    batch = Batch()
                    call = batch.call(NR_getpid)
                    injector.run(batch)
                    assert call.value == child.pid
        wait_for(lambda: state_of(child.pid) == "T", "the SIGSTOP has come through")
        os.kill(child.pid, signal.SIGCONT)
        out, _ = child.communicate(b"\n")
        assert out == b"done\n"


def test_slow_agent_is_told_and_the_thread_unharmed(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(THREADED) as child:
        maps = read_maps(child.pid)
        with Tracer(child.pid) as tracer:
            tracer.stop(child.pid)
            with Injector(tracer) as injector:
                batch = Batch()
                batch.call(NR_getpid)
                finish = injector._finish

                def late(*args: object) -> None:
                    time.sleep(0.8)
                    finish(*args)  # type: ignore[arg-type]

                monkeypatch.setattr(injector, "_finish", late)
                with pytest.raises(InjectError, match="before the agent looked"):
                    injector.run(batch)
        assert read_maps(child.pid) == maps
        out, _ = child.communicate(b"\n")
        assert out == b"done\n"


def test_slow_agent_is_told_and_all_threads_unharmed(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(THREADED) as child:
        maps = read_maps(child.pid)
        with Tracer(child.pid) as tracer:
            threads = tracer.stop_all()
            regs = {t.tid: t.regs.copy() for t in threads}
            with Injector(tracer) as injector:
                batches = {thread.tid: Batch() for thread in threads}
                for batch in batches.values():
                    batch.call(NR_gettid)
                finish = injector._finish

                def late(*args: object) -> None:
                    time.sleep(1.3)
                    finish(*args)  # type: ignore[arg-type]

                monkeypatch.setattr(injector, "_finish", late)
                with pytest.raises(InjectError, match="before the agent looked"):
                    injector.run_parallel(batches)
            for thread in threads:
                tracer.stop(thread.tid)
                assert ptrace.getregs(thread.tid).rip in {r.rip for r in regs.values()} | {
                    r.rip - 2 for r in regs.values()
                }
        assert read_maps(child.pid) == maps
        out, _ = child.communicate(b"\n")
        assert out == b"done\n"


def test_more_threads_than_can_run_at_once_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inject, "MAX_PARALLEL", 4)
    with running(THREADED) as child:
        with Tracer(child.pid) as tracer:
            threads = tracer.stop_all()
            maps = read_maps(child.pid)
            regs = {t.tid: t.regs.copy() for t in threads}
            template, own = template_of(NR_gettid)
            with Injector(tracer) as injector:
                copies = {thread.tid: template.copy() for thread in threads}
                steps = iter(range(1000))
                injector.run_parallel(copies, meanwhile=steps)
                assert next(steps, None) is None, "what is left of the errands is done afterwards"
                for tid, copy in copies.items():
                    copy.load()
                    assert own.value == tid
            assert {t.tid: ptrace.getregs(t.tid) for t in threads} == regs
            assert read_maps(child.pid) == maps
        out, _ = child.communicate(b"\n")
        assert out == b"done\n"


def template_of(nr: int) -> tuple[Template, Call]:
    batch = Batch()
    call = batch.call(nr)
    return Template(batch), call


def test_copies_differ_in_their_variables_only() -> None:
    with running(THREADED) as child, Tracer(child.pid) as tracer:
        threads = tracer.stop_all()
        batch = Batch()
        words = batch.buffer(16)
        back = batch.buffer(8)
        pipe = batch.buffer(8)
        batch.call(NR_pipe2, pipe, os.O_CLOEXEC)
        batch.call(NR_write, pipe.cell(4), words.at(8), words.cell(0))
        batch.call(NR_read, pipe.cell(0), back, 8)
        batch.call(NR_close, pipe.cell(0))
        batch.call(NR_close, pipe.cell(4))
        template = Template(batch)
        texts = {thread.tid: f"<{thread.tid}>".encode()[-8:] for thread in threads}
        with Injector(tracer) as injector:
            copies = {
                tid: template.copy(struct.pack("<Q8s", len(text), text), into=words) for tid, text in texts.items()
            }
            injector.run_parallel(copies)
            for tid, text in texts.items():
                copies[tid].load()
                assert back.read().rstrip(b"\0") == text


def test_failed_call_of_a_copy_is_named() -> None:
    with running(THREADED) as child, Tracer(child.pid) as tracer:
        threads = tracer.stop_all()
        batch = Batch()
        fd = batch.buffer(8)
        batch.call(NR_close, fd.cell(), name="close(it)")
        template = Template(batch)
        with Injector(tracer) as injector:
            copies = {t.tid: template.copy(struct.pack("<q", 9999), into=fd) for t in threads}
            with pytest.raises(InjectError, match=r"close\(it\)"):
                injector.run_parallel(copies)


def test_error_of_an_errand_comes_when_all_is_as_it_was() -> None:
    def errands() -> Iterator[int]:
        yield 1
        raise ValueError("errand")

    with running(THREADED) as child:
        with Tracer(child.pid) as tracer:
            threads = tracer.stop_all()
            maps = read_maps(child.pid)
            regs = {t.tid: t.regs.copy() for t in threads}
            injector = Injector(tracer)
            template, _own = template_of(NR_gettid)
            with pytest.raises(ValueError, match="errand"):
                injector.run_parallel({t.tid: template.copy() for t in threads}, meanwhile=errands())
            with pytest.raises(ValueError, match="errand"):
                injector.close(meanwhile=errands())
            assert {t.tid: ptrace.getregs(t.tid) for t in threads} == regs
            assert read_maps(child.pid) == maps
        out, _ = child.communicate(b"\n")
        assert out == b"done\n"


def test_tail_is_searched_anew_where_it_is_not_as_remembered() -> None:
    with running(THREADED) as child, Tracer(child.pid) as tracer:
        known = tracer.tail
        assert known is not None and known.mapping
        assert find_tail(tracer.memory, known) is known
        for wrong in (known._replace(mapping=known.mapping - PAGE), known._replace(end=known.end + PAGE)):
            assert find_tail(tracer.memory, wrong) == known
        heap = next(line for line in read_maps(child.pid).splitlines() if line.endswith("[heap]"))
        start, end = (int(word, 16) for word in heap.split()[0].split("-"))
        assert find_tail(tracer.memory, TailPlace(end - PAGE, end, start)) == known


def test_skeleton_mode_keeps_its_scratch_mapping_and_can_move_it() -> None:
    with running(THREADED) as child, Tracer(child.pid, kill_on_exit=True) as tracer:
        thread = tracer.stop(child.pid)
        hint = 0x10_0000_0000
        injector = SkeletonInjector(tracer, scratch_hint=hint)
        for address in (hint, 0x20_0000_0000):
            batch = Batch()
            call = batch.call(NR_getpid)
            injector.run(batch)
            assert call.value == child.pid
            found = injector.scratch_range
            assert found is not None and found[0] == address
            injector.move(0x20_0000_0000 if address == hint else 0x30_0000_0000)
        big = Batch()
        blob = big.buffer(5_000_000)
        big.call(NR_uname, blob)
        injector.run(big)
        assert blob.read().startswith(b"Linux")
        page = injector.remote_syscall(thread, NR_mmap, 0, 4096, 3, 0x22, -1, 0)
        tracer.memory.write(page, b"mapped")
        assert tracer.memory.read(page, 6) == b"mapped"
        with pytest.raises(InjectError, match="close"):
            injector.remote_syscall(thread, NR_close, 9999)
        injector.close()
        assert injector.scratch_range is None

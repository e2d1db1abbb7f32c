"""Hints about interrupted calls: believed for the very sleep they were written for, and never in the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import restart_hints
from agent.kernel.syscalls import NR_clock_nanosleep, NR_restart_syscall
from agent.procfs.syscall import SyscallInfo, read_syscall
from agent.target.restart import KnownCall, learn_calls, take_calls

DEADLINE_NS = 123_456_789


def interrupt(pid: int) -> SyscallInfo:
    """Interrupt a sleeper; return what it sleeps in afterwards."""
    before = Path(f"/proc/{pid}/status").read_bytes()
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    os.kill(pid, signal.SIGCONT)
    until = time.monotonic() + 10
    while time.monotonic() < until:
        info = read_syscall(pid, pid)
        if info and info.nr == NR_restart_syscall and Path(f"/proc/{pid}/status").read_bytes() != before:
            time.sleep(0.01)
            return info
    raise AssertionError("the child does not sleep in restart_syscall")


@pytest.fixture
def child() -> Iterator[int]:
    """A process that sleeps in restart_syscall."""
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            while (info := read_syscall(process.pid, process.pid)) is None or info.nr != NR_clock_nanosleep:
                time.sleep(0.01)
            interrupt(process.pid)
            yield process.pid
        finally:
            process.kill()


def call_of(pid: int) -> KnownCall:
    info = read_syscall(pid, pid)
    assert info is not None and info.nr == NR_restart_syscall
    return KnownCall(NR_clock_nanosleep, info.args, info.pc, info.sp, DEADLINE_NS)


def loaded(directory: Path, pid: int) -> dict[int, KnownCall]:
    restart_hints.load(str(directory), pid)
    return take_calls(pid)


@pytest.fixture
def saved(child: int, tmp_path: Path) -> Path:
    """The hint that was written about the child."""
    learn_calls(child, {child: call_of(child)})
    restart_hints.save(str(tmp_path / "state"), child)
    (path,) = (tmp_path / "state").iterdir()
    return path


def test_hint_is_found_by_a_later_agent(saved: Path, child: int) -> None:
    assert take_calls(child) == {}
    assert loaded(saved.parent, child) == {child: call_of(child)}
    assert saved.stat().st_mode & 0o777 == 0o600
    assert saved.parent.stat().st_mode & 0o777 == 0o700


def test_hint_about_an_earlier_sleep_is_not_believed(saved: Path, child: int) -> None:
    interrupt(child)
    assert loaded(saved.parent, child) == {}


@pytest.mark.parametrize("name", ["rip", "rsp", "args"])
def test_hint_about_other_registers_is_not_believed(saved: Path, child: int, name: str) -> None:
    record = json.loads(saved.read_text())
    hint = record["threads"][str(child)]
    hint[name] = [1] * 6 if name == "args" else 1
    saved.write_text(json.dumps(record))
    assert loaded(saved.parent, child) == {}


def test_hint_of_another_view_is_not_believed(saved: Path, child: int) -> None:
    record = json.loads(saved.read_text())
    record["view"][1] = "pid:[1]"
    saved.write_text(json.dumps(record))
    assert loaded(saved.parent, child) == {}


def test_hint_in_a_directory_of_others_is_not_believed(saved: Path, child: int) -> None:
    saved.parent.chmod(0o777)
    assert loaded(saved.parent, child) == {}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"view": 1}', "\xff", '{"view": [], "threads": 1}'])
def test_nonsense_is_ignored(saved: Path, child: int, text: str) -> None:
    saved.write_text(text)
    assert loaded(saved.parent, child) == {}


def test_thread_that_is_in_no_such_call_leaves_no_hint(child: int, tmp_path: Path) -> None:
    learn_calls(child, {child: call_of(child)._replace(rsp=1)})
    restart_hints.save(str(tmp_path), child)
    assert not list(tmp_path.iterdir())


def test_hint_outlives_an_agent_that_stopped_nothing(saved: Path, child: int) -> None:
    restart_hints.save(str(saved.parent), child)
    assert loaded(saved.parent, child) == {child: call_of(child)}


def test_files_of_dead_processes_are_removed(saved: Path, child: int) -> None:
    dead = saved.with_name("4194305.7.restart.json")
    other = saved.with_name("4194306.7.restart.json")
    broken = saved.with_name("4194307.7.restart.json")
    record = json.loads(saved.read_text())
    dead.write_text(json.dumps(record))
    record["view"][1] = "pid:[1]"
    other.write_text(json.dumps(record))
    broken.write_text('{"view": []}')
    learn_calls(child, {child: call_of(child)})
    restart_hints.save(str(saved.parent), child)
    assert set(saved.parent.iterdir()) == {saved, other, broken}


def test_failure_to_write_is_no_failure(child: int, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    learn_calls(child, {child: call_of(child)})
    restart_hints.save(str(tmp_path / "file" / "state"), child)
    restart_hints.save(str(tmp_path / "absent"), child)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

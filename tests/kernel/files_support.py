"""Situations for the tests of open files: a live child that has made something, and its files made again here."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from agent.state.context import DumpContext, RestoreContext
from agent.state.fileitems import decode_items
from agent.state.filerestore import FileRestorer
from agent.state.files import check_files, dump_files
from agent.types import Obstacle, Pid
from protocol.state.files import FilesState, OpenFile

PRELUDE = """
import array, ctypes, fcntl, os, select, signal, socket, struct, sys, threading, time
def ready():
    os.rename(sys.argv[1] + ".tmp", sys.argv[1])
    while True:
        signal.pause()
open(sys.argv[1] + ".tmp", "w").close()
"""


@dataclass(frozen=True)
class Options:
    """Options of both sides."""

    tcp_close: bool = False
    file_locks: bool = False
    leave_running: bool = False
    external_fds: frozenset[int] = frozenset()
    inherit_fds: Mapping[int, int] = field(default_factory=dict)


@dataclass
class Child:
    """A child that waits after it has run its code; numbers are those it wrote down with note()."""

    pid: int
    ctx: DumpContext

    def check(self) -> list[Obstacle]:
        """Run the check."""
        return check_files(self.ctx)

    def dump(self) -> FilesState:
        """Dump the table."""
        return dump_files(self.ctx)


@contextmanager
def live_child(tmp_path: Path, code: str, options: Options | None = None) -> Iterator[Child]:
    """Run ``code`` in a child whose standard files are /dev/null; it must call ready() at its end."""
    flag = tmp_path / f"ready-{time.monotonic_ns()}"
    program = PRELUDE + textwrap.dedent(code)
    with open(tmp_path / "stderr", "w+b") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(flag)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, cwd=tmp_path,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 20
            while not flag.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    errors.seek(0)
                    raise AssertionError(errors.read().decode())
                time.sleep(0.005)
            pidfd = os.pidfd_open(process.pid)
            try:
                yield Child(process.pid, DumpContext(Pid(process.pid), pidfd, options or Options()))
            finally:
                os.close(pidfd)
        finally:
            process.kill()
            process.wait()


def restore_context(
    options: Options | None = None, *, pid: Pid | None = None, **facts: Any
) -> RestoreContext:
    """A context for making files in this process; it can install nothing."""
    return RestoreContext(
        pid=pid or Pid(os.getpid()),
        injector=cast(Any, None),
        options=options or Options(),
        agent_pidfd=-1,
        **facts,
    )


@contextmanager
def restored(state: FilesState, options: Options | None = None, **facts: Any) -> Iterator["Again"]:
    """Make every description of ``state`` in this process."""
    ctx = restore_context(options, **facts)
    restorer = FileRestorer(ctx)
    try:
        restorer.open_all(state)
        yield Again(state, restorer)
    finally:
        restorer.close()


@dataclass
class Again:
    """The restored files, by the numbers they had."""

    state: FilesState
    restorer: FileRestorer

    def fd(self, number: int) -> int:
        """Return the agent's descriptor of what was ``number``."""
        return self.restorer.agent_fd(file_of(self.state, number).id)


def file_of(state: FilesState, number: int) -> OpenFile:
    """Return the description that ``number`` points at."""
    file_id = next(entry.file_id for entry in state.fds if entry.fd == number)
    return next(file for file in state.files if file.id == file_id)


def body_of(state: FilesState, number: int) -> Any:
    """Return the decoded body of what ``number`` points at."""
    file = file_of(state, number)
    return next(item.body for item in decode_items(state)[file.kind] if item.id == file.id)

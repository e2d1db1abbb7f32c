"""A dump of a process of no importance, so that the one that counts is not the agent's first.

Code that has never run is slow: the interpreter has not adapted to it, and no cache has seen it. The first dump of a
small process takes half as long again as the second, and would do so in the freeze. Must never touch the target.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
from collections.abc import Iterator
from typing import Final, cast

from agent.errors import MigrationError
from agent.kernel.prctl import PR_SET_PDEATHSIG, prctl
from agent.state.context import DumpContext
from agent.state.mm import dump_mm
from agent.state.task import TaskDump
from agent.target.inject import Injector
from agent.target.tracer import Tracer
from agent.types import Pid
from protocol.sections import encode_section

_log = logging.getLogger(__name__)
_TURNS: Final = 3
_PATIENCE_S: Final = 0.5
"""How long the extra may take to be ready."""


def rehearse_dump() -> None:
    """Dump a fork of this agent, with a second thread, a few times; nothing depends on whether that succeeds."""
    try:
        with _extra() as pid, Tracer(pid) as tracer:
            for _turn in range(_TURNS):
                _dump(tracer)
                tracer.detach_all()
    except (OSError, MigrationError):
        _log.debug("The rehearsal failed", exc_info=True)


def _dump(tracer: Tracer) -> None:
    dump = TaskDump(cast(DumpContext, _Extra(tracer.pid)))
    tracer.stop_all()
    with Injector(tracer) as injector, contextlib.closing(dump):
        injector.run_parallel(dump.plan(tracer), meanwhile=dump.look())
        state = dump.state()
    for kind, owner, part in state.sections():
        encode_section(kind, owner, part)
    encode_section("mm", tracer.pid, dump_mm(Pid(tracer.pid), brk=0))


class _Extra:
    """As much of a DumpContext as a TaskDump wants."""

    def __init__(self, pid: int) -> None:
        self.pid = pid


@contextlib.contextmanager
def _extra() -> Iterator[int]:
    """A process of two threads that wait to be killed; it ends with the agent."""
    ready, tell = os.pipe2(os.O_CLOEXEC)
    agent = os.getpid()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != agent:
                os._exit(0)  # It died before that: nobody else would end this process, which has its connection open.
            os.setsid()  # no signal from the terminal
            threading.Thread(target=signal.pause, daemon=True).start()
            os.write(tell, b"x")
            while True:
                signal.pause()
        os._exit(0)
    try:
        os.close(tell)
        if not select.select([ready], [], [], _PATIENCE_S)[0] or not os.read(ready, 1):
            raise TimeoutError("the extra is not ready")
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

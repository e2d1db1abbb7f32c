"""A child process that answers questions: one JSON object per line, over its standard input and output.

Both the process that is measured (trackbench_target.py) and the one that tracks it (trackbench_agent.py) are such
children, so that neither shares an interpreter, a heap or CPU time with the other, nor with who asks.
"""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ANSWER_S = 300.0
"""No question takes longer, on any machine that such a measurement makes sense on."""

Handler = Callable[..., Mapping[str, object]]


class ChildFailed(Exception):
    """A child died, took too long, or said what went wrong."""


class Child:
    """A running child; ends with the `with` block, whatever it is doing."""

    def __init__(self, program: str, *arguments: str) -> None:
        path = Path(__file__).resolve().parent / program
        self.process = subprocess.Popen(
            [sys.executable, str(path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # select() must see what is there
        )
        self.pid = self.process.pid

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()  # which ends it
        try:
            self.process.wait(ANSWER_S if kind is None else 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def tell(self, what: str, **arguments: object) -> None:
        """Ask without waiting for the answer."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps([what, arguments]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as err:
            raise ChildFailed(f"process {self.pid} ended: {what} was never heard") from err

    def hear(self) -> dict[str, Any]:
        """Wait for an answer.

        :raises ChildFailed: there is none.
        """
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], ANSWER_S)[0]:
            raise ChildFailed(f"process {self.pid} did not answer within {ANSWER_S} s")
        line = self.process.stdout.readline()
        if not line:
            raise ChildFailed(f"process {self.pid} ended, see its messages above")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise ChildFailed(str(answer["failed"]))
        return answer

    def ask(self, what: str, **arguments: object) -> dict[str, Any]:
        """Ask and wait."""
        self.tell(what, **arguments)
        return self.hear()


def question_waits() -> bool:
    """Say whether another question came meanwhile."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answer until standard input ends. An error is an answer too, and what was left undone the caller sees to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for who asks, who ends us
    questions = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # select() must see what is there
    for line in iter(questions.readline, b""):
        what, arguments = json.loads(line)
        try:
            answer: Mapping[str, object] = handlers[what](**arguments)
        except Exception as err:  # noqa: BLE001 - told, not hidden
            answer = {"failed": f"{what}: {type(err).__name__}: {err}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

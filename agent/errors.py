"""The errors a migration can end in.

    MigrationError              exit 1: failed, the source runs on unharmed
    +-- UsageError              exit 2: the request itself makes no sense
    +-- RefusedError            exit 4: obstacles found before anything was touched
    +-- SetupError              connecting, handshake, arming
    |   +-- TargetGone          the target exited or called exec while Ferry looked at it
    +-- FreezeError             stopping the threads, remote system calls
    |   +-- InjectError         a system call injected into the target failed
    |       +-- TooLateError    the target did not wait for the agent
    +-- DumpError               reading state from the stopped target
    +-- TransferError           the link or the peer failed
    +-- RestoreError            rebuilding the process on the destination
    +-- UndecidedError          exit 3: the link died with COMMIT in flight; both copies frozen

Attributes carry the facts (``pid``, ``vaddr``, ``kind``); ``hint`` says what to try; ``exit_code`` is the
documented exit status. The text says what failed, on what, with which value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from agent.types import Obstacle


class MigrationError(Exception):
    """Root of everything Ferry reports to its user."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", **facts: object) -> None:
        super().__init__(message)
        self.hint = hint
        self.facts = facts


class UsageError(MigrationError):
    """The command line asks for something that makes no sense or is not supported."""

    exit_code = 2


class RefusedError(MigrationError):
    """The target, or the destination, has obstacles; nothing was touched."""

    exit_code = 4

    def __init__(self, message: str, obstacles: Sequence[Obstacle], *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.obstacles = tuple(obstacles)


class SetupError(MigrationError):
    """Something before the first round failed."""


class TargetGone(SetupError):
    """The target exited or replaced its program while Ferry looked at it."""


class FreezeError(MigrationError):
    """The target could not be stopped or controlled."""


class InjectError(FreezeError):
    """A system call made inside the target failed; ``errno`` is positive."""

    def __init__(self, message: str, *, errno: int = 0, hint: str = "", **facts: object) -> None:
        super().__init__(message, hint=hint, errno=errno, **facts)
        self.errno = errno


class TooLateError(InjectError):
    """The agent got no CPU time, and the target went on by itself, unharmed: worth another try."""


class DumpError(MigrationError):
    """State of the stopped target could not be read."""


class TransferError(MigrationError):
    """The link or the peer failed before the commit."""


class RestoreError(MigrationError):
    """The process could not be rebuilt on the destination."""


class UndecidedError(MigrationError):
    """The link died with COMMIT in flight: both copies are frozen until the outcome is learnt."""

    exit_code = 3

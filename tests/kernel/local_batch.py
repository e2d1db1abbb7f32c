"""A batch of system calls that runs in the calling thread: what the Injector does, without a target.

For tests of the state kinds that need no ptrace. Arguments are as in agent.target.inject.Batch.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from agent.target.inject import Batch

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc["syscall"]
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long] * 7


class LocalBlob:
    """Bytes at a fixed address of this process; at() names a place inside."""

    def __init__(self, data: bytes) -> None:
        self._buffer = ctypes.create_string_buffer(data, max(1, len(data)))
        self._length = len(data)

    def address(self) -> int:
        return ctypes.addressof(self._buffer)

    def at(self, offset: int) -> int:
        return self.address() + offset

    def read(self) -> bytes:
        return self._buffer.raw[: self._length]


class LocalCall:
    """One system call and, after the run, its result."""

    def __init__(self, nr: int, args: tuple[object, ...], name: str, check: bool) -> None:
        self.nr, self.args, self.name, self.check = nr, args, name, check
        self.result = 0

    @property
    def value(self) -> int:
        if self.result < 0:
            raise OSError(-self.result, f"{self.name}: {os.strerror(-self.result)}")
        return self.result


class LocalBatch:
    """Collects calls; run() makes them in this thread."""

    def __init__(self) -> None:
        self.calls: list[LocalCall] = []
        self._blobs: list[LocalBlob] = []

    def data(self, data: bytes) -> LocalBlob:
        self._blobs.append(LocalBlob(data))
        return self._blobs[-1]

    def buffer(self, size: int) -> LocalBlob:
        return self.data(bytes(size))

    def call(self, nr: int, *args: object, name: str = "", check: bool = True) -> LocalCall:
        self.calls.append(LocalCall(nr, args, name, check))
        return self.calls[-1]

    def run(self) -> None:
        for call in self.calls:
            values = [_value(arg) for arg in call.args]
            result = _syscall(call.nr, *values, *[0] * (6 - len(values)))
            call.result = -ctypes.get_errno() if result == -1 else result
        for call in self.calls:
            if call.check:
                _ = call.value

    def typed(self) -> Batch:
        """This batch as the type that the state kinds ask for."""
        return cast("Batch", self)


def _value(arg: object) -> int:
    if isinstance(arg, LocalBlob):
        return arg.address()
    if isinstance(arg, LocalCall):
        return arg.result
    assert isinstance(arg, int)
    return arg

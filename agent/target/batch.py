"""A list of system calls to be made by a thread of the target, and the memory they work on.

Nothing here touches the target: a Batch is laid out for an address (pack()) and reads its results from the bytes that
come back (unpack()). Arguments of a call are indirect, so the result of one call, or a word of a buffer that it filled,
can be an argument of a later one in the same batch:

    batch = Batch()
    path = batch.data(b"/tmp/x\\0")
    fd = batch.call(NR_openat, AT_FDCWD, path, os.O_RDONLY)
    batch.call(NR_fstat, fd, batch.buffer(144))
    batch.call(NR_close, fd)
    injector.run(batch)

All calls are made, whatever some of them return. Addresses are target addresses.
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple, Union

from agent.errors import InjectError
from agent.kernel.syscalls import syscall_name
from agent.target.routine_x86_64 import RECORD_BYTES, RECORD_RESULT

_U64: Final = (1 << 64) - 1
_ALIGNMENT: Final = 16
_NR_ARGS: Final = 6


class BlobAddress(NamedTuple):
    """The address of a byte inside a blob, as an argument."""

    blob: Blob
    offset: int


class Cell(NamedTuple):
    """Eight bytes inside a blob whose content, when the call is made, is the argument.

    Four of them will do where the kernel takes an int (one of the descriptors that pipe2() wrote).
    """

    blob: Blob
    offset: int


class Blob:
    """Bytes in the scratch mapping; as an argument it stands for its address."""

    def __init__(self, content: bytes, size: int) -> None:
        self._content = content
        self.size = size
        self._address: int | None = None
        self._after: bytes | None = None
        self.patches: list[tuple[int, Blob | BlobAddress]] = []
        """Addresses to be filled in: (offset, what)."""

    @property
    def has_content(self) -> bool:
        """Whether it is more than zeros for the kernel to fill."""
        return bool(self._content or self.patches)

    @property
    def address(self) -> int:
        """Its target address; known only while and after it runs."""
        if self._address is None:
            raise ValueError("The batch has not run")
        return self._address

    def at(self, offset: int) -> BlobAddress:
        """Its address plus `offset`, as an argument."""
        return BlobAddress(self, offset)

    def cell(self, offset: int = 0) -> Cell:
        """Its content at `offset` when the call is made, as an argument."""
        return Cell(self, offset)

    def read(self) -> bytes:
        """Return its content after the run."""
        if self._after is None:
            raise ValueError("The batch has not run")
        return self._after

    def patch_address(self, offset: int, target: Blob | BlobAddress) -> None:
        """Have the address of another blob written at `offset` of this one (iovec, msghdr, sock_fprog...)."""
        self.patches.append((offset, target))


Argument = Union[int, Blob, BlobAddress, Cell, "Call"]


class Call:
    """One system call; as an argument it stands for its result."""

    def __init__(self, nr: int, args: tuple[Argument, ...], name: str, check: bool) -> None:
        self.nr = nr
        self.args = args
        self.name = name or syscall_name(nr)
        self.check = check
        self.index = -1
        self.undo = False
        self._result: int | None = None

    @property
    def result(self) -> int:
        """What the kernel returned; negative is an errno."""
        if self._result is None:
            raise ValueError(f"{self.name} has not run")
        return self._result

    @property
    def value(self) -> int:
        """The result when the call succeeded.

        :raises InjectError: it failed.
        """
        result = self.result
        if -4096 < result < 0:
            raise InjectError(
                f"Cannot {self.name} in the target: {os.strerror(-result)}", errno=-result
            )
        return result


class Batch:
    """System calls in order, with their memory. Runs once."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._undo: list[Call] = []
        self._blobs: list[Blob] = []
        self._ahead: Packed | None = None
        """What pack() returned last, while it is still right."""

    @classmethod
    def joined(cls, *batches: Batch) -> Batch:
        """Return the calls of several batches in one; of those and their joins only one may run, the one made last."""
        whole = cls()
        for batch in batches:
            whole.calls += batch.calls
            whole._undo += batch._undo
            whole._blobs += batch._blobs
        for calls in (whole.calls, whole._undo):
            for index, call in enumerate(calls):
                call.index = index
        return whole

    def __len__(self) -> int:
        return len(self.calls)

    def data(self, content: bytes) -> Blob:
        """Memory that holds `content`."""
        return self._add_blob(Blob(bytes(content), len(content)))

    def buffer(self, size: int) -> Blob:
        """Zeroed memory of `size` bytes, for the kernel to fill."""
        return self._add_blob(Blob(b"", size))

    def _add_blob(self, blob: Blob) -> Blob:
        self._ahead = None
        self._blobs.append(blob)
        return blob

    def string(self, text: str | bytes) -> Blob:
        """Memory that holds a NUL-terminated string."""
        return self.data(os.fsencode(text) + b"\0")

    def call(self, nr: int, *args: Argument, name: str = "", check: bool = True) -> Call:
        """Add a call; with `check`, its failure makes run() raise once the whole batch has run."""
        return self._add(self.calls, nr, args, name, check)

    def undo(self, nr: int, *args: Argument, name: str = "") -> Call:
        """Add a call that is made only if the agent dies before it goes on from this batch.

        For instance: close a descriptor that the agent was to fetch.
        """
        call = self._add(self._undo, nr, args, name, False)
        call.undo = True
        return call

    def _add(
        self, calls: list[Call], nr: int, args: tuple[Argument, ...], name: str, check: bool
    ) -> Call:
        if len(args) > _NR_ARGS:
            raise ValueError(f"A system call takes at most {_NR_ARGS} arguments, not {len(args)}")
        call = Call(nr, args, name, check)
        call.index = len(calls)
        calls.append(call)
        self._ahead = None
        return call

    # -- layout: records, undo records, cells, blobs ----------------------------------------------------------------

    def pack(self, base: int) -> Packed:
        """Lay the batch out for target address `base` (16-byte aligned).

        Costs next to nothing when it was done for the same address before and nothing was added since.
        """
        if self._ahead is not None and self._ahead.first == base:
            return self._ahead
        nr_records = len(self.calls) + len(self._undo)
        cells_at = base + nr_records * RECORD_BYTES
        # Blobs come last, but constants may be their addresses: leave room for as many cells as there can be.
        end = _align(cells_at + 8 * self._most_cells())
        for blob in self._blobs:
            blob._address = end
            end = _align(end + max(blob.size, 8))

        # Equal constants share a cell. One dictionary look-up for each argument: this is downtime.
        cell_of = {0: cells_at}
        words: list[int] = []
        for call in (*self.calls, *self._undo):
            for arg in (call.nr, *call.args):
                if type(arg) is BlobAddress:
                    arg = arg.blob.address + arg.offset
                elif type(arg) is not int:
                    if isinstance(arg, (Cell, Call)):
                        words.append(self._where(arg, base))
                        continue
                    arg = _value(arg)
                words.append(cell_of.setdefault(arg & _U64, cells_at + 8 * len(cell_of)))
            words += (cells_at,) * (_NR_ARGS - len(call.args))
            words.append(0)  # the result

        content = bytearray(end - base)
        struct.pack_into(f"<{len(words)}Q{len(cell_of)}Q", content, 0, *words, *cell_of)
        for blob in self._blobs:
            at = blob.address - base
            content[at : at + len(blob._content)] = blob._content
            for offset, target in blob.patches:
                struct.pack_into("<Q", content, at + offset, _value(target))
        undo_at = base + len(self.calls) * RECORD_BYTES
        self._ahead = Packed(base, undo_at, cells_at, bytes(content))
        return self._ahead

    def _most_cells(self) -> int:
        return 7 * (len(self.calls) + len(self._undo)) + 1

    def _where(self, arg: Cell | Call, base: int) -> int:
        """Return the address of the word that is the argument."""
        if isinstance(arg, Cell):
            return arg.blob.address + arg.offset
        return base + self._record_index(arg) * RECORD_BYTES + RECORD_RESULT

    def unpack(self, base: int, content: bytes) -> None:
        """Take the results from what pack() laid out, as the run left it."""
        results = memoryview(content)[: len(self.calls) * RECORD_BYTES].cast("q")
        for index, call in enumerate(self.calls):
            call._result = results[8 * index + 7]
        for blob in self._blobs:
            at = blob.address - base
            blob._after = content[at : at + blob.size]

    def check(self) -> None:
        """Raise InjectError for the first checked call that failed."""
        for call in self.calls:
            if call.check and -4096 < call.result < 0:
                call.value  # noqa: B018  # raises

    def _record_index(self, call: Call) -> int:
        return len(self.calls) + call.index if call.undo else call.index

    def size_bytes(self) -> int:
        """Bytes that pack() will need, at most."""
        nr_records = len(self.calls) + len(self._undo)
        blobs = sum(_align(max(blob.size, 8)) for blob in self._blobs)
        return nr_records * RECORD_BYTES + 8 * self._most_cells() + blobs + 2 * _ALIGNMENT


class Packed(NamedTuple):
    """A batch laid out: records are [first, undo), undo records [undo, end)."""

    first: int
    undo: int
    end: int
    content: bytes


def _value(arg: int | Blob | BlobAddress) -> int:
    if isinstance(arg, Blob):
        return arg.address
    if isinstance(arg, BlobAddress):
        return arg.blob.address + arg.offset
    return int(arg)


def _align(value: int) -> int:
    return (value + _ALIGNMENT - 1) & ~(_ALIGNMENT - 1)

"""A batch that many threads run, each a copy of its own: laid out once, long before it is needed.

What pack() costs, a tenth of a millisecond and more, is paid while nobody waits. Of a laid-out batch only the addresses
depend on where it lies: a copy is made by adding its place to each of them, all at once, in one sum of long integers.
A template that is used once serves to have the packing done ahead.
"""

from __future__ import annotations

from typing import Final, final

from agent.target.batch import Batch, Blob, Packed
from agent.target.routine_x86_64 import RECORD_BYTES

_SOMEWHERE: Final = 1 << 56
_ELSEWHERE: Final = 1 << 57
"""Two places to lay the batch out for, to see which bytes are addresses. Neither is one that a program can have: a
constant that happened to equal an address of the batch would share its cell."""


@final
class Template:
    """The layout of ``batch``, which is complete; load() makes it show what a copy brought back."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        first, second = batch.pack(_SOMEWHERE), batch.pack(_ELSEWHERE)
        here = int.from_bytes(first.content, "little")
        self._addresses, rest = divmod(
            int.from_bytes(second.content, "little") - here, _ELSEWHERE - _SOMEWHERE
        )
        assert not rest, "the layout of a batch depends on where it lies"
        self._image = here - _SOMEWHERE * self._addresses
        self.nr_bytes = len(first.content)
        self._undo = first.undo - _SOMEWHERE
        self._end = first.end - _SOMEWHERE
        self._nr_words = len(batch.calls) * (RECORD_BYTES // 8)
        self._checked = [index for index, call in enumerate(batch.calls) if call.check]

    def offset_of(self, blob: Blob) -> int:
        """Where a blob of the batch lies in the content of each copy."""
        return blob.address - _ELSEWHERE

    def copy(self, variables: bytes = b"", *, into: Blob | None = None) -> Copy:
        """Return a copy to be run once; ``variables`` are what the blob ``into`` has in it instead of zeros."""
        if into is None:
            return Copy(self, b"", 0)
        if len(variables) > into.size or into.has_content:
            raise ValueError(f"{len(variables)} bytes do not replace the zeros of a blob of {into.size}")
        return Copy(self, variables, self.offset_of(into))

    def lay_out(self, base: int) -> Packed:
        """Return what pack() of the batch would, for a 16-byte aligned ``base``."""
        image = self._image + base * self._addresses
        content = image.to_bytes(self.nr_bytes, "little")
        return Packed(base, base + self._undo, base + self._end, content)

    def load(self, content: bytes) -> None:
        """Have the calls and blobs of the batch show the results in ``content``."""
        self.batch.unpack(_ELSEWHERE, content)

    def results(self, content: bytes) -> list[int]:
        """Return what the calls in ``content`` returned, in order; negative is an errno."""
        return memoryview(content)[: 8 * self._nr_words].cast("q")[7::8].tolist()

    def check(self, content: bytes) -> None:
        """Raise InjectError for the first checked call that failed."""
        results = self.results(content)
        if any(-4096 < results[index] < 0 for index in self._checked):
            self.load(content)
            self.batch.check()


@final
class Copy:
    """One run of a template, for Runner.run_parallel(); what it left is in ``content`` afterwards."""

    def __init__(self, template: Template, variables: bytes, offset: int) -> None:
        self.template = template
        self._variables = variables
        self._offset = offset
        self.content = b""

    def size_bytes(self) -> int:
        """Bytes that pack() will need."""
        return self.template.nr_bytes

    def pack(self, base: int) -> Packed:
        """Lay the copy out for target address ``base``."""
        packed = self.template.lay_out(base)
        if not self._variables:
            return packed
        content, at = packed.content, self._offset
        content = content[:at] + self._variables + content[at + len(self._variables) :]
        return packed._replace(content=content)

    def unpack(self, base: int, content: bytes) -> None:
        """Keep what the run left."""
        self.content = content

    def load(self) -> Batch:
        """Return the template's batch, showing the results of this copy until another one is loaded."""
        self.template.load(self.content)
        return self.template.batch

    def check(self) -> None:
        """Raise InjectError for the first checked call that failed."""
        self.template.check(self.content)

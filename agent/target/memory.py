"""A target's memory through /proc/PID/mem: works on read-only and PROT_NONE pages too (FOLL_FORCE).

For bulk page copies use agent.kernel.process_vm; this is for the odd structure. The file belongs to the address space
that the process had when it was opened: after an exec, reads and writes fail instead of hitting the new program.
Addresses are target addresses. Source: proc_pid_mem(5).
"""

from __future__ import annotations

import errno
import os
import struct
from array import array
from ctypes import c_char_p, c_void_p, cast
from types import TracebackType
from typing import final

from agent.errors import TargetGone
from agent.kernel import process_vm


@final
class TargetMemory:
    """Read and write the memory of process ``pid``; owns ``fd``, open on /proc/PID/mem."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self.fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError) as err:
            raise TargetGone(f"Cannot open the memory of process {pid}: no such process") from err

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> TargetMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def read(self, vaddr: int, nr_bytes: int) -> bytes:
        """Return exactly ``nr_bytes`` bytes at ``vaddr``.

        :raises OSError: EIO when not all of them are mapped.
        """
        parts = []
        while nr_bytes > 0:
            part = os.pread(self.fd, nr_bytes, vaddr)
            if not part:
                raise OSError(errno.EIO, f"read of process {self.pid} at {vaddr:#x}: no memory")
            parts.append(part)
            vaddr += len(part)
            nr_bytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, vaddr: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of ``data`` at ``vaddr``; private mappings get their own copy of the page.

        :raises OSError: EIO when not all of it is mapped.
        """
        done = self._write_some(vaddr, data)
        if done == len(data):
            return
        view = memoryview(data).cast("B")[done:]
        vaddr += done
        while view:
            done = self._write_some(vaddr, view)
            if not done:
                raise OSError(errno.EIO, f"write to process {self.pid} at {vaddr:#x}: no memory")
            vaddr += done
            view = view[done:]

    def _write_some(self, vaddr: int, view: bytes | bytearray | memoryview) -> int:
        try:
            return os.pwrite(self.fd, view, vaddr)
        except OSError as err:
            # A page that a synchronous userfaultfd protects: this call does not wait for its reader, the other does.
            if err.errno != errno.EIO:
                raise
            content = bytes(view)
            try:
                return process_vm.writev(
                    self.pid, _address_of(content), len(content), array("Q", (vaddr, len(content))), 0, 1
                )
            except OSError:
                raise err from None

    def read_u64(self, vaddr: int) -> int:
        """Return the unsigned 64-bit number at ``vaddr``."""
        value: int = struct.unpack("<Q", self.read(vaddr, 8))[0]
        return value


def _address_of(content: bytes) -> int:
    return cast(c_char_p(content), c_void_p).value or 0

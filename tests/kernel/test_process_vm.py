"""process_vm_readv and process_vm_writev against a child."""

from __future__ import annotations

import ctypes
from array import array

import pytest

from agent.kernel import mman, process_vm
from tests.kernel.support import PAGE, puppet


class Buffer:
    """A local buffer with an address."""

    def __init__(self, length: int, fill: bytes = b"") -> None:
        self.memory = bytearray(fill.ljust(length, b"\0"))
        self._pin = (ctypes.c_char * length).from_buffer(self.memory)
        self.address = ctypes.addressof(self._pin)


def test_scattered_ranges_are_read_in_order() -> None:
    with puppet() as child:
        base = child.map(8)
        for page in range(8):
            child.poke(base + page * PAGE, bytes([page]) * PAGE)
        remote = array("Q", [base + 6 * PAGE, PAGE, base + PAGE, 2 * PAGE, base, 16])
        buffer = Buffer(4 * PAGE)
        done = process_vm.readv(child.pid, buffer.address, 4 * PAGE, remote, 0, 3)
        assert done == 3 * PAGE + 16
        expected = b"\6" * PAGE + b"\1" * PAGE + b"\2" * PAGE + bytes(16)
        assert buffer.memory[:done] == expected


def test_first_and_count_choose_a_part_of_the_table() -> None:
    with puppet() as child:
        base = child.map(3)
        child.poke(base, b"a" * PAGE + b"b" * PAGE + b"c" * PAGE)
        remote = array("Q", [base, PAGE, base + PAGE, PAGE, base + 2 * PAGE, PAGE])
        buffer = Buffer(PAGE)
        assert process_vm.readv(child.pid, buffer.address, PAGE, remote, 1, 1) == PAGE
        assert buffer.memory == b"b" * PAGE


@pytest.mark.parametrize("nr", [1023, 1024, 1025, 2500])
def test_more_ranges_than_one_call_takes_are_copied_both_ways(nr: int) -> None:
    with puppet() as child:
        base = child.map(2 * nr)
        remote = array("Q")
        for i in range(nr):
            remote.extend((base + 2 * i * PAGE, 8))
        content = b"".join(i.to_bytes(8, "little") for i in range(nr))
        buffer = Buffer(nr * 8, content)
        assert process_vm.writev(child.pid, buffer.address, nr * 8, remote, 0, nr) == nr * 8
        assert child.peek(base + 2 * (nr - 1) * PAGE, 8) == (nr - 1).to_bytes(8, "little")
        back = Buffer(nr * 8)
        assert process_vm.readv(child.pid, back.address, nr * 8, remote, 0, nr) == nr * 8
        assert back.memory == content


def test_a_hole_ends_the_copy_short_and_then_raises() -> None:
    with puppet() as child:
        base = child.map(4)
        child.poke(base, b"x" * 4 * PAGE)
        child.run(mman.munmap, base + 2 * PAGE, PAGE)
        buffer = Buffer(4 * PAGE)
        remote = array("Q", [base, 4 * PAGE])
        assert process_vm.readv(child.pid, buffer.address, 4 * PAGE, remote, 0, 1) == 2 * PAGE
        remote = array("Q", [base + 2 * PAGE, 2 * PAGE])
        with pytest.raises(OSError, match="process_vm_readv") as caught:
            process_vm.readv(child.pid, buffer.address, 4 * PAGE, remote, 0, 1)
        assert caught.value.errno == 14  # EFAULT
        assert hex(base + 2 * PAGE) in str(caught.value)


def test_an_error_after_the_first_thousand_ranges_keeps_what_was_copied() -> None:
    with puppet() as child:
        base = child.map(1)
        remote = array("Q", [base, 8] * 1024 + [0, 8])
        buffer = Buffer(1025 * 8)
        done = process_vm.readv(child.pid, buffer.address, 1025 * 8, remote, 0, 1025)
        assert done == 1024 * 8


def test_a_short_local_buffer_ends_the_copy() -> None:
    with puppet() as child:
        base = child.map(2)
        buffer = Buffer(PAGE)
        remote = array("Q", [base, PAGE, base + PAGE, PAGE])
        assert process_vm.readv(child.pid, buffer.address, PAGE, remote, 0, 2) == PAGE


def test_no_ranges_are_no_bytes() -> None:
    assert process_vm.readv(1, 0, 0, array("Q"), 0, 0) == 0


def test_a_process_that_is_gone_is_a_process_lookup_error() -> None:
    with puppet() as child:
        pid = child.pid
    buffer = Buffer(8)
    with pytest.raises(ProcessLookupError):
        process_vm.readv(pid, buffer.address, 8, array("Q", [PAGE, 8]), 0, 1)


def test_prot_none_cannot_be_read_but_proc_mem_can() -> None:
    with puppet() as child:
        base = child.map(1)
        child.poke(base, b"secret")
        child.run(mman.mprotect, base, PAGE, mman.PROT_NONE)
        buffer = Buffer(8)
        with pytest.raises(OSError, match="Bad address"):
            process_vm.readv(child.pid, buffer.address, 8, array("Q", [base, 8]), 0, 1)
        with open(f"/proc/{child.pid}/mem", "r+b", buffering=0) as mem:
            mem.seek(base)
            assert mem.read(6) == b"secret"
            mem.seek(base)
            mem.write(b"SECRET")
            mem.seek(base)
            assert mem.read(6) == b"SECRET"


def test_read_only_private_memory_is_written_through_proc_mem_only() -> None:
    with puppet() as child:
        base = child.map(1, prot=mman.PROT_READ)
        buffer = Buffer(8, b"changed")
        with pytest.raises(OSError, match="Bad address"):
            process_vm.writev(child.pid, buffer.address, 8, array("Q", [base, 8]), 0, 1)
        with open(f"/proc/{child.pid}/mem", "r+b", buffering=0) as mem:
            mem.seek(base)
            mem.write(b"changed")
        assert child.peek(base, 7) == b"changed"

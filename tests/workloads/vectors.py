"""Threads that keep values in every vector register while they are moved, and never put them in memory meanwhile.

Usage: python -m tests.workloads.vectors STATUS_FILE

Each thread loads random bytes into its registers (xmm, ymm or zmm with mask registers: what the processor has) and
spins until a word in memory changes, then stores them: machine code, since no interpreter leaves registers alone. The
main thread changes that word after each turn, and the thread compares. Standard library only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time

from tests.workloads.status import Status

NR_THREADS = 2
TURN_S = 0.3


def cpu_flags() -> frozenset[str]:
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def _mov(prefix: bytes, opcode: int, register: int, offset: int) -> bytes:
    # Legacy encoding of movups: xmm0-15 and [rdi + disp32].
    rex = b"\x44" if register >= 8 else b""
    return prefix + rex + bytes([0x0F, opcode, 0x87 | (register & 7) << 3]) + offset.to_bytes(4, "little")


def _vex_mov(opcode: int, register: int, offset: int) -> bytes:
    # vmovups ymm, [rdi + disp32]: C5 prefix with R inverted, vvvv = 1111, L = 1, pp = 00.
    return bytes([0xC5, 0x7C if register >= 8 else 0xFC, opcode, 0x87 | (register & 7) << 3]) + offset.to_bytes(
        4, "little"
    )


def _evex_mov(opcode: int, register: int, offset: int) -> bytes:
    # vmovups zmm, [rdi + disp32]: EVEX.512.0F.W0, R and R' inverted.
    p0 = 0x61 | (0 if register & 8 else 0x80) | (0 if register & 16 else 0x10)
    return bytes([0x62, p0, 0x7C, 0x48, opcode, 0x87 | (register & 7) << 3]) + offset.to_bytes(4, "little")


def _kmovq(opcode: int, register: int, offset: int) -> bytes:
    # kmovq k, [rdi + disp32]: VEX.L0.0F.W1, three-byte prefix.
    return bytes([0xC4, 0xE1, 0xF8, opcode, 0x87 | (register & 7) << 3]) + offset.to_bytes(4, "little")


def build(kind: str) -> tuple[bytes, int]:
    """Machine code of ``void run(void *values, volatile int *go)`` and the bytes that it loads and stores."""
    moves = []
    if kind == "avx512":
        moves = [(_evex_mov, 0x10, 0x11, register, 64) for register in range(32)]
        moves += [(_kmovq, 0x90, 0x91, register, 8) for register in range(1, 8)]
    elif kind == "avx":
        moves = [(_vex_mov, 0x10, 0x11, register, 32) for register in range(16)]
    load, store, offset = b"", b"", 0
    for encode, opcode_load, opcode_store, register, size in moves:
        load += encode(opcode_load, register, offset)
        store += encode(opcode_store, register, offset)
        offset += size
    if kind == "sse":
        for register in range(16):
            load += _mov(b"", 0x10, register, offset)
            store += _mov(b"", 0x11, register, offset)
            offset += 16
    # 1: pause; cmp dword [rsi], 0; je 1b
    wait = bytes.fromhex("f390833e0074f9")
    return load + wait + store + b"\xc3", offset


def best_kind() -> str:
    flags = cpu_flags()
    if {"avx512f", "avx512bw"} <= flags:
        return "avx512"
    return "avx" if "avx" in flags else "sse"


class Holder:
    """A thread and what it holds."""

    def __init__(self, status: Status, function: object, nr_bytes: int) -> None:
        self.status, self.function, self.nr_bytes = status, function, nr_bytes
        self.go = ctypes.c_int(0)
        self.turns = 0
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        values = ctypes.create_string_buffer(self.nr_bytes)
        while True:
            expected = os.urandom(self.nr_bytes)
            values.raw = expected
            self.go.value = 0
            self.function(values, ctypes.byref(self.go))  # type: ignore[operator]
            self.status.check(values.raw == expected, f"registers changed in turn {self.turns}")
            self.turns += 1


def main() -> None:
    status = Status(sys.argv[1])
    kind = best_kind()
    code, nr_bytes = build(kind)
    memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(address)
    holders = [Holder(status, function, nr_bytes) for _ in range(NR_THREADS)]
    while True:
        time.sleep(TURN_S)
        before = [holder.turns for holder in holders]
        for holder in holders:
            holder.go.value = 1
        while any(holder.turns == turns for holder, turns in zip(holders, before)):
            time.sleep(0.001)
            for holder, turns in zip(holders, before):
                if holder.turns == turns:
                    holder.go.value = 1  # it may have cleared the word after it was set
        status.note(turns=min(holder.turns for holder in holders), kind=kind)


if __name__ == "__main__":
    main()

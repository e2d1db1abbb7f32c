"""The floor: the same bytes from the same process, moved without Ferry in the leanest form that Python allows.

process_vm_readv into one small buffer, one TCP connection between the two hosts, and at the other end fresh memory of
another process, in each of two ways, of which the faster one is the floor:

    writev   recv into one small buffer, process_vm_writev from there into a process that has only mapped the memory
    direct   that process itself receives, straight into its mapping

Either with small pages or, with `huge`, with MADV_HUGEPAGE on the fresh mapping. No rounds, no tracking, no checks, no
protocol. Two roles run inside the hosts:

    python -m tools.benchmark.floors send PID HOST PORT CHUNK_BYTES
    python -m tools.benchmark.floors receive writev|direct small|huge PORT CHUNK_BYTES
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from agent.kernel import mman
from tests.hosts import Host, wait_until

CHUNK_BYTES = 256 << 10
PORT = 7100
LONGEST_S = 300.0
_LENGTH = struct.Struct("<Q")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = _libc.process_vm_writev.restype = ctypes.c_ssize_t


class Floor(NamedTuple):
    """One way to do it."""

    way: str
    pages: str

    def __str__(self) -> str:
        return f"{self.way}-{self.pages}"


FLOORS = (Floor("writev", "small"), Floor("direct", "small"), Floor("writev", "huge"), Floor("direct", "huge"))


class _iovec(ctypes.Structure):
    _fields_ = [("iov_base", ctypes.c_uint64), ("iov_len", ctypes.c_uint64)]


def _transfer(call: Any, pid: int, local: int, remote: int, nbytes: int) -> None:
    here, there = _iovec(local, nbytes), _iovec(remote, nbytes)
    done = call(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    if done != nbytes:
        raise OSError(ctypes.get_errno(), f"{call.__name__} at {remote:#x} of {pid} moved {done} of {nbytes} bytes")


def largest_mapping(pid: int) -> tuple[int, int]:
    """(start, length) of the largest writable anonymous mapping."""
    found = (0, 0)
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split()
        start, end = (int(text, 16) for text in fields[0].split("-"))
        if fields[1].startswith("rw") and len(fields) == 5 and end - start > found[1]:
            found = (start, end - start)
    return found


def send(pid: int, host: str, port: int, chunk: int) -> None:
    start, length = largest_mapping(pid)
    buffer = mmap.mmap(-1, chunk)
    buffer.write(bytes(chunk))
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    view = memoryview(buffer)
    with socket.create_connection((host, port)) as peer:
        began = time.monotonic()
        peer.sendall(_LENGTH.pack(length))
        for at in range(0, length, chunk):
            nbytes = min(chunk, length - at)
            _transfer(_libc.process_vm_readv, pid, address, start + at, nbytes)
            peer.sendall(view[:nbytes])
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b"k"
        print(json.dumps({"seconds": time.monotonic() - began, "bytes": length}), flush=True)


def _receive_exactly(peer: socket.socket, view: memoryview) -> None:
    while view:
        got = peer.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]


def receive(way: str, pages: str, port: int, chunk: int) -> None:
    with socket.create_server(("0.0.0.0", port)) as listener:
        peer, _ = listener.accept()
    header = bytearray(_LENGTH.size)
    _receive_exactly(peer, memoryview(header))
    (length,) = _LENGTH.unpack(header)
    fresh = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if pages == "huge":
        fresh.madvise(mmap.MADV_HUGEPAGE)
    if way == "direct":
        _receive_exactly(peer, memoryview(fresh))
    else:
        _receive_through_buffer(peer, fresh, length, chunk)
    peer.sendall(b"k")


def _receive_through_buffer(peer: socket.socket, fresh: mmap.mmap, length: int, chunk: int) -> None:
    buffer = mmap.mmap(-1, chunk)
    buffer.write(bytes(chunk))
    local = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    remote = ctypes.addressof(ctypes.c_char.from_buffer(fresh))
    owner = os.fork()  # The mapping is at the same place there, and none of it is backed yet.
    if owner == 0:
        while True:
            time.sleep(1)
    view = memoryview(buffer)
    try:
        for at in range(0, length, chunk):
            nbytes = min(chunk, length - at)
            _receive_exactly(peer, view[:nbytes])
            _transfer(_libc.process_vm_writev, owner, local, remote + at, nbytes)
    finally:
        os.kill(owner, 9)
        os.waitpid(owner, 0)


def warm_memory(nr_bytes: int) -> None:
    """Have this machine's next so many bytes of fresh memory be backed already, where it is a virtual one.

    Its host takes back what was free for some seconds, and gives it anew at each first touch: that costs several times
    as much, and whoever is measured first pays.
    """
    with mmap.mmap(-1, nr_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mman.MADV_POPULATE_WRITE)


def measure_floors(
    floors: tuple[Floor, ...], source: Host, destination: Host, pid: int, directory: Path, *, nr_bytes: int
) -> dict[str, dict[str, float]]:
    """Seconds and bytes of each way, for the largest mapping of a process, of some `nr_bytes`, on the source host."""
    return {str(floor): _measure(floor, source, destination, pid, directory, nr_bytes) for floor in floors}


def _measure(
    floor: Floor, source: Host, destination: Host, pid: int, directory: Path, nr_bytes: int
) -> dict[str, float]:
    module = [sys.executable, "-m", "tools.benchmark.floors"]
    warm_memory(nr_bytes)
    with open(directory / "floor.err", "ab") as errors:
        receiver = destination.popen(
            [*module, "receive", floor.way, floor.pages, str(PORT), str(CHUNK_BYTES)], stderr=errors
        )
        wait_until(
            lambda: destination.listens_on_tcp(PORT) or not receiver.alive, "the floor's receiver to listen"
        )
        address = destination.addresses[0]
        sender = source.popen([*module, "send", str(pid), address, str(PORT), str(CHUNK_BYTES)], stderr=errors)
        printed, _ = sender.communicate(LONGEST_S)
        receiver.communicate(LONGEST_S)
    if sender.wait() or receiver.wait():
        raise RuntimeError(f"floor {floor}: {(directory / 'floor.err').read_text()}")
    result: dict[str, Any] = json.loads(printed)
    return {"seconds": round(result["seconds"], 4), "bytes": result["bytes"]}


if __name__ == "__main__":
    if sys.argv[1] == "send":
        send(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        receive(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))

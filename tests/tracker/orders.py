"""A small process that does what it is told, one order at a time; run as a program.

An order is a line of JSON on standard input, [name, arguments...]: a function of this module, of agent.kernel.mman or
of os; the answer is a line of JSON. Small, since tests compare every page of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
from typing import Any

from agent.kernel import mman

PAGE = 4096
NR_PAGES = 256
libc = ctypes.CDLL(None)


def poke(address: int, text: str) -> None:
    """Store characters."""
    data = text.encode("latin-1")
    ctypes.memmove(address, data, len(data))


def peek(address: int, length: int) -> str:
    """Load characters."""
    return ctypes.string_at(address, length).decode("latin-1")


def store_everywhere(base: int, seed: int) -> None:
    """Store to each of NR_PAGES pages, in an order of the seed's."""
    pages = list(range(NR_PAGES))
    random.Random(seed).shuffle(pages)
    for page in pages:
        poke(base + page * PAGE + page, chr(seed))


def read_over(base: int) -> int:
    """Have the kernel store to NR_PAGES pages."""
    fd = os.open("/dev/zero", os.O_RDONLY)
    nr: int = libc.read(fd, ctypes.c_void_p(base), NR_PAGES * PAGE)
    os.close(fd)
    return nr


def write_as_debugger(base: int, nr_pages: int) -> None:
    """Store to NR_PAGES pages by process_vm_writev(2), which pins all that one call names before it stores."""
    content = ctypes.create_string_buffer(b"d" * NR_PAGES * PAGE)
    for page in range(0, NR_PAGES, nr_pages):
        local = (ctypes.c_uint64 * 2)(ctypes.addressof(content) + page * PAGE, nr_pages * PAGE)
        remote = (ctypes.c_uint64 * 2)(base + page * PAGE, nr_pages * PAGE)
        arguments = ctypes.byref(local), ctypes.c_ulong(1), ctypes.byref(remote), ctypes.c_ulong(1), ctypes.c_ulong(0)
        written = libc.process_vm_writev(os.getpid(), *arguments)
        assert written == nr_pages * PAGE, ctypes.get_errno()


def fork_and_store(address: int) -> int:
    """Fork a child that stores to memory it inherited, and return how it ended."""
    pid = os.fork()
    if not pid:
        poke(address, "mine")
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def make_threads(nr: int) -> int:
    """Make and join threads through the C library, whose join waits for the kernel to clear the thread's tid."""
    thread = ctypes.c_uint64()
    for _ in range(nr):
        assert libc.pthread_create(ctypes.byref(thread), None, libc.usleep, ctypes.c_void_p(300)) == 0
        assert libc.pthread_join(thread, None) == 0
    return nr


def become(uid: int) -> None:
    """Give up all privileges."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def main() -> None:
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        function: Any = globals().get(name) or getattr(mman, name, None) or getattr(os, name)
        print(json.dumps(function(*arguments)), flush=True)


if __name__ == "__main__":
    main()

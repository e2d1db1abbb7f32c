"""A process that changes its memory in every way a tracker must survive; run as a program.

usage: victim.py SEED DIRECTORY tracked|untracked UFFD_FLAGS UNFIT STEPS...

UNFIT is an action to leave out. Makes a userfaultfd (UFFD_FLAGS -1: none), prints "PID FD", waits for a line on
standard input and closes it again: from then on somebody else may hold it. Then one thread for each of STEPS mutates
memory of its own that many steps (0: for ever), two threads count up atomically in common memory, and the main
thread's stack grows.

Each step's record (number of the action, its result) is appended to DIRECTORY/log-INDEX, RECORD bytes each: the same
steps without a tracker must give the same records. When all threads are done with their steps, prints "done".
"""

from __future__ import annotations

import ctypes
import os
import random
import struct
import sys
import threading
import time
import warnings

from tests.tracker import calls
from tests.tracker.mutations import ARENA_BASE, PAGE, RW, Mutator

RECORD = struct.Struct("<qq")
COUNTER_PAGES = 16
COUNTERS = ARENA_BASE - (1 << 30)
"""Where the common counters are: private ones, and COUNTER_PAGES further shared ones."""
TALLIES = COUNTERS - (1 << 30)
"""One word for each counting thread: how often it went over all counters."""
COUNTING_THREADS = 2
TIMES = 5
"""How often one call counts up."""
PAUSE_S = 0.002
"""After some steps, without which others hardly get the interpreter or the mmap lock."""


def walk(mutator: Mutator, directory: str, steps: int) -> None:
    log = os.open(f"{directory}/log-{mutator.index}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    done = 0
    while not steps or done < steps:
        os.write(log, RECORD.pack(*mutator.step()))
        done += 1
        if not steps and done % 4 == 0:
            time.sleep(PAUSE_S)


def count(index: int) -> None:
    tally = ctypes.c_uint64.from_address(TALLIES + 8 * index)
    while True:
        calls.hammer(COUNTERS, PAGE, 2 * COUNTER_PAGES, TIMES)
        tally.value += TIMES
        time.sleep(PAUSE_S)


def main() -> None:
    warnings.simplefilter("ignore")  # fork() with threads: that is the point
    calls.libc.prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: it would go on for ever without the test
    seed, directory, mode, flags, unfit, *steps = sys.argv[1:]
    noise = os.open(f"{directory}/noise", os.O_RDWR | os.O_CREAT)
    os.pwrite(noise, random.Random(int(seed)).randbytes(1 << 18), 0)
    uffd = calls.libc.syscall(323, int(flags)) if int(flags) >= 0 else -1
    fixed = 0x10
    calls.sys_mmap(COUNTERS, COUNTER_PAGES * PAGE, RW, 0x22 | fixed, -1, 0)
    calls.sys_mmap(COUNTERS + COUNTER_PAGES * PAGE, COUNTER_PAGES * PAGE, RW, 0x21 | fixed, -1, 0)
    calls.sys_mmap(TALLIES, PAGE, RW, 0x22 | fixed, -1, 0)
    mutators = [
        Mutator(int(seed), index, directory, noise, tracked=mode == "tracked", unfit=unfit.split(","))
        for index in range(len(steps))
    ]
    print(os.getpid(), uffd, flush=True)
    sys.stdin.readline()
    if uffd >= 0:
        os.close(uffd)
    walkers = [
        threading.Thread(target=walk, args=(mutator, directory, int(limit)), daemon=True)
        for mutator, limit in zip(mutators, steps)
    ]
    for index in range(COUNTING_THREADS):
        threading.Thread(target=count, args=(index,), daemon=True).start()
    for walker in walkers:
        walker.start()
    depth = 0
    while any(walker.is_alive() for walker in walkers):
        depth = min(depth + PAGE, 2 << 20)
        calls.touch_stack(depth)
        time.sleep(PAUSE_S)
    print("done", flush=True)


if __name__ == "__main__":
    main()

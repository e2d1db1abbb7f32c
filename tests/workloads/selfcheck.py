"""Eight threads that check themselves: locks, a timer, files, a pipe to itself, big buffers with checksums.

Usage: python -m tests.workloads.selfcheck STATUS_FILE [--megabytes N] [--data FILE] [--pause SECONDS]

Threads: the main one (notes, SIGALRM timer), three that rewrite and verify buffers, two that hand a counter to each
other under a lock, one that keeps a pipe to itself half full, one that works on an open file through two descriptors.
Notes carry the progress of each; an "error" is a self-check that failed. Runs until killed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import threading
import time
import zlib
from types import FrameType
from typing import Optional

from tests.workloads.status import Status

_BLOCK_BYTES = 1 << 18


class Progress:
    """How often each thread came round; written by one thread each."""

    def __init__(self) -> None:
        self.buffers = [0, 0, 0]
        self.handovers = 0
        self.pipe = 0
        self.file = 0
        self.ticks = 0


def rewrite_buffer(status: Status, progress: Progress, index: int, nbytes: int, pause_s: float) -> None:
    """Rewrites random blocks of a big buffer; each block must still be what was last written there."""
    chance = random.Random(index)
    blocks = max(nbytes // _BLOCK_BYTES, 2)
    buffer = bytearray(blocks * _BLOCK_BYTES)
    sums = []
    for number in range(blocks):
        block = chance.randbytes(_BLOCK_BYTES)
        buffer[number * _BLOCK_BYTES : (number + 1) * _BLOCK_BYTES] = block
        sums.append(zlib.crc32(block))
    while True:
        # Mostly a hot quarter, sometimes anywhere: the working set of a real program.
        number = chance.randrange(blocks if chance.random() < 0.2 else max(blocks // 4, 1))
        view = memoryview(buffer)[number * _BLOCK_BYTES : (number + 1) * _BLOCK_BYTES]
        if zlib.crc32(view) != sums[number]:
            status.error(f"buffer {index} block {number} changed by itself")
            sums[number] = zlib.crc32(view)
        at = chance.randrange(_BLOCK_BYTES - 4096)
        view[at : at + 4096] = chance.randbytes(4096)
        sums[number] = zlib.crc32(view)
        progress.buffers[index] += 1
        time.sleep(pause_s)


def hand_over(status: Status, progress: Progress, condition: threading.Condition, parity: int) -> None:
    """Waits for its turn, takes the counter one further, wakes the other."""
    while True:
        with condition:
            while progress.handovers % 2 != parity:
                if not condition.wait(timeout=60):
                    status.error(f"hand-over {parity} waited a minute")
            progress.handovers += 1
            condition.notify_all()
        time.sleep(0.002)


def feed_pipe(status: Status, progress: Progress) -> None:
    """A pipe that always holds unread bytes; they must come out in order."""
    reader, writer = os.pipe()
    for number in range(200):
        os.write(writer, number.to_bytes(8, "little"))
    while True:
        expected = progress.pipe.to_bytes(8, "little")
        found = os.read(reader, 8)
        status.check(found == expected, f"pipe gave {found!r}, expected {expected!r}")
        os.write(writer, (progress.pipe + 200).to_bytes(8, "little"))
        progress.pipe += 1
        time.sleep(0.001)


def append_file(status: Status, progress: Progress, path: str) -> None:
    """Writes through one descriptor, reads through another; both keep their own offsets."""
    writer = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    reader = os.open(path, os.O_RDONLY)
    while True:
        line = b"%015d\n" % progress.file
        os.write(writer, line)
        found = os.read(reader, 16)
        status.check(found == line, f"file gave {found!r}, expected {line!r}")
        progress.file += 1
        if progress.file % 4096 == 0:
            os.lseek(writer, 0, os.SEEK_SET)
            os.lseek(reader, 0, os.SEEK_SET)
        time.sleep(0.002)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("status")
    parser.add_argument("--megabytes", type=int, default=24)
    parser.add_argument("--pause", type=float, default=0.002)
    parser.add_argument("--data")
    options = parser.parse_args()
    status = Status(options.status)
    progress = Progress()

    def tick(signum: int, frame: Optional[FrameType]) -> None:
        progress.ticks += 1

    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    nbytes = options.megabytes * (1 << 20) // 3
    condition = threading.Condition()
    threads = [
        threading.Thread(target=rewrite_buffer, args=(status, progress, i, nbytes, options.pause))
        for i in range(3)
    ]
    threads += [
        threading.Thread(target=hand_over, args=(status, progress, condition, parity))
        for parity in range(2)
    ]
    threads.append(threading.Thread(target=feed_pipe, args=(status, progress)))
    data = options.data or options.status + ".data"
    threads.append(threading.Thread(target=append_file, args=(status, progress, data)))
    for thread in threads:
        thread.daemon = True
        thread.start()
    while True:
        dead = [thread.name for thread in threads if not thread.is_alive()]
        if dead:
            status.error(f"threads ended: {dead}")
        status.note(
            buffers=sum(progress.buffers),
            handovers=progress.handovers,
            pipe=progress.pipe,
            file=progress.file,
            ticks=progress.ticks,
            threads=len(os.listdir("/proc/self/task")),
        )
        time.sleep(0.05)


if __name__ == "__main__":
    main()

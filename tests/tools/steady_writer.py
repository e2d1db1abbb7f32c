"""A load of a known rate: writes to the pages of one mapping in turn, and notes in a file how many it has written.

Usage: python steady_writer.py STATUS MEGABYTES PAGES_PER_SECOND. A note is one JSON line: pages_written, realtime_ns.
Runs until killed.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time

PAGE = 4096
NOTE_S = 0.2


def main() -> None:
    nr_pages = int(sys.argv[2]) * 256
    rate = int(sys.argv[3])
    memory = mmap.mmap(-1, nr_pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[::PAGE] = b"x" * nr_pages
    status = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    written = 0
    begin = noted = time.monotonic()
    while True:
        time.sleep(0.001)
        now = time.monotonic()
        # What a busy machine kept it from is not made up for in one burst.
        due = min(int((now - begin) * rate) - written, rate // 10)
        begin = now - (written + due) / rate
        for number in range(written, written + due):
            memory[number % nr_pages * PAGE] = number & 0xFF
        written += due
        if now - noted >= NOTE_S:
            note = {"pages_written": written, "realtime_ns": time.time_ns()}
            os.write(status, json.dumps(note).encode() + b"\n")
            noted = now


if __name__ == "__main__":
    main()

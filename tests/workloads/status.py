"""How a workload tells the test what it sees: one JSON line per note, appended to a file.

Every note carries a sequence number, the pid, both clocks and the host's name, so a test reads from the file alone
that the same process goes on, where, and since when. A note with an "error" is a failed self-check. Standard library
only; an O_APPEND write per note, no buffering: nothing is lost whatever happens to the process.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any


class Status:
    """Writes the notes of one workload; safe from several threads."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._lock = threading.Lock()
        self.sequence = 0
        self.nr_errors = 0

    def note(self, **facts: Any) -> None:
        """Appends one line with `facts` and what every line has."""
        with self._lock:
            self.sequence += 1
            line = {
                "sequence": self.sequence,
                "pid": os.getpid(),
                "host": os.uname().nodename,
                "monotonic_ns": time.monotonic_ns(),
                "realtime_ns": time.time_ns(),
                "nr_errors": self.nr_errors,
                **facts,
            }
            os.write(self._fd, json.dumps(line).encode() + b"\n")

    def error(self, text: str) -> None:
        """Notes a failed self-check; the workload goes on, so that one failure hides no other."""
        with self._lock:
            self.nr_errors += 1
        self.note(error=text)

    def check(self, truth: object, text: str) -> None:
        """An error with `text` unless `truth`."""
        if not truth:
            self.error(text)

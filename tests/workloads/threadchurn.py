"""Threads that come and go all the time: no two looks at the process show the same ones.

Usage: python -m tests.workloads.threadchurn STATUS_FILE

Breeders start threads that live for a moment, check what is theirs alone and are joined. Two of them blocked in turn,
so that a thread which is lost, or one too many, shows as a count that does not add up or as a breeder that hangs.
"""

from __future__ import annotations

import sys
import threading
import time

from tests.workloads import libc
from tests.workloads.status import Status

NR_BREEDERS = 4
BROOD = 3


def default_timer_slack() -> int:
    """The timer slack that this thread was born with: what 0 stands for."""
    libc.syscall(libc.NR_prctl, 29, 0, 0, 0, 0)  # PR_SET_TIMERSLACK
    return libc.syscall(libc.NR_prctl, 30, 0, 0, 0, 0)  # PR_GET_TIMERSLACK


class Brood:
    """What one breeder's threads did."""

    def __init__(self, status: Status, number: int) -> None:
        self.status = status
        self.number = number
        self.own = threading.local()
        self.born = 0
        self.ended = 0
        self.lock = threading.Lock()

    def live(self, value: int) -> None:
        self.own.value = value
        total = sum(range(200 + value % 50))
        time.sleep(value % 4 / 2000)
        self.status.check(self.own.value == value, "a thread sees another's own value")
        self.status.check(total == sum(range(200 + value % 50)), "arithmetic")
        with self.lock:
            self.ended += 1

    def breed(self) -> None:
        slack = default_timer_slack()
        while True:
            self.status.check(default_timer_slack() == slack, "the default timer slack changed")
            threads = [threading.Thread(target=self.live, args=(self.born + i,)) for i in range(BROOD)]
            for thread in threads:
                thread.start()
            self.born += BROOD
            for thread in threads:
                thread.join(30)
                self.status.check(not thread.is_alive(), f"a thread of breeder {self.number} is lost")
            self.status.check(self.ended == self.born, f"{self.ended} of {self.born} threads ended")


def main() -> None:
    status = Status(sys.argv[1])
    broods = [Brood(status, number) for number in range(NR_BREEDERS)]
    for brood in broods:
        threading.Thread(target=brood.breed, daemon=True).start()
    while True:
        status.note(born=[brood.born for brood in broods])
        time.sleep(0.02)


if __name__ == "__main__":
    main()

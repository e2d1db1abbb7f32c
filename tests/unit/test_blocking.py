"""Which system calls only wait, and until when."""

from __future__ import annotations

import time

import pytest

from agent.kernel import syscalls as nr
from agent.kernel.futex import (
    FUTEX_CLOCK_REALTIME,
    FUTEX_LOCK_PI,
    FUTEX_PRIVATE_FLAG,
    FUTEX_WAIT,
    FUTEX_WAIT_BITSET,
    FUTEX_WAIT_REQUEUE_PI,
)
from agent.target.blocking import end_of, has_limit, takes_nothing

AT = 0x7F0000001000
ABSTIME = 1
GARBAGE = 0xABCD << 32
"""In the upper half of a register: the kernel takes an int."""


def futex(operation: int, limit: int = 0) -> tuple[int, tuple[int, ...]]:
    return nr.NR_futex, (AT, operation, 1, limit, 0, 0xFFFFFFFF)


def sleep(clock: int, flags: int) -> tuple[int, tuple[int, ...]]:
    return nr.NR_clock_nanosleep, (clock & 0xFFFFFFFF, flags, AT, 0, 0, 0)


@pytest.mark.parametrize(
    ("call", "end"),
    [
        (futex(FUTEX_WAIT | FUTEX_PRIVATE_FLAG), None),
        (futex(FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG), None),
        (futex(FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, AT), (time.CLOCK_MONOTONIC, AT)),
        (futex(FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG | GARBAGE, AT), (time.CLOCK_MONOTONIC, AT)),
        (futex(FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG | FUTEX_CLOCK_REALTIME, AT), (time.CLOCK_REALTIME, AT)),
        (sleep(time.CLOCK_MONOTONIC, ABSTIME), (time.CLOCK_MONOTONIC, AT)),
        (sleep(time.CLOCK_BOOTTIME, ABSTIME), (time.CLOCK_BOOTTIME, AT)),
    ],
)
def test_call_that_only_waits(call: tuple[int, tuple[int, ...]], end: tuple[int, int] | None) -> None:
    assert takes_nothing(*call)
    assert end_of(*call) == end


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(futex(FUTEX_WAIT), id="another process may wake it"),
        pytest.param(futex(FUTEX_WAIT_BITSET), id="another process may wake it from a set"),
        pytest.param(futex(FUTEX_WAIT | FUTEX_PRIVATE_FLAG, AT), id="for a time: less remains later"),
        pytest.param(futex(FUTEX_WAIT | FUTEX_PRIVATE_FLAG | GARBAGE, AT), id="the same, by a careless caller"),
        pytest.param(futex(FUTEX_LOCK_PI | FUTEX_PRIVATE_FLAG), id="takes a lock"),
        pytest.param(futex(FUTEX_WAIT_REQUEUE_PI | FUTEX_PRIVATE_FLAG), id="takes another lock"),
        pytest.param(sleep(time.CLOCK_MONOTONIC, 0), id="sleep for a time"),
        pytest.param(sleep(time.CLOCK_PROCESS_CPUTIME_ID, ABSTIME), id="until so much CPU time is used"),
        pytest.param(sleep(-6, ABSTIME), id="the same of another process"),
        pytest.param((nr.NR_nanosleep, (AT, 0, 0, 0, 0, 0)), id="nanosleep"),
        pytest.param((nr.NR_read, (0, AT, 1, 0, 0, 0)), id="takes data"),
        pytest.param((nr.NR_epoll_wait, (3, AT, 1, 0xFFFFFFFF, 0, 0)), id="takes events"),
        pytest.param((nr.NR_wait4, (0xFFFFFFFF, 0, 0, 0, 0, 0)), id="takes a child"),
    ],
)
def test_call_that_does_more_than_wait(call: tuple[int, tuple[int, ...]]) -> None:
    assert not takes_nothing(*call)


def test_limit_of_a_futex_is_seen_whatever_the_upper_half_of_the_register_has() -> None:
    assert has_limit(*futex(FUTEX_WAIT | FUTEX_PRIVATE_FLAG | GARBAGE, AT))
    assert not has_limit(*futex(FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG | GARBAGE, AT))

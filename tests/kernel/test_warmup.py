"""What an agent changes about itself, and about the host, for as long as a freeze lasts."""

from __future__ import annotations

import gc
import os
import resource

import pytest

from agent import warmup
from agent.warmup import populate_own_memory, urgent
from tests.kernel.support import PAGE, Puppet, skip_unless_root

MEMORY_BYTES = 1 << 20
MEMORY = bytearray(b"1" * MEMORY_BYTES)
DEVICE = "/dev/cpu_dma_latency"


def open_devices() -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{fd}") == DEVICE
        except FileNotFoundError:
            pass  # the listing's own
    return found


def test_everything_is_as_before_afterwards() -> None:
    skip_unless_root()
    before = os.sched_getscheduler(0)
    with pytest.raises(KeyError), urgent():
        assert os.sched_getscheduler(0) == os.SCHED_RR
        assert not gc.isenabled()
        assert open_devices() == os.path.exists(DEVICE)
        raise KeyError
    assert os.sched_getscheduler(0) == before
    assert gc.isenabled()
    assert open_devices() == 0


def test_pages_shared_with_a_fork_are_copied_ahead() -> None:
    puppet = Puppet()
    try:
        # Once as they are after the fork, once more after they were populated.
        assert puppet.run(faults_of, MEMORY_BYTES // 2, MEMORY_BYTES) >= MEMORY_BYTES // PAGE // 2 - 1
        puppet.run(populate_own_memory)
        assert puppet.run(faults_of, 0, MEMORY_BYTES // 2) < MEMORY_BYTES // PAGE // 8
    finally:
        puppet.close()


def faults_of(start: int, end: int) -> int:
    """How many page faults it takes to write to a part of the memory that was there before the fork."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for at in range(start, end, PAGE):
        MEMORY[at] = 2
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_host_without_the_device_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_root()
    monkeypatch.setattr(warmup, "_CPU_LATENCY", "/dev/no-such-device")
    with urgent():
        assert os.sched_getscheduler(0) == os.SCHED_RR
    assert os.sched_getscheduler(0) == os.SCHED_OTHER

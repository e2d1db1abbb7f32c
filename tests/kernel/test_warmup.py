"""What an agent changes about itself, and about the host, for as long as a freeze lasts."""

from __future__ import annotations

import gc
import os

import pytest

from agent import warmup
from agent.warmup import urgent
from tests.kernel.support import skip_unless_root

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


def test_a_host_without_the_device_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_root()
    monkeypatch.setattr(warmup, "_CPU_LATENCY", "/dev/no-such-device")
    with urgent():
        assert os.sched_getscheduler(0) == os.SCHED_RR
    assert os.sched_getscheduler(0) == os.SCHED_OTHER

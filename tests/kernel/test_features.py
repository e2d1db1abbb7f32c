"""Feature probing, the C library funnel, and the processor state layout."""

from __future__ import annotations

import os

import pytest

from agent.kernel import libc, ptrace, xstate
from agent.kernel.arch import NT_X86_XSTATE
from agent.kernel.features import kernel_features
from agent.kernel.syscalls import NR_close, NR_getpid
from agent.procfs.maps import read_maps
from tests.kernel.support import stopped_child


def test_every_missing_feature_has_a_reason_and_no_other() -> None:
    features = kernel_features()
    missing = {name for name, value in features._asdict().items() if name.startswith("has_") and not value}
    assert set(features.reasons) == missing


def test_probing_leaves_nothing_behind() -> None:
    kernel_features()
    fds, maps = os.listdir("/proc/self/fd"), read_maps(os.getpid()).count(b"\n")
    kernel_features.cache_clear()
    kernel_features()
    assert os.listdir("/proc/self/fd") == fds
    assert abs(read_maps(os.getpid()).count(b"\n") - maps) <= 2


def test_failed_system_call_is_the_fitting_oserror_and_names_itself() -> None:
    with pytest.raises(OSError, match=f"system call {NR_close} 123456: Bad file descriptor"):
        libc.syscall(NR_close, 123456)
    assert libc.syscall(NR_getpid) == os.getpid()


def test_addresses_are_told_in_hex() -> None:
    assert libc.describe("mmap", (4096, 0x7F0000000000)) == "mmap 4096 0x7f0000000000"


def test_each_user_of_a_function_has_its_own_prototype() -> None:
    assert libc.libc["ioctl"] is not libc.libc["ioctl"]


def test_host_xstate_layout_is_that_of_any_child() -> None:
    layout = xstate.host_layout()
    assert layout.mask & xstate.XFEATURE_MASK_FPSSE == xstate.XFEATURE_MASK_FPSSE
    assert layout.size >= xstate.LEGACY_AND_HEADER_BYTES
    with stopped_child() as child:
        raw = ptrace.getregset(child.pid, NT_X86_XSTATE)
        assert xstate.layout_of(raw) == layout
        assert xstate.components_in_use(raw) & ~layout.mask == 0

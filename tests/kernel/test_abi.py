"""Sizes, offsets and request numbers of the kernel's structures, as literal numbers; tools/check_abi.py asks gcc."""

from __future__ import annotations

import ctypes

import pytest

from agent.kernel import (
    clone,
    kcmp,
    pagemap,
    prctl,
    ptrace,
    rseq,
    sched,
    siginfo,
    syscalls,
    timers,
    uffd,
)
from agent.kernel.arch import user_regs_struct

SIZES = [
    (user_regs_struct, 216),
    (clone.clone_args, 88),
    (kcmp.kcmp_epoll_slot, 12),
    (pagemap.page_region, 24),
    (pagemap.pm_scan_arg, 96),
    (prctl.prctl_mm_map, 104),
    (ptrace.iovec, 16),
    (ptrace.ptrace_peeksiginfo_args, 16),
    (ptrace.ptrace_rseq_configuration, 24),
    (rseq.rseq, 32),
    (rseq.rseq_cs, 32),
    (sched.sched_attr, 56),
    (siginfo.kernel_sigaction, 32),
    (siginfo.stack_t, 24),
    (timers.itimerspec, 32),
    (timers.itimerval, 32),
    (timers.sigevent, 64),
    (timers.timespec, 16),
    (timers.timeval, 16),
    (uffd.uffdio_api, 24),
    (uffd.uffdio_copy, 40),
    (uffd.uffdio_range, 16),
    (uffd.uffdio_register, 32),
    (uffd.uffdio_writeprotect, 24),
    (uffd.uffdio_zeropage, 32),
]

OFFSETS = [
    (user_regs_struct, {"r15": 0, "rbp": 32, "rax": 80, "orig_rax": 120, "rip": 128, "rsp": 152}),
    (user_regs_struct, {"cs": 136, "eflags": 144, "fs_base": 168, "gs": 208}),
    (clone.clone_args, {"flags": 0, "exit_signal": 32, "stack": 40, "tls": 56, "set_tid": 64}),
    (clone.clone_args, {"set_tid_size": 72, "cgroup": 80}),
    (kcmp.kcmp_epoll_slot, {"efd": 0, "tfd": 4, "toff": 8}),
    (pagemap.page_region, {"start": 0, "end": 8, "categories": 16}),
    (pagemap.pm_scan_arg, {"size": 0, "flags": 8, "start": 16, "end": 24, "walk_end": 32}),
    (pagemap.pm_scan_arg, {"vec": 40, "vec_len": 48, "max_pages": 56, "category_inverted": 64}),
    (pagemap.pm_scan_arg, {"category_mask": 72, "category_anyof_mask": 80, "return_mask": 88}),
    (prctl.prctl_mm_map, {"start_code": 0, "start_brk": 32, "brk": 40, "start_stack": 48}),
    (prctl.prctl_mm_map, {"arg_start": 56, "env_end": 80, "auxv": 88, "auxv_size": 96}),
    (prctl.prctl_mm_map, {"exe_fd": 100}),
    (ptrace.ptrace_peeksiginfo_args, {"off": 0, "flags": 8, "nr": 12}),
    (ptrace.ptrace_rseq_configuration, {"rseq_abi_size": 8, "signature": 12, "flags": 16}),
    (rseq.rseq, {"cpu_id_start": 0, "cpu_id": 4, "rseq_cs": 8, "flags": 16}),
    (rseq.rseq_cs, {"start_ip": 8, "post_commit_offset": 16, "abort_ip": 24}),
    (sched.sched_attr, {"sched_policy": 4, "sched_flags": 8, "sched_nice": 16}),
    (sched.sched_attr, {"sched_priority": 20, "sched_runtime": 24, "sched_util_max": 52}),
    (siginfo.kernel_sigaction, {"sa_handler": 0, "sa_flags": 8, "sa_restorer": 16, "sa_mask": 24}),
    (siginfo.stack_t, {"ss_sp": 0, "ss_flags": 8, "ss_size": 16}),
    (timers.itimerspec, {"it_interval": 0, "it_value": 16}),
    (timers.sigevent, {"sigev_value": 0, "sigev_signo": 8, "sigev_notify": 12}),
    (timers.sigevent, {"sigev_notify_thread_id": 16}),
    (uffd.uffdio_register, {"range": 0, "mode": 16, "ioctls": 24}),
    (uffd.uffdio_copy, {"dst": 0, "src": 8, "len": 16, "mode": 24, "copy": 32}),
]


@pytest.mark.parametrize(("struct", "size"), SIZES, ids=lambda v: getattr(v, "__name__", None))
def test_structure_has_the_size_of_the_kernels(
    struct: type[ctypes.Structure], size: int
) -> None:
    assert ctypes.sizeof(struct) == size


@pytest.mark.parametrize(("struct", "offsets"), OFFSETS)
def test_fields_are_where_the_kernel_has_them(
    struct: type[ctypes.Structure], offsets: dict[str, int]
) -> None:
    assert {name: getattr(struct, name).offset for name in offsets} == offsets


def test_ioctl_requests_have_the_kernels_numbers() -> None:
    assert pagemap.PAGEMAP_SCAN == 0xC0606610
    assert uffd.UFFDIO_API == 0xC018AA3F
    assert uffd.UFFDIO_REGISTER == 0xC020AA00
    assert uffd.UFFDIO_UNREGISTER == 0x8010AA01
    assert uffd.UFFDIO_WAKE == 0x8010AA02
    assert uffd.UFFDIO_COPY == 0xC028AA03
    assert uffd.UFFDIO_ZEROPAGE == 0xC020AA04
    assert uffd.UFFDIO_WRITEPROTECT == 0xC018AA06


def test_system_call_numbers_are_the_published_ones() -> None:
    assert (syscalls.NR_read, syscalls.NR_mmap, syscalls.NR_rt_sigprocmask) == (0, 9, 14)
    assert (syscalls.NR_userfaultfd, syscalls.NR_kcmp, syscalls.NR_prctl) == (323, 312, 157)
    assert (syscalls.NR_pidfd_getfd, syscalls.NR_clone3, syscalls.NR_mseal) == (438, 435, 462)
    assert (syscalls.NR_restart_syscall, syscalls.NR_rseq) == (219, 334)


def test_system_call_names_are_those_of_the_table() -> None:
    assert syscalls.syscall_name(257) == "openat"
    assert syscalls.syscall_name(9999) == "syscall_9999"

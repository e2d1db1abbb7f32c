#!/usr/bin/env python3
"""Compare the kernel structures and numbers in agent.kernel with this machine's C headers.

Compiles one small C program (needs gcc or cc and the kernel's user space headers) that prints sizes, offsets and
constants, and compares. What the installed headers do not know yet is told and skipped: they may be older than the
kernel. Exit status: 0 all equal, 1 differences, 2 no compiler.

usage: tools/check_abi.py [-v]
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agent.kernel import (  # noqa: E402
    clone,
    futex,
    kcmp,
    mman,
    namespaces,
    pagemap,
    prctl,
    process_vm,
    ptrace,
    rseq,
    sched,
    siginfo,
    syscalls,
    timers,
    uffd,
)
from agent.kernel.arch import user_regs_struct, x86_64  # noqa: E402

# C name, header, our structure. Names of ours that differ from the header's are given in RENAMED.
STRUCTURES: list[tuple[str, str, type[ctypes.Structure]]] = [
    ("struct user_regs_struct", "sys/user.h", user_regs_struct),
    ("struct clone_args", "linux/sched.h", clone.clone_args),
    ("struct kcmp_epoll_slot", "linux/kcmp.h", kcmp.kcmp_epoll_slot),
    ("struct page_region", "linux/fs.h", pagemap.page_region),
    ("struct pm_scan_arg", "linux/fs.h", pagemap.pm_scan_arg),
    ("struct prctl_mm_map", "linux/prctl.h", prctl.prctl_mm_map),
    ("struct iovec", "linux/uio.h", ptrace.iovec),
    ("struct ptrace_peeksiginfo_args", "linux/ptrace.h", ptrace.ptrace_peeksiginfo_args),
    ("struct ptrace_rseq_configuration", "linux/ptrace.h", ptrace.ptrace_rseq_configuration),
    ("struct rseq", "linux/rseq.h", rseq.rseq),
    ("struct rseq_cs", "linux/rseq.h", rseq.rseq_cs),
    ("struct sched_attr", "linux/sched/types.h", sched.sched_attr),
    ("stack_t", "signal.h", siginfo.stack_t),
    ("struct __kernel_itimerspec", "linux/time_types.h", timers.itimerspec),
    ("struct __kernel_timespec", "linux/time_types.h", timers.timespec),
    ("struct sigevent", "signal.h", timers.sigevent),
    ("struct uffdio_api", "linux/userfaultfd.h", uffd.uffdio_api),
    ("struct uffdio_copy", "linux/userfaultfd.h", uffd.uffdio_copy),
    ("struct uffdio_range", "linux/userfaultfd.h", uffd.uffdio_range),
    ("struct uffdio_register", "linux/userfaultfd.h", uffd.uffdio_register),
    ("struct uffdio_writeprotect", "linux/userfaultfd.h", uffd.uffdio_writeprotect),
    ("struct uffdio_zeropage", "linux/userfaultfd.h", uffd.uffdio_zeropage),
]
RENAMED = {"sigev_notify_thread_id": "_sigev_un._tid"}

# Headers whose macros have the names of a module's constants.
CONSTANTS: list[tuple[ModuleType, str, str]] = [
    (clone, "linux/sched.h", r"CLONE_\w+"),
    (futex, "linux/futex.h", r"FUTEX_\w+"),
    (mman, "linux/mman.h", r"(PROT|MAP|MREMAP|MADV|MLOCK)_\w+"),
    (namespaces, "linux/mount.h", r"MS_\w+"),
    (pagemap, "linux/fs.h", r"(PAGE_IS|PM_SCAN)_\w+|PAGEMAP_SCAN"),
    (prctl, "linux/prctl.h", r"PR_\w+"),
    (process_vm, "limits.h", r"IOV_MAX"),
    (ptrace, "linux/ptrace.h", r"PTRACE_\w+"),
    (sched, "linux/sched.h", r"SCHED_\w+"),
    (siginfo, "asm/siginfo.h", r"SI_[A-Z]+"),
    (siginfo, "asm/signal.h", r"SA_\w+|SIG_(BLOCK|UNBLOCK|SETMASK)"),
    (siginfo, "linux/signal.h", r"SS_\w+"),
    (syscalls, "asm/unistd_64.h", r"NR_\w+"),
    (timers, "linux/time.h", r"(CLOCK|ITIMER|TIMER)_\w+"),
    (uffd, "linux/userfaultfd.h", r"UFFD\w+"),
    (x86_64, "linux/elf.h", r"NT_\w+"),
    (x86_64, "asm/prctl.h", r"ARCH_\w+"),
]


def compile_and_run(compiler: str, header: str, body: list[str]) -> list[str] | None:
    """Return the lines that a program with these statements prints, or None if it does not compile."""
    source = "#define _GNU_SOURCE\n#include <stddef.h>\n#include <stdio.h>\n"
    source += "#include <linux/ioctl.h>\n#include <linux/types.h>\n"
    source += f"#include <{header}>\nint main(void) {{\n" + "\n".join(body) + "\nreturn 0; }\n"
    with tempfile.TemporaryDirectory() as directory:
        program = str(Path(directory) / "abi")
        command = [compiler, "-w", "-x", "c", "-o", program, "-"]
        if subprocess.run(command, input=source.encode(), capture_output=True).returncode:
            return None
        done = subprocess.run([program], capture_output=True, check=True, text=True)
        return done.stdout.splitlines()


def check_structure(
    compiler: str, name: str, header: str, struct: type[ctypes.Structure]
) -> list[str] | None:
    """Return the differences of one structure, or None if the header does not have it."""
    wanted = [("size", ctypes.sizeof(struct))]
    body = [f'printf("%zu\\n", sizeof({name}));']
    if compile_and_run(compiler, header, body) is None:
        return None
    differences = []
    for field, *_ in struct._fields_:
        statement = f'printf("%zu\\n", offsetof({name}, {RENAMED.get(field, field)}));'
        if compile_and_run(compiler, header, [statement]) is not None:
            wanted.append((field, getattr(struct, field).offset))
            body.append(statement)
    found = compile_and_run(compiler, header, body) or []
    for (field, ours), theirs in zip(wanted, map(int, found)):
        # A structure that grew since the headers were installed is no difference.
        if ours != theirs and not (field == "size" and ours > theirs):
            differences.append(f"{name} {field}: ours {ours}, header {theirs}")
    return differences


def check_constants(
    compiler: str, module: ModuleType, header: str, pattern: str
) -> tuple[list[str], list[str]]:
    """Return the differences of a module's constants, and the names that the header does not have."""
    names = [
        name
        for name, value in vars(module).items()
        if re.fullmatch(pattern, name) and isinstance(value, int)
    ]
    body = []
    for name in names:
        macro = f"__{name}" if name.startswith("NR_") else name
        body += [f"#ifdef {macro}", f'printf("{name} %lld\\n", (long long)({macro}));', "#endif"]
    lines = compile_and_run(compiler, header, body)
    if lines is None:
        return [], names
    found = {name: int(value) for name, value in map(str.split, lines)}
    differences = [
        f"{name}: ours {getattr(module, name):#x}, header {found[name]:#x}"
        for name in names
        if name in found and (getattr(module, name) ^ found[name]) & 0xFFFFFFFF
    ]
    return differences, [name for name in names if name not in found]


def main(arguments: list[str]) -> int:
    """Run all comparisons and print what differs."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        print("check_abi: no C compiler found", file=sys.stderr)
        return 2
    differences: list[str] = []
    unknown: list[str] = []
    nr_checked = 0
    for name, header, struct in STRUCTURES:
        result = check_structure(compiler, name, header, struct)
        if result is None:
            unknown.append(name)
            continue
        nr_checked += 1
        differences += result
    for module, header, pattern in CONSTANTS:
        different, missing = check_constants(compiler, module, header, pattern)
        differences += different
        unknown += missing
        nr_checked += sum(1 for name in vars(module) if re.fullmatch(pattern, name)) - len(missing)
    for line in differences:
        print(line)
    if "-v" in arguments:
        print("not in the installed headers:", ", ".join(unknown) or "none")
    print(
        f"check_abi: {nr_checked} structures and numbers compared, {len(differences)} differ, "
        f"{len(unknown)} unknown to the installed headers"
    )
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

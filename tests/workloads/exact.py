"""A process of which everything has an unusual value, and which tells from inside what it sees of itself.

Usage: python -m tests.workloads.exact STATUS_FILE [plain]

Each of its threads notes {"thread": NAME, "picture": {...}} again and again: whatever the kernel answers to the calls
that read a setting. All of it must be the same after a migration. With "plain" nothing is changed from the defaults.
What this kernel or these privileges do not allow is noted in "refused" and left at its default. Standard library only.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable

from tests.workloads import libc
from tests.workloads.status import Status

NR = {
    "arch_prctl": 158, "capget": 125, "capset": 126, "get_mempolicy": 239, "mbind": 237, "get_robust_list": 274,
    "getgroups": 115, "getitimer": 36, "getpriority": 140, "getresgid": 120, "getresuid": 118, "getsid": 124,
    "ioprio_get": 252, "ioprio_set": 251, "membarrier": 324, "mlockall": 151, "personality": 135, "prctl": 157,
    "prlimit64": 302, "rt_sigaction": 13, "rt_sigpending": 127, "rt_sigprocmask": 14, "sched_getaffinity": 204,
    "sched_getattr": 315, "sched_setaffinity": 203, "sched_setattr": 314, "set_mempolicy": 238,
    "set_robust_list": 273, "setfsgid": 123, "setfsuid": 122, "setgroups": 116, "setitimer": 38,
    "setpriority": 141, "setresgid": 119, "setresuid": 117, "timer_getoverrun": 225, "umask": 95,
}  # fmt: skip

PRCTL_GETTERS = {
    # name: (number, whether the answer is written to the second argument)
    "pdeathsig": (2, True), "dumpable": (3, False), "keepcaps": (7, False), "timing": (13, False),
    "seccomp": (21, False), "tsc": (25, True), "securebits": (27, False), "timerslack": (30, False),
    "mce_kill": (34, False), "subreaper": (37, True), "no_new_privs": (39, False), "tid_address": (40, True),
    "thp_disable": (42, False), "io_flusher": (58, False), "mdwe": (66, False), "memory_merge": (68, False),
    "futex_hash_slots": (78, False),
}  # fmt: skip
PR_SPECULATION = 52
SPECULATIONS = {"store_bypass": 0, "indirect_branch": 1, "l1d_flush": 2}
MEMBARRIER_REGISTRATIONS = 512
CAP_VERSION = 0x20080522


class Unusual:
    """Sets things to unusual values; one that is not allowed is recorded, not fatal."""

    def __init__(self) -> None:
        self.refused: dict[str, str] = {}

    def call(self, name: str, *arguments: object, what: str = "") -> int:
        result = libc.syscall(NR[name], *arguments)
        if result < 0:
            self.refused[what or name] = libc.name_of(result)
        return result

    def prctl(self, what: str, *arguments: int) -> None:
        self.call("prctl", *arguments, *[0] * (5 - len(arguments)), what=f"prctl {what}")

    def do(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError) as err:
            self.refused[what] = str(err)


def raw(name: str, *arguments: object) -> int:
    return libc.syscall(NR[name], *arguments)


def buffer_after(name: str, size: int, *before: object, after: tuple[object, ...] = ()) -> str:
    """Hex of what a call writes to a buffer, with its result."""
    buffer = ctypes.create_string_buffer(size)
    result = raw(name, *before, buffer, *after)
    return f"{result} {buffer.raw.hex()}"


def picture_of_thread() -> dict[str, object]:
    """Everything that belongs to the calling thread."""
    seen: dict[str, object] = {"tid": libc.syscall(libc.NR_gettid), "native_id": threading.get_native_id()}
    for name, (number, written) in PRCTL_GETTERS.items():
        if written:
            seen[f"prctl {name}"] = buffer_after("prctl", 8, number, after=(0, 0, 0))
        elif name == "futex_hash_slots":
            seen[f"prctl {name}"] = raw("prctl", number, 2, 0, 0, 0)
        else:
            seen[f"prctl {name}"] = raw("prctl", number, 0, 0, 0, 0)
    for name, which in SPECULATIONS.items():
        seen[f"speculation {name}"] = raw("prctl", PR_SPECULATION, which, 0, 0, 0)
    caps = ctypes.create_string_buffer(24)
    raw("capget", ctypes.create_string_buffer(struct.pack("=Ii", CAP_VERSION, 0)), caps)
    seen["capabilities"] = caps.raw.hex()
    seen["ambient"] = [raw("prctl", 47, 1, cap, 0, 0) for cap in range(41)]
    seen["bounding"] = [raw("prctl", 23, cap, 0, 0, 0) for cap in range(41)]
    seen["uids"] = (os.getresuid(), raw("setfsuid", -1))
    seen["gids"] = (os.getresgid(), raw("setfsgid", -1), os.getgroups())
    seen["sigmask"] = buffer_after("rt_sigprocmask", 8, 0, None, after=(8,))
    seen["pending"] = buffer_after("rt_sigpending", 8, after=(8,))
    seen["altstack"] = buffer_after_altstack()
    seen["robust list"] = robust_list()
    seen["sched"] = buffer_after("sched_getattr", 56, 0, after=(56, 0))
    seen["affinity"] = sorted(os.sched_getaffinity(0))
    seen["nice"] = raw("getpriority", 0, 0)
    seen["ioprio"] = raw("ioprio_get", 1, 0)
    seen["mempolicy"] = mempolicy()
    seen["fs base"] = buffer_after("arch_prctl", 8, 0x1003)
    seen["gs base"] = buffer_after("arch_prctl", 8, 0x1004)
    seen["cpuid"] = raw("arch_prctl", 0x1011, 0)
    seen["rounding"] = _libm.fegetround()
    seen["personality"] = raw("personality", 0xFFFFFFFF)
    seen["name"] = buffer_after("prctl", 16, 16, after=(0, 0, 0))
    return seen


def buffer_after_altstack() -> str:
    buffer = ctypes.create_string_buffer(24)
    return f"{libc.syscall(libc.NR_sigaltstack, None, buffer)} {buffer.raw.hex()}"


def robust_list() -> str:
    head, length = ctypes.c_uint64(), ctypes.c_uint64()
    result = raw("get_robust_list", 0, ctypes.byref(head), ctypes.byref(length))
    return f"{result} {head.value:#x} {length.value}"


def mempolicy(address: int = 0) -> str:
    mode, nodes = ctypes.c_int(), (ctypes.c_uint64 * 16)()
    result = raw("get_mempolicy", ctypes.byref(mode), nodes, 1024, address, 2 if address else 0)
    return f"{result} {mode.value:#x} {bytes(nodes).hex().rstrip('0')}"


def picture_of_process() -> dict[str, object]:
    """Everything that all threads share."""
    seen: dict[str, object] = {"pid": os.getpid(), "umask": umask()}
    words = "\0".join([*sys.argv, *sorted(f"{name}={value}" for name, value in os.environ.items())])
    seen["argv, environ"] = hashlib.sha256(os.fsencode(words)).hexdigest()
    seen["cwd"] = os.getcwd()
    for number in range(1, 65):
        seen[f"action {number}"] = buffer_after("rt_sigaction", 32, number, None, after=(8,))
    for which in range(16):
        seen[f"limit {which}"] = resource_limit(which)
    seen["itimer intervals"] = [signal.getitimer(which)[1] for which in range(3)]
    seen["itimers armed"] = [signal.getitimer(which)[0] > 0 for which in range(3)]
    for number, (_, clock) in TIMERS.items():
        spec = libc.itimerspec()
        result = libc.syscall(libc.NR_timer_gettime, number, ctypes.byref(spec))
        interval = spec.it_interval.tv_sec, spec.it_interval.tv_nsec
        seen[f"timer {number} clock {clock}"] = (result, interval, spec.it_value.tv_sec > 0)
        seen[f"timer {number} overrun"] = raw("timer_getoverrun", number)
    seen["lock of new memory"] = lock_of_new_memory()
    for number, address in enumerate(PLACED):
        seen[f"mapping {number} policy"] = mempolicy(address)
    seen["membarrier"] = raw("membarrier", MEMBARRIER_REGISTRATIONS, 0, 0)
    for command in (8, 32):
        # Registered or not shows in what the call does.
        seen[f"membarrier {command}"] = raw("membarrier", command, 0, 0)
    return seen


def lock_of_new_memory() -> str:
    """What mlockall(2) has said of new mappings: shown by their flags."""
    start = libc.syscall(libc.NR_mmap, 0, 1 << 12, 3, 0x22, -1, 0)
    try:
        with open("/proc/self/smaps", encoding="ascii", errors="replace") as file:
            lines = iter(file.read().splitlines())
        for line in lines:
            low, _, rest = line.partition("-")
            if " " in rest and int(low, 16) <= start < int(rest.partition(" ")[0], 16):
                break
        flags = next(line for line in lines if line.startswith("VmFlags:"))
        return " ".join(flag for flag in flags.split() if flag in ("lo", "lf"))
    finally:
        libc.syscall(libc.NR_munmap, start, 1 << 12)


def umask() -> int:
    value = os.umask(0o777)
    os.umask(value)
    return value


def resource_limit(which: int) -> str:
    return buffer_after("prlimit64", 16, 0, which, None)


_libm = ctypes.CDLL("libm.so.6")
PLACED: list[int] = []
TIMERS: dict[int, tuple[str, int]] = {}
HANDLED = (signal.SIGUSR2, signal.SIGHUP, signal.SIGRTMIN + 3)
_keep: list[object] = []


def unusual_process(unusual: Unusual) -> None:
    """Things that all threads share, apart from credentials."""
    os.umask(0o137)
    os.chdir("/usr/share")
    for number in HANDLED:
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGTTOU, signal.SIGXFSZ, signal.SIGRTMAX):
        signal.signal(number, signal.SIG_IGN)
    signal.siginterrupt(signal.SIGHUP, False)
    # SA_NOCLDSTOP | SA_NOCLDWAIT with the default action: only flags.
    action = struct.pack("=QQQQ", 0, 3, 0, 1 << 40)
    unusual.call("rt_sigaction", signal.SIGCHLD, ctypes.create_string_buffer(action), None, 8)
    # A default action with flags and a mask: what sigaction() leaves behind when a program has a wrapper.
    action = struct.pack("=QQQQ", 0, 0x10000000, 0, 0xF0)
    unusual.call("rt_sigaction", signal.SIGUSR1, ctypes.create_string_buffer(action), None, 8)
    for name, soft, hard in (
        ("RLIMIT_NOFILE", 700, 900), ("RLIMIT_CORE", 4096, 8192), ("RLIMIT_STACK", 4 << 20, 64 << 20),
        ("RLIMIT_NICE", 3, 5), ("RLIMIT_RTPRIO", 2, 7), ("RLIMIT_MSGQUEUE", 1000, 2000),
        ("RLIMIT_MEMLOCK", 64 << 20, 128 << 20), ("RLIMIT_FSIZE", 1 << 40, 1 << 41), ("RLIMIT_SIGPENDING", 300, 400),
        ("RLIMIT_CPU", 3000, 4000), ("RLIMIT_DATA", 1 << 33, 1 << 34), ("RLIMIT_NPROC", 500, 600),
        ("RLIMIT_AS", 1 << 36, 1 << 37), ("RLIMIT_RTTIME", 10**9, 10**9),
    ):  # fmt: skip
        # More than the own hard limit is not ours to have.
        def lower(which: int = getattr(resource, name), soft: int = soft, hard: int = hard) -> None:
            own = resource.getrlimit(which)[1]
            hard = hard if own == resource.RLIM_INFINITY else min(hard, own)
            resource.setrlimit(which, (min(soft, hard), hard))

        unusual.do(name, lower)
    signal.setitimer(signal.ITIMER_REAL, 5000, 7)
    signal.setitimer(signal.ITIMER_VIRTUAL, 6000, 8.5)
    signal.setitimer(signal.ITIMER_PROF, 7000, 9)
    for clock, notify, signum in ((0, 0, 34), (1, 1, 0), (7, 0, 10), (2, 0, 12), (1, 0, 40)):
        make_timer(unusual, clock, notify, signum)
    libc.syscall(libc.NR_timer_delete, 1)  # a gap in the numbers
    TIMERS.pop(1, None)
    unusual.prctl("thp_disable", 41, 1)
    unusual.prctl("subreaper", 36, 1)
    unusual.prctl("memory_merge", 67, 1)
    for command in (4, 16, 64):
        # GLOBAL_EXPEDITED, PRIVATE_EXPEDITED, SYNC_CORE: REGISTER commands.
        unusual.call("membarrier", command, 0, 0, what=f"membarrier {command}")
    for path, text in (("oom_score_adj", "137"), ("coredump_filter", "0x5f")):
        unusual.do(path, lambda path=path, text=text: _write(f"/proc/self/{path}", text))  # type: ignore[misc]
    # Memory with names, advice and locks of its own.
    memory = libc.syscall(libc.NR_mmap, 0, 16 << 12, 3, 0x22, -1, 0)
    unusual.call("prctl", 0x53564D41, 0, memory, 4 << 12, b"named by us\0", what="anon name")
    for offset, advice in ((4, 16), (5, 18), (6, 10), (7, 15), (8, 1), (9, 12)):
        libc.syscall(libc.NR_madvise, memory + (offset << 12), 1 << 12, advice)
    libc.syscall(149, memory + (10 << 12), 1 << 12)  # mlock
    # Whatever is mapped from now on is locked as it is touched; a probe tells.
    unusual.call("mlockall", 2 | 4, what="mlockall")
    # Memory policies of mappings: interleave, bind with MPOL_F_STATIC_NODES, prefer, local; the last has none.
    placed = libc.syscall(libc.NR_mmap, 0, 5 << 12, 3, 0x22, -1, 0)
    node = ctypes.c_uint64(1)
    for offset, (mode, nodes) in enumerate(((3, node), (2 | 1 << 15, node), (1, node), (4, None))):
        mask = (ctypes.byref(nodes), 64) if nodes else (None, 0)
        unusual.call("mbind", placed + (offset << 12), 1 << 12, mode, *mask, 0, what=f"mbind {mode}")
    PLACED.extend(placed + (offset << 12) for offset in range(5))
    libc.syscall(libc.NR_mprotect, memory + (12 << 12), 1 << 12, 0)
    libc.syscall(libc.NR_mprotect, memory + (13 << 12), 1 << 12, 1)
    libc.syscall(libc.NR_mprotect, memory + (14 << 12), 1 << 12, 5)


def make_timer(unusual: Unusual, clock: int, notify: int, signum: int) -> None:
    event = ctypes.create_string_buffer(struct.pack("=QiiI44x", 0x1234567890, signum, notify, 0))
    number = ctypes.c_int(-1)
    result = libc.syscall(libc.NR_timer_create, clock, event, ctypes.byref(number))
    if result < 0:
        unusual.refused[f"timer {clock}"] = libc.name_of(result)
        return
    spec = libc.itimerspec(libc.seconds(11.5 + clock), libc.seconds(9000))
    libc.syscall(libc.NR_timer_settime, number.value, 0, ctypes.byref(spec), None)
    TIMERS[number.value] = ("timer", clock)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def unusual_thread(unusual: Unusual, number: int) -> None:
    """Things of one thread, apart from credentials; ``number`` makes them differ."""
    unusual.call("prctl", 15, b"e%d \xff) (x\n\\\x01\xe2" % number + b"\0", 0, 0, 0, what="name")
    # UNAME26 would change what uname says. ADDR_NO_RANDOMIZE | STICKY_TIMEOUTS; MMAP_PAGE_ZERO
    unusual.call("personality", (0x0040000 | 0x4000000, 0x0100000, 0)[number % 3])
    mask = ctypes.c_uint64((1 << (signal.SIGUSR1 - 1)) | (1 << (40 + number)) | 1 << 63)
    unusual.call("rt_sigprocmask", 2, ctypes.byref(mask), None, 8)
    stack = ctypes.create_string_buffer(65536)
    _keep.append(stack)
    # With SS_AUTODISARM in one thread.
    flags = (1 << 31) if number == 2 else 0
    fields = struct.pack("=QIIQ", ctypes.addressof(stack), flags, 0, 65536 - 4096 * number)
    if libc.syscall(libc.NR_sigaltstack, ctypes.create_string_buffer(fields), None) < 0:
        unusual.refused["altstack"] = "refused"
    head = ctypes.create_string_buffer(64)
    _keep.append(head)
    struct.pack_into("=QQQ", head, 0, ctypes.addressof(head), -32 & (1 << 64) - 1, 0)
    unusual.call("set_robust_list", ctypes.byref(head), 24)
    unusual.prctl("timerslack", 29, 77_000 + number)
    unusual.prctl("mce_kill", 33, 1, number % 2)
    unusual.prctl("io_flusher", 57, int(number == 1))
    if number == 2:
        unusual.prctl("store bypass", 53, 0, 4)
        unusual.prctl("indirect branch", 53, 1, 4)
        unusual.call("arch_prctl", 0x1001, 0x123456789000, what="gs base")
    unusual.call("setpriority", 0, 0, number + 1)
    unusual.call("ioprio_set", 1, 0, (2 << 13) | (number + 3))
    unusual.call("set_mempolicy", 3 if number == 1 else 1, ctypes.byref(ctypes.c_uint64(1)), 64)
    if number:
        cpus = {sorted(os.sched_getaffinity(0))[number % len(os.sched_getaffinity(0))]}
        unusual.do("affinity", lambda: os.sched_setaffinity(0, cpus))
    policy = {0: os.SCHED_OTHER, 1: os.SCHED_BATCH, 2: os.SCHED_IDLE, 3: os.SCHED_FIFO, 4: os.SCHED_RR}[number]
    priority = 1 if number > 2 else 0
    flag = os.SCHED_RESET_ON_FORK if number == 4 else 0
    unusual.do("policy", lambda: os.sched_setscheduler(0, policy | flag, os.sched_param(priority)))
    _libm.fesetround((0, 0x400, 0x800, 0xC00, 0)[number])
    # One signal for the thread alone and one for the process wait for ever: both are blocked in every thread.
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    if number == 0:
        os.kill(os.getpid(), 64 - 0 if number else signal.SIGUSR1)


def unusual_credentials(unusual: Unusual, number: int) -> None:
    """Last, since it takes privileges away; two threads get others than the rest, by raw system calls."""
    if os.geteuid() != 0:
        unusual.prctl("no_new_privs", 38, 1)
        return
    groups = (ctypes.c_uint32 * 3)(7, 1000 + number, 70000)
    unusual.call("setgroups", 3, groups)
    for cap in (1, 12, 33):
        unusual.prctl("bounding", 24, cap)
    if number != 4:
        # KEEP_CAPS, NO_SETUID_FIXUP and its lock.
        unusual.prctl("securebits", 28, (1 << 4) | (1 << 2) | (1 << 3))
        unusual.call("setresgid", 65534, 1234, 0)
        unusual.call("setresuid", 1, 65534, 0)
    some = (1 << 0) | (1 << 5) | (1 << 10) | (1 << 23)
    header = ctypes.create_string_buffer(struct.pack("=Ii", CAP_VERSION, 0))
    words = struct.pack("=6I", 1 << 5, some, (1 << 10) | (1 << 5), 0, 0, 0)
    unusual.call("capset", header, ctypes.create_string_buffer(words))
    unusual.prctl("ambient", 47, 2, 10)
    if number == 3:
        unusual.prctl("no_new_privs", 38, 1)
    if number == 1:
        unusual.call("setfsuid", 1)
    if number == 2:
        unusual.prctl("tsc", 26, 1)
    unusual.prctl("pdeathsig", 1, 10 + number)
    unusual.prctl("dumpable", 4, 0)


def run_thread(status: Status, number: int, *, plain: bool, barrier: threading.Barrier) -> None:
    unusual = Unusual()
    if not plain:
        if number == 0:
            unusual_process(unusual)
        unusual_thread(unusual, number)
        barrier.wait()
        unusual_credentials(unusual, number)
    barrier.wait()
    while True:
        picture = picture_of_thread()
        if number == 0:
            picture |= picture_of_process()
        status.note(thread=f"thread {number}", picture=picture, refused=unusual.refused)
        time.sleep(0.1)


def main() -> None:
    plain = "plain" in sys.argv[2:]
    status = Status(sys.argv[1])
    barrier = threading.Barrier(5)

    def thread(number: int) -> None:
        try:
            run_thread(status, number, plain=plain, barrier=barrier)
        except BaseException as err:
            status.error(f"thread {number}: {err!r}")
            raise

    for number in range(1, 5):
        threading.Thread(target=thread, args=(number,), daemon=True).start()
    thread(0)


if __name__ == "__main__":
    main()

"""Two hosts on one machine: namespaces, without any container engine.

A Host is an init process in pid, mount, net, uts and ipc namespaces of its own (a time namespace too when asked), with
its own /proc. Commands run inside it through nsenter. Hosts share the file system, as hosts with the same software
installed would, so a path means the same on both; they are joined by a veth pair (`join`) or by unix sockets at a
path. Only loopback and these veth pairs carry traffic.

Two views of every process: `outer` pids count in the pid namespace of the tests, `inner` ones in the host's. Ends
nothing but its own init, by pid: the kernel takes the rest of the pid namespace with it. The init ends by itself
when the tests die, because its standard input closes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Optional, Union

REPOSITORY = Path(__file__).resolve().parent.parent
# Enough for a loaded two-core machine; a wait that takes longer is a failure.
WAIT_S = 30.0

# Reaps orphans like any init. EOF on standard input is the end of the host.
_INIT = """
import os, signal, sys, threading
def reap(*_):
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return
signal.signal(signal.SIGCHLD, reap)
print("ready", flush=True)
while os.read(0, 1):
    pass
"""

_Output = Union[int, IO[bytes], None]
_link_numbers = itertools.count(1)


class HostError(Exception):
    """The namespaces could not be made, or a command inside did not do what it should."""


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
    """Returns once `condition()` is true.

    :raises TimeoutError: when it is not within `timeout_s`; `what` says what was waited for.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.005)


def inner_pid_of(outer_pid: int) -> int:
    """The pid that the process has in its own, innermost, pid namespace."""
    for line in Path(f"/proc/{outer_pid}/status").read_text(errors="replace").splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    raise HostError(f"/proc/{outer_pid}/status has no NSpid")


def is_alive(outer_pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{outer_pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(") ")[2][:1] not in ("Z", "X")


class InsideProcess:
    """A command started inside a host: `outer` pid to signal it, `inner` pid to name it to programs in there."""

    def __init__(self, popen: subprocess.Popen[bytes], outer: int, inner: int) -> None:
        self.popen = popen  # nsenter, which waits for the command and exits as it did
        self.outer = outer
        self.inner = inner

    @property
    def alive(self) -> bool:
        return is_alive(self.outer)

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Signals the command itself, not nsenter; ordinary when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.outer, signum)

    def wait(self, timeout_s: float = WAIT_S) -> int:
        """Exit status as subprocess has it: negative when a signal ended the command."""
        return self.popen.wait(timeout_s)

    def communicate(self, timeout_s: float = WAIT_S) -> tuple[bytes, bytes]:
        return self.popen.communicate(timeout=timeout_s)


class Host:
    """A host made of namespaces; a context manager that takes everything inside with it when it ends."""

    def __init__(
        self, name: str, *, first_pid: int = 0, monotonic_offset_s: Optional[int] = None
    ) -> None:
        """`first_pid`: pids inside start above it, so that those of two hosts do not collide.

        `monotonic_offset_s`: a time namespace whose monotonic and boot clocks are ahead by so much.
        """
        self.name = name
        self.init_pid = 0
        self.addresses: list[str] = []
        self._first_pid = first_pid
        self._offset_s = monotonic_offset_s
        self._unshare: Optional[subprocess.Popen[bytes]] = None
        self._started: list[InsideProcess] = []

    def __enter__(self) -> Host:
        command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--mount"]
        command += ["--net", "--uts", "--ipc"]
        if self._offset_s is not None:
            command += ["--time", "--monotonic", str(self._offset_s)]
            command += ["--boottime", str(self._offset_s)]
        self._unshare = subprocess.Popen(
            [*command, sys.executable, "-I", "-S", "-c", _INIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._unshare.stdout is not None
        if self._unshare.stdout.readline() != b"ready\n":
            self.__exit__()
            raise HostError(f"host {self.name}: unshare failed, see its message above")
        self.init_pid = _only_child(self._unshare.pid)
        self.run(["hostname", self.name])
        self.run(["ip", "link", "set", "lo", "up"])
        if self._first_pid:
            self.set_last_pid(self._first_pid)
        return self

    def __exit__(self, *_: object) -> None:
        if self._unshare is not None:
            for stream in (self._unshare.stdin, self._unshare.stdout):
                if stream is not None:
                    stream.close()
            try:
                self._unshare.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                # --kill-child takes the init along.
                self._unshare.kill()
                self._unshare.wait(WAIT_S)
        for process in self._started:
            # nsenter stops itself when the program inside is stopped, and would go on being so without it.
            process.popen.send_signal(signal.SIGCONT)
            process.popen.wait(WAIT_S)
            for stream in (process.popen.stdin, process.popen.stdout, process.popen.stderr):
                if stream is not None:
                    stream.close()

    def set_last_pid(self, last_pid: int) -> None:
        """The next process inside gets the first free pid above `last_pid`."""
        # Through the shell's own redirection: one fork, and the next one counts from here.
        self.run(["sh", "-c", f"echo {last_pid} > /proc/sys/kernel/ns_last_pid"])

    def command(self, argv: Sequence[Union[str, Path]]) -> list[str]:
        """The command line that runs `argv` inside from outside."""
        flags = ["--mount", "--pid", "--net", "--uts", "--ipc"]
        if self._offset_s is not None:
            flags.append("--time")
        # nsenter leaves the working directory on the other mount namespace's root.
        inside = ["env", f"--chdir={REPOSITORY}", *map(str, argv)]
        return ["nsenter", f"--target={self.init_pid}", *flags, "--", *inside]

    def run(
        self, argv: Sequence[Union[str, Path]], *, check: bool = True, timeout_s: float = WAIT_S
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a command inside to its end, output captured.

        :raises HostError: when `check` and the command fails.
        """
        done = subprocess.run(
            self.command(argv), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s
        )
        if check and done.returncode:
            raise HostError(f"{argv} on {self.name}: status {done.returncode}: {done.stderr!r}")
        return done

    def popen(
        self,
        argv: Sequence[Union[str, Path]],
        *,
        stdin: _Output = subprocess.DEVNULL,
        stdout: _Output = subprocess.PIPE,
        stderr: _Output = subprocess.PIPE,
        environment: Optional[dict[str, str]] = None,
        pass_fds: Sequence[int] = (),
    ) -> InsideProcess:
        """Starts a command inside; the caller waits for it, or the host's end ends it."""
        popen = subprocess.Popen(
            self.command(argv),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **(environment or {})},
            pass_fds=pass_fds,
        )
        try:
            outer = _only_child(popen.pid)
            started = InsideProcess(popen, outer, inner_pid_of(outer))
        except (HostError, OSError) as err:
            # Gone already (its parent reaps it): a command that fails at once is the caller's to find out.
            if popen.poll() is None:
                popen.kill()
                popen.wait()
                raise HostError(f"{argv} on {self.name} did not start") from err
            started = InsideProcess(popen, 0, 0)
        self._started.append(started)
        return started

    def start_detached(
        self, argv: Sequence[Union[str, Path]], output: Path, *, last_pid: Optional[int] = None
    ) -> InsideProcess:
        """Starts a program the way a service runs: own session, standard files on /dev/null and `output`."""
        if last_pid is not None:
            self.set_last_pid(last_pid)
        with open(output, "ab") as stream:
            started = self.popen(["setsid", *argv], stdout=stream, stderr=stream)
        # nsenter's child becomes env, setsid and then the program: wait until it is the program.
        wait_until(lambda: not started.alive or _has_become_program(started.outer), f"{argv[0]} to start")
        return started

    def outer_pid(self, inner: int) -> int:
        """The pid, as the tests see it, of the process that is `inner` inside; 0 when there is none."""
        namespace = os.readlink(f"/proc/{self.init_pid}/ns/pid")
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                if os.readlink(f"/proc/{entry}/ns/pid") == namespace:
                    if inner_pid_of(int(entry)) == inner and is_alive(int(entry)):
                        return int(entry)
            except OSError:
                continue
        return 0

    def proc(self, inner: int) -> Path:
        """/proc/PID of a process inside, as seen from outside."""
        return Path(f"/proc/{self.init_pid}/root/proc/{inner}")

    def processes(self) -> dict[int, str]:
        """Inner pid -> command name of everything that runs inside, init left out."""
        found = {}
        for entry in Path(f"/proc/{self.init_pid}/root/proc").iterdir():
            if entry.name.isdigit() and entry.name != "1":
                with contextlib.suppress(OSError):
                    found[int(entry.name)] = (entry / "comm").read_text(errors="replace").strip()
        return found

    def listens_on_tcp(self, port: int) -> bool:
        """Whether a TCP socket listens on `port` inside: no connection is made to find out."""
        wanted = f"{port:04X}"
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{self.init_pid}/net/{table}").read_text(errors="replace").splitlines()[1:]:
                fields = line.split()
                if fields[1].endswith(":" + wanted) and fields[3] == "0A":
                    return True
        return False

    def listens_on_unix(self, path: Path) -> bool:
        """Whether a unix socket made inside listens at `path`."""
        for line in Path(f"/proc/{self.init_pid}/net/unix").read_text(errors="replace").splitlines()[1:]:
            fields = line.split()
            # Flags 00010000 is __SO_ACCEPTCON.
            if len(fields) == 8 and fields[7] == str(path) and fields[3] == "00010000":
                return True
        return False


def join(left: Host, right: Host) -> tuple[str, str]:
    """Joins two hosts with a veth pair; returns their addresses on it."""
    number = next(_link_numbers)
    network = f"10.231.{number % 256}"
    names = (f"fy{os.getpid() % 100000}a{number}", f"fy{os.getpid() % 100000}b{number}")
    subprocess.run(
        ["ip", "link", "add", names[0], "netns", str(left.init_pid), "type", "veth"]
        + ["peer", "name", names[1], "netns", str(right.init_pid)],
        check=True,
    )
    addresses = (f"{network}.1", f"{network}.2")
    for host, name, address in zip((left, right), names, addresses):
        host.run(["ip", "address", "add", f"{address}/24", "dev", name])
        host.run(["ip", "link", "set", name, "up"])
        host.addresses.append(address)
    return addresses


@contextlib.contextmanager
def host_pair(*, monotonic_offset_s: Optional[int] = None) -> Iterator[tuple[Host, Host]]:
    """A joined source and destination; the source's pids are far above the destination's own."""
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(Host("source", first_pid=2000))
        destination = stack.enter_context(
            Host("destination", monotonic_offset_s=monotonic_offset_s)
        )
        join(source, destination)
        yield source, destination


def _only_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            found = children.read_text(errors="replace").split()
        except OSError as err:
            raise HostError(f"process {pid} ended before it had a child") from err
        if found:
            return int(found[0])
        if not is_alive(pid):
            break
        time.sleep(0.002)
    raise HostError(f"process {pid} has no child")


def _has_become_program(outer_pid: int) -> bool:
    try:
        name = Path(f"/proc/{outer_pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return True
    return name not in ("nsenter", "env", "setsid")

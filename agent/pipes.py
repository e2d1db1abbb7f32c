"""stdio: and ssh:// channels: a pair of pipes, which the agent was given or which lead to the ssh it has started."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import socket
import stat
import subprocess

from agent.address import Address
from agent.channel import Channel
from agent.errors import SetupError, UsageError

_log = logging.getLogger(__name__)

PIPE_BYTES = 1 << 20
"""pipe(7): the default limit for a pipe's size set by an unprivileged process."""
SSH_EXIT_WAIT_S = 10.0
_F_SETPIPE_SZ = 1031  # include/uapi/linux/fcntl.h


def _grow(fd: int) -> None:
    # A socket or file, or a user over its pipe limit: smaller steps, nothing worse.
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, _F_SETPIPE_SZ, PIPE_BYTES)


class StdioChannel(Channel):
    """The agent's own standard input and output.

    They are taken over: fd 0 becomes /dev/null and fd 1 a copy of stderr, so that nothing else that
    prints can get into the stream.
    """

    def __init__(self) -> None:
        try:
            if os.isatty(0) or os.isatty(1):
                raise UsageError(
                    "Cannot use stdio: on a terminal",
                    hint="It is meant for a pipe, a socket or ssh.",
                )
            read_fd = _dup_high(0)
            write_fd = _dup_high(1)
        except OSError as err:
            raise UsageError(f"Cannot use stdio: {err.strerror}") from err
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        with contextlib.suppress(OSError):
            os.dup2(2, 1)
        for fd in (read_fd, write_fd):
            _grow(fd)
        super().__init__(read_fd, write_fd, "stdio:")

    def half_close(self) -> None:
        """Tell the peer that nothing more will be sent, also when stdout is a socket."""
        if self._write_fd >= 0:
            shutdown_if_socket(self._write_fd)
        super().half_close()


def _dup_high(fd: int) -> int:
    # dup(2) would return 0-2 if one of them is closed, where it is about to be replaced.
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def shutdown_if_socket(fd: int) -> None:
    """Shut down the sending side of ``fd`` if it is a socket (another fd may hold it open)."""
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
            sock.shutdown(socket.SHUT_WR)


class SshChannel(Channel):
    """``ssh HOST agent-recv --once stdio:`` and the pipes to it."""

    def __init__(self, address: Address, remote_command: str) -> None:
        command = ssh_command(address, remote_command)
        _log.info("Starting %s", " ".join(command))
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                # Ctrl-C reaches every process of the terminal. The agent decides what it means; the
                # link must outlive it, or the outcome could not be told to the other side.
                preexec_fn=_ignore_interrupts,
            )
        except OSError as err:
            raise SetupError(f"Cannot start ssh for {address}: {err.strerror}") from err
        assert self._process.stdin is not None and self._process.stdout is not None
        read_fd, write_fd = (
            os.dup(self._process.stdout.fileno()),
            os.dup(self._process.stdin.fileno()),
        )
        self._process.stdin.close()
        self._process.stdout.close()
        for fd in (read_fd, write_fd):
            _grow(fd)
        super().__init__(read_fd, write_fd, str(address))

    def _end_text(self, part: int, wanted: int) -> str:
        text = super()._end_text(part, wanted)
        try:
            status = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return text
        return f"{text} (ssh exited with status {status})"

    def _close_fds(self) -> None:
        super()._close_fds()
        try:
            self._process.wait(timeout=SSH_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            _log.warning("ssh (pid %d) does not end; terminating it", self._process.pid)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=SSH_EXIT_WAIT_S)


def ssh_command(address: Address, remote_command: str) -> list[str]:
    """The argument vector that starts the receiver on the other host."""
    command = ["ssh", "-T"]
    if address.port is not None:
        command += ["-p", str(address.port)]
    if address.user:
        command += ["-l", address.user]
    return [*command, "--", address.host, f"{remote_command} --once stdio:"]


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

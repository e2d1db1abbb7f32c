"""``agent-send``: move a process, checkpoint it, check it, or resolve a session in doubt.

Parses and checks; the work is done by agent.source, agent.check and agent.resolve.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from agent.address import Address, Transport, parse_address
from agent.cli import options as common
from agent.options import (
    DEFAULT_DOWNTIME_LIMIT_S,
    DEFAULT_IO_TIMEOUT_S,
    DEFAULT_LOG_CAPACITY,
    DEFAULT_MAX_ROUNDS,
    DEFAULT_REMOTE_COMMAND,
    KNOWN_TRACKERS,
    LOG_WHEN_FULL,
    MAX_STREAMS,
    CompressOption,
    SendOptions,
)
from agent.types import Pid

if TYPE_CHECKING:
    import argparse

    from agent.report import Reporter

PROG = "agent-send"

USAGE = """\
agent-send [options] PID ADDRESS
       agent-send --check [options] PID
       agent-send --resolve SESSION [options] [ADDRESS]"""

DESCRIPTION = """\
Move the running process PID to the host where agent-recv listens at ADDRESS.
The process runs on while its memory is copied, in rounds that send what was written
since the round before; then it is stopped for an instant, the rest is sent, and it
goes on over there under the same pid. Whatever fails before that point leaves it
running here as if nothing had happened.

Run as root, or with CAP_SYS_PTRACE and CAP_CHECKPOINT_RESTORE."""

EPILOG = (
    common.ADDRESS_HELP
    + """\
  ssh://[USER@]HOST[:PORT]   run 'agent-recv --once stdio:' on HOST through ssh

  An image (file:) is written beside its final name and renamed when complete: an
  existing one is replaced then and not before. Only its owner can read it.
  Without --leave-running the process ends once the image is complete.

examples:
  agent-send 4121 tcp://10.0.0.2:7000
  agent-send --check 4121
  agent-send --downtime-limit 20 --json 4121 ssh://root@otherhost
  agent-send --leave-running 4121 file:/var/tmp/4121.ferry

"""
    + common.EXIT_STATUS_HELP
)

UNSUPPORTED: tuple[tuple[str, str | None, str], ...] = (
    ("--tcp-established", None, "carry established TCP connections over"),
    ("--shell-job", None, "move a process that uses a terminal"),
    ("--ext-unix-sk", None, "move unix sockets connected to other processes"),
    ("--link-remap", None, "give deleted but open files a temporary name"),
    ("--ghost-limit", "BYTES", "carry deleted but open files up to this size"),
    ("--action-script", "PATH", "run a script at each phase"),
)


def build_parser() -> common.Parser:
    """The parser of agent-send."""
    parser = common.Parser(prog=PROG, usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "positionals", metavar="PID ADDRESS", nargs="*", help="what to move, and where to"
    )
    _add_mode_options(parser)
    _add_memory_options(parser)
    _add_resource_options(parser)
    link = parser.add_argument_group("connection")
    link.add_argument(
        "--connect-timeout",
        metavar="S",
        type=common.decimal(0.1, 3600),
        default=10.0,
        help="give up connecting after S seconds (default: %(default)g)",
    )
    link.add_argument(
        "--remote-command",
        metavar="COMMAND",
        default=None,
        help="ssh://: what to run there instead of 'agent-recv', for example 'sudo agent-recv'; "
        "'--once stdio:' is added",
    )
    link.add_argument(
        "--tls-name",
        metavar="NAME",
        default="",
        help="tls://: the name in the receiver's certificate, if not HOST",
    )
    common.add_common_options(parser)
    common.add_unsupported(parser, UNSUPPORTED)
    return parser


def _add_mode_options(parser: common.Parser) -> None:
    group = parser.add_argument_group("what to do")
    modes = group.add_mutually_exclusive_group()
    modes.add_argument(
        "--check",
        action="store_true",
        help="only find out whether PID can be moved: print one line per obstacle, 'KIND: WHAT: "
        "DETAIL "
        "(HINT)', and exit with 4 if there are any. The process is not touched",
    )
    modes.add_argument(
        "--resolve",
        metavar="SESSION",
        type=common.session_name,
        help="after exit status 3: ask the receiver how the session ended and let the frozen "
        "original run "
        "on, or end it. ADDRESS is needed only if the receiver has moved",
    )
    modes.add_argument(
        "--leave-running",
        action="store_true",
        help="checkpoint: the original goes on afterwards. For file: only, as otherwise two "
        "copies would run",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="compare digests of all memory on both sides before the process is handed over; "
        "lengthens the downtime",
    )


def _add_memory_options(parser: common.Parser) -> None:
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--tracker",
        choices=KNOWN_TRACKERS,
        default="auto",
        help="how writes are noticed (default: auto: the best that the kernel has and that the process need not wait "
        "for). scan: the kernel marks pages; log, bitmap: the process reports each first store to a page and waits; "
        "soft-dirty: bits that few kernels have; compare: reads all memory in every round",
    )
    group.add_argument(
        "--log-capacity",
        metavar="N",
        type=common.whole_number(1, 1 << 26),
        default=None,
        help=f"--tracker log: records that it holds (default: {DEFAULT_LOG_CAPACITY})",
    )
    group.add_argument(
        "--log-when-full",
        choices=LOG_WHEN_FULL,
        default=None,
        help="--tracker log: when it is full, go on in a bitmap until the round is over, or have the process wait "
        f"(default: {LOG_WHEN_FULL[0]})",
    )
    group.add_argument(
        "--downtime-limit",
        metavar="MS",
        type=common.decimal(0, 3_600_000),
        default=DEFAULT_DOWNTIME_LIMIT_S * 1000,
        help="stop the process once the predicted downtime is below this many milliseconds and "
        "rounds no "
        "longer shrink (default: %(default)g)",
    )
    group.add_argument(
        "--max-rounds",
        metavar="N",
        type=common.whole_number(0, 10_000),
        default=DEFAULT_MAX_ROUNDS,
        help="at most N rounds while it runs (default: %(default)s); 0: stop it first, then copy",
    )
    group.add_argument(
        "--bandwidth-limit",
        metavar="BYTES/S",
        type=common.size,
        default=None,
        help="send no faster while the process runs; K, M, G stand for powers of 1024",
    )
    group.add_argument(
        "--compress",
        metavar="none|zstd[:LEVEL]|auto",
        type=common.compression,
        default=CompressOption(),
        help="compress pages; auto: only if the link is slower than the compression (default: "
        "auto)",
    )
    group.add_argument(
        "--streams",
        metavar="N",
        type=common.whole_number(1, 64),
        default=1,
        help="connections for pages (default: 1; more are not supported yet)",
    )


def _add_resource_options(parser: common.Parser) -> None:
    group = parser.add_argument_group("resources")
    group.add_argument(
        "--tcp-close",
        action="store_true",
        help="carry established TCP connections as ones that the peer has reset, instead of "
        "refusing",
    )
    group.add_argument(
        "--file-locks",
        action="store_true",
        help="carry flock(2) and fcntl(2) locks, instead of refusing; exclusive ones cannot pass within "
        "a file system that both hosts share",
    )
    group.add_argument(
        "--external",
        metavar="fd[N]",
        type=common.external_fd,
        action="append",
        default=[],
        help="leave out the process's fd N; agent-recv --inherit-fd puts another in its place "
        "(repeatable)",
    )


def parse_options(argv: Sequence[str]) -> tuple[SendOptions, argparse.Namespace]:
    """Turn arguments into checked options.

    :raises UsageError: they make no sense, or ask for something not supported yet.
    """
    args = build_parser().parse_intermixed_args(list(argv))
    common.refuse_unsupported(args, UNSUPPORTED)
    if args.tracker != "log" and (args.log_capacity or args.log_when_full):
        common.refuse("--log-capacity and --log-when-full mean something with --tracker log only")
    if args.streams > MAX_STREAMS:
        common.refuse(f"--streams {args.streams} is not supported yet")
    pid, address = _parse_positionals(args)
    if args.leave_running and address is not None and address.transport is not Transport.FILE:
        common.refuse(
            f"--leave-running with {address} would leave two running copies",
            hint="It needs a file: address.",
        )
    if args.remote_command is not None:
        if not args.remote_command.strip():
            common.refuse("Argument --remote-command: it is empty")
        if address is None or address.transport is not Transport.SSH:
            common.refuse("--remote-command is for ssh:// addresses")
    return (
        SendOptions(
            pid=pid,
            address=address,
            check=args.check,
            resolve=args.resolve or "",
            leave_running=args.leave_running,
            tracker=args.tracker,
            log_capacity=args.log_capacity or DEFAULT_LOG_CAPACITY,
            log_when_full=args.log_when_full or LOG_WHEN_FULL[0],
            downtime_limit_s=args.downtime_limit / 1000,
            max_rounds=args.max_rounds,
            bandwidth_limit=args.bandwidth_limit,
            compress=args.compress,
            streams=args.streams,
            verify=args.verify,
            tcp_close=args.tcp_close,
            file_locks=args.file_locks,
            external_fds=frozenset(args.external),
            remote_command=args.remote_command or DEFAULT_REMOTE_COMMAND,
            tls=common.tls_options(args, address, args.tls_name),
            connect_timeout_s=args.connect_timeout,
            io_timeout_s=args.io_timeout or DEFAULT_IO_TIMEOUT_S,
            state_dir=args.state_dir,
            json=args.json,
            progress=args.progress,
        ),
        args,
    )


def _parse_positionals(args: argparse.Namespace) -> tuple[Pid, Address | None]:
    given = cast("list[str]", args.positionals)
    if args.resolve:
        if len(given) > 1:
            common.refuse(f"--resolve takes at most an ADDRESS; {given[1]!r} is too much")
        address = parse_address(given[0]) if given else None
        if address is not None and address.transport in (Transport.FILE, Transport.STDIO):
            common.refuse(f"Nobody can be asked at {address}")
        return Pid(0), address
    if not given:
        common.refuse("PID is missing", hint=f"Try '{PROG} --help'.")
    pid = parse_pid(given[0])
    if args.check:
        if len(given) > 1:
            common.refuse(f"--check takes a PID only; {given[1]!r} is too much")
        return pid, None
    if len(given) < 2:
        common.refuse("ADDRESS is missing", hint=f"Try '{PROG} --help'.")
    if len(given) > 2:
        common.refuse(f"One PID and one ADDRESS are expected; {given[2]!r} is too much")
    return pid, parse_address(given[1])


def parse_pid(text: str) -> Pid:
    """A number that may be a pid; whether there is such a process is another matter."""
    if not (text.isascii() and text.isdigit()):
        common.refuse(f"{text!r} is not a pid", hint="The PID comes first, then the ADDRESS.")
    if len(text) > 7 or not 0 < int(text) <= common.PID_MAX:
        common.refuse(f"{text} is not a pid: it is not between 1 and {common.PID_MAX}")
    return Pid(int(text))


def check_pid(pid: Pid) -> None:
    """Refuse a pid that no process has, or one that makes no sense to move.

    :raises UsageError: there is no such process, it is a thread, a zombie, a kernel thread or this
    program.
    """
    import os

    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as stream:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in stream if ":\t" in line)
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            flags = int(stream.read().rpartition(")")[2].split()[6])
    except (FileNotFoundError, ProcessLookupError):
        common.refuse(f"There is no process {pid}")
    except PermissionError:
        return
    leader = int(status.get("Tgid", pid))
    if leader != pid:
        common.refuse(f"{pid} is a thread of process {leader}", hint=f"Give the process: {leader}.")
    if pid == os.getpid():
        common.refuse(f"Process {pid} is {PROG} itself")
    # include/linux/sched.h: PF_KTHREAD.
    if flags & 0x00200000:
        common.refuse(f"Process {pid} is a kernel thread")
    if status.get("State", "").startswith(("Z", "X")) and not _has_live_threads(pid):
        common.refuse(f"Process {pid} has exited and waits for its parent to notice")


def _has_live_threads(pid: Pid) -> bool:
    import os

    try:
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def _body(argv: Sequence[str], reporters: list[Reporter]) -> int:
    options, args = parse_options(argv)
    stdio = options.address is not None and options.address.transport is Transport.STDIO
    reporter = common.make_reporter(PROG, json=options.json, progress=options.progress, stdio=stdio)
    reporters.append(reporter)
    from agent import interrupts, log

    log.set_up_logging(verbosity=args.verbose, log_file=args.log_file)
    interrupts.install()
    if options.pid:
        check_pid(options.pid)
    # Each imports only what it needs: that is most of the time that a check takes.
    if options.resolve:
        from agent.resolve import resolve

        return resolve(options, reporter)
    if options.check:
        from agent.check import check

        return check(options, reporter)
    from agent.source import send

    return send(options, reporter)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``agent-send``; returns the exit status."""
    return common.run(PROG, argv, _body)


if __name__ == "__main__":
    sys.exit(main())

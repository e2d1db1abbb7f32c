"""``agent-recv``: receive processes, or restore one from an image.

Parses and checks; the work is agent.destination.receive().
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agent.address import Transport, parse_address
from agent.cli import options as common
from agent.options import DEFAULT_IO_TIMEOUT_S, RecvOptions

if TYPE_CHECKING:
    import argparse

    from agent.report import Reporter

PROG = "agent-recv"

USAGE = "agent-recv [options] ADDRESS"

DESCRIPTION = """\
Receive processes that agent-send moves to ADDRESS and let them go on here, under the
same pids, one migration after another until interrupted. With file:PATH, restore the
process that the image holds and exit.

Whoever may connect may run any code as the user of agent-recv: prefer tls:// or
ssh:// (at the sender) where the network is not trusted. Run as root."""

EPILOG = (
    common.ADDRESS_HELP
    + """\

  HOST is the local address to listen at: 0.0.0.0 or [::] for all of them. With port 0
  the kernel chooses; the event 'listening' (--json, field 'address') or the first
  line of the progress tells the port.

examples:
  agent-recv tcp://10.0.0.2:7000
  agent-recv --once --json tcp://127.0.0.1:0
  agent-recv --once --wait unix:/run/ferry.sock
  agent-recv file:/var/tmp/4121.ferry

"""
    + common.EXIT_STATUS_HELP
    + """\
  With --wait: the status of the restored process, 128+N if signal N ended it
"""
)

UNSUPPORTED: tuple[tuple[str, str | None, str], ...] = (
    ("--root", "DIR", "restore below another root directory"),
    ("--shell-job", None, "restore a process that uses a terminal"),
    ("--tcp-established", None, "restore established TCP connections"),
    ("--ext-unix-sk", None, "restore unix sockets connected to other processes"),
    ("--action-script", "PATH", "run a script at each phase"),
)


def build_parser() -> common.Parser:
    """The parser of agent-recv."""
    parser = common.Parser(prog=PROG, usage=USAGE, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument(
        "positionals", metavar="ADDRESS", nargs="*", help="where to listen, or the image"
    )
    group = parser.add_argument_group("what to do")
    group.add_argument("--once", action="store_true", help="serve one migration, then exit")
    group.add_argument(
        "--wait",
        action="store_true",
        help="with --once, file: or stdio: stay the parent of the restored process and exit with "
        "its status",
    )
    group.add_argument(
        "--new-pidns",
        action="store_true",
        help="restore into a new pid namespace, where the process's pids are free for certain",
    )
    group.add_argument(
        "--inherit-fd",
        metavar="fd[M]:fd[N]",
        type=common.inherited_fd,
        action="append",
        default=[],
        help="put the open fd M of agent-recv where the process had its fd N, which agent-send "
        "--external "
        "left out (repeatable; for one migration, so with --once, file: or stdio:)",
    )
    group.add_argument(
        "--pidfile",
        metavar="PATH",
        default="",
        help="write the pid of the restored process to a file",
    )
    common.add_common_options(parser)
    common.add_unsupported(parser, UNSUPPORTED)
    return parser


def parse_options(argv: Sequence[str]) -> tuple[RecvOptions, argparse.Namespace]:
    """Turn arguments into checked options.

    :raises UsageError: they make no sense, or ask for something not supported yet.
    """
    args = build_parser().parse_intermixed_args(list(argv))
    common.refuse_unsupported(args, UNSUPPORTED)
    if not args.positionals:
        common.refuse("ADDRESS is missing", hint=f"Try '{PROG} --help'.")
    if len(args.positionals) > 1:
        common.refuse(f"One ADDRESS is expected; {args.positionals[1]!r} is too much")
    address = parse_address(args.positionals[0], listening=True)
    once = args.once or address.transport in (Transport.FILE, Transport.STDIO)
    if args.wait and not once:
        common.refuse("--wait needs --once")
    if args.inherit_fd and not once:
        common.refuse("--inherit-fd needs --once")
    return (
        RecvOptions(
            address=address,
            once=once,
            wait=args.wait,
            new_pidns=args.new_pidns,
            inherit_fds=_check_inherited(args.inherit_fd, address.transport),
            pidfile=args.pidfile,
            tls=common.tls_options(args, address),
            io_timeout_s=args.io_timeout or DEFAULT_IO_TIMEOUT_S,
            state_dir=args.state_dir,
            json=args.json,
            progress=args.progress,
        ),
        args,
    )


def _check_inherited(pairs: Sequence[tuple[int, int]], transport: Transport) -> dict[int, int]:
    import os

    result: dict[int, int] = {}
    for target_fd, fd in pairs:
        option = f"--inherit-fd fd[{fd}]:fd[{target_fd}]"
        if target_fd in result:
            common.refuse(f"{option}: fd {target_fd} of the process is given twice")
        if transport is Transport.STDIO and fd in (0, 1):
            common.refuse(f"{option}: fd {fd} carries the migration itself")
        try:
            os.fstat(fd)
        except OSError:
            common.refuse(f"{option}: {PROG} has no open fd {fd}")
        result[target_fd] = fd
    return result


def _body(argv: Sequence[str], reporters: list[Reporter]) -> int:
    options, args = parse_options(argv)
    stdio = options.address.transport is Transport.STDIO
    reporter = common.make_reporter(PROG, json=options.json, progress=options.progress, stdio=stdio)
    reporters.append(reporter)
    from agent import interrupts, log

    log.set_up_logging(verbosity=args.verbose, log_file=args.log_file)
    interrupts.install()
    from agent.destination import receive

    return receive(options, reporter)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``agent-recv``; returns the exit status."""
    return common.run(PROG, argv, _body)


if __name__ == "__main__":
    sys.exit(main())

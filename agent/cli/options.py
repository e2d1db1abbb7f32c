"""What both commands share: the parser, value types and the way a program ends.

Every mistake on the command line is one line on stderr and exit status 2. Value types are functions
from text that raise ArgumentTypeError; argparse adds the option's name. Only what ``--help`` needs
is imported at the top: it must be fast.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from agent.address import Transport
from agent.errors import MigrationError, RefusedError, UsageError
from agent.options import Compression, CompressOption, TlsOptions
from agent.version import VERSION

if TYPE_CHECKING:
    from agent.address import Address
    from agent.report import Reporter

PID_MAX = 1 << 22
"""proc(5), /proc/sys/kernel/pid_max: the limit on 64-bit systems."""
MAX_FD = 1 << 30
"""Above every value of fs.nr_open."""
ZSTD_LEVELS = range(1, 20)

EXIT_STATUS_HELP = """\
exit status:
  0  completed
  1  failed; the process runs on at the source, unharmed
  2  the command line makes no sense, or asks for something not supported yet
  3  undecided: the link died while the process was handed over. Both copies are
     frozen; run 'agent-send --resolve SESSION' at the source
  4  refused: the process, or the receiver, has obstacles (they are listed)
"""

ADDRESS_HELP = """\
addresses:
  tcp://HOST:PORT            plain TCP; IPv6 in brackets: tcp://[::1]:7000. Neither
                             encrypted nor authenticated: for trusted networks only
  tls://HOST:PORT            TLS with certificates on both sides (--tls-cert, ...)
  unix:PATH                  a unix socket, usable by the same user and root
  file:PATH                  a checkpoint image
  stdio:                     standard input and output, for use in a pipeline.
                             What else is printed (--json too) goes to stderr then
"""


@functools.cache
def _help_width() -> int:
    # argparse asks shutil for it at every option, and importing that takes longer than all else about the parser.
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns) - 2
    try:
        return (os.get_terminal_size().columns or 80) - 2
    except (OSError, ValueError):
        return 78


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_help_width())


class Parser(argparse.ArgumentParser):
    """One line per mistake, exit status 2, no abbreviated options."""

    def __init__(self, *, prog: str, usage: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=_Formatter,
            allow_abbrev=False,
            add_help=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(message[:1].upper() + message[1:])


class _VersionAction(argparse.Action):
    # argparse's own wraps the text and names no product.
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> NoReturn:
        print(f"{parser.prog} (Ferry) {VERSION}")
        sys.exit(0)


# -- value types -----------------------------------------------------------------------------------


def whole_number(minimum: int, maximum: int) -> Callable[[str], int]:
    """A decimal number between two bounds."""

    def parse(text: str) -> int:
        # int() would accept '1_000', ' 5 ' and other scripts' digits.
        if not re.fullmatch(r"[0-9]{1,18}", text, re.ASCII):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
        value = int(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{value} is not between {minimum} and {maximum}")
        return value

    return parse


def decimal(minimum: float, maximum: float) -> Callable[[str], float]:
    """A decimal fraction between two bounds."""

    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text, re.ASCII):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number")
        value = float(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(
                f"{value:g} is not between {minimum:g} and {maximum:g}"
            )
        return value

    return parse


def size(text: str) -> int:
    """Bytes, with K, M, G or T for powers of 1024."""
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)(i?B)?", text, re.ASCII | re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size (examples: 500000, 10M, 2G)")
    value = int(match[1]) << (10 * " KMGT".index(match[2].upper() or " "))
    if not 1 << 10 <= value <= 1 << 50:
        raise argparse.ArgumentTypeError(f"{text} is not between 1K and 1024T")
    return value


def compression(text: str) -> CompressOption:
    """``none``, ``auto``, ``zstd`` or ``zstd:LEVEL``."""
    method, colon, level = text.partition(":")
    if method in ("none", "auto") and not colon:
        return CompressOption(method=Compression(method))
    if method == "zstd" and not colon:
        return CompressOption(method=Compression.ZSTD)
    if method == "zstd":
        low, high = ZSTD_LEVELS[0], ZSTD_LEVELS[-1]
        return CompressOption(method=Compression.ZSTD, level=whole_number(low, high)(level))
    raise argparse.ArgumentTypeError(f"{text!r} is not none, auto, zstd or zstd:LEVEL")


def external_fd(text: str) -> int:
    """``fd[N]``."""
    match = re.fullmatch(r"fd\[([0-9]{1,10})\]", text, re.ASCII)
    if not match or int(match[1]) >= MAX_FD:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form fd[N]")
    return int(match[1])


def inherited_fd(text: str) -> tuple[int, int]:
    """``fd[M]:fd[N]``: the agent's fd M becomes the process's fd N. Returns (N, M)."""
    match = re.fullmatch(r"fd\[([0-9]{1,10})\]:fd\[([0-9]{1,10})\]", text, re.ASCII)
    if not match or int(match[1]) >= MAX_FD or int(match[2]) >= MAX_FD:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form fd[M]:fd[N]")
    return int(match[2]), int(match[1])


def session_name(text: str) -> str:
    """32 hex digits."""
    if not re.fullmatch(r"[0-9a-f]{32}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a session (32 hex digits, as reported)")
    return text


# -- shared options --------------------------------------------------------------------------------


def add_common_options(parser: Parser) -> None:
    """Options that mean the same to both commands."""
    out = parser.add_argument_group("output")
    out.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per line on stdout, its first field 'event'; the last one of a "
        "migration is 'completed' or 'failed'",
    )
    shown = out.add_mutually_exclusive_group()
    shown.add_argument(
        "--progress",
        dest="progress",
        action="store_const",
        const=True,
        help="show progress on stderr even if it is not a terminal",
    )
    shown.add_argument(
        "--no-progress", dest="progress", action="store_const", const=False, help="show no progress"
    )
    out.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=0,
        help="log more on stderr: -v the story, -vv every detail",
    )
    out.add_argument(
        "-o",
        "--log-file",
        metavar="PATH",
        default="",
        help="append the log to a file as well; it has one step more detail than stderr",
    )
    general = parser.add_argument_group("general")
    general.add_argument(
        "--io-timeout",
        metavar="S",
        type=decimal(1, 86400),
        default=None,
        help="give up if the peer is silent for S seconds where an answer is due (default: 60)",
    )
    general.add_argument(
        "--state-dir",
        metavar="DIR",
        default="",
        help="where sessions in doubt and decisions are recorded (default: /run/ferry for root, "
        "$XDG_RUNTIME_DIR/ferry for others)",
    )
    for option, what in (
        ("--tls-cert", "this side's certificate (chain), PEM"),
        ("--tls-key", "its private key, PEM"),
        ("--tls-ca", "the authorities that the other side's certificate must come from, PEM"),
    ):
        general.add_argument(option, metavar="PATH", default="", help=f"tls://: {what}")
    general.add_argument("-h", "--help", action="help", help="show this help and exit")
    general.add_argument(
        "--version", action=_VersionAction, nargs=0, help="show the version and exit"
    )


def add_unsupported(parser: Parser, options: Sequence[tuple[str, str | None, str]]) -> None:
    """Options of the documented command line that this version refuses instead of ignoring them."""
    group = parser.add_argument_group("not supported yet", "These are refused with exit status 2.")
    for name, metavar, text in options:
        if metavar is None:
            group.add_argument(name, action="store_true", help=text)
        else:
            group.add_argument(name, metavar=metavar, help=text)


def refuse_unsupported(
    args: argparse.Namespace, options: Sequence[tuple[str, str | None, str]]
) -> None:
    """Raise UsageError for the first such option that was given."""
    for name, _, _ in options:
        if getattr(args, name[2:].replace("-", "_")) not in (None, False):
            refuse(f"{name} is not supported yet")


def tls_options(
    args: argparse.Namespace, address: Address | None, server_name: str = ""
) -> TlsOptions:
    """The TLS files, which make sense with tls:// only."""
    options = TlsOptions(
        certificate=args.tls_cert,
        key=args.tls_key,
        authorities=args.tls_ca,
        server_name=server_name,
    )
    if address is not None and address.transport is not Transport.TLS and options != TlsOptions():
        refuse(f"--tls-cert, --tls-key, --tls-ca and --tls-name mean nothing with {address}")
    return options


def refuse(message: str, *, hint: str = "") -> NoReturn:
    """Raise a UsageError."""
    raise UsageError(message, hint=hint)


# -- running ---------------------------------------------------------------------------------------


def make_reporter(prog: str, *, json: bool, progress: bool | None, stdio: bool) -> Reporter:
    """The reporter for these options. With stdio: as the address, stdout belongs to the stream."""
    from agent.report import Reporter

    show = sys.stderr.isatty() if progress is None else progress
    return Reporter(
        json_stream=(sys.stderr if stdio else sys.stdout) if json else None,
        progress_stream=sys.stderr if show else None,
        program=prog,
    )


def run(
    prog: str, argv: Sequence[str] | None, body: Callable[[Sequence[str], list[Reporter]], int]
) -> int:
    """Run a command; turn every way it can fail into a message and an exit status.

    ``body`` gets the arguments and a list to which it adds its reporter once there is one.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    reporters: list[Reporter] = []
    _reopen_standard_fds()
    try:
        return body(arguments, reporters)
    except SystemExit as err:
        # --help and --version, after their output.
        return err.code if isinstance(err.code, int) else 0
    except BaseException as err:  # noqa: B902 - the last line of defence: never a traceback
        status = err.exit_code if isinstance(err, MigrationError) else 1
        _print_failure(prog, err)
        _report_failure(prog, arguments, reporters, err)
        return status
    finally:
        _flush_standard_streams()


def _print_failure(prog: str, err: BaseException) -> None:
    import logging

    from agent.report import error_text

    log = logging.getLogger(__name__)
    log.debug("%s ends", prog, exc_info=err)
    lines = [f"{prog}: {error_text(err)}"]
    if isinstance(err, RefusedError):
        lines += [f"  {obstacle}" for obstacle in err.obstacles]
    if isinstance(err, MigrationError):
        lines += [err.hint] if err.hint else []
    elif not isinstance(err, (KeyboardInterrupt, OSError)) and not _is_protocol_error(err):
        lines.append("This is a bug in Ferry; -vv shows where it happened.")
    try:
        text = "\n".join(lines) + "\n"
        sys.stderr.write(text.encode("utf-8", "backslashreplace").decode())
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def _is_protocol_error(err: BaseException) -> bool:
    # Without importing protocol: if it was raised, the module is there.
    module = sys.modules.get("protocol.errors")
    return module is not None and isinstance(err, module.ProtocolError)


def _report_failure(
    prog: str, arguments: Sequence[str], reporters: Sequence[Reporter], err: BaseException
) -> None:
    if reporters:
        reporter = reporters[-1]
    elif "--json" in arguments:
        reporter = make_reporter(prog, json=True, progress=False, stdio="stdio:" in arguments)
    else:
        return
    if not reporter.failed_sent:
        reporter.failed(err)


def _reopen_standard_fds() -> None:
    # With fd 0-2 closed, the next file opened would get one of them, and stray output would land
    # in it. Python has set the streams to None then.
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _flush_standard_streams() -> None:
    # Otherwise the interpreter complains at exit about a reader that went away, with status 120.
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)

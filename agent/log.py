"""Where log messages go: stderr for people, a file for the record.

    option    stderr       --log-file
    (none)    WARNING      INFO
    -v        INFO         DEBUG
    -vv       DEBUG        DEBUG

Errors that end a migration are printed by the command line itself, not logged to stderr. Tracebacks
appear at DEBUG only. Timestamps are UTC, so that the files of two hosts can be laid side by side.
"""

from __future__ import annotations

import logging
import sys
import time

from agent.errors import UsageError

FILE_FORMAT = "%(asctime)s.%(msecs)03dZ %(process)d %(levelname)s %(name)s: %(message)s"
STDERR_FORMAT = "%(levelname)s: %(message)s"
_DATE_FORMAT = "%Y-%m-%dT%H:%M:%S"


def stderr_level(verbosity: int) -> int:
    """The level of stderr for that many ``-v``."""
    return (logging.WARNING, logging.INFO, logging.DEBUG)[max(0, min(verbosity, 2))]


def file_level(verbosity: int) -> int:
    """The level of the log file for that many ``-v``."""
    return logging.DEBUG if verbosity > 0 else logging.INFO


class _BriefFormatter(logging.Formatter):
    """One line per record: a traceback belongs to the debug log."""

    def format(self, record: logging.LogRecord) -> str:
        if record.exc_info or record.exc_text:
            record = logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None})
        return super().format(record)


def set_up_logging(*, verbosity: int = 0, log_file: str = "") -> None:
    """Send log messages where the options say; called once per program.

    :raises UsageError: the log file cannot be opened.
    """
    # A full disk or a closed terminal must not disturb a migration with logging's own tracebacks.
    logging.raiseExceptions = False
    # The two names are a tenth of the cost of a record and never wanted.
    logging.logThreads = False
    logging.logMultiprocessing = False
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    level = stderr_level(verbosity)
    stream = logging.StreamHandler(sys.stderr)
    stream.setLevel(level)
    debug = level <= logging.DEBUG
    stream.setFormatter((logging.Formatter if debug else _BriefFormatter)(STDERR_FORMAT))
    root.addHandler(stream)
    if log_file:
        try:
            record = logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace")
        except OSError as err:
            raise UsageError(f"Cannot open log file {log_file!r}: {err.strerror}") from err
        record.setLevel(file_level(verbosity))
        chosen = logging.Formatter if record.level <= logging.DEBUG else _BriefFormatter
        formatter = chosen(FILE_FORMAT, _DATE_FORMAT)
        formatter.converter = time.gmtime
        record.setFormatter(formatter)
        root.addHandler(record)
        level = min(level, record.level)
    root.setLevel(level)

"""The receiver's outer loop: one migration after another.

A migration that fails is reported and ends there; the next one is served all the same. Only an
address that cannot be used, or with ``--once`` the one migration, ends the program.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from agent import net
from agent.errors import MigrationError, SetupError, UsageError
from agent.options import RecvOptions
from agent.report import Reporter, error_text
from protocol.errors import ProtocolError

_log = logging.getLogger(__name__)

ACCEPT_RETRY_S = 0.5
"""Pause after a failed accept, which may fail again at once (out of file descriptors)."""

Handler = Callable[[net.Channel], "int | None"]
"""Carries out one migration: exit status, or None if the peer wanted something else (``--resolve``),
which does not count for ``--once``. The channel is closed for it."""


def serve(options: RecvOptions, reporter: Reporter, handler: Handler) -> int:
    """Accept and handle migrations as the options say; return the exit status.

    :raises MigrationError: nothing can be accepted at the address, or with ``--once`` the migration
    failed.
    """
    with net.listen(options.address, tls=options.tls) as listener:
        if not listener.one_shot:
            reporter.listening(str(listener.address))
            _log.info("Listening on %s", listener.address)
        only_one = options.once or listener.one_shot
        while True:
            try:
                channel = listener.accept()
            except SetupError as err:
                _log.warning("%s", err)
                time.sleep(ACCEPT_RETRY_S)
                continue
            status = _serve_one(channel, reporter, handler, only_one=only_one)
            if listener.one_shot or (only_one and status is not None):
                return status or 0


def _serve_one(
    channel: net.Channel, reporter: Reporter, handler: Handler, *, only_one: bool
) -> int | None:
    with channel:
        reporter.failed_sent = False
        try:
            return handler(channel)
        except UsageError:
            raise
        except (MigrationError, ProtocolError, OSError) as err:
            if not channel.bytes_received and not channel.recorded:
                # A port scan or a health check: not a migration, and nothing to fail.
                _log.info("%s said nothing: %s", channel.peer, error_text(err))
                return None
            if only_one:
                raise
            _log.debug("Migration failed", exc_info=True)
            _log.error("Migration from %s failed: %s", channel.peer, error_text(err))
            if not reporter.failed_sent:
                reporter.failed(err, phase=channel.phase)
            return 1

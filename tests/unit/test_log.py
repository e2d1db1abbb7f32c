"""Log levels, and tracebacks only where they belong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.errors import UsageError
from agent.log import set_up_logging


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    root.handlers = []
    try:
        yield
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers, logging.raiseExceptions = handlers, raising
        root.setLevel(level)


def log_everything() -> None:
    logger = logging.getLogger("agent.test")
    try:
        raise ValueError("inner")
    except ValueError:
        logger.warning("careful", exc_info=True)
    logger.info("story")
    logger.debug("detail")


@pytest.mark.parametrize(
    ("verbosity", "in_stderr", "in_file"),
    [
        (0, {"careful"}, {"careful", "story"}),
        (1, {"careful", "story"}, {"careful", "story", "detail"}),
    ],
)
def test_levels(
    verbosity: int,
    in_stderr: set[str],
    in_file: set[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "log"
    set_up_logging(verbosity=verbosity, log_file=str(path))
    log_everything()
    err, text = capsys.readouterr().err, path.read_text()
    for word in ("careful", "story", "detail"):
        assert (word in err) == (word in in_stderr)
        assert (word in text) == (word in in_file)
    assert "Traceback" not in err
    assert ("Traceback" in text) == (verbosity > 0)


def test_debug_shows_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(verbosity=5)
    log_everything()
    assert "Traceback" in capsys.readouterr().err


def test_log_file_that_cannot_be_opened_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Cannot open log file"):
        set_up_logging(log_file=str(tmp_path / "no" / "log"))

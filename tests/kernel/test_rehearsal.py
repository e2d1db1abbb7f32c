"""The rehearsal of a dump: it is complete, and nothing is left of it."""

from __future__ import annotations

import logging
import os

import pytest

from agent import rehearsal
from agent.errors import FreezeError
from agent.procfs.process import list_children
from agent.rehearsal import rehearse_dump
from agent.target.tracer import Tracer
from protocol.state import load_all


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_rehearsal_succeeds_and_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    load_all()
    caplog.set_level(logging.DEBUG, logger="agent.rehearsal")
    before = list_children(os.getpid()), open_fds()
    rehearse_dump()
    assert caplog.text == ""
    assert (list_children(os.getpid()), open_fds()) == before


@pytest.mark.parametrize("error", [FreezeError("no tracing here"), PermissionError("no tracing here")])
def test_rehearsal_that_fails_does_not_matter(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(tracer: Tracer) -> None:
        raise error

    caplog.set_level(logging.DEBUG, logger="agent.rehearsal")
    monkeypatch.setattr(rehearsal, "_dump", refuse)
    before = list_children(os.getpid())
    rehearse_dump()
    assert "no tracing here" in caplog.text
    assert list_children(os.getpid()) == before

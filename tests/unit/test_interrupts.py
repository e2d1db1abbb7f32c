"""Stop signals become one exception, and wait while shielded."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from agent import interrupts
from agent.errors import TransferError


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in interrupts.STOP_SIGNALS}
    for number in before:  # a run in the background may have inherited ignored ones
        signal.signal(number, signal.SIG_DFL)
    interrupts.install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_raises_with_its_name(number: signal.Signals) -> None:
    with pytest.raises(interrupts.Interrupted, match=number.name):
        os.kill(os.getpid(), number)


def test_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupts.install()
    os.kill(os.getpid(), signal.SIGHUP)


def test_shielded_body_finishes_first() -> None:
    finished = []
    with pytest.raises(interrupts.Interrupted, match="SIGTERM"):
        with interrupts.shielded():
            with interrupts.shielded():
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            finished.append(True)
    assert finished
    with interrupts.shielded():
        pass


def test_error_of_the_body_wins_over_the_signal() -> None:
    with pytest.raises(TransferError), interrupts.shielded():
        os.kill(os.getpid(), signal.SIGTERM)
        raise TransferError("x")
    with interrupts.shielded():
        pass


def test_completed_body_may_drop_the_signal() -> None:
    with interrupts.shielded(raise_after=False):
        os.kill(os.getpid(), signal.SIGTERM)
    with interrupts.shielded():
        pass

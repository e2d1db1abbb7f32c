"""agent.machine: another architecture is refused by name, with what to do."""

from __future__ import annotations

import pytest

from agent import machine
from agent.errors import SetupError


def test_unknown_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "is_supported_machine", lambda: False)
    with pytest.raises(SetupError, match="supports x86_64 only") as caught:
        machine.require_machine()
    assert caught.value.hint


def test_this_machine_is_accepted() -> None:
    machine.require_machine()

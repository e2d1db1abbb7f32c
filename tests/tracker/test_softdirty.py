"""The soft-dirty tracker where the kernel has no such bits, and where it has (with emulated ones: see emulated.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from agent.errors import SetupError
from agent.kernel.features import kernel_features
from agent.tracker import softdirty
from agent.tracker.populated import ProcPagemap
from agent.tracker.softdirty import SoftDirtyTracker, require_soft_dirty


def test_kernel_without_the_bits_is_refused_by_name() -> None:
    reasons = {"has_soft_dirty": "kernel built without CONFIG_MEM_SOFT_DIRTY"}
    features = kernel_features()._replace(has_soft_dirty=False, reasons=reasons)
    with pytest.raises(SetupError, match="soft-dirty: kernel built without CONFIG_MEM_SOFT_DIRTY"):
        require_soft_dirty(features)


def test_kernel_with_the_bits_is_accepted() -> None:
    require_soft_dirty(kernel_features()._replace(has_soft_dirty=True))


def test_refusal_comes_before_anything_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = kernel_features()._replace(has_soft_dirty=False)
    monkeypatch.setattr(softdirty, "kernel_features", lambda: lacking)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(SetupError):
        SoftDirtyTracker(os.getpid())
    assert os.listdir("/proc/self/fd") == before


class _Noted(ProcPagemap):
    def __init__(self, pid: int, story: list[str]) -> None:
        super().__init__(pid)
        self.story = story

    def read(self, start: int, end: int) -> bytes:
        if self.story[-1:] != ["look"]:
            self.story.append("look")
        return super().read(start, end)

    def clear(self) -> None:
        self.story.append("clear")


def test_target_is_stopped_around_look_and_clear_and_the_final_round_clears_nothing() -> None:
    story: list[str] = []

    @contextmanager
    def pause(pid: int) -> Iterator[None]:
        story.append("stop")
        yield
        story.append("go on")

    tracker = SoftDirtyTracker(os.getpid(), source=_Noted(os.getpid(), story), pause=pause)
    tracker.collect(final=False)
    assert story == ["stop", "look", "clear", "go on"]
    story.clear()
    tracker.collect(final=True)
    assert story == ["look"]
    tracker.disarm()

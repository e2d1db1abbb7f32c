"""Mappings that cannot be carried are told by their flags."""

from __future__ import annotations

import os

import pytest

from agent.procfs.maps import MapsEntry
from agent.procfs.smaps import PROTECTION_KEY
from agent.state.vma import LayoutDumper
from agent.types import Pid


def details(flag: str, perms: str = "rw-p") -> list[str]:
    entry = MapsEntry(0x1000, 0x3000, perms, 0, 0, 0, 0, "")
    dumper = LayoutDumper(Pid(os.getpid()), lambda entry: 1)
    return [obstacle.detail for obstacle in dumper.check([entry], {0x1000: frozenset({"rd", flag})})]


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("ht", "hugetlbfs"),
        ("um", "userfaultfd"),
        ("ss", "shadow stack"),
        ("io", "device"),
        ("sf", "MAP_SYNC"),
        (PROTECTION_KEY, "protection keys"),
    ],
)
def test_flag_is_an_obstacle(flag: str, word: str) -> None:
    (detail,) = details(flag)
    assert word in detail


@pytest.mark.parametrize("flag", ["lo", "gd", "dd", "ac"])
def test_flag_is_carried(flag: str) -> None:
    assert details(flag) == []


def test_the_kernels_own_key_of_execute_only_memory_is_no_obstacle() -> None:
    assert details(PROTECTION_KEY, "--xp") == []

"""Version choice and the comparison of two hosts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from protocol.errors import RemoteProtocolError
from protocol.version import PROTOCOL_VERSION, choose_version, explain_refusal
from tests.protocol.samples import HOST


def kinds(source: dict[str, Any], destination: dict[str, Any]) -> list[str]:
    found = explain_refusal(replace(HOST, **source), replace(HOST, **destination))
    return [obstacle.kind for obstacle in found]


def test_newest_common_version_is_chosen() -> None:
    assert choose_version(1, 1) == 1
    assert choose_version(1, 99) == PROTOCOL_VERSION


def test_no_common_version_names_both_ranges() -> None:
    with pytest.raises(RemoteProtocolError, match="versions 7 to 9, this side 1 to 1"):
        choose_version(7, 9)


def test_equal_hosts_have_no_obstacles() -> None:
    assert kinds({}, {}) == []
    assert kinds({}, {"hostname": "beta", "boot_id": "other", "uid": 1000}) == []


def test_other_machine_is_the_only_obstacle_named() -> None:
    assert kinds({}, {"machine": "aarch64", "vdso_sha256": "", "cpu_flags": []}) == ["machine"]


def test_page_size_must_be_ours_on_both() -> None:
    assert kinds({"page_size": 65536}, {"page_size": 65536}) == ["page-size"] * 2


def test_destination_may_have_more_instructions_but_not_fewer() -> None:
    assert kinds({}, {"cpu_flags": [*HOST.cpu_flags, "avx512f"]}) == []
    found = explain_refusal(replace(HOST, cpu_flags=["sse2", "avx9", "bmi2"]), HOST)
    assert [obstacle.detail for obstacle in found] == ["processor lacks avx9 bmi2"]


def test_flags_that_promise_programs_nothing_may_differ() -> None:
    assert kinds({"cpu_flags": ["sse2", "vmx", "pti", "md_clear"]}, {}) == []


def test_every_flag_counts_on_other_machines() -> None:
    arm = {"machine": "aarch64", "cpu_flags": ["asimd", "sve"]}
    assert kinds(arm, {**arm, "cpu_flags": ["asimd"]}) == ["cpu"]


def test_destination_must_keep_every_register_state() -> None:
    assert kinds({"xstate_mask": 0x2E7}, {"xstate_size": 4096}) == ["xstate"]
    assert kinds({}, {"xstate_mask": 0x2E7, "xstate_size": 2704}) == []


def test_same_states_in_another_layout_are_an_obstacle() -> None:
    assert kinds({}, {"xstate_size": 2704}) == ["xstate"]
    assert kinds({}, {"xstate_mask": 0x2E7, "xstate_size": 2000}) == ["xstate"]


def test_other_vdso_is_an_obstacle() -> None:
    assert kinds({}, {"vdso_sha256": "cd" * 32}) == ["vdso"]

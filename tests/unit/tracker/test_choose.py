"""Which tracker is used, and the reason that is given."""

from __future__ import annotations

import pytest

from agent.errors import SetupError, UsageError
from agent.kernel import uffd
from agent.kernel.features import KernelFeatures
from agent.options import KNOWN_TRACKERS
from agent.tracker import choose
from agent.tracker.choose import TRACKER_NAMES, choose_tracker
from agent.tracker.create import CREATE_FLAGS, FEATURES

EVERYTHING = KernelFeatures(
    has_guard_pages=True,
    has_kcmp=True,
    has_mseal=True,
    has_pagemap_scan=True,
    has_pidfd_getfd=True,
    has_soft_dirty=True,
    has_time_ns=True,
    has_timer_restore_ids=True,
    has_uffd=True,
    has_uffd_wp_async=True,
    has_uffd_wp_shmem=True,
    has_uffd_wp_unpopulated=True,
    uffd_features=uffd.UFFD_FEATURES_LOG | uffd.UFFD_FEATURES_SCAN,
)
NO_ASYNC = EVERYTHING._replace(
    has_uffd_wp_async=False, reasons={"has_uffd_wp_async": "an old kernel"}
)
NEITHER = NO_ASYNC._replace(has_soft_dirty=False)


@pytest.fixture(autouse=True)
def all_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_is_built", lambda name: True)


@pytest.mark.parametrize("name", TRACKER_NAMES)
def test_a_name_is_taken_at_its_word(name: str) -> None:
    assert choose_tracker(name, EVERYTHING).name == name


def test_the_command_line_knows_the_same_names() -> None:
    assert set(KNOWN_TRACKERS) == {"auto", *TRACKER_NAMES}


def test_auto_takes_the_best_there_is_and_says_why() -> None:
    name, reason = choose_tracker("auto", EVERYTHING)
    assert name == "scan" and "never waits" in reason
    name, reason = choose_tracker("auto", NO_ASYNC)
    assert name == "soft-dirty" and reason == "not scan: uffd_wp_async: an old kernel"
    name, reason = choose_tracker("auto", NEITHER)
    assert name == "compare" and "not scan" in reason and "not soft-dirty" in reason


def test_auto_never_makes_the_process_wait() -> None:
    assert not {"log", "bitmap"} & set(choose.PREFERENCE)


def test_auto_does_without_what_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_is_built", lambda name: name == "scan")
    with pytest.raises(SetupError, match="not scan: uffd_wp_async: an old kernel; not soft-dirty"):
        choose_tracker("auto", NO_ASYNC)
    with pytest.raises(UsageError, match="compare is not supported yet"):
        choose_tracker("compare", EVERYTHING)


@pytest.mark.parametrize("name", ["log", "bitmap"])
def test_synchronous_trackers_need_no_asynchronous_protection(name: str) -> None:
    assert choose_tracker(name, NEITHER).name == name


@pytest.mark.parametrize("name", ["log", "bitmap"])
def test_missing_event_is_named(name: str) -> None:
    poor = EVERYTHING._replace(uffd_features=~uffd.UFFD_FEATURE_EVENT_UNMAP & (1 << 64) - 1)
    with pytest.raises(SetupError, match=f"Cannot track memory by {name}: userfaultfd lacks features 0x40"):
        choose_tracker(name, poor)


def test_a_tracker_that_the_kernel_cannot_carry_is_refused_with_the_reason() -> None:
    with pytest.raises(SetupError, match="Cannot track memory by scan: uffd_wp_async: an old kernel"):
        choose_tracker("scan", NO_ASYNC)
    with pytest.raises(SetupError, match="Cannot track memory by soft-dirty: soft_dirty"):
        choose_tracker("soft-dirty", NEITHER)


def test_only_asynchronous_protection_works_in_user_mode_only() -> None:
    # Under it, a system call that stores to a protected page fails unless the kernel resolves the fault itself.
    for name, flags in CREATE_FLAGS.items():
        is_asynchronous = bool(FEATURES[name] & uffd.UFFD_FEATURE_WP_ASYNC)
        assert bool(flags & uffd.UFFD_USER_MODE_ONLY) == is_asynchronous

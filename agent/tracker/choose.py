"""Which tracker to use: the user's word, or the best the kernel offers. Decides only, touches nothing."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

from agent.errors import SetupError, UsageError
from agent.kernel import uffd
from agent.kernel.features import KernelFeatures

PREFERENCE = ("scan", "soft-dirty", "compare")
"""What `auto` tries, in this order. Never log or bitmap: with them the target waits for the agent at each first store
to a page and at each change of its mappings, and the kernel fails the last stores of exiting threads. Where the kernel
has what they need it has what scan needs."""
REFERENCE = "compare"
"""Misses nothing, whatever way memory changes."""
TRACKER_NAMES = ("scan", "log", "bitmap", "soft-dirty", "compare")

_SCAN_NEEDS = (
    "has_pagemap_scan",
    "has_uffd_wp_async",
    "has_uffd_wp_unpopulated",
    "has_pidfd_getfd",
)
_LOG_NEEDS = ("has_pagemap_scan", "has_uffd", "has_uffd_wp_shmem", "has_pidfd_getfd")
_NEEDS = {
    "scan": _SCAN_NEEDS,
    "log": _LOG_NEEDS,
    "bitmap": _LOG_NEEDS,
    "soft-dirty": ("has_soft_dirty",),
    "compare": (),
}
_UFFD_NEEDS = {"log": uffd.UFFD_FEATURES_LOG, "bitmap": uffd.UFFD_FEATURES_LOG}
_MODULES = {"soft-dirty": "agent.tracker.softdirty", "compare": "agent.tracker.compare"}
_HINTS = {
    "scan": "Linux 6.7 or later is needed",
    "log": "Linux 6.7 or later is needed",
    "bitmap": "Linux 6.7 or later is needed",
    "soft-dirty": "use --tracker auto",
}


class Choice(NamedTuple):
    """A tracker's name, and why it was chosen."""

    name: str
    reason: str


def choose_tracker(requested: str, features: KernelFeatures) -> Choice:
    """Return the tracker for `requested` ("auto" or a name).

    :raises UsageError: a tracker that does not exist (yet).
    :raises SetupError: the kernel cannot carry it.
    """
    if requested == "auto":
        return _best(features)
    if requested not in TRACKER_NAMES or not _is_built(requested):
        raise UsageError(f"Tracker {requested} is not supported yet", hint="use --tracker auto")
    missing = _missing(requested, features)
    if missing:
        raise SetupError(
            f"Cannot track memory by {requested}: {missing}", hint=_HINTS.get(requested, "")
        )
    return Choice(requested, "as asked for")


def _best(features: KernelFeatures) -> Choice:
    passed: list[str] = []
    for name in PREFERENCE:
        missing = _missing(name, features) if _is_built(name) else "not built"
        if not missing:
            reason = "; ".join(passed) or "the kernel has all it needs, and the process never waits for the agent"
            return Choice(name, reason)
        passed.append(f"not {name}: {missing}")
    raise SetupError(f"Cannot track memory: {'; '.join(passed)}", hint=_HINTS["scan"])


def _missing(name: str, features: KernelFeatures) -> str:
    """Say what of the kernel is missing for a tracker; empty if nothing is."""
    for need in _NEEDS[name]:
        if not getattr(features, need):
            return f"{need.removeprefix('has_')}: {features.reasons.get(need, 'not supported')}"
    lacking = _UFFD_NEEDS.get(name, 0) & ~features.uffd_features
    return f"userfaultfd lacks features {lacking:#x}" if lacking else ""


def _is_built(name: str) -> bool:
    module = _MODULES.get(name)
    return module is None or importlib.util.find_spec(module) is not None

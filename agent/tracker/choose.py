"""Which tracker to use: the user's word, or the best the kernel offers. Decides only, touches nothing."""

from __future__ import annotations

from agent.errors import SetupError, UsageError
from agent.kernel.features import KernelFeatures

TRACKER_NAMES = ("scan",)
"""What is built. The command line also knows log, bitmap, soft-dirty and compare; they come later."""


def choose_tracker(requested: str, features: KernelFeatures) -> str:
    """Return the name of the tracker for `requested` ("auto" or a name).

    :raises UsageError: a tracker that does not exist (yet).
    :raises SetupError: the kernel cannot carry it.
    """
    if requested not in ("auto", *TRACKER_NAMES):
        raise UsageError(f"Tracker {requested} is not supported yet", hint="use --tracker auto")
    needed = {
        "has_pagemap_scan": features.has_pagemap_scan,
        "has_uffd_wp_async": features.has_uffd_wp_async,
        "has_uffd_wp_unpopulated": features.has_uffd_wp_unpopulated,
        "has_pidfd_getfd": features.has_pidfd_getfd,
    }
    for name, present in needed.items():
        if not present:
            reason = features.reasons.get(name, "not supported")
            raise SetupError(
                f"Cannot track memory by scan: {name.removeprefix('has_')}: {reason}",
                hint="Linux 6.7 or later is needed",
            )
    return "scan"

"""Guard pages (MADV_GUARD_INSTALL, madvise(2)), as the last look at the frozen process's memory found them."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.state import register


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardsState:
    """``ranges``: flat (start, end) pairs of addresses."""

    ranges: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.ranges) % 2:
            raise ValueError("guard ranges are not pairs")


register("guards", GuardsState, version_id=1, minimum_version_id=1)

"""Every tracker in every single situation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tracker.situations import SITUATIONS
from tests.tracker.target import Target
from tests.tracker.trackers import SITUATED, TRACKERS


@pytest.fixture(params=SITUATED)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    made = Target(TRACKERS[request.param])
    yield made
    made.close()


@pytest.mark.parametrize("situation", SITUATIONS)
def test_situation(target: Target, situation: str) -> None:
    SITUATIONS[situation](target)

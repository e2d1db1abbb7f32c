"""What the agents need themselves does not grow with the process: both stay below 64 MiB of resident memory."""

from __future__ import annotations

import pytest

from tests.prerequisites import require_namespaces
from tools.benchmark.run import measure
from tools.benchmark.scenarios import parse_scenario

LIMIT_KIB = 64 << 10
pytestmark = pytest.mark.timeout(120)  # on a busy machine


@pytest.mark.parametrize("scenario", ["vmas-30k", "fds-10k"])
def test_agents_stay_small(scenario: str) -> None:
    require_namespaces()
    peaks = measure(parse_scenario(scenario), options=[], watch_s=0.1)["peak_rss_kib"]
    assert peaks.keys() == {"send", "recv"}
    assert max(peaks.values()) < LIMIT_KIB, peaks

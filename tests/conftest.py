"""Fixtures for every test: a source and a destination host, joined, made anew for each test that asks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.hosts import Host, host_pair
from tests.prerequisites import require_namespaces

# A busy machine is no reason to fail: no example may be too slow, and the same ones are tried each time.
settings.register_profile(
    "ferry", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ferry")


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """(source, destination)."""
    require_namespaces()
    with host_pair() as pair:
        yield pair


@pytest.fixture
def source(hosts: tuple[Host, Host]) -> Host:
    """The host on which the workload starts."""
    return hosts[0]


@pytest.fixture
def destination(hosts: tuple[Host, Host]) -> Host:
    """The host to which it is moved."""
    return hosts[1]

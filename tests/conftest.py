"""Fixtures for every test: a source and a destination host, joined, made anew for each test that asks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hosts import Host, host_pair
from tests.prerequisites import require_namespaces


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

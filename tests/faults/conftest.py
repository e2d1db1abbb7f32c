"""The arena, shared by the tests of a module: each leaves the sleeper as it was, on one host or the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.faults.arena import Arena
from tests.hosts import host_pair
from tests.prerequisites import require_namespaces


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """A sleeper and two hosts between which it can be moved."""
    require_namespaces()
    directory = tmp_path_factory.mktemp("arena")
    with host_pair() as hosts, contextlib.closing(Arena(*hosts, directory)) as arena:
        yield arena

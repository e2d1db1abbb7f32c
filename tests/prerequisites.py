"""What a test needs from the machine: skip without it, fail when AGENT_TEST_FORCE=1.

Continuous integration sets AGENT_TEST_FORCE, so a machine that silently lost a prerequisite cannot look green.
Every reason says how to provide what is missing. Must never probe by changing the machine.
"""

from __future__ import annotations

import os
import shutil

import pytest


def require(present: object, reason: str) -> None:
    """Goes on when `present` is true; skips the test otherwise, or fails it when forced."""
    if present:
        return
    if os.environ.get("AGENT_TEST_FORCE") == "1":
        pytest.fail(f"AGENT_TEST_FORCE=1 and a prerequisite is missing: {reason}")
    pytest.skip(reason)


def require_program(name: str, package: str) -> str:
    """The path of an installed program."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    require(path, f"{name} is not installed: apt-get install {package} (tools/prepare does)")
    assert path is not None
    return path


def require_root() -> None:
    """Namespaces, other processes' memory and clone3(set_tid) need root."""
    require(os.geteuid() == 0, "not root: run tools/check as root, or in a container with CAP_SYS_ADMIN")


def require_namespaces() -> None:
    """Everything tests/hosts.py is made of."""
    require_root()
    for program, package in [
        ("unshare", "util-linux"),
        ("nsenter", "util-linux"),
        ("setsid", "util-linux"),
        ("ip", "iproute2"),
    ]:
        require_program(program, package)

"""The arrows between layers point down only.

    agent.cli -> agent.source | agent.destination -> agent.{state, pages, tracker, policy, report, ...}
              -> agent.target -> agent.{kernel, procfs}          protocol <- used by agent, uses nothing of ours

Read from the source text with ast: imports inside functions and under TYPE_CHECKING count as well.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.hosts import REPOSITORY

# Leaves that every layer of the agent may use.
LEAVES = {"agent", "agent.errors", "agent.types", "agent.ranges", "agent.options", "agent.address", "agent.log"}
# Layer -> what it may import from the agent besides itself, the leaves and (all but kernel and procfs) protocol.
LOWER = {"agent.kernel": 0, "agent.procfs": 0, "agent.target": 1, "agent.middle": 2, "agent.top": 3, "agent.cli": 4}
TOP = {"agent.source", "agent.destination"}
THIRD_PARTY = {"msgpack": {"protocol.codec"}, "zstandard": {"agent.pages.compress"}}


def modules(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Dotted names of every module that the file imports; of `from a import b` both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module
            children = {f"{node.module}.{alias.name}" for alias in node.names}
            existing = {child for child in children if is_module(child)}
            # `from agent import x` with x a module is an import of agent.x only.
            found.update(existing)
            if existing != children:
                found.add(node.module)
    return found


def is_module(name: str) -> bool:
    path = REPOSITORY / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def level(name: str) -> int:
    """How high a module of the agent stands; leaves are below everything."""
    if name in LEAVES:
        return -1
    for layer, height in LOWER.items():
        if name == layer or name.startswith(layer + "."):
            return height
    return LOWER["agent.top"] if name in TOP else LOWER["agent.middle"]


@pytest.mark.parametrize("path", modules("protocol"), ids=name_of)
def test_protocol_uses_nothing_of_ours(path: Path) -> None:
    ours = {name for name in imports(path) if name.split(".")[0] in ("agent", "tests", "tools")}
    assert not ours


@pytest.mark.parametrize("path", modules("protocol"), ids=name_of)
def test_protocol_knows_no_sockets_threads_or_clocks(path: Path) -> None:
    forbidden = {"socket", "threading", "time", "select", "selectors", "asyncio", "ctypes", "fcntl", "subprocess"}
    assert not forbidden & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", modules("agent"), ids=name_of)
def test_agent_imports_point_down(path: Path) -> None:
    name = name_of(path)
    height = level(name)
    used = {other for other in imports(path) if other.split(".")[0] == "agent"}
    above = {other for other in used if level(other) > height}
    assert not above, f"{name} uses {above} of a layer above it"
    assert not {other for other in imports(path) if other.split(".")[0] in ("tests", "tools")}
    if height in (LOWER["agent.kernel"], -1):
        assert not {other for other in imports(path) if other.split(".")[0] == "protocol"}


@pytest.mark.parametrize("path", modules("agent") + modules("protocol"), ids=name_of)
def test_third_party_packages_have_one_importer(path: Path) -> None:
    # _typeshed exists for type checkers only.
    ours = {"agent", "protocol", "_typeshed"}
    outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - ours
    for package in outside:
        assert package in THIRD_PARTY, f"{package} is not a dependency of Ferry"
        assert name_of(path) in THIRD_PARTY[package], f"{package} is imported by {name_of(path)}"


@pytest.mark.parametrize("path", modules("agent") + modules("protocol"), ids=name_of)
def test_module_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text))

"""What can be measured: each scenario turns one knob, so that a curve can be drawn against it.

A name says all: NAME-NUMBER[-RATE][+OPTION...], numbers may end in k.

    redis-MIB[-RATE]    redis-server filled to MIB, RATE writes a second (none: idle), and a client that pings
    memory-MIB[-RATE]   one mapping of MIB, half of it incompressible, RATE pages written a second
    raw-MIB             the same, incompressible and idle, and beside it the floor: the same bytes moved without Ferry
    threads-N  vmas-N  fds-N        a small process with so many threads, mappings, descriptors
    +OPTION             an option of agent-send: raw-256+compress=none is agent-send --compress=none

SETS are lists of such names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SMALL_MB = 16
"""Memory of a process whose knob is another one."""
KINDS = ("redis", "memory", "raw", "threads", "vmas", "fds")
_NAME = re.compile(r"(?P<kind>[a-z]+)-(?P<number>\d+k?)(?:-(?P<rate>\d+k?))?(?P<options>(?:\+[a-z][^+]*)*)")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One thing to measure. `knob` is what the number of the name counts."""

    name: str
    kind: str
    number: int
    megabytes: int
    rate: int = 0
    options: tuple[str, ...] = ()

    @property
    def program(self) -> str:
        return "redis" if self.kind == "redis" else "subject"

    @property
    def knob(self) -> str:
        return self.kind if self.kind in ("threads", "vmas", "fds") else "megabytes"

    @property
    def needed_bytes(self) -> int:
        """What both copies and everything around them may take."""
        return 2 * self.megabytes * (1 << 20) * 11 // 10 + (1 << 30)


def _number(text: str) -> int:
    return int(text[:-1]) * 1000 if text.endswith("k") else int(text)


def parse_scenario(name: str) -> Scenario:
    """:raises ValueError: the name is none, with what would be."""
    match = _NAME.fullmatch(name)
    if not match or match["kind"] not in KINDS:
        raise ValueError(f"{name!r} is no scenario: KIND-NUMBER[-RATE][+OPTION...], KIND one of {', '.join(KINDS)}")
    kind, number = match["kind"], _number(match["number"])
    has_memory = kind in ("redis", "memory", "raw")
    if match["rate"] and kind not in ("redis", "memory"):
        raise ValueError(f"{name!r}: nobody writes to {kind}")
    return Scenario(
        name=name,
        kind=kind,
        number=number,
        megabytes=number if has_memory else SMALL_MB,
        rate=_number(match["rate"] or "0"),
        options=tuple(f"--{option}" for option in match["options"].split("+")[1:]),
    )


SETS = {
    "smoke": ["redis-16-1k", "raw-16", "vmas-100", "vmas-300"],
    "quick": ["redis-256", "redis-256-10k", "memory-256-10k", "raw-256", "threads-64", "vmas-10k", "fds-1k"],
    "redis": ["redis-256", "redis-256-10k", "redis-1024", "redis-1024-10k", "redis-4096", "redis-4096-10k"],
    "memory": ["memory-64", "memory-256", "memory-1024", "memory-4096"],
    "rates": ["memory-256", "memory-256-1k", "memory-256-10k", "memory-256-50k"],
    "threads": ["threads-1", "threads-16", "threads-64", "threads-256"],
    "vmas": ["vmas-100", "vmas-1k", "vmas-10k", "vmas-30k"],
    "fds": ["fds-10", "fds-100", "fds-1k", "fds-10k"],
    "raw": ["raw-4096"],
    "compress": ["memory-512+compress=none", "memory-512+compress=zstd", "memory-512+compress=auto"],
}
SETS["full"] = [
    *SETS["redis"], "redis-8192", *SETS["memory"], *SETS["rates"][1:],
    *SETS["threads"], *SETS["vmas"], *SETS["fds"], *SETS["raw"],
]  # fmt: skip


def expand(names: list[str]) -> list[Scenario]:
    """The scenarios of names and of names of sets, each once."""
    found: dict[str, Scenario] = {}
    for name in names:
        for each in SETS.get(name, [name]):
            found.setdefault(each, parse_scenario(each))
    return list(found.values())

"""Mappings of every sort arrive as they were: extent, protection, flags, advice, locks, contents."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts import Host, wait_until
from tests.migrate.crossing import Workload, migrate, start_workload

# Tracking shows as "uw" until the last reference to the userfaultfd is gone.
_TRACKED = {"uw", "um"}

Line = tuple[int, int, str, str, frozenset[str]]
"""Start, end, permissions and offset, name, VmFlags."""


def _lines(smaps: str) -> list[Line]:
    lines: list[Line] = []
    start, end, what, name = 0, 0, "", ""
    for line in smaps.splitlines():
        word = line.split(None, 1)[0]
        if not word.endswith(":"):
            extent, perms, offset, _device, _inode, *path = line.split(None, 5)
            start, end = (int(part, 16) for part in extent.split("-"))
            what, name = f"{perms} {offset}", path[0] if path else ""
        elif word == "VmFlags:":
            flags = frozenset(line.split()[1:]) - _TRACKED
            lines.append((start, end, what, name, flags))
    return lines


def _merged(lines: list[Line]) -> list[Line]:
    # The kernel of the destination may join neighbours that a different history kept apart on the source.
    merged: list[Line] = []
    for line in lines:
        if merged and merged[-1][1] == line[0] and merged[-1][4] == line[4] and _continues(merged[-1], line):
            merged[-1] = (merged[-1][0], line[1], *merged[-1][2:])
        else:
            merged.append(line)
    return merged


def _continues(before: Line, line: Line) -> bool:
    (perms, offset), (next_perms, next_offset) = before[2].split(), line[2].split()
    moved = before[1] - before[0] if before[3] and not before[3].startswith("[") else 0
    return (perms, before[3]) == (next_perms, line[3]) and int(offset, 16) + moved == int(next_offset, 16)


def _settled(workload: Workload, host: Host) -> list[Line]:
    # The workload flips protections when it checks: a picture counts when it is seen three times in a row.
    seen: list[list[Line]] = []

    def settled() -> bool:
        seen.append(_lines((host.proc(workload.pid) / "smaps").read_text()))
        return len(seen) >= 3 and seen[-1] == seen[-2] == seen[-3]

    wait_until(settled, "the layout to keep still")
    return seen[-1]


@pytest.mark.parametrize("options", [(), ("--max-rounds=0",)], ids=["precopy", "stop-copy"])
def test_every_sort_of_mapping_arrives_as_it_was(
    source: Host, destination: Host, tmp_path: Path, options: tuple[str, ...]
) -> None:
    workload = start_workload(source, tmp_path, "layout", "STATUS", tmp_path)
    before = _settled(workload, source)
    migrate(workload, destination, tmp_path, send=["--verify", *options])
    workload.assert_healthy(destination)
    after = _settled(workload, destination)
    assert _merged(after) == _merged(before)
    # Not more VMAs than it had: something of ours would stand between neighbours.
    assert len(after) <= len(before)

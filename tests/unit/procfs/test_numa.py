"""numa_maps and node lists."""

from __future__ import annotations

import pytest

from agent.procfs.numa import parse_nodes, parse_numa_maps

DEFAULT = b"""\
55b89b94e000 default file=/usr/bin/cat mapped=2 N0=2 kernelpagesize_kB=4
7ffecf59e000 default stack anon=11 dirty=11 N0=11 kernelpagesize_kB=4
"""


@pytest.mark.parametrize(
    ("text", "mask"), [("", 0), ("0", 1), ("0-2,5\n", 0b100111), ("63-64", 3 << 63)]
)
def test_node_lists(text: str, mask: int) -> None:
    assert parse_nodes(text) == mask


@pytest.mark.parametrize(
    ("policy", "mask"),
    [
        (b"interleave:0-1", 0b11),
        (b"bind=static:0,3", 0b1001),
        (b"prefer:2", 0b100),
        (b"prefer (many):1-2", 0b110),
        (b"weighted interleave=relative:1", 0b10),
        (b"local", 0),
    ],
)
def test_policies_name_nodes(policy: bytes, mask: int) -> None:
    assert parse_numa_maps(DEFAULT) is None
    assert parse_numa_maps(DEFAULT + b"7f57ea604000 " + policy + b"\n") == mask
    assert parse_numa_maps(b"7f57ea604000 " + policy + b" anon=4 N5=4\n" + DEFAULT) == mask


def test_policies_of_several_mappings_add_up() -> None:
    assert parse_numa_maps(b"1000 bind:0\n" + DEFAULT + b"3000 interleave:4 anon=1\n") == 0b10001

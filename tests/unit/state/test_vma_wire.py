"""A layout on its way: by columns, and back as it was; what cannot be a layout is refused."""

from __future__ import annotations

from collections.abc import Mapping

import msgpack
import pytest

from protocol import codec
from protocol.errors import RemoteProtocolError
from protocol.messages import StateSection
from protocol.sections import decode_section, encode_section
from protocol.state.vma import BackingFile, LayoutColumns, LayoutState, VmaKind, VmaState

_FILES = tuple(BackingFile(path=f"/lib/{name}", size=9, mtime_ns=7, mode=0o755) for name in "ab")
_LAYOUT = LayoutState(
    files=_FILES,
    vmas=(
        VmaState(start=0x1000, end=0x3000, prot=5, shared=False, kind=VmaKind.FILE, offset=0x2000, file_index=1),
        VmaState(start=0x3000, end=0x4000, prot=3, shared=False, kind=VmaKind.ANON, flags=("ac",), name="heap"),
        VmaState(start=0x5000, end=0x6000, prot=3, shared=False, kind=VmaKind.ANON, flags=("ac",), name="heap"),
        VmaState(start=0x6000, end=0x9000, prot=1, shared=True, kind=VmaKind.FILE, file_index=0),
        VmaState(
            start=0xA000, end=0xB000, prot=3, shared=True, kind=VmaKind.OBJECT, offset=0x1000, object_id=1 << 33,
            policy=2, policy_nodes=b"\1",
        ),
        VmaState(start=0xC000, end=0xD000, prot=5, shared=False, kind=VmaKind.SPECIAL, name="[vdso]"),
    ),
)  # fmt: skip


def test_a_layout_arrives_as_it_was() -> None:
    assert decode_section(encode_section("layout", 1, _LAYOUT)) == _LAYOUT
    empty = LayoutState(files=(), vmas=())
    assert decode_section(encode_section("layout", 1, empty)) == empty


def test_mappings_that_are_alike_share_their_traits() -> None:
    columns = LayoutColumns.of(_LAYOUT)
    assert columns.traits_of == (0, 1, 1, 2, 3, 4)
    assert columns.backing == (0x2000, 1, 0, 0, 0x1000, 1 << 33)


@pytest.mark.parametrize(
    "changes",
    [
        {"traits_of": [0, 1, 1, 2, 3, 5]},
        {"traits_of": [0, 1, 1, 2, 3, -1]},
        {"traits_of": [0, 1, 1, 2, 3]},
        {"bounds": [0x1000, 0x3000]},
        {"backing": [0x2000, 1, 0, 0, 0x1000]},
        {"backing": [0x2000, 2, 0, 0, 0x1000, 1]},
        {"backing": []},
        {"bounds": [0x1000, 0x3000, 0x2000, 0x4000, 0x5000, 0x6000, 0x6000, 0x9000, 0xA000, 0xB000, 0xC000, 0xD000]},
        {"bounds": [0x1000, 0x3001, *range(0x4000, 0xE000, 0x1000)]},
    ],
)
def test_columns_that_contradict_each_other_are_refused(changes: Mapping[str, object]) -> None:
    fields = msgpack.unpackb(codec.encode(LayoutColumns.of(_LAYOUT)))
    with pytest.raises(RemoteProtocolError, match="LayoutColumns: "):
        decode_section(_section(2, msgpack.packb({**fields, **changes})))


def test_an_older_layout_is_refused_by_name() -> None:
    with pytest.raises(RemoteProtocolError, match="'layout': version 1 is of an older Ferry"):
        decode_section(_section(1, codec.encode(_LAYOUT)))


def _section(version: int, body: bytes) -> StateSection:
    return StateSection(
        kind="layout", version_id=version, minimum_version_id=version, required=True, owner_id=1, body=body
    )

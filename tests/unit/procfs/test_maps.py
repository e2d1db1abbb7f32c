"""parse_maps and the smaps parsers on texts as kernels write them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from agent.procfs import files, maps, smaps
from agent.procfs.files import read_lines
from agent.procfs.maps import MapsEntry, parse_bounds, parse_maps
from agent.procfs.smaps import SmapsEntry, parse_smaps, parse_vm_flags, read_vm_flags

TEXT = b"""\
00400000-00452000 r-xp 00001000 08:02 173521                             /usr/bin/dbus daemon
00e03000-00e24000 rw-p 00000000 00:00 0                                  [heap]
35b1a21000-35b1a22000 rw-p 00000000 00:00 0 
7f2c6ff8c000-7f2c7078c000 rw-s 00000000 00:05 1026                       /memfd:a b (deleted)
7fffb2c0d000-7fffb2c2e000 rw-p 00000000 00:00 0                          [stack]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""  # noqa: W291


def test_every_column_is_parsed() -> None:
    entries = parse_maps(TEXT)
    assert entries[0] == MapsEntry(
        0x400000, 0x452000, "r-xp", 0x1000, 8, 2, 173521, "/usr/bin/dbus daemon"
    )
    assert [entry.path for entry in entries[1:]] == [
        "[heap]", "", "/memfd:a b (deleted)", "[stack]", "[vsyscall]"
    ]  # fmt: skip
    assert entries[-1].start == 0xFFFFFFFFFF600000
    assert entries[3].perms == "rw-s" and entries[3].dev_minor == 5


def test_strange_names_survive() -> None:
    head = b"1000-2000 r--p 00000000 fe:01 7 " + b" " * 40
    assert parse_maps(head + b"/a\rb\xff\\012\n")[0].path == "/a\rb\udcff\\012"


def test_bounds_are_those_of_all_entries() -> None:
    text = TEXT + b"7fffc0000000-7fffc0001000 r--p 00000000 fe:01 7     /1000-2000 r--p\r3000-4000 r--p\n"
    assert list(parse_bounds(text)) == [bound for entry in parse_maps(text) for bound in entry[:2]]


def test_no_mappings_are_no_entries() -> None:
    assert parse_maps(b"") == []


def test_large_texts_that_resemble_the_last_one_are_parsed_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "_last", (b"", []))
    chance = random.Random(5)
    lines = [_line(number) for number in range(20)]
    known: list[MapsEntry] = []
    for _ in range(500):
        for _ in range(chance.randrange(4)):
            at = chance.randrange(len(lines) + 1)
            lines[at : at + chance.randrange(3)] = [_line(chance.randrange(40)) for _ in range(chance.randrange(3))]
        text = b"".join(lines)
        monkeypatch.setattr(maps, "_LARGE_BYTES", 1 << 20)
        expected = parse_maps(text)
        monkeypatch.setattr(maps, "_LARGE_BYTES", 0)
        found = parse_maps(text)
        assert found == expected
        if found and found[0] in known[:1]:
            assert found[0] is known[0], "entries of an unchanged line are the same object"
        known = found[:]
        found.clear()  # the list is the caller's own


def _line(number: int) -> bytes:
    return b"%x000-%x000 rw-p 00000000 00:00 0 %s\n" % (number + 16, number + 17, b"/x" * (number % 3))


@pytest.mark.parametrize(
    "text", [b"1000-2000 r--p 00000000 00:00 0 ", b"rubbish\n", b"1000-2000 r--p\n", b"\n"]
)
def test_other_texts_are_value_errors(text: bytes) -> None:
    with pytest.raises(ValueError):
        parse_maps(text)


SMAPS = b"""\
7f0000000000-7f0000002000 rw-p 00000000 00:00 0 
Size:                  8 kB
Rss:                   4 kB
THPeligible:           0
ProtectionKey:         3
VmFlags: rd wr mr mw me ac sd 
7f0000002000-7f0000004000 r--s 00000000 00:01 12                         /dev/VmFlags: x
Size:                  8 kB
Rss:                   0 kB
VmFlags: rd sh mr mw me ms uw 
"""  # noqa: W291


def test_vm_flags_belong_to_their_mapping() -> None:
    first, second = parse_vm_flags(SMAPS)
    assert (first.start, first.end) == (0x7F0000000000, 0x7F0000002000)
    # A protection key has a line of its own.
    assert first.flags == {"rd", "wr", "mr", "mw", "me", "ac", "sd", "pkey"}
    assert "uw" in second.flags


def test_smaps_counters_are_bytes() -> None:
    first, second = parse_smaps(SMAPS)
    assert isinstance(first, SmapsEntry)
    assert first.bytes_by_name == {"Size": 8192, "Rss": 4096}
    assert (first.protection_key, second.protection_key) == (3, 0)


@pytest.mark.parametrize("size", [1, 7, 100, 1 << 16])
def test_flags_read_in_pieces_of_any_size_are_the_same(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SMAPS + SMAPS.replace(b"7f00", b"7f01")[:-1]  # the last line is cut off
    (tmp_path / "smaps").write_bytes(text)
    monkeypatch.setattr(files, "READ_BYTES", size)
    pieces = list(read_lines(str(tmp_path / "smaps")))
    assert b"".join(pieces) == text
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])
    monkeypatch.setattr(smaps, "read_lines", lambda path: read_lines(str(tmp_path / "smaps")))
    assert read_vm_flags(1) == parse_vm_flags(text)
    assert len(read_vm_flags(1)) == 4


@pytest.mark.parametrize("known", [b"", b"ab", b"abcdefg", b"abcdefgh", b"abcdeXgh", b"Xbcdefg", b"abcdef"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_what_is_read_again_is_what_is_there(
    known: bytes, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"abcdefg")
    monkeypatch.setattr(files, "READ_BYTES", size)
    found = files.read_again(str(tmp_path / "file"), known)
    assert found == b"abcdefg"
    assert found is known or known != found

"""The codec: every annotation it supports, and what it must refuse by name."""

from __future__ import annotations

import enum
import os
import tracemalloc
from dataclasses import dataclass, field
from typing import Any, NewType

import msgpack
import pytest

from protocol.codec import decode, decode_plain, encode
from protocol.errors import LocalProtocolError, RemoteProtocolError

Number = NewType("Number", int)


class Colour(enum.IntEnum):
    RED = 1
    BLUE = 2


class Word(str, enum.Enum):
    YES = "yes"


class Bits(enum.IntFlag):
    READ = 1
    WRITE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    value: int
    name: str = "leaf"

    def __post_init__(self) -> None:
        if self.value == 13:
            raise ValueError("value 13 is not welcome")


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything:
    number: int
    flag: bool
    text: str
    data: bytes
    real: float
    colour: Colour
    word: Word
    bits: Bits
    numbers: list[int]
    names: tuple[str, ...]
    pair: tuple[int, str]
    by_number: dict[int, Leaf]
    by_name: dict[str, list[bytes]]
    maybe: int | None
    leaf: Leaf
    leaves: list[Leaf]
    renamed: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    children: list[Tree] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wider:
    value: int
    extra: list[Leaf]


def everything(**changes: Any) -> Everything:
    fields: dict[str, Any] = {
        "number": -5,
        "flag": True,
        "text": "h\u00e9",
        "data": b"\0\xff",
        "real": 0.5,
        "colour": Colour.BLUE,
        "word": Word.YES,
        "bits": Bits.READ | Bits.WRITE,
        "numbers": [1, 2**64 - 1, -(2**63)],
        "names": ("a", "b"),
        "pair": (7, "seven"),
        "by_number": {3: Leaf(value=3)},
        "by_name": {"x": [b"y"]},
        "maybe": None,
        "leaf": Leaf(value=1, name="one"),
        "leaves": [Leaf(value=2)],
        "renamed": Number(9),
    }
    return Everything(**{**fields, **changes})


def wire_of(**changes: Any) -> bytes:
    wire: Any = decode_plain(encode(everything()))
    wire.update(changes)
    packed: bytes = msgpack.packb({key: value for key, value in wire.items() if value is not ...})
    return packed


def test_everything_survives_the_round_trip() -> None:
    for obj in (everything(), everything(maybe=4, numbers=[], real=-0.0)):
        again = decode(Everything, encode(obj))
        assert again == obj
        assert type(again.colour) is Colour and type(again.bits) is Bits


def test_wire_form_is_a_map_of_field_names() -> None:
    assert decode_plain(encode(Leaf(value=1))) == {"value": 1, "name": "leaf"}


def test_class_may_contain_itself() -> None:
    tree = Tree(children=[Tree(), Tree(children=[Tree()])])
    assert decode(Tree, encode(tree)) == tree


def test_file_names_that_are_not_utf8_travel_unharmed() -> None:
    name = os.fsdecode(b"/tmp/\xff\xfe")
    again = decode(Leaf, encode(Leaf(value=1, name=name)))
    assert os.fsencode(again.name) == b"/tmp/\xff\xfe"


def test_field_with_a_default_may_be_absent() -> None:
    assert decode(Leaf, msgpack.packb({"value": 4})) == Leaf(value=4)


def test_fields_may_come_in_any_order() -> None:
    wire: Any = decode_plain(encode(everything()))
    assert decode(Everything, msgpack.packb(dict(reversed(wire.items())))) == everything()


def test_first_field_that_does_not_fit_is_the_one_that_is_named() -> None:
    for changes in ({"names": "ab", "maybe": "no"}, {"names": [1], "renamed": "9"}, {"names": ..., "leaf": 5}):
        with pytest.raises(RemoteProtocolError, match=r"^Everything\.names: "):
            decode(Everything, wire_of(**changes))
    with pytest.raises(LocalProtocolError, match=r"^Everything\.names: "):
        encode(everything(names=["a"], renamed="9"))


def test_class_without_fields() -> None:
    assert decode(Nothing, encode(Nothing())) == Nothing()
    with pytest.raises(RemoteProtocolError, match=r"Nothing.*unknown field"):
        decode(Nothing, msgpack.packb({"value": 1}))
    with pytest.raises(RemoteProtocolError, match="expected a map for Nothing, got list"):
        decode(Nothing, b"\x90")


def test_nothing_is_left_of_a_value_that_could_not_be_encoded() -> None:
    before = encode(everything())
    with pytest.raises(LocalProtocolError):
        encode(everything(leaves=[Leaf(value=1), Leaf(value=2**64)]))
    assert encode(everything()) == before


def test_large_value_leaves_no_large_buffer_behind() -> None:
    tracemalloc.start()
    try:
        encode(everything(data=bytes(1 << 25)))
        assert tracemalloc.get_traced_memory()[0] < 1 << 22
    finally:
        tracemalloc.stop()


def test_numbers_are_welcome_as_a_float_only_when_encoding() -> None:
    assert decode(Everything, encode(everything(real=2))).real == 2.0
    with pytest.raises(RemoteProtocolError, match=r"Everything\.real"):
        decode(Everything, wire_of(real=2))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("number", "5"),
        ("number", True),
        ("number", None),
        ("number", 1.0),
        ("flag", 1),
        ("text", b"x"),
        ("data", "x"),
        ("real", float("nan")),
        ("real", float("inf")),
        ("colour", 0),
        ("colour", True),
        ("colour", "RED"),
        ("word", "no"),
        ("bits", 2),
        ("bits", -1),
        ("bits", 8),
        ("numbers", [1, "2"]),
        ("numbers", [True]),
        ("numbers", {}),
        ("names", "ab"),
        ("pair", [7]),
        ("pair", [7, "seven", 8]),
        ("by_number", {"3": {"value": 3}}),
        ("by_name", {"x": ["y"]}),
        ("maybe", "no"),
        ("leaf", None),
        ("leaf", [1, "one"]),
        ("renamed", "9"),
        ("number", ...),
        ("leaf", ...),
    ],
)
def test_unfit_value_is_refused_by_the_name_of_its_field(name: str, value: Any) -> None:
    with pytest.raises(RemoteProtocolError, match=rf"^Everything\.{name}: "):
        decode(Everything, wire_of(**{name: value}))


def test_nested_field_is_named_by_its_own_class() -> None:
    with pytest.raises(RemoteProtocolError, match=r"^Leaf\.value: expected int, got str"):
        decode(Everything, wire_of(leaves=[{"value": "2"}]))


def test_unknown_field_is_refused_unless_asked_to_ignore_it() -> None:
    data = msgpack.packb({"value": 1, "extra": [{"value": 2, "novel": True}]})
    with pytest.raises(RemoteProtocolError, match=r"extra.*unknown field"):
        decode(Leaf, data)
    assert decode(Leaf, data, ignore_unknown=True) == Leaf(value=1)
    with pytest.raises(RemoteProtocolError, match="novel"):
        decode(Wider, data)
    assert decode(Wider, data, ignore_unknown=True) == Wider(value=1, extra=[Leaf(value=2)])


def test_check_of_the_class_becomes_a_remote_error() -> None:
    with pytest.raises(RemoteProtocolError, match="13 is not welcome"):
        decode(Leaf, msgpack.packb({"value": 13}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x81",
        encode(Leaf(value=1)) + b"\0",
        encode(Leaf(value=1))[:-1],
        b"\x90",
        b"\x82\xa5value\x01\xa5value\x02",
        b"\x81\x90\x01",
        b"\x81\xc4\x01\xff\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\xdd\x00\x0f\xff\xff" * 2000,
        b"\xd7\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x81\xa5value\xd4\x05\x00",
    ],
)
def test_malformed_bytes_are_a_remote_error(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(Leaf, data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("number", "5"),
        ("number", 2**64),
        ("number", -(2**63) - 1),
        ("numbers", [2**64]),
        ("numbers", (1, 2)),
        ("flag", 1),
        ("text", "\ud800"),
        ("real", float("nan")),
        ("colour", 2),
        ("bits", Bits(2)),
        ("leaf", everything),
        ("leaves", [Tree()]),
        ("names", ["a"]),
    ],
)
def test_unfit_value_of_ours_is_a_local_error(name: str, value: Any) -> None:
    with pytest.raises(LocalProtocolError):
        encode(everything(**{name: value}))


def test_only_dataclasses_are_encoded() -> None:
    with pytest.raises(TypeError):
        encode({"value": 1})

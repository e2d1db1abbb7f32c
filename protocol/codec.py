"""Dataclass <-> msgpack: the one place that imports msgpack.

A dataclass travels as a map {field name: value}. The wire form of a field follows from its
annotation alone, so a schema is its dataclass and nothing else:

    int                     integer, -2**63 .. 2**64-1; bool is not an int here
    bool, bytes             as they are
    float                   64 bits, finite
    str                     UTF-8; what is not becomes surrogates (os.fsdecode), travels unharmed
    Enum, IntEnum           the member's value
    Flag, IntFlag           integer; a bit the class does not name is refused
    list[T], tuple[T, ...]  array; tuple[A, B] an array of exactly that length
    dict[str | int, T]      map without duplicate keys
    T | None                the value or nil
    dataclass               map; fields with defaults may be absent
    NewType                 like the type it renames

Decoding is strict: unknown or missing fields, wrong types, values out of range and whatever the
class's ``__post_init__`` refuses with ValueError end in RemoteProtocolError naming ``Class.field``.
Nothing else leaves ``decode``, whatever the bytes. Encoding applies the same types and raises
LocalProtocolError. Python types are compared exactly: no silent conversions, except that an int
is welcome where a float is due on the sending side.

This module must never look at what a message means. Sources: the msgpack specification; typing.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import operator
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, Union

import msgpack

from protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from protocol.limits import MAX_CONTROL_FRAME_BYTES, MAX_LIST_ITEMS, MAX_MAP_ITEMS

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview
"""A flat run of bytes; what sockets, files and slices of them give."""

_Convert = Callable[[Any], Any]

_INT_MIN = -(1 << 63)
_INT_MAX = (1 << 64) - 1
_SCALARS = (int, bool, str, bytes, float)
_KEPT_BYTES = 1 << 18
"""A packer that has made more than this is not kept: its buffer never shrinks."""
# What a schema's own check may raise when it meets a value it did not expect.
_CHECK_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError)


def encode(obj: object) -> bytes:
    """Encode the dataclass instance `obj`.

    :raises LocalProtocolError: when a field holds something its annotation does not allow.
    """
    cls = type(obj)
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is not a dataclass")
    try:
        return _pack(_encoder(cls)(obj))
    except (_Mismatch, ValueError, TypeError, OverflowError, RecursionError) as err:
        raise LocalProtocolError(f"Cannot encode {cls.__name__}: {err}") from err


def decode(cls: type[T], data: Buffer, *, ignore_unknown: bool = False) -> T:
    """Decode `data`, all of it, into an instance of the dataclass `cls`.

    `ignore_unknown` skips fields the classes do not have, for sections written by a newer peer
    that says an older reader may do so.

    :raises RemoteProtocolError: for any bytes that are not exactly one valid `cls`.
    """
    schema: Any = cls
    try:
        result: T = _decoder(schema, ignore_unknown)(_unpack(data))
    except _Mismatch as err:
        raise RemoteProtocolError(f"{cls.__name__}: {err}") from err
    except RecursionError as err:
        raise RemoteProtocolError(f"{cls.__name__}: nested too deeply") from err
    return result


def prepare(cls: type[Any]) -> None:
    """Build now what encoding and decoding `cls` needs, and all classes inside it.

    Otherwise the first use does, at a fraction of a millisecond for each class.
    """
    pending, seen = [cls], {cls}
    while pending:
        schema: Any = pending.pop()
        _encoder(schema)
        _decoder(schema, False)
        for inner in _classes_in(typing.get_type_hints(schema).values()):
            if inner not in seen:
                seen.add(inner)
                pending.append(inner)


def _classes_in(hints: Iterable[Any]) -> Iterator[type[Any]]:
    for hint in hints:
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield hint
        else:
            yield from _classes_in(typing.get_args(hint))


def decode_plain(data: Buffer) -> object:
    """Decode `data` without a schema into dicts, lists and scalars, for tools that show it.

    :raises RemoteProtocolError: when the bytes are not one encoded value.
    """
    return _unpack(data)


# ---- plain values -> bytes ----


def _pack(wire: dict[str, Any]) -> bytes:
    # Whoever else packs at the same time, in another thread, finds none and makes one more.
    try:
        packer = _spare_packers.pop()
    except IndexError:
        # Nested records are turned into maps one by one, when their turn comes: of tens of thousands, none stays.
        packer = msgpack.Packer(default=_inner_to_wire, use_bin_type=True, unicode_errors="surrogateescape")
    packed: bytes = packer.pack(wire)
    if len(packed) <= _KEPT_BYTES:
        _spare_packers.append(packer)
    return packed


_spare_packers: list[msgpack.Packer] = []
"""To make one takes longer than to pack most of what is packed: it has a large buffer."""


class _Mismatch(Exception):
    """A value does not fit; the nearest dataclass above adds the name of its field."""


# ---- bytes -> plain values ----


def _unpack(data: Buffer) -> object:
    size = len(data)
    if size > MAX_CONTROL_FRAME_BYTES:
        raise RemoteProtocolError(f"Value has {size} bytes, limit {MAX_CONTROL_FRAME_BYTES}")
    try:
        value: object = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=False,
            unicode_errors="surrogateescape",
            object_pairs_hook=_unique_map,
            max_array_len=min(size, MAX_LIST_ITEMS),
            max_map_len=min(size, MAX_MAP_ITEMS),
        )
    except ProtocolError:
        raise
    except RecursionError as err:
        raise RemoteProtocolError("Encoded value is nested too deeply") from err
    except (msgpack.UnpackException, MemoryError, *_CHECK_ERRORS) as err:
        # msgpack has no common root: FormatError, StackError and ExtraData are ValueErrors,
        # OutOfData is not, and keys that cannot be hashed give TypeError.
        reason = str(err) or type(err).__name__
        raise RemoteProtocolError(f"Encoded value is malformed: {reason}") from err
    return value


def _unique_map(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise RemoteProtocolError("Encoded map has a duplicate key")
    return table


# ---- annotations -> converters, built once for each class ----


def _show(value: object) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"


def _scalar(kind: type) -> _Convert:
    def convert(value: Any) -> Any:
        if type(value) is not kind:
            raise _Mismatch(f"expected {kind.__name__}, got {_show(value)}")
        return value

    return convert


def _to_int(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _Mismatch(f"expected int, got {_show(value)}")
    if not _INT_MIN <= value <= _INT_MAX:
        raise _Mismatch(f"integer {value:#x} does not fit 64 bits")
    return int(value)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise _Mismatch(f"expected a finite float, got {value}")
    return value


def _float_to_wire(value: Any) -> float:
    if type(value) is not float and type(value) is not int:
        raise _Mismatch(f"expected float, got {_show(value)}")
    return _finite(float(value))


def _float_from_wire(value: Any) -> float:
    if type(value) is not float:
        raise _Mismatch(f"expected float, got {_show(value)}")
    return _finite(value)


def _enum_to_wire(kind: type[enum.Enum]) -> _Convert:
    known = _named_bits(kind)

    def convert(value: Any) -> Any:
        if not isinstance(value, kind):
            raise _Mismatch(f"expected {kind.__name__}, got {_show(value)}")
        if known is not None:
            _check_bits(kind, value.value, known)
        return value.value

    return convert


def _enum_from_wire(kind: type[enum.Enum]) -> _Convert:
    known = _named_bits(kind)
    # Keyed by type too: True would find the member whose value is 1.
    members = {(type(item.value), item.value): item for item in kind.__members__.values()}

    def flags(value: Any) -> Any:
        if type(value) is not int:
            raise _Mismatch(f"expected {kind.__name__}, got {_show(value)}")
        _check_bits(kind, value, known or 0)
        return kind(value)

    def convert(value: Any) -> Any:
        try:
            return members[type(value), value]
        except (KeyError, TypeError):
            raise _Mismatch(f"{_show(value)} is not a {kind.__name__}") from None

    return convert if known is None else flags


def _named_bits(kind: type[enum.Enum]) -> int | None:
    """Return all bits the flag class `kind` names, None when it is no flag class."""
    if not issubclass(kind, enum.Flag):
        return None
    return functools.reduce(operator.or_, (item.value for item in kind.__members__.values()), 0)


def _check_bits(kind: type[enum.Enum], value: int, known: int) -> None:
    if value < 0 or value & ~known:
        raise _Mismatch(f"{value:#x} has bits {kind.__name__} does not name")


def _optional(inner: _Convert, exact: type | None) -> _Convert:
    def convert(value: Any) -> Any:
        return value if value is None or type(value) is exact else inner(value)

    return convert


def _sequence(kind: Any, made: Any, item: _Convert, exact: type | None) -> _Convert:
    # `exact`: the one type every item must have when converting it would change nothing.
    def convert(value: Any) -> Any:
        if type(value) is not kind:
            raise _Mismatch(f"expected {kind.__name__}, got {_show(value)}")
        if exact is not None and set(map(type, value)) <= {exact}:
            # msgpack writes a tuple as it does a list.
            return made(value) if made is tuple else value
        return made(map(item, value))

    return convert


def _records_from_wire(made: Any, cls: Any, lenient: bool) -> _Convert:
    def convert(value: Any) -> Any:
        if type(value) is not list:
            raise _Mismatch(f"expected list, got {_show(value)}")
        item = _decoder(cls, lenient)
        # In place: the map of one record makes room for the next record.
        for index, part in enumerate(value):
            value[index] = item(part)
        return value if made is list else made(value)

    return convert


def _fixed(kind: Any, made: Any, items: tuple[_Convert, ...]) -> _Convert:
    def convert(value: Any) -> Any:
        if type(value) is not kind or len(value) != len(items):
            raise _Mismatch(f"expected {len(items)} items, got {_show(value)}")
        return made(item(part) for item, part in zip(items, value))

    return convert


def _mapping(key: _Convert, item: _Convert) -> _Convert:
    def convert(value: Any) -> Any:
        if type(value) is not dict:
            raise _Mismatch(f"expected dict, got {_show(value)}")
        return {key(name): item(part) for name, part in value.items()}

    return convert


def _exact(hint: Any) -> type | None:
    """The type whose instances travel unchanged and unchecked but for their type, if any.

    msgpack itself refuses an int that does not fit. Floats are looked at for NaN.
    """
    hint = _plain(hint)
    return typing.cast(type, hint) if hint in (int, bool, str, bytes) else None


def _unconverted(hint: Any) -> type | None:
    """As _exact(), of what stands in a list on its way out: records, too, are left to the packer."""
    return typing.cast(type, hint) if dataclasses.is_dataclass(hint) else _exact(hint)


def _plain(hint: Any) -> Any:
    while hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    return hint


def _build(hint: Any, *, decoding: bool, lenient: bool) -> _Convert:
    hint = _plain(hint)
    if hint is int:
        return _to_int
    if hint is float:
        return _float_from_wire if decoding else _float_to_wire
    if hint in _SCALARS:
        return _scalar(hint)
    build = functools.partial(_build, decoding=decoding, lenient=lenient)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        inner = [arg for arg in args if arg is not type(None)]
        if len(inner) == 1 and len(args) == 2:
            return _optional(build(inner[0]), _exact(inner[0]))
    elif origin is list:
        if decoding and dataclasses.is_dataclass(args[0]):
            return _records_from_wire(list, args[0], lenient)
        return _sequence(list, list, build(args[0]), _unconverted(args[0]))
    elif origin is tuple:
        kind, made = (list, tuple) if decoding else (tuple, list)
        if len(args) == 2 and args[1] is Ellipsis:
            if decoding and dataclasses.is_dataclass(args[0]):
                return _records_from_wire(tuple, args[0], lenient)
            return _sequence(kind, made, build(args[0]), _unconverted(args[0]))
        return _fixed(kind, made, tuple(build(arg) for arg in args))
    elif origin is dict and _plain(args[0]) in (int, str):
        return _mapping(build(args[0]), build(args[1]))
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum_from_wire(hint) if decoding else _enum_to_wire(hint)
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _record_from_wire(hint, lenient) if decoding else _record_to_wire(hint)
    raise TypeError(f"The codec has no wire form for {hint!r}")


# The converter of a nested class is looked up at call time, so that a class may contain itself.


def _record_from_wire(cls: Any, lenient: bool) -> _Convert:
    return lambda value: _decoder(cls, lenient)(value)


def _record_to_wire(cls: Any) -> _Convert:
    def convert(value: Any) -> Any:
        if type(value) is not cls:
            raise _Mismatch(f"expected {cls.__name__}, got {_show(value)}")
        return value

    return convert


def _inner_to_wire(value: Any) -> dict[str, Any]:
    # What msgpack has no form for itself; only records get here.
    kind: Any = type(value)
    wire: dict[str, Any] = _encoder(kind)(value)
    return wire


@functools.cache
def _encoder(cls: Any) -> _Convert:
    hints = typing.get_type_hints(cls)
    plan = [
        (field.name, _exact(hints[field.name]),
         _build(hints[field.name], decoding=False, lenient=False))
        for field in dataclasses.fields(cls)
    ]

    def convert(obj: Any) -> dict[str, Any]:
        wire = {}
        name = ""
        try:
            for name, exact, to_wire in plan:
                value = getattr(obj, name)
                wire[name] = value if type(value) is exact else to_wire(value)
        except _Mismatch as err:
            raise LocalProtocolError(f"{cls.__name__}.{name}: {err}") from err
        return wire

    return convert


@functools.cache
def _decoder(cls: Any, lenient: bool) -> _Convert:
    hints = typing.get_type_hints(cls)
    plan = [
        (field.name, _exact(hints[field.name]),
         _build(hints[field.name], decoding=True, lenient=lenient),
         field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING)
        for field in dataclasses.fields(cls)
    ]
    names = frozenset(name for name, *_ in plan)

    def convert(wire: Any) -> Any:
        if type(wire) is not dict:
            raise _Mismatch(f"expected a map for {cls.__name__}, got {_show(wire)}")
        if not names.issuperset(wire):
            unknown = [name for name in wire if name not in names]
            if not lenient:
                raise RemoteProtocolError(f"{cls.__name__}.{_show(unknown[0])}: unknown field")
            for name in unknown:
                del wire[name]
        name = ""
        try:
            # Converted in place: nobody else holds the map.
            for name, exact, from_wire, required in plan:
                if name in wire:
                    value = wire[name]
                    if type(value) is not exact:
                        wire[name] = from_wire(value)
                elif required:
                    raise _Mismatch("field is missing")
        except _Mismatch as err:
            raise RemoteProtocolError(f"{cls.__name__}.{name}: {err}") from err
        try:
            return cls(**wire)
        except _CHECK_ERRORS as err:
            raise RemoteProtocolError(f"{cls.__name__}: {err}") from err

    return convert

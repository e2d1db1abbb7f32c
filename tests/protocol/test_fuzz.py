"""Garbage: whatever the bytes, only RemoteProtocolError leaves the decoders and the session.

Four kinds of garbage, from outside in: random bytes, real bytes with a few changed, random values
in a valid frame and message, and real messages in random order. Seeded or hypothesis' own; each a
second or two.
"""

from __future__ import annotations

import dataclasses
import enum
import random
import typing
from collections.abc import Callable, Hashable
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import sections, state
from protocol.errors import RemoteProtocolError
from protocol.framing import FrameDecoder, FrameType, encode_frame
from protocol.messages import StateSection, decode_message
from protocol.pages import PageBatch, parse_batch
from protocol.session import Role, Session
from tests.protocol.samples import BATCHES, MESSAGES, RECORDED, VECTORS, frame_of

state.load_all()

STREAM = VECTORS["v1_image"]
EVERYTHING = b"".join(VECTORS.values())
FEW = settings(max_examples=300, deadline=None, derandomize=True, database=None)


def swallow(data: bytes, *, role: Role = Role.DESTINATION, recorded: bool = False) -> int:
    """Take `data` in as an agent would; return how many frames made sense."""
    decoder = FrameDecoder()
    session = Session(role, recorded=recorded)
    nr_frames = 0
    try:
        decoder.receive_data(data)
        while (frame := decoder.next_frame()) is not None:
            if frame.type is FrameType.PAGES:
                session.page_batch_received(parse_batch(frame.payload))
            else:
                message = decode_message(frame.payload)
                session.receive(message)
                if isinstance(message, StateSection):
                    sections.decode_section(message)
            nr_frames += 1
        decoder.end_of_stream()
    except RemoteProtocolError:
        pass
    return nr_frames


def parsers() -> list[Callable[[bytes], object]]:
    return [swallow, decode_message, parse_batch, *map(section_parser, state.KINDS)]


def section_parser(kind: str) -> Callable[[bytes], object]:
    def parse(body: bytes) -> object:
        known = state.KINDS[kind]
        return sections.decode_section(
            StateSection(
                kind=kind,
                version_id=known.version_id,
                minimum_version_id=known.minimum_version_id,
                required=True,
                owner_id=1,
                body=body,
            )
        )

    return parse


def only_remote_errors(parse: Callable[[bytes], object], data: bytes) -> None:
    try:
        parse(data)
    except RemoteProtocolError:
        pass


@FEW
@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    for parse in parsers():
        only_remote_errors(parse, data)


@FEW
@given(st.integers(0, 255), st.binary(max_size=100))
def test_random_bytes_behind_a_tag(tag: int, data: bytes) -> None:
    only_remote_errors(decode_message, bytes((tag,)) + data)


@pytest.mark.parametrize("seed", range(4))
def test_real_streams_with_a_few_bytes_changed(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(250):
        broken = bytearray(rng.choice((STREAM, EVERYTHING, *VECTORS.values())))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(broken))
            match rng.randrange(4):
                case 0:
                    broken[at] = rng.randrange(256)
                case 1:
                    broken[at] ^= 1 << rng.randrange(8)
                case 2:
                    del broken[at : at + rng.randint(1, 9)]
                case 3:
                    broken[at:at] = rng.randbytes(rng.randint(1, 9))
            if not broken:
                break
        swallow(bytes(broken), recorded=True)
        swallow(bytes(broken), role=Role.SOURCE)


def test_every_single_bit_flipped_in_every_small_sample() -> None:
    for sample in (*MESSAGES.values(), BATCHES["zero"], BATCHES["absent"]):
        data = bytearray(frame_of(sample))
        parse = parse_batch if isinstance(sample, PageBatch) else decode_message
        for bit in range(64, 8 * len(data)):
            data[bit // 8] ^= 1 << bit % 8
            only_remote_errors(parse, bytes(data[8:]))
            data[bit // 8] ^= 1 << bit % 8


def any_value(rng: random.Random, depth: int = 3) -> Any:
    """A random msgpack value, rather often of the kind and size that is nearly right."""
    match rng.randrange(9 if depth else 7):
        case 0:
            return rng.choice((None, True, False))
        case 1 | 2:
            return rng.choice((-(2**63), -1, 0, 1, 2, 4096, 2**32, 2**63, 2**64 - 1))
        case 3:
            return rng.choice((0.0, -1.5, 1e300, float("nan"), float("inf")))
        case 4:
            return rng.choice(("", "a", "\0", "\udcff", "x" * 100, "committed"))
        case 5 | 6:
            return rng.randbytes(rng.choice((0, 1, 8, 128, 216, 4096)))
        case 7:
            return [any_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    keys: tuple[object, ...] = ("", "name", 0, 7, 2**64 - 1, b"x", None)
    return {key: any_value(rng, depth - 1) for key in rng.sample(keys, rng.randint(0, 3))}


def near_value(rng: random.Random, hint: Any, depth: int = 4) -> Any:
    """A random value of the type `hint`, now and then of another, to get behind the type checks."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if not depth or rng.random() < 0.03:
        return any_value(rng)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return {name: near_value(rng, part, depth - 1) for name, part in hints.items()}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return rng.choice(list(hint)).value
    if origin is list or (origin is tuple and args[-1] is ...):
        return [near_value(rng, args[0], depth - 1) for _ in range(rng.randint(0, 3))]
    if origin is tuple:
        return [near_value(rng, part, depth - 1) for part in args]
    if origin is dict:
        key = near_value(rng, args[0], 1)
        return {key if isinstance(key, Hashable) else 0: near_value(rng, args[1], depth - 1)}
    if args:
        return near_value(rng, rng.choice(args), depth)
    hint = getattr(hint, "__supertype__", hint)
    fitting = [value for value in (any_value(rng, 0) for _ in range(12)) if type(value) is hint]
    return fitting[0] if fitting else any_value(rng)


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_random_values_in_the_fields_of_real_messages(name: str) -> None:
    rng = random.Random(name)
    payload = frame_of(MESSAGES[name])[8:]
    for _ in range(100):
        fields: dict[str, Any] = msgpack.unpackb(payload[1:])
        for field in rng.sample(sorted(fields), min(len(fields), rng.randint(1, 2))):
            fields[field] = any_value(rng)
        broken = msgpack.packb(fields, unicode_errors="surrogateescape")
        only_remote_errors(decode_message, payload[:1] + broken)


@pytest.mark.parametrize("kind", sorted(state.KINDS))
def test_random_values_in_the_fields_of_every_section(kind: str) -> None:
    rng = random.Random(kind)
    parse = section_parser(kind)
    for _ in range(100):
        value = near_value(rng, state.KINDS[kind].wire)
        only_remote_errors(parse, msgpack.packb(value, unicode_errors="surrogateescape"))


@pytest.mark.parametrize("role", Role)
def test_real_messages_in_random_order(role: Role) -> None:
    rng = random.Random(7)
    frames = [frame_of(item) for item in (*RECORDED, *MESSAGES.values(), *BATCHES.values())]
    for _ in range(200):
        swallow(b"".join(rng.sample(frames, 12)), role=role)
        swallow(frames[0] + b"".join(rng.choices(frames, k=12)), role=role, recorded=True)


def test_the_unbroken_stream_is_swallowed_whole() -> None:
    # The kind of the sample's sections is not a real one: swallow() stops at the first.
    plain = [item for item in RECORDED if not isinstance(item, StateSection)]
    assert swallow(b"".join(map(frame_of, plain[:-2])), recorded=True) == len(plain) - 2


def test_frame_with_garbage_is_cut_out_whole() -> None:
    rng = random.Random(3)
    for _ in range(50):
        garbage = rng.randbytes(rng.randint(0, 300))
        decoder = FrameDecoder()
        decoder.receive_data(b"".join(encode_frame(FrameType.CONTROL, garbage)))
        frame = decoder.next_frame()
        assert frame is not None and frame.payload == garbage

"""Golden bytes: what today's code writes and reads is what every build of version 1 does.

A failure here means peers and images in the world would no longer understand us. Do not edit a
vector: add a protocol version.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.framing import FrameDecoder, FrameType
from protocol.messages import Message, decode_message
from protocol.pages import PageBatch, parse_batch
from tests.protocol.samples import BATCHES, MESSAGES, RECORDED, VECTORS

DIRECTORY = Path(__file__).parent / "vectors"

EXPECTED: dict[str, list[Message | PageBatch]] = {
    **{f"v1_{name}": [message] for name, message in MESSAGES.items()},
    **{f"v1_pages_{name}": [batch] for name, batch in BATCHES.items()},
    "v1_image": RECORDED,
}


def golden(name: str) -> bytes:
    return bytes.fromhex((DIRECTORY / f"{name}.hex").read_text(encoding="ascii"))


def test_every_vector_has_a_sample_and_the_other_way_round() -> None:
    assert {path.stem for path in DIRECTORY.glob("*.hex")} == set(VECTORS) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_bytes_are_what_we_write(name: str) -> None:
    assert VECTORS[name] == golden(name)


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_bytes_are_read_as_they_were_meant(name: str) -> None:
    decoder = FrameDecoder()
    decoder.receive_data(golden(name))
    got: list[Message | PageBatch] = []
    while (frame := decoder.next_frame()) is not None:
        parse = parse_batch if frame.type is FrameType.PAGES else decode_message
        got.append(parse(frame.payload))
    decoder.end_of_stream()
    assert got == EXPECTED[name]

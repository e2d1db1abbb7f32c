"""tools/decode_stream.py shows a recorded stream, and where a broken one stops making sense."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.protocol.samples import RECORDED, VECTORS

PROGRAM = Path(__file__).resolve().parents[2] / "tools" / "decode_stream.py"
IMAGE = VECTORS["v1_image"]


def decode(data: bytes, *options: str) -> tuple[int, list[dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *options, "-"], input=data, capture_output=True, check=False
    )
    assert done.stderr == b""
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_every_frame_is_one_line() -> None:
    status, lines = decode(IMAGE, "--check")
    assert status == 0
    assert len(lines) == len(RECORDED)
    assert lines[0]["message"] == "Hello" and lines[0]["host"]["hostname"] == "alpha"
    assert lines[1]["body"] == {"x": 1}
    assert lines[4]["encoding"] == "RAW"
    assert lines[4]["ranges"][0] == "0x7f0000000000-0x7f0000001000"


@pytest.mark.parametrize("options", [[], ["--check"]])
def test_cut_stream_ends_with_an_error(options: list[str]) -> None:
    status, lines = decode(IMAGE[:-1], *options)
    assert status == 1
    assert "ends inside a frame" in lines[-1]["error"]
    assert lines[-1]["offset"] == len(IMAGE) - 10


def test_illegal_order_is_found_only_when_asked_for() -> None:
    assert decode(VECTORS["v1_commit"])[0] == 0
    status, lines = decode(VECTORS["v1_commit"], "--check")
    assert status == 1
    assert "Commit in state idle" in lines[-1]["error"]

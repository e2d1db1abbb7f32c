"""The receiver's outer loop: what ends it and what does not."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import net
from agent.address import parse_address
from agent.channel import PeerGone
from agent.errors import SetupError, TransferError
from agent.options import RecvOptions
from agent.report import Reporter
from agent.serve import serve


class Done(Exception):
    """Ends the endless loop of a test."""


def knock(path: Path, times: int) -> threading.Thread:
    def run() -> None:
        for _ in range(times):
            while True:
                try:
                    with net.connect(parse_address(f"unix:{path}")) as channel:
                        # A handler may be done, and gone, before anything was sent.
                        with contextlib.suppress(PeerGone):
                            channel.send_buffers([b"!"])
                    break
                except SetupError:
                    pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def run_serve(
    path: Path, handler: Callable[[net.Channel], int | None], *, once: bool
) -> tuple[int, list[dict[str, object]]]:
    stream = io.StringIO()
    options = RecvOptions(address=parse_address(f"unix:{path}"), once=once)
    try:
        status = serve(options, Reporter(json_stream=stream), handler)
    except Done:
        status = -1
    return status, [json.loads(line) for line in stream.getvalue().splitlines()]


def test_failed_migration_is_reported_and_the_next_one_served(tmp_path: Path) -> None:
    channels: list[net.Channel] = []

    def handler(channel: net.Channel) -> int:
        channels.append(channel)
        channel.recv_exactly_into(bytearray(1))
        if len(channels) == 1:
            raise TransferError("first")
        if len(channels) == 2:
            return 1
        raise Done

    thread = knock(tmp_path / "s", 3)
    status, events = run_serve(tmp_path / "s", handler, once=False)
    thread.join(10)
    assert status == -1
    assert [event["event"] for event in events] == ["listening", "failed"]
    assert all(channel.closed for channel in channels)


def test_once_serves_one_migration_and_passes_its_status_on(tmp_path: Path) -> None:
    answers: list[int | None] = [None, 3]
    thread = knock(tmp_path / "s", 2)
    status, _ = run_serve(tmp_path / "s", lambda channel: answers.pop(0), once=True)
    thread.join(10)
    assert (status, answers) == (3, [])


def test_once_fails_with_its_migration(tmp_path: Path) -> None:
    def handler(channel: net.Channel) -> int:
        channel.recv_exactly_into(bytearray(1))
        raise TransferError("only one")

    thread = knock(tmp_path / "s", 1)
    with pytest.raises(TransferError):
        run_serve(tmp_path / "s", handler, once=True)
    thread.join(10)


def test_image_is_served_once_without_a_listening_event(tmp_path: Path) -> None:
    path = tmp_path / "i.ferry"
    path.write_bytes(b"x")
    stream = io.StringIO()
    options = RecvOptions(address=parse_address(f"file:{path}"))
    assert serve(options, Reporter(json_stream=stream), lambda channel: None) == 0
    assert stream.getvalue() == ""


def test_port_scan_does_not_use_up_the_one_migration(tmp_path: Path) -> None:
    calls: list[net.Channel] = []

    def handler(channel: net.Channel) -> int:
        calls.append(channel)
        if len(calls) == 1:
            raise PeerGone("closed at once")
        return 0

    thread = knock(tmp_path / "s", 2)
    status, events = run_serve(tmp_path / "s", handler, once=True)
    thread.join(10)
    assert (status, len(calls)) == (0, 2)
    assert [event["event"] for event in events] == ["listening"]

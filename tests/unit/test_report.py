"""Events and texts, and that no reader can disturb a migration."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace

import pytest

from agent.errors import RefusedError, SetupError, TransferError
from agent.report import (
    CompletedReport,
    PhaseClock,
    PhaseSpan,
    Reporter,
    RoundReport,
    downtime,
    format_bytes,
    format_completed,
    format_round,
    format_seconds,
    freeze_trace,
    render_timeline,
)
from agent.types import Obstacle

ROUND = RoundReport(
    round=1,
    pages_dirty=256,
    pages_sent=250,
    pages_zero=6,
    bytes_sent=1 << 20,
    seconds=0.5,
    predicted_downtime_s=0.0123,
)
COMPLETED = CompletedReport(
    session="a" * 32,
    pid=4121,
    downtime_s=0.0121,
    downtime_basis="upper bound",
    total_s=1.5,
    tracker="scan",
    rounds=(ROUND,),
    bytes_total=1 << 20,
    pages_total=250,
    pages_zero=6,
    verified=True,
    timeline=(PhaseSpan(name="arm", start_s=0.0, end_s=1.0),),
    notes=("something",),
)
OBSTACLE = Obstacle(kind="fd", what="fd 5", detail="is a terminal", hint="close it")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def events(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_event_is_one_object_with_event_first() -> None:
    stream = io.StringIO()
    reporter = Reporter(json_stream=stream)
    reporter.listening("tcp://[::1]:7000")
    reporter.connected("unix:/x")
    reporter.phase("arm")
    reporter.round(ROUND)
    reporter.completed(COMPLETED)
    found = events(stream)
    names = [event["event"] for event in found]
    assert names == ["listening", "connected", "phase", "round", "completed"]
    assert all(next(iter(event)) == "event" for event in found)
    assert found[0]["address"] == "tcp://[::1]:7000"


def test_completed_carries_what_scripts_rely_on() -> None:
    stream = io.StringIO()
    Reporter(json_stream=stream).completed(COMPLETED)
    (event,) = events(stream)
    assert {
        "session", "pid", "downtime_s", "total_s", "tracker", "rounds", "bytes_total",
        "pages_total", "pages_zero",
    } <= set(event)  # fmt: skip
    rounds = event["rounds"]
    assert isinstance(rounds, list)
    assert {"pages_dirty", "pages_sent", "bytes_sent", "seconds"} <= set(rounds[0])


def test_completed_traces_the_freeze_in_order_of_its_phases() -> None:
    clock = PhaseClock()
    clock.add("arm", 0.0, 0.1)
    clock.add("restore: prepare threads", 0.3, 0.301, frozen=True)
    # A phase is recorded when it ends, after its steps.
    clock.add("restore: wait", 0.503, 0.5035, frozen=True)
    clock.add("restore", 0.503, 0.506, frozen=True)
    clock.add("freeze", 0.5, 0.503, frozen=True)
    stream, terminal = io.StringIO(), io.StringIO()
    report = replace(COMPLETED, timeline=clock.spans)
    Reporter(json_stream=stream, progress_stream=terminal).completed(report)
    (event,) = events(stream)
    assert event["freeze"] == [
        {"phase": "restore: prepare threads", "start_us": -200_000, "microseconds": 1000},
        {"phase": "freeze", "start_us": 0, "microseconds": 3000},
        {"phase": "restore", "start_us": 3000, "microseconds": 3000},
        {"phase": "restore: wait", "start_us": 3000, "microseconds": 500},
    ]
    assert clock.spans[-1].monotonic_ns == clock.start_ns + 500_000_000
    assert "completed: pid 4121" in terminal.getvalue()


def test_a_migration_without_a_freeze_has_an_empty_trace() -> None:
    assert freeze_trace(COMPLETED.timeline) == []


def test_failed_carries_exit_code_hint_and_obstacles() -> None:
    stream = io.StringIO()
    reporter = Reporter(json_stream=stream)
    reporter.failed(RefusedError("Refused", [OBSTACLE], hint="Try"), phase="check", session="s")
    (event,) = events(stream)
    assert (event["exit_code"], event["hint"], event["phase"]) == (4, "Try", "check")
    assert event["obstacles"] == [
        {"kind": "fd", "what": "fd 5", "detail": "is a terminal", "hint": "close it"}
    ]
    assert reporter.failed_sent


def test_any_byte_in_a_name_survives_as_json() -> None:
    stream = io.StringIO()
    Reporter(json_stream=stream).event("x", path="a\udcffb\n")
    stream.getvalue().encode("utf-8")
    assert events(stream)[0]["path"] == "a\udcffb\n"


def test_reader_that_went_away_is_forgotten() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    stream = os.fdopen(write_fd, "w")
    reporter = Reporter(json_stream=stream, progress_stream=stream)
    reporter.phase("arm")
    reporter.round(ROUND)
    assert reporter.json_stream is None
    assert reporter.progress_stream is None
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_closed_stream_is_forgotten() -> None:
    stream = io.StringIO()
    stream.close()
    reporter = Reporter(json_stream=stream)
    reporter.phase("arm")
    assert reporter.json_stream is None


def test_deferred_events_come_out_afterwards_in_order() -> None:
    stream = io.StringIO()
    reporter = Reporter(json_stream=stream)
    with pytest.raises(TransferError), reporter.deferred():
        reporter.phase("a")
        with reporter.deferred():
            reporter.phase("b")
        assert stream.getvalue() == ""
        raise TransferError("x")
    assert [event["phase"] for event in events(stream)] == ["a", "b"]


def test_progress_rewrites_its_line_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1.0]
    monkeypatch.setattr("agent.report.time.monotonic", lambda: now[0])
    terminal, plain = Terminal(), io.StringIO()
    for stream in (terminal, plain):
        reporter = Reporter(progress_stream=stream)
        for done in (100, 200, 300):
            reporter.progress(0, done << 20, 1000 << 20)
            now[0] += 0.06
        reporter.phase("switchover")
    assert terminal.getvalue() == (
        "round 0: 100.0 MiB (10 %)\r\x1b[Kround 0: 300.0 MiB (30 %)\r\x1b[Kswitchover...\n"
    )
    assert plain.getvalue() == "switchover...\n"


def test_check_prints_one_line_per_obstacle(capsys: pytest.CaptureFixture[str]) -> None:
    other = Obstacle(kind="seccomp", what="task 5", detail="filter")
    assert Reporter().checked(5, [OBSTACLE, other]) == 4
    expected = "fd: fd 5: is a terminal (close it)\nseccomp: task 5: filter\n"
    assert capsys.readouterr().out == expected
    assert Reporter().checked(5, []) == 0
    assert capsys.readouterr().out == "Process 5 can be migrated.\n"


def test_check_as_json_ends_with_completed_or_failed() -> None:
    for obstacles, last in (([OBSTACLE], "failed"), ([], "completed")):
        stream = io.StringIO()
        Reporter(json_stream=stream, progress_stream=io.StringIO()).checked(5, obstacles)
        assert events(stream)[-1]["event"] == last


def test_downtime_uses_the_destinations_clock_only_if_it_is_ours() -> None:
    times = {"frozen_ns": 1_000_000, "commit_sent_ns": 5_000_000, "resumed_received_ns": 9_000_000}
    assert downtime(**times, released_ns=7_000_000) == (0.006, "exact")
    for released in (None, 4_999_999, 9_000_001, 10**18):
        assert downtime(**times, released_ns=released) == (0.008, "upper bound")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (5e-5, "50 us"), (0.0123, "12.3 ms"), (2.5, "2.50 s")]
)
def test_seconds_for_people(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


def test_round_line_says_what_a_stop_would_cost() -> None:
    assert format_round(ROUND) == (
        "round 1: 256 dirty pages, 1.0 MiB sent in 500.0 ms (2.0 MiB/s), predicted downtime 12.3 ms"
    )


def test_summary_names_the_basis_the_verification_and_the_notes() -> None:
    lines = format_completed(COMPLETED)
    assert "downtime 12.1 ms (upper bound)" in lines[-2]
    assert "1 round, memory verified" in lines[-2]
    assert lines[-1] == "note: something"
    stream = io.StringIO()
    Reporter(progress_stream=stream).completed(COMPLETED)
    assert stream.getvalue().splitlines() == lines


def test_timeline_bars_are_to_scale_and_mark_the_freeze() -> None:
    spans = [
        PhaseSpan(name="round 0", start_s=0.0, end_s=0.5),
        PhaseSpan(name="final", start_s=0.5, end_s=1.0, frozen=True),
        PhaseSpan(name="instant", start_s=1.0, end_s=1.0),
    ]
    bars = [line.split("|")[1] for line in render_timeline(spans, width=10)]
    assert bars == ["=====     ", "     #####", "         ="]
    assert render_timeline([]) == []


def test_phase_clock_records_failed_phases_too() -> None:
    clock = PhaseClock()
    with pytest.raises(SetupError), clock.phase("arm", frozen=True):
        raise SetupError("x")
    (span,) = clock.spans
    assert span.name == "arm" and span.frozen
    assert 0 <= span.start_s <= span.end_s <= clock.elapsed_s

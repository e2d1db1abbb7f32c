"""What the user sees of a migration: events, progress and the final report.

With ``--json`` every event is one object per line, ``event`` first; each migration ends with
``completed`` or ``failed``. Progress for people goes to stderr. Reporting must never be what fails
or delays a migration: a reader that went away is forgotten, and while the target is frozen nothing
is written at all (``deferred``). Durations are seconds, instants are CLOCK_MONOTONIC nanoseconds of
this host.

*Downtime* is the time from the instant the first thread of the target is stopped for the last time
to the instant the last thread is released on the destination. It leaves out what each side cannot
know: how long the first instruction then takes to reach a cold cache, and the time a client needs
to notice. See downtime().
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO, cast

from agent.errors import MigrationError, RefusedError
from agent.types import Obstacle

PROGRESS_INTERVAL_S = 0.1
"""A terminal line is rewritten at most this often."""
TIMELINE_WIDTH = 40
"""Characters of the bars in the timeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """One finished round; ``seconds`` is scan, read and send together."""

    round: int
    pages_dirty: int
    pages_sent: int
    pages_zero: int = 0
    pages_absent: int = 0
    bytes_sent: int
    seconds: float
    predicted_downtime_s: float | None = None
    decision: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSpan:
    """One phase of the migration, relative to its start; ``frozen``: the target stood still."""

    name: str
    start_s: float
    end_s: float
    frozen: bool = False
    monotonic_ns: int = 0
    """``start_s`` on this host's CLOCK_MONOTONIC: puts both sides on one axis where they share it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletedReport:
    """The fields of the ``completed`` event. On the destination ``downtime_s`` is None: only the
    source knows when the target stopped."""

    session: str
    pid: int
    downtime_s: float | None
    downtime_basis: str = ""
    total_s: float
    tracker: str = ""
    tracker_reason: str = ""
    rounds: Sequence[RoundReport] = ()
    bytes_total: int = 0
    pages_total: int = 0
    pages_zero: int = 0
    address: str = ""
    verified: bool | None = None
    timeline: Sequence[PhaseSpan] = ()
    notes: Sequence[str] = ()


def downtime(
    *, frozen_ns: int, commit_sent_ns: int, resumed_received_ns: int, released_ns: int | None
) -> tuple[float, str]:
    """Seconds the target did not run, and how that is known.

    ``released_ns`` is the destination's own clock. It is used if it lies where it must on this
    host's clock, between the sending of COMMIT and the arrival of RESUMED ("exact": one clock, the
    same host). Otherwise the clocks differ and the arrival of RESUMED is taken ("upper bound":
    longer than the truth by the way back). Even a wrong guess is off by no more than that interval.
    """
    if released_ns is not None and commit_sent_ns <= released_ns <= resumed_received_ns:
        return (released_ns - frozen_ns) / 1e9, "exact"
    return (resumed_received_ns - frozen_ns) / 1e9, "upper bound"


class PhaseClock:
    """Records how long each phase takes."""

    def __init__(self) -> None:
        self.start_ns = time.monotonic_ns()
        self.spans: list[PhaseSpan] = []

    @property
    def elapsed_s(self) -> float:
        """Seconds since the migration began."""
        return (time.monotonic_ns() - self.start_ns) / 1e9

    @contextlib.contextmanager
    def phase(self, name: str, *, frozen: bool = False) -> Iterator[None]:
        """Time the body as one phase; it is recorded even if it fails."""
        start_s = self.elapsed_s
        try:
            yield
        finally:
            self.add(name, start_s, self.elapsed_s, frozen=frozen)

    def add(self, name: str, start_s: float, end_s: float, *, frozen: bool = False) -> None:
        """Record a phase that was timed elsewhere."""
        self.spans.append(
            PhaseSpan(
                name=name,
                start_s=start_s,
                end_s=end_s,
                frozen=frozen,
                monotonic_ns=self.start_ns + round(start_s * 1e9),
            )
        )


def freeze_trace(spans: Sequence[PhaseSpan]) -> list[dict[str, object]]:
    """What the freeze consisted of: its phases and their steps ("phase: step") by their start, in
    microseconds since the first phase began. A step that was made ahead begins before that."""
    frozen = sorted((span for span in spans if span.frozen), key=lambda span: (span.start_s, -span.end_s))
    begin_s = min((span.start_s for span in frozen if ": " not in span.name), default=0.0)
    return [
        {
            "phase": span.name,
            "start_us": round((span.start_s - begin_s) * 1e6),
            "microseconds": round((span.end_s - span.start_s) * 1e6),
        }
        for span in frozen
    ]


@dataclass(slots=True)
class Reporter:
    """Writes events of one agent. ``json_stream`` and ``progress_stream`` are None when not
    wanted."""

    json_stream: TextIO | None = None
    progress_stream: TextIO | None = None
    program: str = "agent"
    failed_sent: bool = False
    _queue: list[tuple[str, dict[str, object]]] | None = None
    _live_at: float = 0.0
    _live: bool = False
    _rewrites: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        stream = self.progress_stream
        self._rewrites = stream is not None and stream.isatty()

    # -- events ------------------------------------------------------------------------------------

    def event(self, name: str, **fields: object) -> None:
        """Report one event; values must be what JSON can hold."""
        if self._queue is not None:
            self._queue.append((name, fields))
        else:
            self._write_event(name, fields)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Keep events back until the body is done: a slow reader must not prolong the downtime."""
        if self._queue is not None:
            yield
            return
        self._queue = []
        try:
            yield
        finally:
            queue, self._queue = self._queue, None
            for name, fields in queue:
                self._write_event(name, fields)

    def listening(self, address: str) -> None:
        """The receiver is ready; ``address`` has the real port."""
        self.event("listening", address=address)

    def connected(self, peer: str, session: str = "") -> None:
        """A peer was reached, or came."""
        self.event("connected", peer=peer, session=session)

    def phase(self, name: str) -> None:
        """A phase begins: check, arm, switchover, restore..."""
        self.event("phase", phase=name)

    def round(self, report: RoundReport) -> None:
        """A round is over."""
        self.event("round", **_fields(report))

    def progress(self, round_: int, bytes_done: int, bytes_expected: int) -> None:
        """Rewrite the terminal line of a running round; cheap enough to call for every batch."""
        if not self._rewrites or self._queue is not None:
            return
        now = time.monotonic()
        if now - self._live_at < PROGRESS_INTERVAL_S:
            return
        self._live_at = now
        percent = min(99, 100 * bytes_done // bytes_expected) if bytes_expected else 0
        self._print(f"round {round_}: {format_bytes(bytes_done)} ({percent} %)", live=True)

    def completed(self, report: CompletedReport) -> None:
        """The migration is complete."""
        self.event("completed", **_fields(report), freeze=freeze_trace(report.timeline))

    def failed(self, error: BaseException, *, phase: str = "", session: str = "") -> None:
        """The migration failed, or was refused; written once per migration."""
        code, hint = 1, ""
        if isinstance(error, MigrationError):
            code, hint = error.exit_code, error.hint
        obstacles = error.obstacles if isinstance(error, RefusedError) else ()
        self.failed_sent = True
        self.event(
            "failed",
            session=session,
            phase=phase,
            error=type(error).__name__,
            message=error_text(error),
            hint=hint,
            exit_code=code,
            obstacles=[obstacle._asdict() for obstacle in obstacles],
        )

    def checked(self, pid: int, obstacles: Sequence[Obstacle]) -> int:
        """The outcome of ``--check``: one line per obstacle on stdout. Returns the exit status."""
        stream = sys.stdout if self.json_stream is None else None
        for obstacle in obstacles:
            self.event("obstacle", **obstacle._asdict())
            _write_line(stream, str(obstacle))
        if not obstacles:
            _write_line(stream, f"Process {pid} can be migrated.")
            self.event("completed", pid=pid, obstacles=0)
            return 0
        plural = "" if len(obstacles) == 1 else "s"
        error = RefusedError(
            f"Process {pid} cannot be migrated: {len(obstacles)} obstacle{plural}", obstacles
        )
        self.failed(error, phase="check")
        return error.exit_code

    # -- output ------------------------------------------------------------------------------------

    def _write_event(self, name: str, fields: dict[str, object]) -> None:
        if self.json_stream is not None:
            line = json.dumps({"event": name, **fields}, ensure_ascii=False, default=str)
            if not _write_line(self.json_stream, line):
                self.json_stream = None
        if self.progress_stream is not None:
            for text in _progress_lines(name, fields):
                self._print(text)

    def _print(self, text: str, *, live: bool = False) -> None:
        prefix = "\r\x1b[K" if self._live else ""
        self._live = live
        stream = self.progress_stream
        if stream is not None and not _write_line(stream, prefix + text, end="" if live else "\n"):
            self.progress_stream = None
            self._rewrites = False


def _write_line(stream: TextIO | None, text: str, *, end: str = "\n") -> bool:
    if stream is None:
        return True
    try:
        # Names of the target (paths, comm) may hold any byte.
        stream.write(text.encode("utf-8", "backslashreplace").decode() + end)
        stream.flush()
    except (OSError, ValueError):
        return False
    return True


def _fields(record: RoundReport | CompletedReport) -> dict[str, object]:
    return asdict(record)


def error_text(error: BaseException) -> str:
    """The message of an error; one that is not ours also names its type."""
    if isinstance(error, MigrationError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "Interrupted"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# -- text for people -------------------------------------------------------------------------------


def format_bytes(count: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def format_seconds(seconds: float | None) -> str:
    """``0.0123`` -> ``12.3 ms``; None, which is not known, is ``?``."""
    if seconds is None:
        return "?"
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s"


def format_round(report: RoundReport) -> str:
    """One line for a round: what was dirty, what was sent, how fast, what a stop now would cost."""
    rate = report.bytes_sent / report.seconds if report.seconds > 0 else 0.0
    text = (
        f"round {report.round}: {report.pages_dirty} dirty pages, "
        f"{format_bytes(report.bytes_sent)} sent "
        f"in {format_seconds(report.seconds)} ({format_bytes(rate)}/s)"
    )
    if report.predicted_downtime_s is not None:
        text += f", predicted downtime {format_seconds(report.predicted_downtime_s)}"
    return text


def render_timeline(spans: Sequence[PhaseSpan], *, width: int = TIMELINE_WIDTH) -> list[str]:
    """The phases as bars on a common axis: ``=`` the target ran, ``#`` it was frozen."""
    if not spans:
        return []
    start = min(span.start_s for span in spans)
    total = max(span.end_s for span in spans) - start or 1e-9
    label = max(len(span.name) for span in spans)
    lines = []
    for span in spans:
        first = min(width - 1, int((span.start_s - start) / total * width))
        length = max(1, min(width - first, round((span.end_s - span.start_s) / total * width)))
        bar = " " * first + ("#" if span.frozen else "=") * length
        took = format_seconds(span.end_s - span.start_s)
        lines.append(f"  {span.name:<{label}}  {took:>9}  |{bar:<{width}}|")
    return lines


def format_completed(report: CompletedReport) -> list[str]:
    """The summary of a finished migration with its timeline."""
    pages = f"{report.pages_total} pages ({report.pages_zero} zero)"
    nr_rounds = len(report.rounds)
    lines = render_timeline(report.timeline)
    lines.append(
        f"completed: pid {report.pid}, downtime {format_seconds(report.downtime_s)}"
        + (f" ({report.downtime_basis})" if report.downtime_basis not in ("", "exact") else "")
        + f", total {format_seconds(report.total_s)}, {format_bytes(report.bytes_total)}, {pages}, "
        + f"{nr_rounds} round{'' if nr_rounds == 1 else 's'}"
        + (", memory verified" if report.verified else "")
    )
    lines.extend(f"note: {note}" for note in report.notes)
    return lines


def _progress_lines(name: str, fields: dict[str, object]) -> list[str]:
    if name == "listening":
        return [f"listening on {fields['address']}"]
    if name == "connected":
        return [f"connected: {fields['peer']}"]
    if name == "phase":
        return [f"{fields['phase']}..."]
    if name == "round":
        return [format_round(RoundReport(**cast("dict[str, Any]", fields)))]
    if name == "completed" and "total_s" in fields:
        known = {key: value for key, value in fields.items() if key != "freeze"}
        spans = cast("list[dict[str, Any]]", known.pop("timeline", []))
        timeline = [PhaseSpan(**span) for span in spans]
        return format_completed(CompletedReport(**cast("dict[str, Any]", known), timeline=timeline))
    # "failed" and obstacles are printed by the command line, once, whether or not progress is
    # shown.
    return []

"""Measures how fast a process writes to its memory, before anyone migrates it, and foretells the migration.

Usage: tools/dirtyrate PID [--seconds S] [--interval S] [--bandwidth BYTES/S]... [--json]

What QEMU's calc-dirty-rate does for a virtual machine, for a process: its memory is watched for --seconds (default 5)
and looked at every --interval (default 0.25). Shown are
- dirty pages per second over time. A page that is written many times within an interval counts once, so shorter
  intervals give higher rates; the working set table says how many different pages are written within longer ones;
- the hottest ranges: address, mapping, share of all page writes, and how much of it is dirty after an interval;
- for each --bandwidth (default: 1 and 10 Gbit/s) what agent-send's own policy would do: rounds, downtime, total time.
  Every page counts 4096 bytes, although zero pages cost nothing and others may compress.

The process is watched as agent-send --tracker scan watches it: one thread is stopped for some milliseconds at the
start, and the first write to a page in each interval costs it about a microsecond. Afterwards it is as it was, also
when this program is killed. Needs what agent-send needs: root, or CAP_SYS_PTRACE. Children are processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agent import restart_hints  # noqa: E402 - needs the repository on the path
from agent.errors import MigrationError, SetupError  # noqa: E402
from agent.kernel.features import kernel_features  # noqa: E402
from agent.options import DEFAULT_DOWNTIME_LIMIT_S  # noqa: E402
from agent.pages.extents import shared_extents  # noqa: E402
from agent.policy import PolicyLimits  # noqa: E402
from agent.procfs.maps import MapsEntry  # noqa: E402
from agent.ranges import RangeSet  # noqa: E402
from agent.tracker.base import DirtySet, SharedKey, Tracker  # noqa: E402
from agent.tracker.choose import choose_tracker  # noqa: E402
from agent.tracker.create import create_tracker  # noqa: E402
from agent.tracker.layout import is_shared_object, shared_key  # noqa: E402
from agent.types import PAGE_SIZE  # noqa: E402
from tools.dirtyrate_analysis import (  # noqa: E402
    HotRange,
    Look,
    Prediction,
    WorkingSet,
    WorkingSetCurve,
    hot_ranges,
    predict,
    working_sets,
)

BANDWIDTHS = (125_000_000, 1_250_000_000)
"""1 and 10 Gbit/s."""
SUFFIXES = {"K": 10**3, "M": 10**6, "G": 10**9}
BARS = "▁▂▃▄▅▆▇█"
NR_HOT_RANGES = 10


@dataclass(slots=True)
class Measurement:
    """What was seen. `began_ns` and `ended_ns` are CLOCK_REALTIME, between them lie the looks."""

    pid: int
    nr_pages: int = 0
    began_ns: int = 0
    ended_ns: int = 0
    look_s: float = 0.0
    """Time spent looking."""
    looks: list[Look] = field(default_factory=list)
    maps: list[MapsEntry] = field(default_factory=list)


@contextlib.contextmanager
def armed(pid: int) -> Iterator[Tracker]:
    """Watch a process for as long as the body runs.

    :raises MigrationError: there is no such process, or it cannot be watched.
    """
    name = choose_tracker("scan", kernel_features()).name
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as err:
        raise SetupError(f"Cannot watch process {pid}: {err.strerror}") from err
    try:
        restart_hints.load("", pid)
        tracker = create_tracker(name, pid, pidfd)
        try:
            tracker.arm()
            yield tracker
        finally:
            tracker.disarm()
            restart_hints.save("", pid)
    finally:
        os.close(pidfd)


def measure(pid: int, seconds: float, interval_s: float) -> Measurement:
    """Look at process `pid` every `interval_s` for `seconds`.

    :raises MigrationError: as armed(), or it exited.
    """
    made = Measurement(pid)
    with armed(pid) as tracker:
        made.nr_pages = all_pages(tracker, tracker.collect(final=False)).nr_pages
        began = previous = time.monotonic()
        made.began_ns = time.time_ns()
        while previous < began + seconds:
            time.sleep(max(began + (len(made.looks) + 1) * interval_s - time.monotonic(), 0.0))
            now = time.monotonic()
            made.ended_ns = time.time_ns()
            dirty = tracker.collect(final=False)
            made.looks.append(Look(now - began, now - previous, all_pages(tracker, dirty)))
            made.look_s += time.monotonic() - now
            made.maps = dirty.maps
            previous = now
    return made


def all_pages(tracker: Tracker, dirty: DirtySet) -> RangeSet:
    """Return the addresses of all dirty pages; those of shared objects where the object is mapped first."""
    pages = dirty.pages.copy()
    seen: set[SharedKey] = set()
    for entry in dirty.maps if dirty.shared else ():
        key = shared_key(entry) if is_shared_object(entry) else None
        if key is None or key in seen or key not in dirty.shared:
            continue
        seen.add(key)
        offsets = dirty.shared[key]
        if offsets is None:  # all of it would have to be sent again
            fd = tracker.shared_watch.fd_of(key)
            offsets = shared_extents(fd) if fd is not None else RangeSet()
        inside = offsets.clip(entry.offset, entry.offset + entry.end - entry.start)
        pages.update(RangeSet(map((entry.start - entry.offset).__add__, inside.pairs)))
    return pages


def analyse(measured: Measurement, bandwidths: Sequence[float], limits: PolicyLimits) -> dict[str, Any]:
    """Return all that is to be said, ready for JSON."""
    sets = working_sets(measured.looks)
    curve = WorkingSetCurve(sets, measured.nr_pages)
    rates = [look.pages.nr_pages / look.seconds for look in measured.looks]
    return {
        "pid": measured.pid,
        "pages_populated": measured.nr_pages,
        "began_ns": measured.began_ns,
        "ended_ns": measured.ended_ns,
        "look_s": measured.look_s,
        "dirty_pages": sum(look.pages.nr_pages for look in measured.looks),
        "dirty_pages_per_s": {"mean": sum(rates) / len(rates), "min": min(rates), "max": max(rates)},
        "looks": [
            {"at_s": look.at_s, "seconds": look.seconds, "pages": look.pages.nr_pages}
            for look in measured.looks
        ],
        "working_set": [asdict(found) for found in sets],
        "hot_ranges": [asdict(hot) for hot in hot_ranges(measured.looks, measured.maps, NR_HOT_RANGES)],
        "predictions": [
            asdict(predict(curve, measured.nr_pages, speed, limits)) for speed in bandwidths
        ],
    }


# Text


def size_text(nr_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if nr_bytes < 1024:
            break
        nr_bytes /= 1024
    else:
        unit = "TiB"
    return f"{nr_bytes:.0f} {unit}" if unit == "bytes" else f"{nr_bytes:.1f} {unit}"


def time_text(seconds: float) -> str:
    """0.0123 -> "12 ms"."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def report(measured: Measurement, result: dict[str, Any]) -> str:
    """Return the text for people."""
    rates = result["dirty_pages_per_s"]
    looks = [look.pages.nr_pages / look.seconds for look in measured.looks]
    top = max(looks) or 1.0
    bars = "".join(BARS[min(int(rate / top * len(BARS)), len(BARS) - 1)] for rate in looks)
    lines = [
        f"Process {measured.pid}: {size_text(measured.nr_pages * PAGE_SIZE)} populated, {len(looks)} looks in "
        f"{measured.looks[-1].at_s:.1f} s ({time_text(measured.look_s)} spent looking)",
        "",
        f"Dirty pages/s: mean {rates['mean']:.0f}, least {rates['min']:.0f}, most {rates['max']:.0f} "
        f"({size_text(rates['mean'] * PAGE_SIZE)}/s)",
        f"over time, up to {top:.0f}/s: {bars}",
        "",
        "Written within      different pages (mean, most)",
    ]
    lines += [
        f"{time_text(one.seconds):>14}      {one.pages_mean:>10.0f} {one.pages_max:>10} "
        f"{size_text(one.pages_mean * PAGE_SIZE):>12}"
        for one in (WorkingSet(**values) for values in result["working_set"])
    ]
    lines += ["", "Hottest ranges                       size   share   dirty   mapping"]
    lines += [
        f"{hot.start:#014x}-{hot.end:#014x} {size_text(hot.end - hot.start):>11} {hot.share:>6.1%} "
        f"{hot.density:>7.1%}   {hot.name}"
        for hot in (HotRange(**values) for values in result["hot_ranges"])
    ]
    lines += ["(share of all page writes seen; dirty: part of it that is written within one interval)", ""]
    for values in result["predictions"]:
        lines += prediction_lines(Prediction(**values))
    return "\n".join(lines)


def prediction_lines(made: Prediction) -> list[str]:
    """Say how a migration would go."""
    rounds: list[Any] = made.rounds
    sizes = ", ".join(size_text(one["pages_dirty"] * PAGE_SIZE) for one in rounds[:6])
    more = f" and {len(rounds) - 6} more" if len(rounds) > 6 else ""
    lines = [
        f"At {made.bandwidth_bytes_per_s / 1e6:.0f} MB/s: downtime {time_text(made.downtime_s)}, "
        f"total {time_text(made.total_s)}, {size_text(made.bytes_total)} in {len(rounds)} rounds ({sizes}{more})",
        f"    {made.action}: {made.reason}",
    ]
    if made.extrapolated:
        lines.append("    (some rounds are longer than this measurement: extrapolated)")
    return lines


def bandwidth(text: str) -> float:
    """Parse bytes per second, with K, M or G for powers of 1000."""
    factor = SUFFIXES.get(text[-1:].upper(), 1)
    try:
        value = float(text[:-1] if factor > 1 else text) * factor
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"not a number of bytes per second: {text}") from err
    if not value >= 1:
        raise argparse.ArgumentTypeError("must be at least 1 byte per second")
    return value


def positive(text: str) -> float:
    """Parse seconds above 0."""
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError("must be more than 0 seconds")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="dirtyrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pid", type=int)
    parser.add_argument("--seconds", type=positive, default=5.0, help="how long to watch")
    parser.add_argument("--interval", type=positive, default=0.25, help="seconds between looks")
    parser.add_argument(
        "--bandwidth",
        type=bandwidth,
        action="append",
        metavar="BYTES/S",
        help="of the link; K, M and G for powers of 1000; may be given several times",
    )
    parser.add_argument(
        "--downtime-limit",
        type=positive,
        default=DEFAULT_DOWNTIME_LIMIT_S * 1e3,
        metavar="MS",
        help="as of agent-send",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # leaves through armed()
    try:
        measured = measure(options.pid, options.seconds, options.interval)
    except MigrationError as err:
        print(f"dirtyrate: {err}", f"({err.hint})" if err.hint else "", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        return 130
    limits = PolicyLimits(downtime_limit_s=options.downtime_limit / 1e3)
    result = analyse(measured, options.bandwidth or BANDWIDTHS, limits)
    print(json.dumps(result) if options.json else report(measured, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

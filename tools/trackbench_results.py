"""From the records of tools/trackbench to tables, charts and findings.

What a tracker costs is the difference to `none` in the same repetition; what is shown is the median over repetitions.
Ratios and differences of one run are meant, never figures of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from agent.types import PAGE_SIZE

Record = dict[str, Any]
GIB = 1 << 30
MIB = 1 << 20
FLOOR = "none"
WIDE = 8
"""Sizes must differ by this much, and reach a GiB, before a slope is more than noise."""
NO_TIME = 1e-9
"""Below a nanosecond nothing was measured."""

_PARAMETERS = ("experiment", "workload", "pages", "bytes", "share", "event", "capacity")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text; the first column names the row."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over a numeric axis, or bars over named groups (then x are positions in `groups`)."""

    title: str
    note: str
    x_label: str
    y_label: str
    series: dict[str, list[tuple[float, float]]]
    groups: list[str] = field(default_factory=list)
    log_x: bool = True
    log_y: bool = True
    x_bytes: bool = False


Value = Callable[[Record], float]


def add_floor(records: Iterable[Record]) -> list[Record]:
    """Give each record the one of `none` that it is compared with, as `floor`."""
    records = list(records)
    floors = {_key(one): one for one in records if one["variant"] == FLOOR}
    return [{**one, "floor": floors.get(_key(one), {})} for one in records]


def _key(record: Record) -> tuple[object, ...]:
    # The floor of log-capacity has no capacity.
    return (
        record["repetition"],
        *(record.get(name) for name in _PARAMETERS if name != "capacity"),
    )


class Results:
    """The records of one run, with their floors."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = add_floor(records)
        self.variants = list(dict.fromkeys(one["variant"] for one in self.records))
        self.trackers = [name for name in self.variants if name != FLOOR]

    def where(self, **wanted: object) -> list[Record]:
        """Return the records with these values."""
        return [one for one in self.records if all(one.get(k) == v for k, v in wanted.items())]

    def values(self, name: str, **wanted: object) -> list[Any]:
        """Return the different values of a parameter, in the order they came."""
        return list(dict.fromkeys(one[name] for one in self.where(**wanted) if name in one))

    def median(self, value: Value, **wanted: object) -> float | None:
        """Return the median of a value over repetitions; None if nothing was measured."""
        found = [value(one) for one in self.where(**wanted)]
        return median(found) if found else None

    # Tables

    def tables(self) -> list[Table]:
        """Return all tables for which there are records."""
        made = [
            *(self.first_write_waits(), self.first_write_cpu(), self.latencies()),
            *(self.round_by_size(), self.memory_by_size(), self.cost_by_share()),
            *(self.events(), self.running(), self.log_capacity()),
        ]
        return [table for table in made if table.rows and len(table.columns) > 1]

    def _by_variant(
        self,
        title: str,
        note: str,
        columns: Sequence[tuple[str, dict[str, object]]],
        value: Value,
        variants: Sequence[str],
        text: Callable[[float], str] = lambda value: significant(value),
    ) -> Table:
        rows: list[list[str]] = []
        for name in variants:
            cells = [self.median(value, variant=name, **wanted) for _, wanted in columns]
            if any(cell is not None for cell in cells):
                rows.append([name, *("-" if cell is None else text(cell) for cell in cells)])
        return Table(title, note, ["tracker", *(label for label, _ in columns)], rows)

    def _first_write_columns(self) -> list[tuple[str, dict[str, object]]]:
        return [
            (f"{workload}, {pages}", {"experiment": "first-write", "workload": workload, "pages": pages})
            for pages in self.values("pages", experiment="first-write")
            for workload in self.values("workload", experiment="first-write", pages=pages)
        ]

    def first_write_waits(self) -> Table:
        return self._by_variant(
            "First write to a page in a round: the writer waits (µs)",
            "Median of single writes, wall clock; none: the write itself and the clock; others: what the tracker adds.",
            self._first_write_columns(),
            lambda r: _extra_us(r) if r["variant"] != FLOOR else r["p50_ns"] / 1e3,
            self.variants,
        )

    def first_write_cpu(self) -> Table:
        return self._by_variant(
            "CPU time of all parties for each page written in a round (µs)",
            "Writer beyond its floor, agent and its reader, the look at the end of the round included.",
            self._first_write_columns(),
            _all_cpu_us,
            self.trackers,
        )

    def latencies(self) -> Table:
        names = ("p50", "p99", "p99.9", "max")
        wanted: dict[str, object] = {"experiment": "first-write", "workload": "sparse", "pages": "4 KiB"}
        rows = []
        for name in self.variants:
            cells = [
                self.median(lambda r, n=part: r[f"{n}_ns"] / 1e3, variant=name, **wanted)  # type: ignore[misc]
                for part in names
            ]
            rows.append([name, *("-" if cell is None else significant(cell) for cell in cells)])
        return Table(
            "Latency of first writes, sparse, 4 KiB pages (µs)",
            "Wall clock, nothing subtracted: what the machine's other load does shows in `none` as well.",
            ["tracker", *names],
            rows if self.where(**wanted) else [],
        )

    def _size_columns(self) -> list[tuple[str, dict[str, object]]]:
        return [
            (bytes_text(size), {"experiment": "memory-size", "bytes": size})
            for size in self.values("bytes", experiment="memory-size")
        ]

    def round_by_size(self) -> Table:
        some = self.where(experiment="memory-size")
        pages = some[0]["pages_written"] if some else 0
        return self._by_variant(
            f"CPU time of a round by memory size, {pages} dirty pages (ms)",
            "Agent and its reader, from one look to the next.",
            self._size_columns(),
            lambda r: r["agent_cpu_s"] * 1e3,
            self.trackers,
        )

    def memory_by_size(self) -> Table:
        return self._by_variant(
            "Memory that tracking takes in the agent, by memory size (MiB)",
            "Proportional set size of the agent and its reader, beyond what they had before.",
            self._size_columns(),
            lambda r: r["agent_bytes"] / MIB,
            self.trackers,
        )

    def cost_by_share(self) -> Table:
        return self._by_variant(
            "CPU time of all parties for each page written, by how much of the memory is dirty (µs)",
            "Writer beyond its floor, agent and its reader.",
            [
                (share_text(share), {"experiment": "dirty-share", "share": share})
                for share in self.values("share", experiment="dirty-share")
            ],
            _all_cpu_us,
            self.trackers,
        )

    def events(self) -> Table:
        return self._by_variant(
            "One change of mappings: the process waits (µs)",
            "Median of single calls, wall clock, nothing subtracted. Areas of 64 KiB.",
            [
                (event, {"experiment": "events", "event": event})
                for event in self.values("event", experiment="events")
            ],
            lambda r: r["p50_ns"] / 1e3,
            self.variants,
        )

    def running(self) -> Table:
        columns: list[tuple[str, Callable[[float], str], Value]] = [
            ("slowdown", ratio_text, _slowdown),
            ("p50 µs", significant, lambda r: r["p50_ns"] / 1e3),
            ("p99 µs", significant, lambda r: r["p99_ns"] / 1e3),
            ("p99.9 µs", significant, lambda r: r["p99.9_ns"] / 1e3),
            ("max µs", significant, lambda r: r["max_ns"] / 1e3),
            ("rounds", significant, lambda r: r["rounds"]),
            ("round ms", significant, lambda r: r["round_s"] / r["rounds"] * 1e3),
            ("MiB/round", significant, lambda r: r["bytes_reported"] / r["rounds"] / MIB),
            ("needless", percent_text, _needless),
            ("stalls", significant, lambda r: r["stalls"]),
        ]
        rows = []
        for workload in self.values("workload", experiment="running"):
            for name in self.variants:
                wanted: dict[str, object] = {"experiment": "running", "workload": workload, "variant": name}
                cells = [(self.median(value, **wanted), text) for _, text, value in columns]
                row = ["-" if cell is None else text(cell) for cell, text in cells]
                rows.append([f"{workload}: {name}", *row])
        return Table(
            "While rounds are taken all the time",
            "Times of single writes or events; needless: share of pages that were sent before with this very content.",
            ["workload: tracker", *(label for label, _, _ in columns)],
            rows,
        )

    def log_capacity(self) -> Table:
        rows = []
        for name in self.trackers:
            for capacity in self.values("capacity", experiment="log-capacity", variant=name):
                wanted: dict[str, object] = {
                    **{"experiment": "log-capacity", "variant": name, "capacity": capacity},
                }
                cells = [
                    (self.median(_burst_us, **wanted), significant),
                    (self.median(lambda r: r["stalls"], **wanted), significant),
                    (self.median(lambda r: r["stall_s"] / r["writer_wall_s"], **wanted), percent_text),
                    (self.median(lambda r: r["spills"], **wanted), significant),
                    (self.median(lambda r: r["rounds"], **wanted), significant),
                ]
                row = ["-" if cell is None else text(cell) for cell, text in cells]
                rows.append([f"{name} {capacity}" if capacity else name, *row])
        some = self.where(experiment="log-capacity")
        return Table(
            f"Log capacity: a burst of {some[0]['pages_written'] if some else 0} first writes, rounds meanwhile",
            "µs/page: wall clock of the writer beyond its floor; stalled: part of the burst that it waited for room.",
            ["tracker, records", "µs/page", "stalls", "stalled", "spills", "rounds"],
            rows,
        )

    # Charts

    def charts(self) -> list[Chart]:
        """Return all charts for which there are records."""
        made = [
            Chart(
                "A round where nearly all memory is clean",
                "A fixed small number of dirty pages. A scan looks at every page table, compare at every byte; "
                "a log does not care.",
                "memory of the process",
                "CPU time of a round, agent and reader (ms)",
                self._curves("memory-size", "bytes", lambda r: r["agent_cpu_s"] * 1e3, self.trackers),
                x_bytes=True,
            ),
            Chart(
                "What a dirty page costs all parties",
                "Writer beyond its floor, agent and reader, for each page written in a round.",
                "share of the memory that is dirty (%)",
                "CPU time (µs/page)",
                self._curves("dirty-share", "share", _all_cpu_us, self.trackers, scale=100),
            ),
            Chart(
                "First write to a page in a round",
                "What the writer waits beyond the floor: median of single writes.",
                "",
                "time of one write (µs)",
                self._bars(self._first_write_columns(), _extra_us, self.trackers),
                groups=[label for label, _ in self._first_write_columns()],
            ),
            self._latency_chart(),
            Chart(
                "One change of mappings",
                "Median of single calls, nothing subtracted. What has an event waits for the reader of a log.",
                "",
                "time of one call (µs)",
                self._bars(self._event_columns(), lambda r: r["p50_ns"] / 1e3, self.variants),
                groups=[label for label, _ in self._event_columns()],
            ),
            Chart(
                "Log capacity",
                "A burst of first writes while rounds are taken: a full log stalls the writer or spills into a bitmap. "
                "scan and bitmap have no capacity.",
                "records that the log holds",
                "writer's time beyond the floor (µs/page)",
                self._capacity_curves(),
            ),
        ]
        return [chart for chart in made if any(chart.series.values())]

    def _curves(
        self, experiment: str, axis: str, value: Value, variants: Sequence[str], scale: float = 1.0
    ) -> dict[str, list[tuple[float, float]]]:
        made: dict[str, list[tuple[float, float]]] = {}
        for name in variants:
            made[name] = []
            for x in self.values(axis, experiment=experiment, variant=name):
                y = self.median(value, experiment=experiment, variant=name, **{axis: x})
                if y is not None and y > 0:
                    made[name].append((x * scale, y))
        return made

    def _bars(
        self, columns: Sequence[tuple[str, dict[str, object]]], value: Value, variants: Sequence[str]
    ) -> dict[str, list[tuple[float, float]]]:
        made: dict[str, list[tuple[float, float]]] = {}
        for name in variants:
            cells = [self.median(value, variant=name, **wanted) for _, wanted in columns]
            made[name] = [(float(i), y) for i, y in enumerate(cells) if y is not None and y > 0]
        return made

    def _event_columns(self) -> list[tuple[str, dict[str, object]]]:
        return [
            (event, {"experiment": "events", "event": event})
            for event in self.values("event", experiment="events")
        ]

    def _latency_chart(self) -> Chart:
        names = ("p50", "p99", "p99.9", "max")
        columns: dict[str, object] = {"experiment": "running", "workload": "hot set"}
        series: dict[str, list[tuple[float, float]]] = {}
        for name in self.variants:
            points = [
                self.median(lambda r, n=part: r[f"{n}_ns"] / 1e3, variant=name, **columns)  # type: ignore[misc]
                for part in names
            ]
            series[name] = [(float(i), y) for i, y in enumerate(points) if y is not None and y > 0]
        return Chart(
            "Latency of writes to a hot set while rounds are taken",
            "Every write is timed; the floor is the untracked process on the same machine in the same minutes.",
            "",
            "time of one write (µs)",
            series,
            groups=list(names),
        )

    def _capacity_curves(self) -> dict[str, list[tuple[float, float]]]:
        capacities = [c for c in self.values("capacity", experiment="log-capacity") if c]
        made: dict[str, list[tuple[float, float]]] = {}
        for name in self.trackers:
            points = []
            for capacity in capacities:
                wanted = capacity if name.startswith("log") else 0
                y = self.median(_burst_us, experiment="log-capacity", variant=name, capacity=wanted)
                if y is not None and y > 0:
                    points.append((float(capacity), y))
            made[name] = points
        return made

    # Findings

    def findings(self) -> list[str]:
        """Return what the figures say, in sentences."""
        return [text for text in (self._slopes(), self._crossover(), self._waiting()) if text]

    def slope_us_per_gib(self, name: str) -> float | None:
        """CPU time of a round for each GiB of memory, from the smallest and the largest size."""
        sizes = self.values("bytes", experiment="memory-size", variant=name)
        low, high = min(sizes, default=0), max(sizes, default=0)
        if high < WIDE * low or high < GIB:
            return None
        ends = [
            self.median(lambda r: r["agent_cpu_s"], experiment="memory-size", variant=name, bytes=size)
            for size in (low, high)
        ]
        first, last = ends
        return None if first is None or last is None else (last - first) / (high - low) * GIB * 1e6

    def _slopes(self) -> str:
        slopes = {name: self.slope_us_per_gib(name) for name in self.trackers}
        told = [
            f"{name} {significant(value / 1e3) if value > 0 else 'nothing'}"
            for name, value in slopes.items()
            if value is not None
        ]
        return f"CPU time of a round for each GiB of clean memory (ms): {', '.join(told)}." if told else ""

    def crossover_gib(self, log: str = "log-spill") -> float | None:
        """GiB of memory from which a round by log costs all parties less CPU time than one by scan.

        With as many dirty pages as memory-size has; from the smallest size and what scan pays for each GiB more.
        """
        slope, log_slope = self.slope_us_per_gib("scan"), self.slope_us_per_gib(log)
        if slope is None or log_slope is None or slope <= max(log_slope, 0.0):
            return None
        smallest = min(self.values("bytes", experiment="memory-size"))
        wanted: dict[str, object] = {"experiment": "memory-size", "bytes": smallest}
        by_log = self.median(_round_cpu_us, variant=log, **wanted)
        by_scan = self.median(_round_cpu_us, variant="scan", **wanted)
        if by_log is None or by_scan is None:
            return None
        crossover: float = (by_log - by_scan) / (slope - max(log_slope, 0.0)) + smallest / GIB
        return max(crossover, 0.0)

    def _crossover(self) -> str:
        gib = self.crossover_gib()
        if not gib:
            return ""
        pages = self.where(experiment="memory-size")[0]["pages_written"]
        return (
            f"With {pages} pages written in a round, a log costs all parties less CPU time than scan from about "
            f"{significant(gib)} GiB on: where fewer than about {significant(pages / gib)} pages per GiB are written "
            f"({percent_text(pages / gib * PAGE_SIZE / GIB)})."
        )

    def _waiting(self) -> str:
        wanted: dict[str, object] = {"experiment": "first-write", "workload": "sparse", "pages": "4 KiB"}
        waits = {
            name: self.median(_extra_us, variant=name, **wanted)
            for name in ("scan", "log-spill", "bitmap")
        }
        told = [f"{name} {significant(value)}" for name, value in waits.items() if value is not None]
        return f"The writer waits at the first write to a page (µs): {', '.join(told)}." if told else ""


def _floor(record: Record, name: str) -> float:
    return max(float(record["floor"].get(name, 0.0)), NO_TIME)


def _extra_us(record: Record) -> float:
    return float(record["p50_ns"] - _floor(record, "p50_ns")) / 1e3


def _round_cpu_us(record: Record) -> float:
    writer = record["writer_cpu_s"] - _floor(record, "writer_cpu_s")
    return float(writer + record["agent_cpu_s"]) * 1e6


def _all_cpu_us(record: Record) -> float:
    return _round_cpu_us(record) / float(record["pages_written"])


def _burst_us(record: Record) -> float:
    extra = record["writer_wall_s"] - _floor(record, "writer_wall_s")
    return float(extra / record["pages_written"] * 1e6)


def _slowdown(record: Record) -> float:
    # In the same time fewer are done.
    floor = record["floor"]
    return float(record["writer_wall_s"] / record["writes"] / (floor["writer_wall_s"] / floor["writes"]))


def _needless(record: Record) -> float:
    return float(record["needless"] / max(record["bytes_reported"] / PAGE_SIZE, 1))


# Text


def significant(value: float) -> str:
    """Three significant digits, no exponent."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    text = f"{value:.3g}"
    return f"{value:.6f}".rstrip("0") if "e" in text else text


def ratio_text(value: float) -> str:
    return f"{significant(value)} x"


def percent_text(value: float) -> str:
    return f"{significant(value * 100)} %"


def share_text(share: float) -> str:
    return percent_text(share)


def bytes_text(nr_bytes: float) -> str:
    """1073741824 -> "1 GiB"."""
    return f"{nr_bytes / GIB:g} GiB" if nr_bytes >= GIB else f"{nr_bytes / MIB:g} MiB"


def render(table: Table) -> str:
    """Return a table as text."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    body = [
        line[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths[1:]))
        for line in lines
    ]
    return "\n".join([table.title, body[0], "-" * len(body[0]), *body[1:], f"({table.note})"])

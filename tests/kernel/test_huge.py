"""Huge pages made ahead (agent/pages/huge.py): where all pages come, in memory that is empty, and nowhere else."""

from __future__ import annotations

import errno
import os
import re
from array import array
from collections.abc import Iterator

import pytest

from agent.kernel.mman import MADV_COLLAPSE, mmap, munmap, process_madvise
from agent.pages import huge
from agent.pages.huge import HugePages, huge_page_bytes
from agent.pages.place import PagePlacer
from agent.pages.sender import EXPECT_BYTES
from agent.ranges import RangeSet
from protocol.pages import PageEncoding, check_batch
from tests.kernel.test_pages import BASE, NR_PAGES, PAGE, Child, joined
from tests.prerequisites import require

END = BASE + NR_PAGES * PAGE
SIZE = 2 << 20
WHOLE = RangeSet((BASE, END))


def huge_kb(child: Child) -> int:
    with open(f"/proc/{child.pid}/smaps_rollup", encoding="ascii") as file:
        found = re.search(r"AnonHugePages:\s+(\d+)", file.read())
    assert found
    return int(found[1])


def flags(child: Child) -> list[str]:
    with open(f"/proc/{child.pid}/smaps", encoding="ascii") as file:
        text = file.read()
    return re.findall(rf"{BASE:x}-.*?VmFlags: (.*?)\n", text, re.DOTALL)


@pytest.fixture
def pair() -> Iterator[tuple[Child, Child]]:
    require(
        huge_page_bytes() == SIZE and collapses(), "no transparent huge pages of 2 MiB, or no MADV_COLLAPSE (v6.1)"
    )
    source, destination = Child(), Child()
    yield source, destination
    source.close()
    destination.close()


def collapses() -> bool:
    area = mmap(0, 2 * SIZE, 3, 0x22)
    pidfd = os.pidfd_open(os.getpid())
    try:
        # Nothing is there: EINVAL comes from the memory, not from an advice that is not known.
        process_madvise(pidfd, array("Q", (area, SIZE)), MADV_COLLAPSE)
    except OSError as err:
        return err.errno == errno.EINVAL
    finally:
        os.close(pidfd)
        munmap(area, 2 * SIZE)
    return True


def placer_for(destination: Child, *, anonymous: RangeSet = WHOLE) -> PagePlacer:
    placer = PagePlacer()
    placer.add_process_space(7, destination.pid)
    placer.set_anonymous(7, anonymous)
    return placer


@pytest.mark.parametrize("method", ["none", "zstd"])
def test_expected_areas_get_huge_pages_and_their_exact_content(pair: tuple[Child, Child], method: str) -> None:
    source, destination = pair
    source.write(0, b"".join(bytes([page % 251 + 1]) * PAGE for page in range(NR_PAGES)))
    source.write(0, bytes(PAGE))
    source.write(700, bytes(PAGE))
    before = flags(destination)
    placer = placer_for(destination)
    sender = joined(placer, method=method)
    sender.send_expected(7, WHOLE)
    assert huge_kb(destination) == 0, "made too early"
    sender.send_process_pages(7, source.pid, WHOLE, final=True)
    assert huge_kb(destination) >= SIZE >> 10
    assert source.read(0, NR_PAGES) == destination.read(0, NR_PAGES)
    assert flags(destination) == before
    placer.close()


def test_without_announcement_pages_are_small(pair: tuple[Child, Child]) -> None:
    source, destination = pair
    source.write(0, b"x" * PAGE * NR_PAGES)
    joined(placer_for(destination)).send_process_pages(7, source.pid, WHOLE, final=True)
    assert huge_kb(destination) == 0
    assert source.read(0, NR_PAGES) == destination.read(0, NR_PAGES)


def test_no_page_is_made_that_the_source_does_not_have(pair: tuple[Child, Child]) -> None:
    source, destination = pair
    source.write(0, b"x" * PAGE * NR_PAGES)
    most = RangeSet((BASE + PAGE, BASE + SIZE, BASE + SIZE, END - PAGE))
    assert most.nr_bytes > EXPECT_BYTES
    sender = joined(placer_for(destination))
    sender.send_expected(7, RangeSet((BASE + PAGE, BASE + SIZE)))
    sender.send_expected(7, RangeSet((BASE + SIZE, END - PAGE)))
    sender.send_process_pages(7, source.pid, most, final=True)
    assert huge_kb(destination) == 0
    assert destination.read(0) == bytes(PAGE) == destination.read(NR_PAGES - 1)


def test_memory_that_holds_something_is_left_alone(pair: tuple[Child, Child]) -> None:
    source, destination = pair
    source.write(0, b"x" * PAGE * NR_PAGES)
    sender = joined(placer_for(destination))
    sender.send_process_pages(7, source.pid, RangeSet((BASE, BASE + PAGE)))
    sender.send_expected(7, WHOLE)
    sender.send_process_pages(7, source.pid, RangeSet((BASE + PAGE, END)), final=True)
    assert huge_kb(destination) == 0
    assert source.read(0, NR_PAGES) == destination.read(0, NR_PAGES)


def test_memory_that_is_not_anonymous_is_left_alone(pair: tuple[Child, Child]) -> None:
    source, destination = pair
    source.write(0, b"x" * PAGE * NR_PAGES)
    sender = joined(placer_for(destination, anonymous=RangeSet((BASE, BASE + SIZE - PAGE))))
    sender.send_expected(7, WHOLE)
    sender.send_process_pages(7, source.pid, WHOLE, final=True)
    assert huge_kb(destination) == 0


@pytest.mark.parametrize("prot", [0, 1])
def test_read_only_memory_in_between_is_filled_all_the_same(pair: tuple[Child, Child], prot: int) -> None:
    source, destination = pair
    source.write(0, b"".join(bytes([page % 251 + 1]) * PAGE for page in range(NR_PAGES)))
    for child in pair:
        child.run(f"libc.mprotect({BASE}, {SIZE + PAGE}, {prot})")
    sender = joined(placer_for(destination))
    sender.send_expected(7, WHOLE)
    sender.send_process_pages(7, source.pid, WHOLE, final=True)
    assert source.read(0, NR_PAGES) == destination.read(0, NR_PAGES)


def test_announcements_of_an_odd_peer_write_nothing(pair: tuple[Child, Child]) -> None:
    _, destination = pair
    placer = placer_for(destination)
    for ranges in ((BASE, END), (0, 1 << 62), (BASE + SIZE, END)):
        placer.place(check_batch(7, PageEncoding.EXPECT, array("Q", ranges), b""))
    assert not placer.held(7)
    content = b"y" * PAGE
    # Out of order: the second has had its turn, and keeps what is there.
    for page in (NR_PAGES - 1, 0, NR_PAGES // 2):
        at = BASE + page * PAGE
        placer.place(check_batch(7, PageEncoding.RAW, array("Q", (at, at + PAGE)), bytearray(content)))
    assert destination.read(0) == destination.read(NR_PAGES // 2) == destination.read(NR_PAGES - 1) == content
    assert destination.read(1, NR_PAGES // 2 - 1) == bytes((NR_PAGES // 2 - 1) * PAGE)


class Made(HugePages):
    """Counts what is tried, and takes as long as it is told."""

    def __init__(self, seconds: float) -> None:
        super().__init__(os.getpid())
        self._size = SIZE
        self.seconds = seconds
        self.now = 0.0
        self.tried: list[int] = []

    def _make(self, areas: list[int]) -> int:
        self.now += self.seconds * len(areas)
        self.tried += areas
        return len(areas)


@pytest.mark.parametrize(("seconds", "least", "most"), [(0.2e-3, 1000, 1000), (4e-3, 5, 15)])
def test_pages_that_take_too_long_are_tried_more_and_more_rarely(
    seconds: float, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(seconds)
    monkeypatch.setattr("agent.pages.huge.time.thread_time", lambda: made.now)
    made.expect(RangeSet((0, 1000 * SIZE)))
    for start in range(0, 1000 * SIZE, SIZE // 4):
        made.prepare(array("Q", (start, start + SIZE // 4)))
    assert least <= len(made.tried) <= most
    assert len(set(made.tried)) == len(made.tried)
    made.close()


@pytest.mark.parametrize("text", ["always madvise [never]", None])
def test_hosts_that_want_no_huge_pages_get_none(
    text: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    if text is not None:
        with open(os.path.join(tmp_path, "enabled"), "w", encoding="ascii") as file:
            file.write(text)
        with open(os.path.join(tmp_path, "hpage_pmd_size"), "w", encoding="ascii") as file:
            file.write("2097152")
    monkeypatch.setattr(huge, "_DIRECTORY", str(tmp_path))
    assert huge_page_bytes() == 0

"""Following a layout: the planned calls, carried out on a model of an address space, give exactly the wanted one."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass

import pytest

from agent.kernel import syscalls as nr
from agent.kernel.mman import MAP_ANONYMOUS, MAP_NORESERVE, PROT_NONE, PROT_READ, PROT_WRITE
from agent.state import mirror
from agent.state.mirror import Fate, _Builder, find_torn, make_plan
from agent.target.inject import Batch, Call
from protocol.state.vma import BackingFile, LayoutState, VmaKind, VmaState

_PAGE = 4096
_BASE = 0x10000000
_RW = PROT_READ | PROT_WRITE
_FILES = (
    BackingFile(path="/a", size=1, mtime_ns=1, mode=0o644),
    BackingFile(path="/b", size=1, mtime_ns=1, mode=0o644),
)


def vma(first: int, last: int, prot: int = _RW, **facts: object) -> VmaState:
    given: dict[str, object] = {"shared": False, "kind": VmaKind.ANON, "flags": ("ac",), **facts}
    return VmaState(start=_BASE + first * _PAGE, end=_BASE + last * _PAGE, prot=prot, **given)  # type: ignore[arg-type]


def layout(*vmas: VmaState) -> LayoutState:
    return LayoutState(files=_FILES, vmas=vmas)


@dataclass(frozen=True)
class Page:
    """What the model knows of a page: what it shows, how it may be used, and whether it was ever writable."""

    shows: tuple[object, ...]
    prot: int
    reserve: bool
    generation: int


class Space:
    """An address space that understands the calls of a plan."""

    def __init__(self) -> None:
        self.pages: dict[int, Page] = {}
        self.committed: set[int] = set()
        self.nr_maps = 0

    def run(self, batch: Batch) -> None:
        open_fds: dict[int, int] = {}
        for call in batch.calls:
            # Pointers to data stand for nothing here.
            arguments = [
                open_fds[id(a)] if isinstance(a, Call) else a if isinstance(a, int) else 0
                for a in call.args
            ]
            if call.nr == nr.NR_pidfd_getfd:
                open_fds[id(call)] = arguments[1]
            elif call.nr == nr.NR_mmap:
                self._mmap(*arguments)
            elif call.nr == nr.NR_munmap:
                for number in self._range(arguments):
                    self.pages.pop(number, None)
                    self.committed.discard(number)
            elif call.nr == nr.NR_mprotect:
                for number in self._range(arguments):
                    page = self.pages[number]
                    prot = arguments[2]
                    self.pages[number] = Page(page.shows, prot, page.reserve, page.generation)
                    if prot & PROT_WRITE:
                        self.committed.add(number)

    def _range(self, arguments: list[int]) -> range:
        return range(arguments[0] // _PAGE, (arguments[0] + arguments[1]) // _PAGE)

    def _mmap(self, start: int, length: int, prot: int, flags: int, fd: int, offset: int) -> None:
        self.nr_maps += 1
        for index, number in enumerate(self._range([start, length])):
            shows = ("anon",) if flags & MAP_ANONYMOUS else (fd, offset // _PAGE + index)
            self.pages[number] = Page(shows, prot, not flags & MAP_NORESERVE, self.nr_maps)
            self.committed.discard(number)
            if prot & PROT_WRITE:
                self.committed.add(number)

    def follow(self, before: LayoutState, after: LayoutState) -> None:
        _Builder(self.run, after.files, 5, _fd_of, 4).build(make_plan(before, after))

    def check(self, wanted: LayoutState) -> None:
        expected: dict[int, tuple[tuple[object, ...], int, bool]] = {}
        for each in wanted.vmas:
            for index, number in enumerate(range(each.start // _PAGE, each.end // _PAGE)):
                if each.kind is VmaKind.ANON:
                    shows: tuple[object, ...] = ("anon",)
                else:
                    shows = (_fd_of(each, None), each.offset // _PAGE + index)
                expected[number] = (shows, each.prot, "nr" not in each.flags)
        found = {n: (p.shows, p.prot, p.reserve) for n, p in self.pages.items()}
        assert found == expected
        for each in wanted.vmas:
            if each.kind is VmaKind.ANON:
                pages = set(range(each.start // _PAGE, each.end // _PAGE))
                assert pages <= self.committed if "ac" in each.flags else not pages & self.committed


def _fd_of(each: VmaState, _backing: BackingFile | None) -> int:
    return 100 + each.file_index if each.kind is VmaKind.FILE else 200 + each.object_id


def test_a_mapping_that_only_changed_its_protection_is_kept() -> None:
    plan = make_plan(layout(vma(0, 8)), layout(vma(0, 2), vma(2, 4, PROT_READ), vma(4, 8)))
    assert not plan.unmap
    assert {part.fate for _, parts in plan.wanted for part in parts} == {Fate.KEEP}


def test_what_is_gone_is_unmapped_and_what_is_new_is_mapped() -> None:
    plan = make_plan(layout(vma(0, 8)), layout(vma(4, 12)))
    assert plan.unmap == [(_BASE, _BASE + 4 * _PAGE)]
    assert [part.fate for part in plan.wanted[0][1]] == [Fate.KEEP, Fate.MAP]


def test_one_old_mapping_serves_several_new_ones() -> None:
    plan = make_plan(layout(vma(0, 20)), layout(vma(0, 5), vma(7, 9, PROT_READ), vma(15, 20)))
    assert [(s - _BASE, e - _BASE) for s, e in plan.unmap] == [
        (5 * _PAGE, 7 * _PAGE),
        (9 * _PAGE, 15 * _PAGE),
    ]


def test_unchanged_mappings_do_not_appear() -> None:
    plan = make_plan(layout(vma(0, 8), vma(10, 12)), layout(vma(0, 8), vma(10, 12)))
    assert not plan.wanted and not plan.unmap


def test_contents_survive_a_change_of_flags() -> None:
    plan = make_plan(layout(vma(0, 8)), layout(vma(0, 8, flags=("nr",))))
    assert plan.remade == [(_BASE, _BASE + 8 * _PAGE)]


def test_contents_do_not_survive_another_file() -> None:
    one = vma(0, 8, kind=VmaKind.FILE, file_index=0, flags=())
    other = vma(0, 8, kind=VmaKind.FILE, file_index=1, flags=())
    assert not make_plan(layout(one), layout(other)).remade


def test_the_same_index_may_come_to_mean_another_file() -> None:
    one = vma(0, 8, kind=VmaKind.FILE, file_index=0, flags=())
    swapped = LayoutState(files=_FILES[::-1], vmas=(one,))
    assert make_plan(layout(one), swapped).wanted == [(one, ())]


def test_new_neighbours_come_from_one_mapping() -> None:
    space = Space()
    wanted = layout(vma(0, 4), vma(4, 8, PROT_NONE, flags=()), vma(8, 12, PROT_READ))
    space.follow(layout(), wanted)
    space.check(wanted)
    assert len({page.generation for page in space.pages.values()}) == 1


def test_a_reservation_is_never_writable() -> None:
    space = Space()
    wanted = layout(vma(0, 4), vma(4, 1 << 12, PROT_NONE, flags=()))
    space.follow(layout(), wanted)
    space.check(wanted)


def test_torn_mappings_are_found_with_their_pieces() -> None:
    whole, torn = vma(0, 8), vma(10, 20)
    numbers = (0, 8, 8, 12, 12, 13, 13, 25)
    ((found, pieces),) = find_torn([whole, torn], array("Q", [_BASE + number * _PAGE for number in numbers]))
    assert found is torn
    assert [((s - _BASE) // _PAGE, (e - _BASE) // _PAGE) for s, e in pieces] == [(10, 12), (12, 13), (13, 20)]


def _random_layout(chance: random.Random) -> LayoutState:
    vmas = []
    position = 0
    while position < 60:
        position += chance.choice([0, 0, 1, 5])
        length = chance.randrange(1, 12)
        kind = chance.choice([VmaKind.ANON] * 4 + [VmaKind.FILE, VmaKind.OBJECT])
        prot = chance.choice([PROT_NONE, PROT_READ, _RW])
        facts: dict[str, object] = {"kind": kind, "flags": ()}
        if kind is VmaKind.ANON:
            committed = prot == _RW or chance.random() < 0.4
            facts["flags"] = ("ac",) if committed else ("nr",) * chance.randrange(2)
        else:
            # Often the same file at its own place: then pieces of it go on in the next layout.
            facts["offset"] = chance.choice([position, 7]) * _PAGE
            facts["shared"] = kind is VmaKind.OBJECT
            facts["file_index" if kind is VmaKind.FILE else "object_id"] = chance.randrange(1, 2)
        vmas.append(vma(position, position + length, prot, **facts))
        position += length
    return layout(*vmas)


@pytest.mark.parametrize("calls_at_once", [1, 5, mirror.CALLS_AT_ONCE])
@pytest.mark.parametrize("seed", range(100))
def test_any_layout_can_follow_any_other(
    seed: int, calls_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "CALLS_AT_ONCE", calls_at_once)
    chance = random.Random(seed)
    space = Space()
    before = layout()
    for _ in range(4):
        after = _random_layout(chance)
        space.follow(before, after)
        space.check(after)
        before = after

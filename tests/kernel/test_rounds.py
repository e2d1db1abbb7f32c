"""The layout that a round sends follows what no list of mappings shows: advice, locks, memory policies."""

from __future__ import annotations

import ctypes
from typing import Any, cast

import pytest

from agent.address import parse_address
from agent.check import Target, open_target
from agent.kernel.libc import syscall
from agent.kernel.mman import madvise
from agent.kernel.syscalls import NR_mbind, NR_munmap
from agent.options import SendOptions
from agent.procfs.maps import parse_maps, read_maps
from agent.rounds import RoundSender
from agent.snapshot import TaskSender
from agent.target.tracer import Tracer
from agent.tracker.base import DirtySet
from agent.types import Pid
from protocol.messages import StateSection
from protocol.sections import decode_section
from protocol.state import load_all
from protocol.state.vma import LayoutState, VmaState
from tests.kernel.support import puppet

MADV_DONTFORK, MPOL_INTERLEAVE = 10, 3


class Recorder:
    """In place of a link."""

    def __init__(self) -> None:
        self.sections: list[StateSection] = []

    def send(self, section: StateSection) -> None:
        self.sections.append(section)

    def send_all(self, sections: Any) -> None:
        self.sections.extend(sections)

    def layouts(self) -> list[LayoutState]:
        return [decode_section(section) for section in self.sections if section.kind == "layout"]


def rounds_of(target: Target, link: Recorder) -> RoundSender:
    return RoundSender(cast(Any, link), target, cast(Any, None), cast(Any, None), lambda *_: None)


def look(target: Target, rounds: RoundSender) -> None:
    """What a round does with the layout."""
    text = read_maps(target.pid)
    rounds._send_layout(DirtySet(maps_text=text, maps=parse_maps(text)))


def vma_at(layout: LayoutState, start: int) -> VmaState:
    return next(vma for vma in layout.vmas if vma.start == start)


def interleave(start: int, length: int) -> None:
    nodes = ctypes.c_uint64(1)
    syscall(NR_mbind, start, length, MPOL_INTERLEAVE, ctypes.addressof(nodes), 64, 0)


def options_for(pid: int) -> SendOptions:
    return SendOptions(pid=Pid(pid), address=parse_address("stdio:"))


def test_advice_for_a_whole_mapping_is_seen_before_the_freeze() -> None:
    load_all()
    link = Recorder()
    with puppet() as child, open_target(Pid(child.pid), options_for(child.pid)) as target:
        start = child.map(4, prot=5)  # like none beside it
        rounds = rounds_of(target, link)
        look(target, rounds)
        child.run(madvise, start, 4 * 4096, MADV_DONTFORK)
        child.wait_idle()
        rounds.learn_flags()
        look(target, rounds)
        rounds.learn_flags()
        look(target, rounds)
    first, second = link.layouts()
    assert "dc" not in vma_at(first, start).flags
    assert "dc" in vma_at(second, start).flags


def test_memory_policies_of_mappings_are_asked_for_where_there_are_any() -> None:
    load_all()
    link = Recorder()
    with puppet() as child, open_target(Pid(child.pid), options_for(child.pid)) as target:
        start = child.map(4, prot=5)
        rounds = rounds_of(target, link)
        target.learn_policies()
        before = target.policy_nodes
        look(target, rounds)
        child.run(interleave, start, 4 * 4096)
        child.wait_idle()
        target.learn_policies()
        sender = TaskSender(target)
        assert (before, target.policy_nodes) == (None, 1)
        with Tracer(target.pid) as tracer:
            tracer.stop_all()
            sender.send(cast(Any, link), tracer, lambda: None)
            look(target, rounds)
    first, second = link.layouts()
    assert vma_at(first, start).policy == 0
    assert (vma_at(second, start).policy, vma_at(second, start).policy_nodes) == (MPOL_INTERLEAVE, b"\1")
    assert [vma.start for vma in second.vmas if vma.policy] == [start]


def test_flags_are_read_again_for_what_is_new_and_not_for_what_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    load_all()
    link = Recorder()
    nr_reads = 0

    def counted(target: Target) -> dict[int, frozenset[str]]:
        nonlocal nr_reads
        nr_reads += 1
        return vm_flags(target)

    vm_flags = Target.vm_flags
    monkeypatch.setattr(Target, "vm_flags", counted)
    with puppet() as child, open_target(Pid(child.pid), options_for(child.pid)) as target:
        gone, cut = child.map(4, prot=5), child.map(8, prot=5)
        rounds = rounds_of(target, link)
        look(target, rounds)
        child.run(syscall, NR_munmap, gone, 4 * 4096)
        child.wait_idle()
        look(target, rounds)
        before = nr_reads
        child.run(madvise, cut + 4 * 4096, 4 * 4096, MADV_DONTFORK)
        child.wait_idle()
        look(target, rounds)
    layouts = link.layouts()
    assert before == 1 and nr_reads == 2
    assert all(vma.start != gone for vma in layouts[1].vmas)
    assert "dc" not in vma_at(layouts[2], cut).flags
    assert "dc" in vma_at(layouts[2], cut + 4 * 4096).flags

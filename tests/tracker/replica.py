"""What a destination would hold, in a dictionary, and its comparison with the live process.

Judges by means of its own (PAGEMAP_SCAN without protection, /proc/PID/mem), not by what a tracker believes.
"""

from __future__ import annotations

import functools
import os
from array import array
from concurrent.futures import ThreadPoolExecutor

import pytest

from agent.kernel.pagemap import (
    PAGE_IS_FILE,
    PAGE_IS_GUARD,
    PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED,
    PagemapScanner,
)
from agent.pages.sender import OnRead, PageSender
from agent.procfs.maps import MapsEntry
from agent.procfs.smaps import read_vm_flags
from agent.state.shmem import content_to_send
from agent.tracker import scan
from agent.tracker.base import DirtySet, Foresighted, SharedKey, Tracker, Witness
from agent.tracker.layout import Layout, classify
from protocol.codec import Buffer
from protocol.framing import FrameDecoder
from protocol.pages import PageEncoding, parse_batch

PAGE = 4096
ZERO = bytes(PAGE)
PROCESS = 1
"""The space of the process; objects have the numbers from 2 on."""


class Replica:
    """Takes real frames from a real PageSender, round by round."""

    def __init__(self, pid: int, tracker: Tracker) -> None:
        self.pid = pid
        self.tracker = tracker
        self.witness = tracker if isinstance(tracker, Witness) else None
        self.spaces: dict[int, dict[int, bytes]] = {PROCESS: {}}
        self.ids: dict[SharedKey, int] = {}
        self.sender = PageSender(self.take)
        self.bytes_received = 0
        self.executor = ThreadPoolExecutor(1)

    def close(self) -> None:
        self.sender.close()
        self.executor.shutdown()

    def take(self, buffers: list[Buffer]) -> None:
        """Receive one frame."""
        decoder = FrameDecoder()
        decoder.receive_data(b"".join(buffers))
        frame = decoder.next_frame()
        assert frame is not None
        batch = parse_batch(memoryview(bytes(frame.payload)))
        space = self.spaces[batch.space_id]
        offset = 0
        for start, end in zip(batch.ranges[0::2], batch.ranges[1::2]):
            for page in range(start, end, PAGE):
                if batch.encoding is PageEncoding.ABSENT:
                    space.pop(page, None)
                elif batch.encoding is PageEncoding.ZERO:
                    space[page] = ZERO
                else:
                    space[page] = bytes(batch.payload[offset : offset + PAGE])
                    offset += PAGE
        self.bytes_received += batch.payload.nbytes

    def round(self, *, final: bool) -> DirtySet:
        """Have the tracker look, and take what it found, as agent.rounds does."""
        if final and isinstance(self.tracker, Foresighted):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(scan, "AHEAD_BYTES", -1)  # little memory, too
                self.tracker.look_ahead(self.executor)
        dirty = self.tracker.collect(final=final)
        self.take_round(dirty, final=final)
        return dirty

    def take_round(self, dirty: DirtySet, *, final: bool) -> None:
        """Take what was found."""
        assert not dirty.pages.intersect(dirty.absent), "both dirty and absent"
        self.sender.send_absent(PROCESS, dirty.absent)
        counters = self.sender.send_process_pages(
            PROCESS, self.pid, dirty.pages, final=final, on_read=self.on_read(None)
        )
        self.tracker.forget(counters.gone)
        for key, offsets in dirty.shared.items():
            space = self.ids.setdefault(key, len(self.ids) + 2)
            self.spaces.setdefault(space, {})
            fd = self.tracker.shared_watch.fd_of(key)
            assert fd is not None, "these tests need CAP_CHECKPOINT_RESTORE"
            data, absent = content_to_send(fd, offsets)
            self.sender.send_absent(space, absent)
            if self.witness:
                self.witness.dropped(key, absent)
            self.sender.send_file_pages(space, fd, data, on_read=self.on_read(key))

    def on_read(self, key: SharedKey | None) -> OnRead | None:
        return functools.partial(self.witness.delivered, key) if self.witness else None

    def differences(self, dirty: DirtySet) -> list[str]:
        """Compare with the stopped process after its final round; returns what differs."""
        layout = classify(dirty.maps, _droppable(self.pid, dirty.maps))
        return self._private_differences(layout, dirty) + self._shared_differences()

    def _private_differences(self, layout: Layout, dirty: DirtySet) -> list[str]:
        wrong: list[str] = []
        held = self.spaces[PROCESS]
        state = _categories(self.pid, layout)
        mem = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY)
        for page in sorted(state.keys() | held.keys()):
            categories = state.get(page, 0)
            if page not in layout.private:
                wrong.append(f"{page:#x}: held, but nothing is mapped there")
            elif categories & PAGE_IS_GUARD:
                if page in held:
                    wrong.append(f"{page:#x}: guard page has content")
                if page not in dirty.guards:
                    wrong.append(f"{page:#x}: guard page not reported")
            elif page in layout.private_file and page not in held:
                if categories & PAGE_IS_PRESENT and not categories & PAGE_IS_FILE:
                    wrong.append(f"{page:#x}: copied page of a file was not sent")
            else:
                content = os.pread(mem, PAGE, page)
                if content != held.get(page, ZERO):
                    wrong.append(
                        f"{page:#x}: content differs, categories {categories:#x}, held {page in held}"
                    )
        os.close(mem)
        wrong += [
            f"{page:#x}: no guard is there"
            for start, end in dirty.guards
            for page in range(start, end, PAGE)
            if not state.get(page, 0) & PAGE_IS_GUARD
        ]
        return wrong

    def _shared_differences(self) -> list[str]:
        wrong: list[str] = []
        for key, space in self.ids.items():
            fd = self.tracker.shared_watch.fd_of(key)
            if fd is None:
                continue  # nobody has it any more
            for offset in range(0, os.fstat(fd).st_size, PAGE):
                content = os.pread(fd, PAGE, offset).ljust(PAGE, b"\0")
                if content != self.spaces[space].get(offset, ZERO):
                    wrong.append(f"object {key} offset {offset:#x} differs")
        return wrong


def _droppable(pid: int, maps: list[MapsEntry]) -> set[MapsEntry]:
    # MAP_DROPPABLE memory is not carried.
    ranges = {(start, end) for start, end, flags in read_vm_flags(pid) if "dp" in flags}
    return {entry for entry in maps if (entry.start, entry.end) in ranges}


def _categories(pid: int, layout: Layout) -> dict[int, int]:
    mask = PAGE_IS_FILE | PAGE_IS_GUARD | PAGE_IS_PRESENT | PAGE_IS_SWAPPED
    triples: array[int] = array("Q")
    with PagemapScanner(pid) as scanner:
        for start, end in layout.private:
            triples += scanner.scan(start, end, category_anyof_mask=mask, return_mask=mask)
    return {
        page: categories
        for start, end, categories in zip(triples[0::3], triples[1::3], triples[2::3])
        for page in range(start, end, PAGE)
    }

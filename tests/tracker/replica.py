"""What a destination would hold, in a dictionary, and its comparison with the live process."""

from __future__ import annotations

import os
from array import array

from agent.kernel.pagemap import (
    PAGE_IS_FILE,
    PAGE_IS_GUARD,
    PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED,
    PagemapScanner,
)
from agent.pages.sender import PageSender
from agent.state.shmem import content_to_send
from agent.tracker.base import DirtySet, SharedKey
from agent.tracker.layout import classify
from agent.tracker.scan import ScanTracker
from protocol.codec import Buffer
from protocol.framing import FrameDecoder
from protocol.pages import PageEncoding, parse_batch

PAGE = 4096
ZERO = bytes(PAGE)


class Replica:
    """Takes real frames from a real PageSender; space 1 is the process, from 2 on the objects."""

    def __init__(self, pid: int, tracker: ScanTracker) -> None:
        self.pid = pid
        self.tracker = tracker
        self.spaces: dict[int, dict[int, bytes]] = {1: {}}
        self.ids: dict[SharedKey, int] = {}
        self.sender = PageSender(self.take)
        self.bytes_received = 0

    def take(self, buffers: list[Buffer]) -> None:
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
        dirty = self.tracker.collect(final=final)
        self.sender.send_absent(1, dirty.absent)
        counters = self.sender.send_process_pages(1, self.pid, dirty.pages, final=final)
        self.tracker.forget(counters.gone)
        for key, offsets in dirty.shared.items():
            space = self.ids.setdefault(key, len(self.ids) + 2)
            self.spaces.setdefault(space, {})
            fd = self.tracker.shared_watch.fd_of(key)
            assert fd is not None, "these tests need CAP_CHECKPOINT_RESTORE"
            data, absent = content_to_send(fd, offsets)
            self.sender.send_absent(space, absent)
            self.sender.send_file_pages(space, fd, data)
        return dirty

    def differences(self, dirty: DirtySet) -> list[str]:
        """Compare with the stopped process; returns what differs."""
        layout = classify(dirty.maps, self.tracker._excluded)
        wrong: list[str] = []
        triples: array[int] = array("Q")
        mask = PAGE_IS_FILE | PAGE_IS_GUARD | PAGE_IS_PRESENT | PAGE_IS_SWAPPED
        with PagemapScanner(self.pid) as scanner:
            for start, end in layout.private:
                triples += scanner.scan(
                    start, end, category_anyof_mask=mask, return_mask=mask
                )
        state = {
            page: categories
            for start, end, categories in zip(triples[0::3], triples[1::3], triples[2::3])
            for page in range(start, end, PAGE)
        }
        held = self.spaces[1]
        mem = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY)
        for page in sorted(state.keys() | held.keys()):
            if page not in layout.private:
                continue
            categories = state.get(page, 0)
            if categories & PAGE_IS_GUARD:
                if page in held:
                    wrong.append(f"{page:#x}: guard page has content")
                if page not in dirty.guards:
                    wrong.append(f"{page:#x}: guard page not reported")
                continue
            if page in layout.private_file and page not in held:
                if categories & PAGE_IS_PRESENT and not categories & PAGE_IS_FILE:
                    wrong.append(f"{page:#x}: copied page of a file was not sent")
                continue
            content = os.pread(mem, PAGE, page)
            if content != held.get(page, ZERO):
                wrong.append(
                    f"{page:#x}: content differs, categories {categories:#x}, held {page in held}"
                )
        os.close(mem)
        for key, space in self.ids.items():
            fd = self.tracker.shared_watch.fd_of(key)
            assert fd is not None
            for offset in range(0, os.fstat(fd).st_size, PAGE):
                content = os.pread(fd, PAGE, offset).ljust(PAGE, b"\0")
                if content != self.spaces[space].get(offset, ZERO):
                    wrong.append(f"object {key} offset {offset:#x} differs")
        return wrong

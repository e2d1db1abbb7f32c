"""Laying out a batch ahead of its run."""

from __future__ import annotations

from agent.target.batch import Batch


def getpid_and_write(batch: Batch) -> None:
    batch.call(39, name="getpid")
    batch.call(1, 1, batch.data(b"hello"), 5, name="write")


def test_packing_twice_for_one_address_is_done_once() -> None:
    batch = Batch()
    getpid_and_write(batch)
    first = batch.pack(0x10000)
    assert batch.pack(0x10000) is first
    assert batch.pack(0x20000) != first
    assert batch.pack(0x10000) == first


def test_what_is_added_after_packing_is_packed_too() -> None:
    batch = Batch()
    getpid_and_write(batch)
    batch.pack(0x10000)
    batch.data(b"more")
    assert b"more" in batch.pack(0x10000).content
    batch.call(60, 77, name="exit")
    batch.undo(3, 99, name="close")
    packed = batch.pack(0x10000)
    assert (77).to_bytes(8, "little") in packed.content
    assert (99).to_bytes(8, "little") in packed.content
    fresh = Batch()
    getpid_and_write(fresh)
    fresh.data(b"more")
    fresh.call(60, 77, name="exit")
    fresh.undo(3, 99, name="close")
    assert packed == fresh.pack(0x10000)

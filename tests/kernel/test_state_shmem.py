"""Shared memory objects: dumped, made again, finished; content split into data and holes."""

from __future__ import annotations

import fcntl
import os

from agent.ranges import RangeSet
from agent.state.shmem import content_to_send, dump_shared, finish_shared, restore_shared
from protocol.state.shmem import SharedKind, SharedObject

PAGE = 4096


def test_memfd_keeps_name_size_mode_and_seals() -> None:
    source = os.memfd_create("cache", os.MFD_ALLOW_SEALING)
    os.ftruncate(source, 3 * PAGE + 1)
    os.fchmod(source, 0o640)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE
    fcntl.fcntl(source, fcntl.F_ADD_SEALS, seals)
    state = dump_shared(70, source, os.readlink(f"/proc/self/fd/{source}"))
    made = restore_shared(state)
    os.pwrite(made, b"x", 0)
    finish_shared(made, state)
    assert dump_shared(70, made, os.readlink(f"/proc/self/fd/{made}")) == state
    os.close(source)
    os.close(made)


def test_memfd_without_sealing_stays_unsealable() -> None:
    source = os.memfd_create("plain", 0)
    state = dump_shared(71, source, "/memfd:plain (deleted)")
    made = restore_shared(state)
    finish_shared(made, state)
    assert fcntl.fcntl(made, fcntl.F_GET_SEALS) == fcntl.fcntl(source, fcntl.F_GET_SEALS)
    os.close(source)
    os.close(made)


def test_shared_anonymous_object_has_its_size() -> None:
    state = SharedObject(id=5, kind=SharedKind.ANON, name="", size=4 * PAGE)
    fd = restore_shared(state)
    os.pwrite(fd, b"x", 3 * PAGE)
    finish_shared(fd, state)
    assert os.fstat(fd).st_size == 4 * PAGE
    os.close(fd)


def test_content_is_split_into_data_and_holes() -> None:
    fd = os.memfd_create("holes")
    os.ftruncate(fd, 8 * PAGE)
    os.pwrite(fd, b"x", 2 * PAGE)
    data, absent = content_to_send(fd, None)
    assert data == RangeSet((2 * PAGE, 3 * PAGE))
    assert absent == RangeSet((0, 2 * PAGE, 3 * PAGE, 8 * PAGE))
    assert not content_to_send(fd, RangeSet((0, PAGE)))[0]
    os.close(fd)

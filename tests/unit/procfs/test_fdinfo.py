"""fdinfo and mountinfo on texts as kernels write them."""

from __future__ import annotations

import pytest

from agent.procfs import fdinfo
from agent.procfs.mountinfo import parse_mountinfo

COMMON = b"pos:\t5\nflags:\t02004002\nmnt_id:\t15\nino:\t1057\n"


def test_common_fields_are_parsed_in_their_bases() -> None:
    info = fdinfo.parse_fdinfo(COMMON)
    assert (info.pos, info.flags, info.mnt_id, info.ino) == (5, 0o2004002, 15, 1057)
    assert info.cloexec
    assert info.get("nothing") is None


def test_eventfd_count_is_hexadecimal() -> None:
    text = COMMON + b"eventfd-count:              1f\neventfd-id: 3\neventfd-semaphore: 1\n"
    info = fdinfo.parse_fdinfo(text)
    assert fdinfo.eventfd(info) == fdinfo.EventfdInfo(31, True)
    old = fdinfo.parse_fdinfo(COMMON + b"eventfd-count: ffffffffffffffff\n")
    assert fdinfo.eventfd(old) == fdinfo.EventfdInfo(2**64 - 1, None)


def test_file_of_another_kind_is_a_value_error() -> None:
    info = fdinfo.parse_fdinfo(COMMON)
    with pytest.raises(ValueError, match="eventfd-count"):
        fdinfo.eventfd(info)
    with pytest.raises(ValueError, match="sigmask"):
        fdinfo.signalfd(info)


def test_signalfd_mask_is_a_bit_set() -> None:
    assert fdinfo.signalfd(fdinfo.parse_fdinfo(COMMON + b"sigmask:\t0000000000000200\n")) == 0x200


def test_epoll_targets_are_parsed() -> None:
    text = (
        b"tfd:        5 events:       1d data: ffffffffffffffff pos:0 ino:61af sdev:7\n"
        b"tfd:       12 events: 80000001 data:                c  pos:10 ino:a sdev:fe00001\n"
        b"tfd:        6 events:       19 data:                6\n"
    )
    assert fdinfo.epoll(fdinfo.parse_fdinfo(COMMON + text)) == [
        (5, 0x1D, 2**64 - 1, 0, 0x61AF, 7),
        (12, 0x80000001, 12, 10, 10, 0xFE00001),
        (6, 0x19, 6, 0, 0, 0),
    ]


def test_timerfd_times_are_nanoseconds() -> None:
    text = (
        b"clockid: 1\nticks: 2\nsettime flags: 03\n"
        b"it_value: (0, 49406829)\nit_interval: (1, 5)\n"
    )
    info = fdinfo.timerfd(fdinfo.parse_fdinfo(COMMON + text))
    assert info == (1, 2, 3, 49406829, 1_000_000_005)


def test_inotify_watches_are_parsed() -> None:
    text = (
        b"inotify wd:3 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 "
        b"fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d\n"
    )
    assert fdinfo.inotify(fdinfo.parse_fdinfo(COMMON + text)) == [
        (3, 0x9E7E, 0x800013, 0x800AFCE, 1, bytes.fromhex("7e9e0000640d1b6d"))
    ]


def test_locks_are_parsed_and_waiters_left_out() -> None:
    text = (
        b"lock:\t1: FLOCK  ADVISORY  WRITE 359 00:13:11691 0 EOF\n"
        b"lock:\t2: POSIX  ADVISORY  READ 360 fe:00:7 10 19\n"
        b"lock:\t2: -> POSIX  ADVISORY  READ 361 fe:00:7 10 19\n"
    )
    assert fdinfo.locks(fdinfo.parse_fdinfo(COMMON + text)) == [
        ("FLOCK", False, "WRITE", 359, "00:13", 11691, 0, -1),
        ("POSIX", False, "READ", 360, "fe:00", 7, 10, 19),
    ]


def test_mountinfo_escapes_and_optional_fields_are_resolved() -> None:
    text = (
        b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime shared:1 master:2 - ext3 /dev/root rw,errors=x\n"
        b"37 36 0:21 / /proc rw,relatime - proc  rw\n"
    )
    first, second = parse_mountinfo(text)
    assert (first.mount_id, first.parent_id, first.dev_major, first.dev_minor) == (36, 35, 98, 0)
    assert (first.root, first.mount_point) == ("/mnt1", "/mnt 2")
    assert first.optional_fields == ("shared:1", "master:2")
    assert (first.fstype, first.source, first.super_options) == ("ext3", "/dev/root", "rw,errors=x")
    assert (second.source, second.super_options, second.optional_fields) == ("", "rw", ())

"""Files of /proc that were opened ahead say what is true when they are read."""

from __future__ import annotations

import os
import subprocess

import pytest

from agent.procfs.files import ReadAgain, read_bytes


def test_content_is_that_of_the_moment() -> None:
    path = f"/proc/self/task/{os.getpid()}/comm"
    before = read_bytes(path)
    again = ReadAgain([path], limit=1)
    try:
        with open(path, "wb") as file:
            file.write(b"changed")
        assert again.read_bytes(path) == b"changed\n"
    finally:
        with open(path, "wb") as file:
            file.write(before.rstrip(b"\n"))
        again.close()
    assert again.read_bytes(path) == before, "closed, it reads by the path"


def test_no_more_are_opened_than_allowed_and_the_others_read_all_the_same() -> None:
    paths = ["/proc/self/status", "/proc/self/no such file", "/proc/self/stat"]
    before = len(os.listdir("/proc/self/fd"))
    again = ReadAgain(paths, limit=2)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert again.read_bytes("/proc/self/stat").startswith(b"%d (" % os.getpid())
    again.close()
    again.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_dead_task_is_gone() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        path = f"/proc/{child.pid}/status"
        again = ReadAgain([path], limit=1)
        assert b"Name:\tcat" in again.read_bytes(path) or b"Pid:" in again.read_bytes(path)
    with pytest.raises(ProcessLookupError):
        again.read_bytes(path)
    again.close()


def test_long_content_is_complete() -> None:
    path = f"/proc/{os.getpid()}/smaps"
    again = ReadAgain([path], limit=1)
    assert again.read_bytes(path).count(b"VmFlags:") == read_bytes(path).count(b"VmFlags:") > 20
    again.close()

"""A descriptor table that never stands still, and a model that knows what every number must be.

Usage: python -m tests.workloads.fdstorm SEED DIRECTORY STATUS_FILE

Opens, closes, duplicates, swaps and fills files, pipes, eventfds, memfds, socket pairs and epolls, moves offsets, flips
flags, takes locks. Every step checks the number that it touches; now and then all of them are checked. Whatever differs
from the model is an "error" note.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from tests.workloads.status import Status

_NUMBERS = range(30, 110)
_FILES = 6
_ADD, _DEL = 1, 2
SETTLE_S = 1.0
_libc = ctypes.CDLL(None, use_errno=True)


class Content:
    """A regular file or memfd."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.data = b""


class Pipe:
    """A pipe, or one direction of a socket pair."""

    def __init__(self) -> None:
        self.queue = b""


class File:
    """One open file description. Some of the attributes mean something for some kinds only."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.flags = 0
        self.numbers: set[int] = set()
        self.content = Content(None)
        self.pos = 0
        self.reads: Pipe | None = None
        self.writes: Pipe | None = None
        self.count = 0
        self.watched: dict[int, File] = {}
        self.locked = False


class Storm:
    """The table and the operations on it."""

    def __init__(self, status: Status, seed: int, directory: Path) -> None:
        self.status = status
        self.chance = random.Random(seed)
        self.directory = directory
        self.contents = [Content(directory / f"storm-{number}") for number in range(_FILES)]
        for content in self.contents:
            assert content.path is not None
            content.path.touch()
        self.others = {int(name) for name in os.listdir("/proc/self/fd")}
        self.table: dict[int, File] = {}
        self.cloexec: dict[int, bool] = {}
        self.nr_steps = 0

    # -- numbers -----------------------------------------------------------------------------------------------------

    def place(self, fd: int, file: File, number: int | None = None) -> None:
        """Give a new descriptor a number of the storm's."""
        number = self.chance.choice(_NUMBERS) if number is None else number
        self.forget(number)
        cloexec = self.chance.random() < 0.5
        os.dup2(fd, number, not cloexec)
        os.close(fd)
        self.put(number, file, cloexec=cloexec)

    def put(self, number: int, file: File, *, cloexec: bool) -> None:
        self.table[number], self.cloexec[number] = file, cloexec
        file.numbers.add(number)

    def forget(self, number: int) -> None:
        file = self.table.pop(number, None)
        if file is not None:
            file.numbers.discard(number)
            if not file.numbers:
                for epoll in {id(f): f for f in self.table.values() if f.kind == "epoll"}.values():
                    epoll.watched = {n: f for n, f in epoll.watched.items() if f is not file}

    def living(self, direction: Pipe, *, reading: bool) -> bool:
        return any((f.reads if reading else f.writes) is direction for f in self.table.values())

    # -- operations --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        self.nr_steps += 1
        make = [self.open_file, self.open_file, self.open_pipe, self.open_event, self.open_memfd]
        make += [self.open_sockets, self.open_epoll]
        change = [self.close, self.close, self.close, self.duplicate, self.swap, self.close_on_exec]
        change += [self.non_blocking, self.use, self.use, self.use, self.use, self.watch]
        if len(self.table) < 30 or self.chance.random() < 0.15:
            self.chance.choice(make)()
        else:
            number = self.chance.choice(list(self.table))
            self.chance.choice(change)(number)
            if number in self.table:
                self.check(number)
        if self.nr_steps % 500 == 0:
            self.check_all()

    def open_file(self) -> None:
        file = File("file")
        file.content = self.chance.choice(self.contents)
        file.flags = self.chance.choice([0, os.O_APPEND])
        assert file.content.path is not None
        self.place(os.open(file.content.path, os.O_RDWR | file.flags), file)

    def open_memfd(self) -> None:
        file = File("memfd")
        file.content = Content(None)
        self.place(os.memfd_create("storm"), file)

    def open_pipe(self) -> None:
        pipe = Pipe()
        for fd, kind in zip(os.pipe(), ("reader", "writer")):
            file = File(kind)
            file.reads, file.writes = (pipe, None) if kind == "reader" else (None, pipe)
            self.place(fd, file)

    def open_sockets(self) -> None:
        there, back = Pipe(), Pipe()
        for end, reads, writes in zip(socket.socketpair(), (there, back), (back, there)):
            file = File("socket")
            file.reads, file.writes = reads, writes
            self.place(end.detach(), file)

    def open_event(self) -> None:
        file = File("event")
        file.count = self.chance.randrange(2)
        self.place(os.eventfd(file.count), file)

    def open_epoll(self) -> None:
        self.place(_libc.epoll_create1(0), File("epoll"))

    def close(self, number: int) -> None:
        os.close(number)
        self.forget(number)

    def duplicate(self, number: int) -> None:
        other = self.chance.choice(_NUMBERS)
        if other != number:
            file, cloexec = self.table[number], self.chance.random() < 0.5
            os.dup2(number, other, not cloexec)
            self.forget(other)
            self.put(other, file, cloexec=cloexec)

    def swap(self, number: int) -> None:
        other = self.chance.choice(list(self.table))
        mine, theirs = self.table[number], self.table[other]
        if mine is theirs:
            return
        spare = os.dup(number)
        os.dup2(other, number)
        os.dup2(spare, other)
        os.close(spare)
        for fd, old, new in ((number, mine, theirs), (other, theirs, mine)):
            old.numbers.discard(fd)
            self.put(fd, new, cloexec=False)

    def close_on_exec(self, number: int) -> None:
        self.cloexec[number] = not self.cloexec[number]
        os.set_inheritable(number, not self.cloexec[number])

    def non_blocking(self, number: int) -> None:
        file = self.table[number]
        if file.kind != "epoll":
            file.flags ^= os.O_NONBLOCK
            fcntl.fcntl(number, fcntl.F_SETFL, file.flags)

    def watch(self, number: int) -> None:
        """Have an epoll watch what stands at a number, or no longer."""
        epolls = [fd for fd, file in self.table.items() if file.kind == "epoll"]
        if not epolls or self.table[number].kind in ("epoll", "file", "memfd"):
            return
        epfd = self.chance.choice(epolls)
        epoll, file = self.table[epfd], self.table[number]
        if number in epoll.watched and epoll.watched[number] is not file:
            return  # Keeps the model simple: one interest for each number.
        operation = _DEL if number in epoll.watched else _ADD
        event = struct.pack("=IQ", select.EPOLLIN, number)
        if _libc.epoll_ctl(epfd, operation, number, event) < 0:
            self.status.error(f"epoll_ctl {operation} of {number}: {errno.errorcode[ctypes.get_errno()]}")
        if operation == _ADD:
            epoll.watched[number] = file
        else:
            del epoll.watched[number]

    def use(self, number: int) -> None:
        """Move data, an offset or a count."""
        file = self.table[number]
        data = self.chance.randbytes(self.chance.randrange(1, 40))
        if file.kind in ("file", "memfd"):
            self.use_content(number, file, data)
        elif file.kind == "event":
            if file.count and self.chance.random() < 0.5:
                os.eventfd_read(number)
                file.count = 0
            else:
                os.eventfd_write(number, 3)
                file.count += 3
        elif file.kind != "epoll":
            if file.writes is not None and self.living(file.writes, reading=True) and len(file.writes.queue) < 2000:
                os.write(number, data)
                file.writes.queue += data
            if file.reads is not None:
                self.empty(number, file.reads)

    def use_content(self, number: int, file: File, data: bytes) -> None:
        content = file.content
        what = self.chance.randrange(4)
        if what == 0:
            file.pos = self.chance.randrange(len(content.data) + 1)
            os.lseek(number, file.pos, os.SEEK_SET)
        elif what == 1 and len(content.data) < 20000:
            at = len(content.data) if file.flags & os.O_APPEND else file.pos
            os.write(number, data)
            content.data = content.data[:at] + data + content.data[at + len(data) :]
            file.pos = at + len(data)
        elif what == 2:
            found = os.read(number, 50)
            self.status.check(found == content.data[file.pos : file.pos + 50], f"fd {number} read something else")
            file.pos += len(found)
        elif file.kind == "file":
            fcntl.flock(number, fcntl.LOCK_UN if file.locked else fcntl.LOCK_SH)
            file.locked = not file.locked

    def empty(self, number: int, pipe: Pipe) -> None:
        if pipe.queue:
            found = os.read(number, len(pipe.queue))
            self.status.check(found == pipe.queue, f"fd {number} gave {len(found)} of {len(pipe.queue)} bytes")
            pipe.queue = b""
        elif self.table[number].kind == "reader" and not self.living(pipe, reading=False):
            # Not of sockets: what a peer left unread makes that an error, once.
            os.set_blocking(number, False)
            ended = _settled(lambda: _read(number), b"")
            self.status.check(ended == b"", f"fd {number} does not end")
            os.set_blocking(number, not self.table[number].flags & os.O_NONBLOCK)

    # -- checks ------------------------------------------------------------------------------------------------------

    def check(self, number: int) -> None:
        file = self.table[number]
        told = self.status.check
        told(os.get_inheritable(number) != self.cloexec[number], f"fd {number}: close on exec is wrong")
        flags = fcntl.fcntl(number, fcntl.F_GETFL) & (os.O_APPEND | os.O_NONBLOCK)
        told(flags == file.flags, f"fd {number}: {file.kind} has flags {flags:#o}, not {file.flags:#o}")
        if file.kind in ("file", "memfd"):
            told(os.lseek(number, 0, os.SEEK_CUR) == file.pos, f"fd {number}: offset is not {file.pos}")
            found = os.pread(number, 1 << 16, 0)
            told(found == file.content.data, f"fd {number}: {file.kind} has other content")
        elif file.kind == "epoll":
            expected = {n for n, watched in file.watched.items() if self.is_ready(watched)}
            ready = _settled(lambda: self.poll(number), expected)
            told(ready == expected, f"fd {number}: epoll shows {ready}, not {expected}")
        else:
            poller = select.poll()
            poller.register(number, select.POLLIN)
            ready = _settled(lambda: bool(poller.poll(0)), self.is_ready(file))
            told(ready == self.is_ready(file), f"fd {number}: {file.kind} is {'' if ready else 'not '}ready")

    def poll(self, epfd: int) -> set[int]:
        events = ctypes.create_string_buffer(12 * 128)
        count = _libc.epoll_wait(epfd, events, 128, 0)
        return {struct.unpack_from("=IQ", events, 12 * n)[1] for n in range(count)}

    def is_ready(self, file: File) -> bool:
        if file.kind == "event":
            return file.count > 0
        if file.kind == "writer":
            assert file.writes is not None
            return not self.living(file.writes, reading=True)  # POLLERR
        assert file.reads is not None
        return bool(file.reads.queue) or not self.living(file.reads, reading=False)

    def check_all(self) -> None:
        open_now = {int(name) for name in os.listdir("/proc/self/fd")} - self.others
        open_now = {fd for fd in open_now if _is_open(fd)}
        self.status.check(open_now == set(self.table), f"open: {open_now ^ set(self.table)} too many or too few")
        for number in self.table:
            self.check(number)


def _settled(look: Callable[[], object], expected: object) -> object:
    # Whoever looks at a running process may have a copy of a descriptor for a moment: it ends when that is closed.
    deadline = time.monotonic() + SETTLE_S
    while (found := look()) != expected and time.monotonic() < deadline:
        time.sleep(0.001)
    return found


def _read(fd: int) -> bytes | None:
    try:
        return os.read(fd, 1)
    except BlockingIOError:
        return None


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False  # the directory listing itself
    return True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int)
    parser.add_argument("directory", type=Path)
    parser.add_argument("status")
    options = parser.parse_args()
    status = Status(options.status)
    storm = Storm(status, options.seed, options.directory)
    while True:
        for _ in range(100):
            try:
                storm.step()
            except OSError as err:
                status.error(f"step {storm.nr_steps}: {err!r}")
        status.note(steps=storm.nr_steps, open=len(storm.table))
        time.sleep(0.005)


if __name__ == "__main__":
    main()

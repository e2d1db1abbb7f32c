"""One of every kind of file descriptor, and a check that each still is what it was.

Usage: python -m tests.workloads.fdzoo DIRECTORY STATUS_FILE [--only KIND[,KIND]]

DIRECTORY takes the files, the FIFO and the unix sockets. Every exhibit makes its descriptors once, then checks them ten
times a second: content, offset, flags, sharing, queued bytes. What a check takes out it puts back, so there is always
something in flight when the process is moved. A check compares with what was noted at the start, never with a guess.
"""

from __future__ import annotations

import argparse
import array
import ctypes
import fcntl
import os
import select
import signal
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.workloads import libc
from tests.workloads.status import Status

Check = Callable[[], None]
Exhibit = Callable[[Path], Check]

_NR_timerfd_create, _NR_timerfd_settime, _NR_timerfd_gettime = 283, 286, 287
_NR_signalfd4 = 289
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_F_SETPIPE_SZ, _F_GETPIPE_SZ = 1031, 1032
_SEAL_SHRINK, _SEAL_GROW = 2, 4


def regular_files(directory: Path) -> Check:
    """Offsets: shared between dup'd descriptors, separate between two opens; O_APPEND and CLOEXEC kept."""
    path = directory / "regular"
    path.write_bytes(bytes(range(256)) * 64)
    first = os.open(path, os.O_RDWR)
    twin = os.dup(first)
    os.set_inheritable(twin, True)
    other = os.open(path, os.O_RDONLY)
    log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.lseek(first, 1000, os.SEEK_SET)
    os.lseek(other, 77, os.SEEK_SET)
    size = 0

    def check() -> None:
        nonlocal size
        assert os.lseek(twin, 0, os.SEEK_CUR) == 1000, "dup'd descriptor lost the offset"
        os.lseek(twin, 1000, os.SEEK_SET)
        assert os.read(first, 2) == bytes([1000 % 256, 1001 % 256]), "wrong content"
        assert os.lseek(twin, 0, os.SEEK_CUR) == 1002, "offset is no longer shared"
        os.lseek(first, 1000, os.SEEK_SET)
        assert os.lseek(other, 0, os.SEEK_CUR) == 77, "separate open shares the offset"
        assert not os.get_inheritable(first) and os.get_inheritable(twin), "CLOEXEC changed"
        assert fcntl.fcntl(log, fcntl.F_GETFL) & os.O_APPEND, "O_APPEND lost"
        os.lseek(log, 0, os.SEEK_SET)
        size += os.write(log, b"line\n")
        assert os.fstat(log).st_size == size, "append went elsewhere"

    return check


def directories(directory: Path) -> Check:
    """A directory, and an O_PATH descriptor."""
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    path_only = os.open(directory, os.O_PATH)
    inode = os.fstat(opened).st_ino

    def check() -> None:
        assert stat.S_ISDIR(os.fstat(opened).st_mode)
        assert os.fstat(opened).st_ino == os.fstat(path_only).st_ino == inode
        assert os.stat("regular", dir_fd=path_only).st_size >= 0
        assert fcntl.fcntl(path_only, fcntl.F_GETFL) & os.O_PATH

    (directory / "regular").touch()
    return check


def devices(directory: Path) -> Check:
    """Character devices that every host has."""
    null, zero = os.open("/dev/null", os.O_RDWR), os.open("/dev/zero", os.O_RDONLY)
    chance = os.open("/dev/urandom", os.O_RDONLY | os.O_NONBLOCK)

    def check() -> None:
        assert os.write(null, b"x") == 1 and os.read(null, 1) == b""
        assert os.read(zero, 8) == bytes(8)
        assert len(os.read(chance, 8)) == 8
        assert fcntl.fcntl(chance, fcntl.F_GETFL) & os.O_NONBLOCK

    return check


def pipes(directory: Path) -> Check:
    """Unread bytes, size, non-blocking mode, packet boundaries."""
    reader, writer = os.pipe()
    size = fcntl.fcntl(writer, _F_SETPIPE_SZ, 1 << 17)
    os.write(writer, b"a" * 5000 + b"b" * 5000)
    packet_reader, packet_writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    half_reader, half_writer = os.pipe()
    os.write(half_writer, b"last words")
    os.close(half_writer)
    turns = 0
    for packet in (b"one", b"three"):
        os.write(packet_writer, packet)

    def check() -> None:
        nonlocal turns
        found = os.read(reader, 10000)
        assert found == b"a" * 5000 + b"b" * 5000, f"pipe held {len(found)} bytes"
        os.write(writer, found)
        assert fcntl.fcntl(reader, _F_GETPIPE_SZ) == size, "pipe size changed"
        assert os.read(packet_reader, 100) == b"one", "packet boundary lost"
        assert os.read(packet_reader, 100) == b"three", "packet boundary lost"
        os.write(packet_writer, b"one")
        os.write(packet_writer, b"three")
        assert not os.get_blocking(packet_reader), "O_NONBLOCK lost"
        turns += 1
        if turns == 30:
            assert os.read(half_reader, 100) == b"last words"
        if turns >= 30:
            assert os.read(half_reader, 100) == b"", "no end of file after the last writer"

    return check


def fifos(directory: Path) -> Check:
    """Both ends of a named pipe."""
    path = directory / "fifo"
    os.mkfifo(path)
    both = os.open(path, os.O_RDWR)
    writer = os.open(path, os.O_WRONLY)
    os.write(writer, b"queued")

    def check() -> None:
        assert os.read(both, 100) == b"queued"
        os.write(writer, b"queued")

    return check


def eventfds(directory: Path) -> Check:
    """A counter and a semaphore."""
    counter = os.eventfd(41)
    semaphore = os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)

    def check() -> None:
        assert os.eventfd_read(counter) == 41, "counter changed"
        os.eventfd_write(counter, 41)
        assert [os.eventfd_read(semaphore) for _ in range(3)] == [1, 1, 1], "no semaphore any more"
        try:
            os.eventfd_read(semaphore)
        except BlockingIOError:
            pass
        else:
            raise AssertionError("semaphore had more than 3")
        os.eventfd_write(semaphore, 3)

    return check


def epolls(directory: Path) -> Check:
    """Interest lists: level, edge and one-shot, user data, an epoll in an epoll."""
    outer, inner = select.epoll(), select.epoll()
    level, edge, once = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
    inner.register(level, select.EPOLLIN)
    inner.register(edge, select.EPOLLIN | select.EPOLLET)
    inner.register(once, select.EPOLLIN | select.EPOLLONESHOT)
    outer.register(inner.fileno(), select.EPOLLIN)

    def check() -> None:
        assert outer.poll(0) == [], "an event out of nothing"
        for fd in (level, edge, once):
            os.eventfd_write(fd, 1)
        assert [fd for fd, _ in outer.poll(1)] == [inner.fileno()], "nested epoll is deaf"
        assert sorted(fd for fd, _ in inner.poll(1)) == sorted([level, edge, once])
        assert [fd for fd, _ in inner.poll(0)] == [level], "edge or one-shot mode lost"
        for fd in (level, edge, once):
            os.eventfd_read(fd)
        inner.modify(once, select.EPOLLIN | select.EPOLLONESHOT)

    return check


def timerfds(directory: Path) -> Check:
    """A periodic one that ticks on, and a long one whose remaining time only shrinks."""
    fd = libc.syscall(_NR_timerfd_create, time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    long = libc.syscall(_NR_timerfd_create, time.CLOCK_BOOTTIME, os.O_CLOEXEC)
    every = libc.itimerspec(libc.seconds(0.05), libc.seconds(0.05))
    libc.syscall(_NR_timerfd_settime, fd, 0, ctypes.byref(every), None)
    far = libc.itimerspec(libc.seconds(0), libc.seconds(5000))
    libc.syscall(_NR_timerfd_settime, long, 0, ctypes.byref(far), None)
    last, since = 5000.0, time.time()

    def check() -> None:
        nonlocal last
        ready, _, _ = select.select([fd], [], [], 5)
        assert ready, "periodic timerfd stopped"
        assert struct.unpack("Q", os.read(fd, 8))[0] >= 1
        now = libc.itimerspec()
        libc.syscall(_NR_timerfd_gettime, long, ctypes.byref(now))
        left = now.it_value.tv_sec + now.it_value.tv_nsec / 1e9
        assert last >= left > 4000, f"remaining time went from {last} to {left}"
        spent = time.time() - since
        assert left + spent > 4999.9, f"the long timer ran {5000 - left:.3f} s in {spent:.3f} s"
        last = left

    return check


def signalfds(directory: Path) -> Check:
    """A signalfd with a pending signal."""
    mask = ctypes.c_uint64(1 << (signal.SIGUSR2 - 1))
    fd = libc.syscall(_NR_signalfd4, -1, ctypes.byref(mask), 8, os.O_NONBLOCK)
    os.kill(os.getpid(), signal.SIGUSR2)

    def check() -> None:
        found = os.read(fd, 128)
        assert struct.unpack_from("I", found)[0] == signal.SIGUSR2
        assert struct.unpack_from("I", found, 12)[0] == os.getpid(), "sender changed"
        os.kill(os.getpid(), signal.SIGUSR2)

    return check


def memfds(directory: Path) -> Check:
    """Content, offset, seals, and a second descriptor of the same file."""
    fd = os.memfd_create("zoo", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, b"0123456789" * 1000)
    fcntl.fcntl(fd, _F_ADD_SEALS, _SEAL_GROW | _SEAL_SHRINK)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    os.lseek(fd, 4321, os.SEEK_SET)
    count = 0

    def check() -> None:
        nonlocal count
        assert fcntl.fcntl(fd, _F_GET_SEALS) == _SEAL_GROW | _SEAL_SHRINK, "seals lost"
        assert os.lseek(fd, 0, os.SEEK_CUR) == 4321, "offset lost"
        assert os.fstat(fd).st_size == 10000
        assert os.pread(again, 8, 8) == count.to_bytes(8, "little") if count else True, "write lost"
        count += 1
        os.pwrite(fd, count.to_bytes(8, "little"), 8)
        assert os.pread(again, 8, 8) == count.to_bytes(8, "little"), "two files now"

    return check


def unix_pairs(directory: Path) -> Check:
    """Queued bytes, datagram boundaries, half-closed ends."""
    stream_left, stream_right = socket.socketpair()
    stream_left.send(b"queued" * 1000)
    datagram_left, datagram_right = socket.socketpair(type=socket.SOCK_DGRAM)
    packet_left, packet_right = socket.socketpair(type=socket.SOCK_SEQPACKET)
    for end in (datagram_left, packet_left):
        end.send(b"first")
        end.send(b"second, longer")
    half_left, half_right = socket.socketpair()
    half_left.send(b"bye")
    half_left.shutdown(socket.SHUT_WR)
    half_right.setblocking(False)

    def check() -> None:
        found = stream_right.recv(6000, socket.MSG_WAITALL)
        assert found == b"queued" * 1000, f"stream held {len(found)} bytes"
        stream_left.send(found)
        for left, right in ((datagram_left, datagram_right), (packet_left, packet_right)):
            assert right.recv(100) == b"first", "datagram boundary lost"
            assert right.recv(100) == b"second, longer", "datagram boundary lost"
            left.send(b"first")
            left.send(b"second, longer")
        assert half_right.recv(100, socket.MSG_PEEK) == b"bye", "half-closed end lost its bytes"
        half_right.send(b"x")
        assert half_left.recv(1) == b"x", "the open direction closed"

    return check


def passed_descriptors(directory: Path) -> Check:
    """A descriptor that is under way in a unix socket."""
    left, right = socket.socketpair()
    reader, writer = os.pipe()
    os.write(writer, b"inside")

    def send() -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reader]))]
        left.sendmsg([b"!"], rights)

    send()

    def check() -> None:
        _, fds, _, _ = socket.recv_fds(right, 1, 1)
        assert os.read(fds[0], 100) == b"inside"
        os.write(writer, b"inside")
        os.close(fds[0])
        send()

    return check


def unix_listeners(directory: Path) -> Check:
    """A listening path socket that a client of the same process reaches; a bound datagram socket."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "listener"))
    listener.listen(5)
    mailbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    mailbox.bind(str(directory / "mailbox"))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(b"\0ferry-zoo-%d" % os.getpid())
    abstract.listen()

    def check() -> None:
        for address in (str(directory / "listener"), b"\0ferry-zoo-%d" % os.getpid()):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(address)
                told = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                expected = (os.getpid(), os.geteuid(), os.getegid())
                assert struct.unpack("iII", told) == expected, "somebody else listens"
                server, _ = (listener if isinstance(address, str) else abstract).accept()
                with server:
                    server.send(b"hello")
                    assert client.recv(9) == b"hello"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.sendto(b"letter", str(directory / "mailbox"))
            assert mailbox.recv(100) == b"letter"

    return check


def inet_listeners(directory: Path) -> Check:
    """TCP listeners on both families with their options, UDP bound and connected to itself."""
    listeners = []
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)
        listener.bind((host, 0))
        listener.listen(7)
        listener.settimeout(2)
        listeners.append((listener, listener.getsockname()))
    udp = socket.socket(type=socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    udp.connect(udp.getsockname())
    udp.send(b"datagram")
    udp.settimeout(2)
    idle = socket.socket()

    def check() -> None:
        for listener, address in listeners:
            assert listener.getsockname() == address
            assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 77
            assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            with socket.socket(listener.family) as client:
                client.settimeout(2)
                # Reset at the end: no TIME_WAIT that could be in the way of a bind.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.connect(address[:2])
                server, _ = listener.accept()
                with server:
                    server.send(b"hello")
                    assert client.recv(9) == b"hello"
        assert udp.recv(100) == b"datagram", "queued datagram lost"
        udp.send(b"datagram")
        assert idle.getsockname() == ("0.0.0.0", 0)

    return check


# Their checks have a connection open for an instant, which Ferry refuses: they hold still while DIRECTORY/still exists.
_CONNECTING = ("unix_listener", "inet")

EXHIBITS: dict[str, Exhibit] = {
    "regular": regular_files,
    "directory": directories,
    "device": devices,
    "pipe": pipes,
    "fifo": fifos,
    "eventfd": eventfds,
    "epoll": epolls,
    "timerfd": timerfds,
    "signalfd": signalfds,
    "memfd": memfds,
    "unix_pair": unix_pairs,
    "passed": passed_descriptors,
    "unix_listener": unix_listeners,
    "inet": inet_listeners,
}


def descriptors() -> dict[int, tuple[int, int, int]]:
    """Number -> (type, status flags, descriptor flags) of everything open."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            kind = stat.S_IFMT(os.fstat(fd).st_mode)
            found[fd] = (kind, fcntl.fcntl(fd, fcntl.F_GETFL), fcntl.fcntl(fd, fcntl.F_GETFD))
        except OSError:
            continue  # the directory listing itself
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("status")
    parser.add_argument("--only", default=",".join(EXHIBITS))
    options = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    status = Status(options.status)
    names = options.only.split(",")
    checks = {name: EXHIBITS[name](options.directory) for name in names}
    # One thread more: descriptor tables are shared between threads.
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    inventory = descriptors()
    turns = 0
    while True:
        still = (options.directory / "still").exists()
        for name, check in checks.items():
            if still and name in _CONNECTING:
                continue
            try:
                check()
            except (AssertionError, OSError) as err:
                status.error(f"{name}: {err!r}")
        now = descriptors()
        if now != inventory:
            changed = {fd: (inventory.get(fd), now.get(fd)) for fd in inventory.keys() | now.keys()}
            changed = {fd: both for fd, both in changed.items() if both[0] != both[1]}
            status.error(f"descriptors changed: {changed}")
            inventory = now
        turns += 1
        status.note(turns=turns, still=still)
        time.sleep(0.1)


if __name__ == "__main__":
    main()

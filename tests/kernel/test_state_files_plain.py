"""Regular files, devices, pipes, eventfd, timerfd, signalfd, epoll of a live child."""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import socket
import struct
import tempfile
import time
from pathlib import Path

import pytest

from agent.errors import RefusedError, RestoreError
from agent.state.fileitems import preflight_files
from tests.kernel.files_support import Options, body_of, file_of, live_child, restored
from tests.kernel.support import skip_unless_root


def test_offset_flags_and_sharing_of_regular_files(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"0123456789")
    (tmp_path / "log").write_bytes(b"first\n")
    code = """
    a = os.open("data", os.O_RDONLY)
    os.lseek(a, 4, 0)
    os.dup2(a, 50)
    b = os.open("data", os.O_RDONLY); os.dup2(b, 51); os.close(b)
    c = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK); os.dup2(c, 52, inheritable=False)
    d = os.open(".", os.O_RDONLY | os.O_DIRECTORY); os.dup2(d, 53)
    e = os.open("data", os.O_PATH); os.dup2(e, 54)
    os.dup2(a, 60)
    ready()
    """
    with live_child(tmp_path, code) as child:
        assert child.check() == []
        state = child.dump()
        assert preflight_files(state, Options()) == []
    assert file_of(state, 50) == file_of(state, 60)
    assert file_of(state, 50) != file_of(state, 51)
    assert {entry.fd for entry in state.fds if entry.cloexec} >= {52}
    with restored(state) as again:
        assert os.read(again.fd(50), 3) == b"456"
        assert os.read(again.fd(51), 3) == b"012"
        os.write(again.fd(52), b"second\n")
        assert fcntl.fcntl(again.fd(52), fcntl.F_GETFL) & os.O_NONBLOCK
        assert "data" in os.listdir(again.fd(53))
        assert fcntl.fcntl(again.fd(54), fcntl.F_GETFL) & os.O_PATH
    assert (tmp_path / "log").read_bytes() == b"first\nsecond\n"


def test_all_obstacles_are_named_at_once(tmp_path: Path) -> None:
    code = """
    a = open("gone", "w"); os.unlink("gone")
    libc = ctypes.CDLL(None)
    inotify = libc.inotify_init1(0)
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    master, slave = os.openpty()
    pidfd = os.pidfd_open(os.getpid())
    fuse = os.open("/dev/kmsg", os.O_RDONLY)
    locked = open("locked", "w"); fcntl.flock(locked, fcntl.LOCK_EX)
    ready()
    """
    with live_child(tmp_path, code) as child:
        kinds = sorted(obstacle.kind for obstacle in child.check())
        with pytest.raises(RefusedError) as caught:
            child.dump()
    assert kinds == sorted(
        ["deleted file", "inotify", "socket", "terminal", "terminal", "pidfd", "device", "file lock"]
    )
    assert len(caught.value.obstacles) == len(kinds)
    assert all(obstacle.what.startswith("fd ") for obstacle in caught.value.obstacles)


def test_a_changed_file_is_refused_by_the_destination(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    with live_child(tmp_path, "a = open('a'); b = open('b'); ready()") as child:
        state = child.dump()
    (tmp_path / "a").write_bytes(b"longer")
    (tmp_path / "b").unlink()
    obstacles = preflight_files(state, Options())
    assert [obstacle.kind for obstacle in obstacles] == ["file", "file"]
    with pytest.raises(RestoreError, match="Cannot restore fd"), restored(state):
        pass


def test_pipe_contents_ends_and_size(tmp_path: Path) -> None:
    code = """
    r, w = os.pipe()
    fcntl.fcntl(w, 1031, 1 << 18)
    os.write(w, b"x" * 100000); os.write(w, b"yz")
    os.dup2(r, 50); os.dup2(w, 51); os.set_blocking(51, False)
    r2, w2 = os.pipe(); os.write(w2, b"left"); os.close(w2); os.dup2(r2, 52)
    r3, w3 = os.pipe(); os.close(r3); os.dup2(w3, 53)
    r4, w4 = os.pipe2(os.O_DIRECT)
    os.write(w4, b"one"); os.write(w4, b"three"); os.dup2(r4, 54); os.dup2(w4, 55)
    other = os.open("/proc/self/fd/%d" % r4, os.O_RDONLY | os.O_NONBLOCK); os.dup2(other, 56)
    ready()
    """
    with live_child(tmp_path, code) as child:
        assert child.check() == []
        state = child.dump()
        assert child.dump().files == state.files, "dumping must not consume anything"
        assert preflight_files(state, Options()) == []
    with restored(state) as again:
        assert fcntl.fcntl(again.fd(50), 1032) == 1 << 18
        assert not os.get_blocking(again.fd(51)) and os.get_blocking(again.fd(50))
        got = b""
        while len(got) < 100002:
            got += os.read(again.fd(50), 1 << 18)
        assert got == b"x" * 100000 + b"yz"
        os.write(again.fd(51), b"more")
        assert os.read(again.fd(50), 10) == b"more"
        assert os.read(again.fd(52), 10) == b"left"
        assert os.read(again.fd(52), 10) == b""
        with pytest.raises(BrokenPipeError):
            os.write(again.fd(53), b"x")
        assert os.read(again.fd(54), 100) == b"one"
        assert os.read(again.fd(56), 100) == b"three"
        os.write(again.fd(55), b"a")
        os.write(again.fd(55), b"b")
        assert os.read(again.fd(54), 100) == b"a"


def test_a_pipe_to_another_process_is_an_obstacle(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        os.set_inheritable(writer, True)
        code = f"""
        w = os.open("/proc/{os.getpid()}/fd/{writer}", os.O_WRONLY); os.dup2(w, 50); os.close(w)
        ready()
        """
        with live_child(tmp_path, code) as child:
            (obstacle,) = child.check()
        assert obstacle.kind == "pipe" and f"process {os.getpid()}" in obstacle.detail
        external = Options(external_fds=frozenset({50}), inherit_fds={50: writer})
        with live_child(tmp_path, code, external) as child:
            assert child.check() == []
            state = child.dump()
        assert [o.kind for o in preflight_files(state, Options())] == ["external"]
        assert preflight_files(state, external) == []
        with restored(state, external) as again:
            os.write(again.fd(50), b"hello")
            assert os.read(reader, 10) == b"hello"
    finally:
        os.close(reader)
        os.close(writer)


def test_fifo_ends_and_contents(tmp_path: Path) -> None:
    code = """
    os.mkfifo("fifo")
    a = os.open("fifo", os.O_RDWR); os.write(a, b"abc"); os.dup2(a, 50)
    b = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK); os.dup2(b, 51)
    ready()
    """
    with live_child(tmp_path, code) as child:
        assert child.check() == []
        state = child.dump()
        with restored(state):
            pass  # It is the same FIFO, and holds what it should.
        child_fd = os.open(tmp_path / "fifo", os.O_WRONLY)
        os.write(child_fd, b"more")
        os.close(child_fd)
        with pytest.raises(RestoreError, match="in use"), restored(state):
            pass
    assert preflight_files(state, Options()) == []
    with restored(state) as again:
        assert os.read(again.fd(51), 10) == b"abc"
        os.write(again.fd(50), b"d")
        assert os.read(again.fd(51), 10) == b"d"
    os.unlink(tmp_path / "fifo")
    assert [o.kind for o in preflight_files(state, Options())] == ["fifo", "fifo"]


def test_eventfd_timerfd_signalfd(tmp_path: Path) -> None:
    code = """
    libc = ctypes.CDLL(None, use_errno=True)
    def keep(fd, number):
        assert fd >= 0
        os.dup2(fd, number); os.close(fd)
    keep(libc.eventfd(7, 0o4000), 50)
    keep(libc.eventfd(2, 1), 51)
    def timer(clock, flags, interval, value):
        fd = libc.timerfd_create(clock, 0)
        spec = struct.pack("=qqqq", int(interval), int(interval % 1 * 1e9), int(value), int(value % 1 * 1e9))
        assert libc.timerfd_settime(fd, flags, spec, None) == 0
        return fd
    keep(timer(1, 0, 2.5, 1000), 52)
    keep(timer(0, 3, 0, time.time() + 500), 53)
    keep(timer(1, 0, 0.01, 0.01), 54)
    keep(libc.timerfd_create(7, 0), 55)
    keep(timer(1, 0, 0, 0.001), 57)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    mask = ctypes.create_string_buffer(128); mask[1] = 0x02
    keep(libc.signalfd(-1, mask, 0o4000), 56)
    time.sleep(0.05)
    ready()
    """
    with live_child(tmp_path, code) as child:
        assert child.check() == []
        state = child.dump()
        assert preflight_files(state, Options()) == []
    assert body_of(state, 56).mask == 1 << 9
    assert body_of(state, 53).deadline_ns is not None
    with restored(state) as again:
        restorer = again.restorer
        counter, semaphore = again.fd(50), again.fd(51)
        assert struct.unpack("Q", os.read(counter, 8)) == (7,)
        with pytest.raises(BlockingIOError):
            os.read(counter, 8)
        assert struct.unpack("Q", os.read(semaphore, 8)) == (1,)
        assert struct.unpack("Q", os.read(semaphore, 8)) == (1,)
        kept = {number: os.dup(again.fd(number)) for number in range(52, 58)}
        try:
            restorer.start()
            shown = {n: Path(f"/proc/self/fdinfo/{fd}").read_text() for n, fd in kept.items()}
            assert "it_interval: (2, 500000000)" in shown[52]
            assert "it_value: (999, " in shown[52]
            assert "settime flags: 03" in shown[53]
            assert "it_value: (49" in shown[53]
            assert "clockid: 7" in shown[55]
            assert "it_value: (0, 0)" in shown[55]
            (ticks,) = struct.unpack("Q", os.read(kept[54], 8))
            assert ticks >= body_of(state, 54).ticks > 1
            assert struct.unpack("Q", os.read(kept[57], 8)) == (1,), "an unread expiry is kept"
            assert "sigmask:\t0000000000000200" in shown[56]
        finally:
            for fd in kept.values():
                os.close(fd)


def test_epoll_interests_name_descriptions(tmp_path: Path) -> None:
    code = """
    a, b = socket.socketpair()
    ep = select.epoll(); os.dup2(ep.fileno(), 50); ep.close(); ep = select.epoll.fromfd(50)
    libc = ctypes.CDLL(None, use_errno=True)
    def add(epfd, fd, events, data):
        assert libc.epoll_ctl(epfd, 1, fd, struct.pack("=IQ", events, data)) == 0
    os.dup2(a.fileno(), 51)
    add(50, 51, select.EPOLLIN | select.EPOLLET, 0xdeadbeefcafe)
    os.dup2(b.fileno(), 52)
    add(50, 52, select.EPOLLOUT | select.EPOLLONESHOT, 5)
    ep.poll(0)                                       # spends the one-shot
    outer = select.epoll(); os.dup2(outer.fileno(), 53)
    add(53, 50, select.EPOLLIN, 9)
    os.dup2(a.fileno(), 54); add(50, 54, select.EPOLLIN, 7); os.close(54)   # closed, a lives on
    os.dup2(0, 54)                                                          # and taken again
    ready()
    """
    with live_child(tmp_path, code) as child:
        assert child.check() == []
        state = child.dump()
    items = {item.fd: item for item in body_of(state, 50).items}
    assert items[51].data == 0xDEADBEEFCAFE and items[51].events & select.EPOLLET
    assert items[52].events == select.EPOLLONESHOT
    assert items[54].file_id == file_of(state, 51).id != file_of(state, 54).id
    assert [item.file_id for item in body_of(state, 53).items] == [file_of(state, 50).id]


def test_epoll_interest_in_an_unreachable_file_is_an_obstacle(tmp_path: Path) -> None:
    code = """
    a, b = socket.socketpair()
    ep = select.epoll(); ep.register(a.fileno(), select.EPOLLIN)
    c, d = socket.socketpair()
    c.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [a.fileno()]))])
    a.close()
    ready()
    """
    with live_child(tmp_path, code) as child:
        kinds = {obstacle.kind for obstacle in child.check()}
    assert kinds == {"epoll", "unix socket"}


def test_locks_are_carried_on_request(tmp_path: Path) -> None:
    code = """
    f = open("flock", "w"); fcntl.flock(f, fcntl.LOCK_EX)
    p = open("posix", "w"); fcntl.lockf(p, fcntl.LOCK_EX, 10, 5)
    o = open("ofd", "w"); fcntl.fcntl(o, 37, struct.pack("=hh4xqqi4x", 1, 0, 3, 4, 0))
    os.dup2(f.fileno(), 50); os.dup2(p.fileno(), 51); os.dup2(o.fileno(), 52)
    ready()
    """
    with live_child(tmp_path, code, Options(file_locks=True)) as child:
        assert child.check() == []
        state = child.dump()
        refused = [str(obstacle) for obstacle in preflight_files(state, Options())]
        assert [name in text for name, text in zip(("flock", "posix", "ofd"), refused)] == [True] * 3
        with pytest.raises(RestoreError, match="lock is held by another process"), restored(state):
            pass
    assert preflight_files(state, Options()) == []
    (lock,) = file_of(state, 51).locks
    assert (lock.start, lock.length, lock.exclusive) == (5, 10, True)
    with restored(state) as again:
        with open(tmp_path / "flock") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "OFDLCK" in Path(f"/proc/self/fdinfo/{again.fd(52)}").read_text()


def test_a_thousand_descriptors_take_milliseconds(tmp_path: Path) -> None:
    code = """
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, 2000))
    for number in range(500):
        os.open("/dev/null", os.O_RDWR)
    for number in range(250):
        os.pipe()
    ready()
    """
    with live_child(tmp_path, code) as child:
        child.check()
        start = time.perf_counter()
        state = child.dump()
        seconds = time.perf_counter() - start
    assert len(state.fds) >= 1000
    print(f"{seconds * 1000:.1f} ms")
    assert seconds < 1.0


def test_a_file_on_a_mount_that_only_the_process_sees(tmp_path: Path) -> None:
    code = """
    libc = ctypes.CDLL(None, use_errno=True)
    os.mkdir("private")
    assert libc.unshare(0x20000) == 0
    assert libc.mount(None, b"/", None, (1 << 18) | 16384, None) == 0
    assert libc.mount(b"none", b"private", b"tmpfs", 0, None) == 0
    open("private/hidden", "w").close()
    os.dup2(os.open("private/hidden", os.O_RDONLY), 50)
    ready()
    """
    with live_child(tmp_path, code) as child:
        assert child.check() == []
        assert body_of(child.dump(), 50).path == str(tmp_path / "private" / "hidden")


def test_files_of_a_process_that_has_changed_its_root(tmp_path: Path) -> None:
    skip_unless_root()
    jail = tmp_path / "jail"
    jail.mkdir()
    # Short: the name of a unix socket has only 108 bytes, and this one is bound before the change.
    outside = tempfile.mkdtemp(dir="/tmp")
    code = f"""
    flag = sys.argv[1]
    here = os.open(os.path.dirname(flag), os.O_RDONLY)
    def ready():
        os.rename(os.path.basename(flag) + ".tmp", os.path.basename(flag), src_dir_fd=here, dst_dir_fd=here)
        while True:
            signal.pause()
    def keep(thing, number):
        os.dup2(thing if isinstance(thing, int) else thing.fileno(), number)
    def mailbox(name, number):
        s = socket.socket(type=socket.SOCK_DGRAM, family=socket.AF_UNIX); s.bind(name); keep(s, number)
        s.sendto(b"letter", name)
    keep(os.open({outside!r} + "/before", os.O_RDWR | os.O_CREAT), 50)
    mailbox({outside!r} + "/early", 51)
    os.chroot({str(jail)!r}); os.chdir("/")
    os.mkdir("run"); os.mknod("null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    keep(os.open("/after", os.O_RDWR | os.O_CREAT), 60)
    mailbox("/run/late", 61); mailbox("relative", 62); mailbox("/run/removed", 63); os.unlink("/run/removed")
    client = socket.socket(type=socket.SOCK_DGRAM, family=socket.AF_UNIX); client.connect("/run/late")
    keep(client, 64)
    os.mkfifo("/fifo"); keep(os.open("/fifo", os.O_RDWR), 65); os.write(65, b"queued")
    keep(os.open("/null", os.O_RDWR), 66); keep(os.open("/run", os.O_PATH), 67)
    ready()
    """
    with live_child(tmp_path, code.replace("flag = ", "import stat; flag = ")) as child:
        assert child.check() == []
        state = child.dump()
    assert preflight_files(state, Options()) == []
    assert body_of(state, 50).path == outside + "/before"
    assert body_of(state, 60).path == str(jail / "after")
    assert (body_of(state, 51).name.root, body_of(state, 61).name.root) == ("", str(jail))
    with restored(state) as again:
        for number, path in (
            (50, f"{outside}/before"), (60, jail / "after"), (65, jail / "fifo"), (66, jail / "null"),
            (67, jail / "run"),
        ):  # fmt: skip
            assert os.readlink(f"/proc/self/fd/{again.fd(number)}") == str(path)
        for number, name in ((51, f"{outside}/early"), (61, "/run/late"), (62, "relative"), (63, "/run/removed")):
            with socket.socket(fileno=os.dup(again.fd(number))) as box:
                assert (box.getsockname(), box.recv(100)) == (name, b"letter")
        assert (jail / "run" / "late").is_socket() and (jail / "relative").is_socket()
        assert not (jail / "run" / "removed").exists()
        with socket.socket(fileno=os.dup(again.fd(64))) as client:
            client.send(b"hello")
        assert os.read(again.fd(61), 100) == b"hello"
        assert os.read(again.fd(65), 100) == b"queued"
    # What is missing below the new root is named by where it must be.
    (jail / "after").unlink()
    (jail / "run" / "late").unlink()
    (jail / "run").rmdir()
    found = {obstacle.detail.partition(":")[0] for obstacle in preflight_files(state, Options())}
    assert {str(jail / "after"), str(jail / "run"), "/run/late"} <= found
    shutil.rmtree(outside)


def test_a_file_that_differs_on_the_destination_is_named(tmp_path: Path) -> None:
    for name in ("read", "written", "log"):
        (tmp_path / name).write_bytes(b"0123456789")
    (tmp_path / "folder").mkdir(mode=0o755)
    code = """
    os.dup2(os.open("read", os.O_RDONLY), 50); os.dup2(os.open("written", os.O_RDWR), 51)
    os.dup2(os.open("log", os.O_WRONLY | os.O_APPEND), 52); os.dup2(os.open("folder", os.O_RDONLY), 53)
    os.dup2(os.open("folder", os.O_PATH), 54)
    ready()
    """
    with live_child(tmp_path, code) as child:
        state = child.dump()

    def problems() -> dict[str, str]:
        found = [obstacle.detail.partition(": ") for obstacle in preflight_files(state, Options())]
        if found:
            with pytest.raises(RestoreError) as error, restored(state):
                pass
            assert any(f"{path}: {problem}" in str(error.value) for path, _, problem in found)
        return {Path(path).name: problem for path, _, problem in found}

    assert problems() == {}
    before = (tmp_path / "read").stat()
    # What is only read must be the very same; what is written may have grown, and a log may have been cut.
    (tmp_path / "written").write_bytes(b"0123456789 and more")
    (tmp_path / "log").write_bytes(b"")
    assert problems() == {}
    os.utime(tmp_path / "read", ns=(0, before.st_mtime_ns + 2 * 10**9))
    assert problems()["read"].startswith("it was modified at")
    (tmp_path / "read").write_bytes(b"012345678")
    assert problems() == {"read": "its size is 9, not 10"}
    (tmp_path / "read").write_bytes(b"0123456789")
    os.utime(tmp_path / "read", ns=(0, before.st_mtime_ns))
    (tmp_path / "written").write_bytes(b"012")
    assert problems() == {"written": "its size is 3, smaller than 10"}
    (tmp_path / "written").write_bytes(b"0123456789")
    (tmp_path / "log").chmod(0o600)
    (tmp_path / "folder").chmod(0o700)
    assert problems() == {"log": "its mode is 600, not 644", "folder": "its mode is 700, not 755"}
    (tmp_path / "log").unlink()
    (tmp_path / "folder").rmdir()
    (tmp_path / "folder").touch()
    assert set(problems()) == {"log", "folder"}


def test_a_timerfd_never_ends_early_however_long_the_dump_takes(tmp_path: Path) -> None:
    code = """
    libc = ctypes.CDLL(None)
    fd = libc.timerfd_create(1, 0)
    libc.timerfd_settime(fd, 0, struct.pack("=qqqq", 0, 0, 5000, 0), None)
    os.dup2(fd, 50)
    ready()
    """
    with live_child(tmp_path, code) as child:
        before_ns = time.monotonic_ns()
        value = re.search(r"it_value: \((\d+), (\d+)\)", Path(f"/proc/{child.pid}/fdinfo/50").read_text())
        assert value
        state = child.dump()
        after_ns = time.monotonic_ns()
    assert before_ns < state.clock_monotonic_ns < after_ns
    ends_ns = before_ns + int(value[1]) * 10**9 + int(value[2])
    assert state.clock_monotonic_ns + body_of(state, 50).remaining_ns >= ends_ns

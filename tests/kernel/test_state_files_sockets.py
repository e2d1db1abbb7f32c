"""TCP, UDP and unix sockets of a live child."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from agent.errors import RefusedError
from agent.kernel.pidfd import pidfd_getfd
from agent.state.fileitems import preflight_files
from agent.state.filerestore import FileRestorer
from agent.state.inetsk import reset_connections
from agent.state.sockets import socket_identity
from agent.types import Pid
from protocol.state.inetsk import InetState
from tests.kernel.files_support import (
    Again,
    Options,
    body_of,
    live_child,
    restore_context,
    restored,
)


def sock(again: Again, number: int) -> socket.socket:
    """Return an own socket object for a restored socket."""
    return socket.socket(fileno=os.dup(again.fd(number)))


def test_what_is_no_socket_any_more_leaves_nothing_open() -> None:
    # A running target may have put another file there since its link was read.
    before = set(os.listdir("/proc/self/fd"))
    with open("/dev/null", "rb") as null:
        for _ in range(3):
            with pytest.raises(OSError, match="non-socket"):
                socket_identity(null.fileno())
    assert set(os.listdir("/proc/self/fd")) == before


def test_listening_and_bound_inet_sockets(tmp_path: Path) -> None:
    code = """
    def keep(s, number):
        os.dup2(s.fileno(), number); s.close()
    a = socket.socket(); a.setsockopt(1, socket.SO_REUSEADDR, 1); a.setsockopt(6, socket.TCP_NODELAY, 1)
    a.setsockopt(1, socket.SO_KEEPALIVE, 1); a.setsockopt(6, socket.TCP_KEEPIDLE, 77)
    a.bind(("127.0.0.1", 0)); a.listen(37); a.setblocking(False); keep(a, 50)
    b = socket.socket(socket.AF_INET6); b.setsockopt(41, socket.IPV6_V6ONLY, 1)
    b.setsockopt(1, socket.SO_LINGER, struct.pack("ii", 1, 9)); b.settimeout(None)
    b.setsockopt(1, socket.SO_RCVTIMEO, struct.pack("qq", 3, 0)); b.setsockopt(1, socket.SO_SNDBUF, 50000)
    b.bind(("::1", 0)); b.listen(5); keep(b, 51)
    u = socket.socket(type=socket.SOCK_DGRAM); u.setsockopt(1, socket.SO_BROADCAST, 1)
    u.setsockopt(0, socket.IP_TTL, 33); u.bind(("127.0.0.1", 0))
    v = socket.socket(type=socket.SOCK_DGRAM); v.connect(u.getsockname()); v.send(b"one"); v.send(b"2")
    keep(u, 52); keep(v, 53)
    keep(socket.socket(), 54)
    ready()
    """
    with live_child(tmp_path, code) as child:
        assert child.check() == []
        state = child.dump()
        busy = preflight_files(state, Options())
        assert {obstacle.kind for obstacle in busy} == {"port"} and len(busy) == 4
    assert preflight_files(state, Options()) == []
    with restored(state) as again:
        listener = sock(again, 50)
        assert listener.getsockname() == ("127.0.0.1", body_of(state, 50).local.port)
        assert struct.unpack_from("I", listener.getsockopt(6, socket.TCP_INFO, 32), 28) == (37,)
        assert listener.getsockopt(6, socket.TCP_NODELAY) == 1
        assert listener.getsockopt(6, socket.TCP_KEEPIDLE) == 77
        with pytest.raises(BlockingIOError):
            listener.accept()
        with socket.create_connection(listener.getsockname()):
            listener.setblocking(True)
            listener.accept()[0].close()
        six = sock(again, 51)
        assert six.getsockopt(41, socket.IPV6_V6ONLY) == 1
        assert six.getsockopt(1, socket.SO_REUSEADDR) == 0
        assert six.getsockopt(1, socket.SO_LINGER, 8) == struct.pack("ii", 1, 9)
        assert six.getsockopt(1, socket.SO_RCVTIMEO, 16) == struct.pack("qq", 3, 0)
        assert six.getsockopt(1, socket.SO_SNDBUF) == 100000
        receiver, sender = sock(again, 52), sock(again, 53)
        assert receiver.getsockopt(0, socket.IP_TTL) == 33
        sender.send(b"datagram")
        assert receiver.recvfrom(100) == (b"one", sender.getsockname())
        assert [receiver.recv(100) for _ in range(2)] == [b"2", b"datagram"]
        fresh = sock(again, 54)
        fresh.connect(listener.getsockname())
        for each in (listener, six, receiver, sender, fresh):
            each.close()


def test_peers_learn_of_the_end_before_the_process_dies(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = f"""
        for number in (50, 51):
            s = socket.create_connection(("127.0.0.1", {listener.getsockname()[1]}))
            os.dup2(s.fileno(), number); s.close()
        l = socket.create_server(("127.0.0.1", 0)); os.dup2(l.fileno(), 52); l.close()
        ready()
        """
        with live_child(tmp_path, code) as child:
            alone, shared = listener.accept()[0], listener.accept()[0]
            other_holder = pidfd_getfd(child.ctx.pidfd, 51)
            try:
                assert poll(alone) == poll(shared) == 0
                reset_connections(child.ctx)
                child.ctx.drop_fetched()
                assert poll(alone) & select.POLLHUP
                with pytest.raises(ConnectionResetError):
                    alone.recv(1)
                assert poll(shared) == 0
            finally:
                os.close(other_holder)
                alone.close()
                shared.close()


def poll(connection: socket.socket) -> int:
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    return dict(poller.poll(0)).get(connection.fileno(), 0)


def test_tcp_connections_are_refused_or_reset(tmp_path: Path) -> None:
    code = """
    for family, host, number in ((socket.AF_INET, "127.0.0.1", 50), (socket.AF_INET6, "::1", 60)):
        l = socket.socket(family); l.bind((host, 0)); l.listen()
        c = socket.socket(family); c.connect(l.getsockname())
        a, _ = l.accept()
        c.send(b"unread")
        os.dup2(a.fileno(), number); os.dup2(c.fileno(), number + 1)
        os.set_blocking(number, False)
    ready()
    """
    with live_child(tmp_path, code) as child:
        obstacles = child.check()
        assert [obstacle.kind for obstacle in obstacles] == ["tcp connection"] * 4
        assert all("--tcp-close" in obstacle.hint for obstacle in obstacles)
    with live_child(tmp_path, code, Options(tcp_close=True)) as child:
        assert child.check() == []
        state = child.dump()
    assert body_of(state, 50).state is InetState.RESET
    with restored(state) as again:
        for number in (50, 51, 60, 61):
            poller = select.poll()
            poller.register(again.fd(number), select.POLLIN)
            ((_, events),) = poller.poll(0)
            assert events & select.POLLIN and events & select.POLLHUP
            with sock(again, number) as reset:
                with pytest.raises(ConnectionResetError):
                    reset.recv(10)
                assert reset.recv(10) == b""
                with pytest.raises(BrokenPipeError):
                    reset.send(b"x")


def test_unix_pairs_keep_queues_and_shutdown(tmp_path: Path) -> None:
    code = """
    def keep(s, number):
        os.dup2(s.fileno(), number); s.close()
    a, b = socket.socketpair()
    a.send(b"to b, "); a.send(b"more"); b.send(b"to a"); a.shutdown(socket.SHUT_WR)
    b.setsockopt(1, socket.SO_PASSCRED, 1)
    keep(a, 50); keep(b, 51)
    c, d = socket.socketpair(type=socket.SOCK_SEQPACKET)
    c.send(b"one"); c.send(b"two!"); d.send(b"back"); keep(c, 52); keep(d, 53)
    e, f = socket.socketpair(type=socket.SOCK_DGRAM)
    e.send(b""); e.send(b"x"); e.send(b"yy"); keep(e, 54); keep(f, 55)
    g, h = socket.socketpair(); h.send(b"last words"); h.close(); keep(g, 56)
    i, j = socket.socketpair(type=socket.SOCK_DGRAM); j.close(); keep(i, 57)
    k, l = socket.socketpair(); l.setblocking(False); l.setsockopt(1, socket.SO_SNDBUF, 300000)
    try:
        while True: l.send(b"z" * 1000)
    except BlockingIOError: pass
    keep(k, 58); keep(l, 59)
    m, n = socket.socketpair(); keep(m, 60); keep(n, 61)
    os.dup2(60, 62)
    ready()
    """
    with live_child(tmp_path, code) as child:
        assert child.check() == []
        state = child.dump()
        assert child.dump().files == state.files
        assert preflight_files(state, Options()) == []
    expected = len(b"".join(message.data for message in body_of(state, 58).queue))
    assert expected > 100000
    with restored(state) as again:
        a, b, c, d, e, f, g, i = (sock(again, number) for number in range(50, 58))
        assert b.getsockopt(1, socket.SO_PASSCRED) == 1
        assert b.recv(100) == b"to b, more" and b.recv(100) == b""
        assert a.recv(100) == b"to a"
        with pytest.raises(BrokenPipeError):
            a.send(b"x")
        b.send(b"still open")
        assert a.recv(100) == b"still open"
        assert (d.recv(100), d.recv(100), c.recv(100)) == (b"one", b"two!", b"back")
        assert (f.recv(100), f.recv(100), f.recv(100)) == (b"", b"x", b"yy")
        e.send(b"new")
        assert f.recv(100) == b"new"
        assert g.recv(100) == b"last words" and g.recv(100) == b""
        with pytest.raises(OSError) as refused:
            i.send(b"x")
        assert refused.value.errno in (errno.ECONNREFUSED, errno.ENOTCONN)
        k, last = sock(again, 58), sock(again, 59)
        k.setblocking(False)
        got = 0
        while got < expected:
            got += len(k.recv(1 << 20))
        assert last.getsockopt(1, socket.SO_SNDBUF) == 600000 and not os.get_blocking(again.fd(59))
        m, n = sock(again, 60), sock(again, 61)
        m.send(b"q")
        assert n.recv(1) == b"q"
        for each in (a, b, c, d, e, f, g, i, k, last, m, n):
            each.close()


def test_unix_names_listeners_and_accepted_connections(tmp_path: Path) -> None:
    code = """
    def keep(s, number):
        os.dup2(s.fileno(), number); s.close()
    cwd = os.getcwd()
    path = cwd + "/listener"
    l = socket.socket(socket.AF_UNIX); l.bind(path); os.chmod(path, 0o640); l.listen(23)
    c = socket.socket(socket.AF_UNIX); c.bind(b"\\0client-%d" % os.getpid()); c.connect(path)
    s, _ = l.accept(); c.send(b"hello"); s.send(b"welcome")
    keep(l, 50); keep(c, 51); keep(s, 52)
    x = socket.socket(socket.AF_UNIX); x.bind("relative"); x.listen(1); keep(x, 53)
    y = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); y.bind(cwd + "/dgram")
    z = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); z.connect(cwd + "/dgram"); z.send(b"anonymous")
    w = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); w.bind(b"\\0named-%d" % os.getpid())
    w.sendto(b"named", cwd + "/dgram")
    keep(y, 54); keep(z, 55); keep(w, 56)
    t = socket.socket(socket.AF_UNIX); t.bind(cwd + "/temporary"); t.listen()
    tc = socket.socket(socket.AF_UNIX); tc.connect(cwd + "/temporary"); ts, _ = t.accept()
    t.close(); os.unlink("temporary"); keep(tc, 57); keep(ts, 58)
    ready()
    """
    with live_child(tmp_path, code) as child:
        assert child.check() == []
        state = child.dump()
        # Abstract names are taken; paths of the source itself may be replaced.
        (bound,) = preflight_files(state, Options())
        assert bound.kind == "unix socket" and "@named-" in bound.detail
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with live_child(elsewhere, code, Options(leave_running=True)) as child:
        taken = preflight_files(child.dump(), Options())
        assert len([o for o in taken if "another process has bound it" in o.detail]) == 4
    assert preflight_files(state, Options()) == []
    with restored(state) as again:
        numbers = range(50, 59)
        listener, c, s, relative, y, z, w, tc, ts = (sock(again, number) for number in numbers)
        path = str(tmp_path / "listener")
        assert listener.getsockname() == s.getsockname() == path
        assert os.stat(path).st_mode & 0o777 == 0o640
        assert c.getsockname().startswith(b"\0client-") and c.getpeername() == path
        assert s.recv(10) == b"hello" and c.recv(10) == b"welcome"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            listener.accept()[0].close()
        assert relative.getsockname() == "relative"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "relative"))
        assert y.recvfrom(100) == (b"anonymous", None)
        data, sender = y.recvfrom(100)
        assert data == b"named" and sender == w.getsockname()
        z.send(b"again")
        assert y.recv(100) == b"again"
        assert ts.getsockname() == str(tmp_path / "temporary") == tc.getpeername()
        assert not (tmp_path / "temporary").exists()
        tc.send(b"!")
        assert ts.recv(1) == b"!"
        for each in (listener, c, s, relative, y, z, w, tc, ts):
            each.close()


def test_unix_obstacles(tmp_path: Path) -> None:
    ours = socket.socket(socket.AF_UNIX)
    ours.bind(str(tmp_path / "ours"))
    ours.listen(10)
    code = """
    out = socket.socket(socket.AF_UNIX); out.connect("ours")
    l = socket.socket(socket.AF_UNIX); l.bind(os.getcwd() + "/l"); l.listen()
    p = socket.socket(socket.AF_UNIX); p.connect("l")
    a, b = socket.socketpair()
    closed = open("closed", "w")
    a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [closed.fileno()]))])
    closed.close()
    for n, s in enumerate((out, l, p, a, b)): os.dup2(s.fileno(), 50 + n); s.close()
    ready()
    """
    try:
        with live_child(tmp_path, code) as child:
            assert child.check()
            texts = {obstacle.what: obstacle.detail for obstacle in child.check()}
            assert "not accepted" in texts["fd 50"]
            assert "wait for accept" in texts["fd 51"]
            assert "not accepted" in texts["fd 52"]
            server, _ = ours.accept()
            assert "another process" in {o.what: o.detail for o in child.check()}["fd 50"]
            server.close()
            with pytest.raises(RefusedError) as caught:
                child.dump()
            refused = {obstacle.what: obstacle.detail for obstacle in caught.value.obstacles}
            assert "in flight" in refused["fd 54"]
    finally:
        ours.close()


def test_descriptors_in_flight_that_the_process_has_open(tmp_path: Path) -> None:
    code = """
    def keep(s, number):
        os.dup2(s.fileno(), number); s.close()
    def rights(*fds): return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    r, w = os.pipe(); os.write(w, b"inside"); os.dup2(r, 40); os.dup2(w, 41)
    a, b = socket.socketpair()
    a.send(b"before"); a.sendmsg([b"!"], rights(r, w)); a.send(b"after")
    c, d = socket.socketpair(type=socket.SOCK_SEQPACKET); c.sendmsg([b"x"], rights(a.fileno()))
    for number, s in enumerate((a, b, c, d), 50): keep(s, number)
    ready()
    """
    with live_child(tmp_path, code) as child:
        assert child.check() == []
        state = child.dump()
        assert child.dump().files == state.files
    with restored(state) as again:
        b, d = sock(again, 51), sock(again, 53)
        data, (reader, writer), _, _ = socket.recv_fds(b, 100, 5)
        assert data == b"before!" and b.recv(100) == b"after"
        os.write(writer, b" and new")
        assert os.read(reader, 100) == b"inside and new"
        _, (passed,), _, _ = socket.recv_fds(d, 100, 5)
        os.write(passed, b"through")
        assert b.recv(100) == b"through"
        for fd in (reader, writer, passed):
            os.close(fd)
        b.close()
        d.close()


def test_a_log_socket_is_connected_again_by_name(tmp_path: Path) -> None:
    code = """
    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect(sys.argv[1].rpartition("/")[0] + "/log")
    os.dup2(s.fileno(), 50); s.close()
    ready()
    """
    log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    log.bind(str(tmp_path / "log"))
    with live_child(tmp_path, code) as child:
        assert child.check() == []
        state = child.dump()
    log.close()
    assert [obstacle.kind for obstacle in preflight_files(state, Options())] == ["unix socket"]
    os.unlink(tmp_path / "log")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(tmp_path / "log"))
        assert preflight_files(state, Options()) == []
        with restored(state) as again:
            os.write(again.fd(50), b"line")
            assert other.recv(10) == b"line"


def test_a_failed_crossing_gives_the_source_its_path_back(tmp_path: Path) -> None:
    code = """
    l = socket.socket(socket.AF_UNIX); l.bind(os.getcwd() + "/l"); l.listen()
    os.dup2(l.fileno(), 50); l.close()
    ready()
    """
    path = str(tmp_path / "l")
    gone = subprocess.Popen(["/bin/true"])
    gone.wait()
    with live_child(tmp_path, code) as child:
        inode = os.stat(path).st_ino
        restorer = FileRestorer(restore_context(pid=Pid(gone.pid)))
        restorer.open_all(child.dump())
        assert os.stat(path).st_ino != inode
        restorer.close()
        assert os.stat(path).st_ino == inode
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
        assert sorted(name for name in os.listdir(tmp_path) if name[:1] == "l") == ["l"]

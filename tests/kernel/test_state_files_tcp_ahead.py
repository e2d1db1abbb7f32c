"""TCP sockets made ahead: ports that several share or hand on, what epolls say, what nobody may notice, thousands."""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import textwrap
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from agent.errors import RefusedError, RestoreError
from agent.kernel.pidfd import pidfd_getfd
from agent.state.fileitems import decode_items
from agent.state.filerestore import FileRestorer
from agent.state.files import dump_files
from agent.state.predump import PreDump
from agent.types import Pid
from protocol.state.files import FilesState
from tests.kernel.files_support import Options
from tests.kernel.predump_support import (
    changing_child,
    let_change,
    outcome,
    rebuilt,
    refused_later,
    skeleton_context,
    told,
    whole_of,
)
from tests.kernel.test_state_files_install import AGENT_PIDFD, skeleton

CLOSE = Options(tcp_close=True)

SERVER = """
tcp(10, 0, 7, 1); tcp(11, 0, 7); tcp(12, 0); tcp(13)
connection(10, 20, 21)
epoll(50, (10, 1), (20, 1 | 1 << 31)); epoll(51, (11, 1)); epoll(52, (13, 1))
"""
SERVING = {0, 1, 2, 10, 11, 12, 13, 20, 21, 50, 51, 52}

SOCKET_CHANGES: dict[str, tuple[str, set[int]]] = {
    "nothing": ("pass", set()),
    "closed": ("os.close(12)", set()),
    "moved to another number": ("os.dup2(12, 40); os.close(12)", {40}),
    "shared": ("os.dup2(12, 40)", set()),
    "a client came": ("connection(10, 30, 31)", {30, 31}),
    "a client came and went": ("connection(10, 30, 31); os.close(30); os.close(31)", set()),
    "another client": ("os.close(20); os.close(21); connection(10, 20, 21)", {20, 21, 50}),
    "the client went": ("os.close(21)", set()),
    "another socket on its port": ("p = port(12); os.close(12); tcp(12, p)", {12}),
    "another listens on its port": ("p = port(11); os.close(11); tcp(14, p, 3)", {14, 51}),
    "numbers swapped": ("swap(11, 12)", {11, 12, 51}),
    "listens": ("lent(12).listen(3)", {12}),
    "bound": ("lent(13).bind(('127.0.0.1', 0))", {13, 52}),
    "connected": ("lent(13).connect(('127.0.0.1', port(10)))", {13, 52}),
    "not connected any more": ("LIBC.connect(20, bytes(16), 16)", {20, 50}),
    "stopped listening": ("lent(11).shutdown(2)", {11, 51}),
    "option": ("lent(11).setsockopt(1, 9, 1)", {11, 51}),
    "option of TCP": ("lent(11).setsockopt(6, 9, 5)", {11, 51}),
    "option of IP": ("lent(12).setsockopt(0, 1, 16)", {12}),
    "option set and taken back": ("s = lent(11); s.setsockopt(1, 9, 1); s.setsockopt(1, 9, 0)", set()),
    "option that is a structure": ("lent(11).setsockopt(1, 13, struct.pack('ii', 1, 5))", {11, 51}),
    "option that is a text": ("lent(11).setsockopt(6, 13, b'reno')", {11, 51}),
    "size of a buffer": ("lent(11).setsockopt(1, 8, 1 << 16)", {11, 51}),
    "backlog": ("lent(11).listen(9)", {11, 51}),
    "non-blocking": ("os.set_blocking(11, False)", {11, 51}),
    "owner": ("fcntl.fcntl(11, 10, 12)", {11, 51}),
    "locked": ("fcntl.flock(11, 1)", {11, 51}),
    "interest": ("watch(51, MOD, 11, 5)", {51}),
}  # fmt: skip


@pytest.mark.parametrize("name", SOCKET_CHANGES)
def test_sockets_that_have_changed_and_no_others_are_dumped_again(tmp_path: Path, name: str) -> None:
    later, dumped = SOCKET_CHANGES[name]
    options = Options(tcp_close=True, file_locks=True)
    state = told(tmp_path, SERVER, later, options)
    assert state.prepared == SERVING
    assert state.dumped == dumped
    with rebuilt(state, options):
        pass


def test_what_was_made_ahead_listens_from_the_freeze_on(tmp_path: Path) -> None:
    state = told(tmp_path, "tcp(10, 0, 7)", "pass")
    (item,) = decode_items(state.ahead)["inet"]
    address = (item.body.local.host, item.body.local.port)
    with skeleton() as (pid, injector):
        ctx = skeleton_context(pid, injector)
        with closing(FileRestorer(ctx)) as restorer:
            restorer.prepare(state.ahead)
            assert os.readlink(f"/proc/{pid}/fd/10").startswith("socket:")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address)
            restorer.open_all(state.change)
            socket.create_connection(address).close()
            restorer.install()
            restorer.start()
            socket.create_connection(address).close()
    # Nothing is left of it.
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the connection of just now
        again.bind(address)


def test_a_filter_attached_since_the_first_look_is_refused(tmp_path: Path) -> None:
    later = """
    program = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0xFFFF))
    lent(10).setsockopt(1, 26, struct.pack("HxxxxxxQ", 1, ctypes.addressof(program)))
    """
    assert refused_later(tmp_path, "tcp(10, 0, 7)", later) == {"fd 10"}


def test_sockets_of_the_next_protocol_are_known_again(tmp_path: Path) -> None:
    before = """
    for number in (10, 11):
        s = socket.socket(socket.AF_INET6); s.bind(("::1", 0)); s.listen(5)
        place(s.detach(), number)
    """
    later = "socket.socket(fileno=os.dup(11)).setsockopt(41, 67, 8)  # IPV6_TCLASS"
    state = told(tmp_path, before, later)
    assert state.prepared == {0, 1, 2, 10, 11}
    assert state.dumped == {11}


def test_a_connection_made_since_the_first_look_is_refused(tmp_path: Path) -> None:
    later = "lent(11).connect(('127.0.0.1', port(10)))"
    # One end, and the other in the queue of those to be accepted.
    assert refused_later(tmp_path, "tcp(10, 0, 7); tcp(11)", later) == {"fd 10", "fd 11"}


MORE = """
def group(number, port=0, backlog=7):
    s = socket.socket(); s.setsockopt(1, 15, 1); s.bind(("127.0.0.1", port))
    if backlog: s.listen(backlog)
    place(s.detach(), number)
def other(number, host, port=0, backlog=7, options=()):
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    for level, option, value in options: s.setsockopt(level, option, value)
    s.bind((host, port)); s.listen(backlog)
    place(s.detach(), number)
V6ONLY, BOTH, FREEBIND6, TRANSPARENT, LOOPBACK = (41, 26, 1), (41, 26, 0), (41, 78, 1), (0, 19, 1), (1, 25, b"lo")
"""
GROUP = "group(10); group(11, port(10)); epoll(50, (10, 1)); epoll(51, (11, 1))"
DUPS = "tcp(10, 0, 7); os.dup2(10, 11); os.dup2(10, 12); epoll(50, (11, 1))"
ADDRESSES = """
other(10, "::", 0, 7, [V6ONLY]); other(11, "0.0.0.0", port(10)); other(12, "::", 0, 7, [BOTH])
other(13, "2001:db8::7", 0, 7, [FREEBIND6]); other(14, "192.0.2.7", 0, 7, [TRANSPARENT])
other(15, "127.0.0.1", 0, 7, [LOOPBACK])
"""

SITUATIONS: dict[str, tuple[str, str, set[int]]] = {
    "group": (GROUP, "pass", set()),
    "group, other backlog": (GROUP, "lent(11).listen(9)", {11, 51}),
    "group, one closed": (GROUP, "os.close(10)", {50}),
    "group, one more": (GROUP, "group(12, port(10))", {12}),
    "group, one replaced": (GROUP, "p = port(10); os.close(10); group(10, p)", {10, 50}),
    "group, one stopped": (GROUP, "lent(10).shutdown(2)", {10, 50}),
    "group, one listens": ("group(10, 0, 0); group(11, port(10))", "lent(10).listen(2)", {10}),
    "copies, one closed": (DUPS, "os.close(11)", set()),
    "copies, their port listened on": (
        DUPS, "p = port(10)\nfor fd in (10, 11, 12): os.close(fd)\ntcp(12, p, 7)", {12, 50}
    ),
    "ports swapped": (
        "tcp(10, 0, 7); tcp(11, 0, 8)",
        "p, q = port(10), port(11); os.close(10); os.close(11); tcp(10, q, 7); tcp(11, p, 8)",
        {10, 11},
    ),
    "wider address": ("tcp(10, 0, 7)", "p = port(10); os.close(10); other(30, '0.0.0.0', p)", {30}),
    "narrower address": ("other(10, '0.0.0.0')", "p = port(10); os.close(10); tcp(30, p, 7)", {30}),
    "addresses": (ADDRESSES, "pass", set()),
    "addresses, other backlog": (
        ADDRESSES, "for fd in range(10, 16): lent(fd).listen(3)", {10, 11, 12, 13, 14, 15}
    ),
    "listener to connection": (
        "tcp(10, 0, 7, 1); tcp(11, 0, 7)",
        "LIBC.connect(11, bytes(16), 16); lent(11).connect(('127.0.0.1', port(10)))",
        {11},
    ),
    "connection to listener": (
        "tcp(10, 0, 7, 1); connection(10, 20, 21)",
        "LIBC.connect(21, bytes(16), 16); s = lent(21); s.bind(('127.0.0.1', 0)); s.listen(2)",
        {21},
    ),
    "connection of another family": (
        "other(10, '::', 0, 7, [BOTH])\n"
        "place(socket.create_connection(('::ffff:127.0.0.1', port(10))).detach(), 20)",
        "lent(20).setsockopt(41, 1, struct.pack('i', socket.AF_INET))",
        {20},
    ),
    "owner of a connection": (
        "tcp(10, 0, 7, 1); connection(10, 20, 21)", "fcntl.fcntl(20, 10, 12)", {20}
    ),
    "queue of a listener": ("tcp(10, 0, 7, 1); tcp(11)", "lent(11).connect(('127.0.0.1', port(10)))", {11}),
}  # fmt: skip


@pytest.mark.parametrize("name", SITUATIONS)
def test_ports_go_from_one_socket_to_another(tmp_path: Path, name: str) -> None:
    before, later, dumped = SITUATIONS[name]
    state = told(tmp_path, MORE + textwrap.dedent(before), later, CLOSE)
    assert state.prepared >= {10}
    assert state.dumped == dumped
    with rebuilt(state, CLOSE):
        pass


def test_a_port_that_the_process_gives_up_after_the_first_look_is_free(tmp_path: Path) -> None:
    with changing_child(tmp_path, "tcp(10, 0, 7)", "os.close(10)") as child:
        with closing(PreDump(child.ctx)) as ahead:
            socket.create_connection(address_of(ahead.state)).close()
            let_change(child, tmp_path)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address_of(ahead.state))


@contextmanager
def preparing(ahead: FilesState) -> Iterator[tuple[Pid, FileRestorer]]:
    with skeleton() as (pid, injector):
        with closing(FileRestorer(skeleton_context(pid, injector, CLOSE))) as restorer:
            restorer.prepare(ahead)
            yield pid, restorer


def address_of(state: FilesState) -> tuple[str, int]:
    local = decode_items(state)["inet"][0].body.local
    return local.host, local.port


def test_a_port_that_is_busy_for_a_moment_is_bound_in_the_end(tmp_path: Path) -> None:
    state = told(tmp_path, "tcp(10, 0, 7); epoll(50, (10, 1))", "pass")
    with socket.socket() as busy:
        busy.bind(address_of(state.ahead))
        with preparing(state.ahead) as (pid, restorer):
            made = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
            assert made == state.prepared - {10, 50} | {AGENT_PIDFD}
            busy.close()
            restorer.open_all(state.change)
            restorer.install()
            restorer.start()
            socket.create_connection(address_of(state.ahead)).close()


def test_a_port_on_which_somebody_else_listens_by_now_is_named(tmp_path: Path) -> None:
    state = told(tmp_path, "tcp(10, 0, 7, 1); tcp(11, 0, 7)", "pass")
    address = address_of(state.ahead)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with preparing(state.ahead) as (_pid, restorer):
            # Both allow the other to have the port, as long as none listens.
            other.bind(address)
            other.listen()
            with pytest.raises(RestoreError, match=f"fd 10: {address[0]}:{address[1]}: Address already in use"):
                restorer.open_all(state.change)
        socket.create_connection(address).close()
    for item in decode_items(state.ahead)["inet"][1:]:
        with socket.socket() as free:
            free.bind((item.body.local.host, item.body.local.port))


def test_nothing_keeps_the_port_when_the_copy_is_given_up(tmp_path: Path) -> None:
    state = told(tmp_path, "tcp(10, 0, 7); os.dup2(10, 11)", "pass")
    with preparing(state.ahead) as (_pid, restorer):
        with socket.socket() as other, pytest.raises(OSError) as busy:
            other.bind(address_of(state.ahead))
        assert busy.value.errno == errno.EADDRINUSE
        restorer.open_all(state.change)
    with socket.socket() as other:
        other.bind(address_of(state.ahead))


def test_a_whole_table_may_want_the_same_ports(tmp_path: Path) -> None:
    state = told(tmp_path, "tcp(10, 0, 7); tcp(11, 0); epoll(50, (10, 1))", "pass")
    state.change = state.whole  # type: ignore[assignment]
    with rebuilt(state):
        pass


def test_an_epoll_made_ahead_tells_nothing_of_the_time_before_its_socket_listened(tmp_path: Path) -> None:
    # One bound only is hung up: EPOLLHUP.
    edge, once = 1 << 31, 1 << 30
    before = f"""
    for number in (10, 11, 12, 13): tcp(number, 0, 7, 1)
    epoll(50, (10, 1)); epoll(51, (11, 1 | {edge})); epoll(52, (12, 1 | {once})); epoll(53, (13, 1 | {once}))
    client = socket.create_connection(("127.0.0.1", port(13)))
    assert select.epoll.fromfd(os.dup(53)).poll(5)
    lent(13).accept()[0].close(); client.close()
    """
    state = told(tmp_path, before, "pass", CLOSE)
    assert state.dumped == set()
    with rebuilt(state, CLOSE) as copy:
        kept = {number: pidfd_getfd(copy.pidfd, number) for number in (10, 11, 12, 13, 50, 51, 52, 53)}
        polls = {number: select.epoll.fromfd(kept[number]) for number in (50, 51, 52, 53)}
        assert [poll.poll(0) for poll in polls.values()] == [[], [], [], []]
        for number in (10, 11, 12, 13):
            with socket.socket(fileno=os.dup(kept[number])) as listener:
                socket.create_connection(listener.getsockname()).close()
        # The one-shot that has fired before stays silent.
        assert [[fd for fd, _events in poll.poll(1 if number != 53 else 0)] for number, poll in polls.items()] == [
            [10], [11], [12], []
        ]  # fmt: skip
        for fd in (10, 11, 12, 13):
            os.close(kept[fd])
        for poll in polls.values():
            poll.close()


def test_a_connection_in_place_of_one_that_was_reset_is_refused(tmp_path: Path) -> None:
    # The first needs no --tcp-close: its peer is gone.
    before = """
    tcp(10, 0, 7, 1); connection(10, 20, 21)
    lent(20).setsockopt(1, 13, struct.pack("ii", 1, 0)); os.close(20)
    """
    later = "LIBC.connect(21, bytes(16), 16); lent(21).connect(('127.0.0.1', port(10))); lent(10).accept()[0].close()"
    with changing_child(tmp_path, before, later) as child:
        with closing(PreDump(child.ctx)) as ahead:
            assert 21 in {entry.fd for entry in ahead.state.fds}
            let_change(child, tmp_path)
            with pytest.raises(RefusedError) as refused:
                ahead.dump_change()
    assert {obstacle.what for obstacle in refused.value.obstacles} == {"fd 21"}


@pytest.fixture
def few_files() -> Iterator[int]:
    """As many files as a process may open by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield 1024
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_connections_than_the_agent_may_have_files(tmp_path: Path, few_files: int) -> None:
    before = f"""
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, ({few_files * 4}, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    tcp(10, 0, 7, 1)
    for number in range(2000, 2000 + {few_files}, 2): connection(10, number, number + 1)
    """
    udp = "for number in range(2000, 2000 + %d): place(socket.socket(type=2).detach(), number)" % few_files
    with changing_child(tmp_path, before, udp, CLOSE) as child:
        with closing(PreDump(child.ctx)) as ahead:
            assert len(ahead.state.fds) > few_files
            assert not ahead.dump_change().fds
            let_change(child, tmp_path)
            # Everything in the place of something else: as many looks of the other sort.
            assert len(ahead.dump_change().files) == few_files


# -- at random -------------------------------------------------------------------------------------------------------

CHURN = """
import random
chance = random.Random({seed})
numbers = range(10, 24)
def one():
    fd, other, third = (chance.choice(numbers) for _ in range(3))
    what = chance.randrange(14)
    try:
        if what == 0: os.close(fd)
        elif what == 1: os.dup2(fd, other)
        elif what == 2: tcp(fd, 0, chance.randrange(1, 9), 1)
        elif what == 3: tcp(fd, chance.choice([None, 0]), None, 1)
        elif what < 6: connection(chance.choice([n for n in numbers if listens(n)] or [fd]), other, third)
        elif what == 6: p = port(fd); forget(fd); tcp(other, p, chance.randrange(1, 9), 1)
        elif what == 7: lent(fd).listen(chance.randrange(1, 9))
        elif what == 8: lent(fd).setsockopt(1, 9, chance.randrange(2))
        elif what == 9: LIBC.connect(fd, bytes(16), 16)
        elif what == 10: lent(fd).shutdown(2)
        elif what == 11: epoll(fd)
        elif what == 12: watch(fd, chance.choice([ADD, DEL]), other, 1)
        elif what == 13: swap(fd, other)
    except (OSError, OverflowError):
        pass
def listens(number):
    try: return lent(number).getsockopt(1, 30)
    except OSError: return 0
def forget(number):
    link = os.readlink(f"/proc/self/fd/{{number}}")
    for n in numbers:
        try:
            if os.readlink(f"/proc/self/fd/{{n}}") == link: os.close(n)
        except OSError: pass
signal.alarm(30)
tcp(10, 0, 7, 1); tcp(11, 0, 7, 1); epoll(12, (10, 1), (11, 1)); connection(10, 13, 14)
for number in range(40): one()
"""


@pytest.mark.parametrize("seed", range(12))
def test_random_churn_of_sockets_is_told_and_made_as_it_is(tmp_path: Path, seed: int) -> None:
    later = "for number in range(chance.randrange(8)): one()"
    with changing_child(tmp_path, CHURN.format(seed=seed), later, CLOSE) as child:
        for _turn in range(10):
            with closing(PreDump(child.ctx)) as ahead:
                let_change(child, tmp_path)
                expected = outcome(lambda: dump_files(child.ctx))
                assert outcome(lambda: whole_of(ahead.state, ahead.dump_change())) == expected  # noqa: B023
    state = told(tmp_path, CHURN.format(seed=seed), later, CLOSE)
    with rebuilt(state, CLOSE):
        pass

"""Schemas of open files: what may not exist, and that nothing hostile gets further than decoding."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from agent.state.fileitems import decode_items
from agent.state.openfile import Description
from agent.state.registry import FILE_KINDS
from agent.state.sockopts import OPTIONS
from protocol import codec
from protocol.errors import RemoteProtocolError
from protocol.state.bodies import FILE_BODIES
from protocol.state.chardev import CharDevice
from protocol.state.epoll import Epoll, EpollItem
from protocol.state.eventfd import EventFd
from protocol.state.files import FdEntry, FilesState, OpenFile
from protocol.state.inetsk import InetAddress, InetSocket, InetState
from protocol.state.pipe import PipeEnd
from protocol.state.regfile import RegularFile
from protocol.state.sockopts import SocketOptions
from protocol.state.timerfd import TimerFd
from protocol.state.unixsk import UnixMessage, UnixName, UnixPeer, UnixSocket

BODIES: dict[str, Any] = {
    "chardev": CharDevice(major=1, minor=3, path="/dev/null"),
    "epoll": Epoll(items=(EpollItem(fd=4, file_id=2, events=1 << 31, data=(1 << 64) - 1),)),
    "eventfd": EventFd(count=(1 << 64) - 2, semaphore=True),
    "inet": InetSocket(
        family=10, type=1, protocol=6, state=InetState.LISTENING, backlog=5,
        local=InetAddress(host="::1", port=80), options=SocketOptions(ints={"SO_KEEPALIVE": 1}),
    ),
    "pipe": PipeEnd(pipe_id=7, capacity=65536, chunks=(b"a", b"bc")),
    "regular": RegularFile(path="/etc/hosts", mode=0o100644, size=3, mtime_ns=4),
    "timerfd": TimerFd(clockid=1, ticks=2, settime_flags=1, remaining_ns=3, interval_ns=4),
    "unix": UnixSocket(
        type=1, options=SocketOptions(), peer=UnixPeer.FILE, peer_id=3, name=UnixName(name=b"\0a"),
        queue=(UnixMessage(data=b"x", file_ids=(1,)),),
    ),
}  # fmt: skip


def state(kind: str, body: bytes) -> FilesState:
    """A table with one descriptor."""
    return FilesState(
        fds=(FdEntry(fd=3, file_id=1), FdEntry(fd=9, file_id=1, cloexec=True)),
        files=(OpenFile(id=1, kind=kind, flags=2, body=body),),
    )


@pytest.mark.parametrize("kind", sorted(BODIES))
def test_bodies_survive_the_wire(kind: str) -> None:
    sent = state(kind, codec.encode(BODIES[kind]))
    received = codec.decode(FilesState, codec.encode(sent))
    assert received == sent
    (item,) = decode_items(received)[kind]
    assert item.body == BODIES[kind] and item.fds == (3, 9)


def test_every_kind_has_a_schema_and_a_way_back() -> None:
    assert FILE_KINDS.keys() == FILE_BODIES.keys()
    assert [kind.name for kind in FILE_KINDS.values()] == list(FILE_KINDS)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(Exception, match="unknown kind of file 'teleporter'"):
        decode_items(state("teleporter", b""))


def test_a_malformed_body_is_the_peers_fault() -> None:
    with pytest.raises(RemoteProtocolError):
        decode_items(state("eventfd", codec.encode(BODIES["timerfd"])))


@pytest.mark.parametrize(
    ("schema", "facts"),
    [
        (RegularFile, {"path": "/a/../../etc/shadow", "mode": 0, "size": 0, "mtime_ns": 0}),
        (RegularFile, {"path": "relative", "mode": 0, "size": 0, "mtime_ns": 0}),
        (CharDevice, {"major": 10, "minor": 200, "path": "/dev/net/tun"}),
        (PipeEnd, {"pipe_id": 1, "capacity": 4, "chunks": (b"12345",)}),
        (PipeEnd, {"pipe_id": 1, "capacity": 1 << 40}),
        (UnixName, {"name": b"x" * 109}),
        (UnixName, {"name": b"a\0b"}),
        (InetAddress, {"host": "example.org", "port": 1}),
        (FdEntry, {"fd": -1, "file_id": 1}),
        (OpenFile, {"id": 0, "kind": "pipe", "flags": 0, "body": b""}),
        (TimerFd, {"clockid": 1, "ticks": 0, "settime_flags": 8, "remaining_ns": 0, "interval_ns": 0}),
    ],
)  # fmt: skip
def test_impossible_state_cannot_exist(schema: Any, facts: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        schema(**facts)


def test_table_and_files_must_agree() -> None:
    file = OpenFile(id=1, kind="pipe", flags=0, body=b"")
    with pytest.raises(ValueError, match="disagree"):
        FilesState(fds=(FdEntry(fd=0, file_id=2),), files=(file,))
    with pytest.raises(ValueError, match="is listed after"):
        FilesState(fds=(FdEntry(fd=1, file_id=1), FdEntry(fd=1, file_id=1)), files=(file,))


def test_description_knows_its_inode_and_mode() -> None:
    assert {field.name for field in fields(Description)} >= {"fds", "link", "flags"}
    assert all(option.length in (0, 8, 16) for option in OPTIONS.values())

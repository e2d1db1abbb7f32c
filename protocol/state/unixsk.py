"""A unix(7) socket. Its peer, if any, is another socket of the same process."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from protocol.state.sockopts import SocketOptions

MAX_NAME_BYTES = 108
"""sizeof(sun_path)."""


class UnixPeer(enum.Enum):
    """What a socket is connected to."""

    NONE = "none"
    FILE = "file"
    """Another description of this process, ``peer_id``."""
    GONE = "gone"
    """A socket that was closed."""
    NAMED = "named"
    """Somebody else's socket bound to ``peer_name``: connected to again on the destination."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixMessage:
    """Queued bytes: one datagram, or a piece of a stream.

    ``sender`` is the name it came from (may be empty); ``file_ids`` are the descriptions that were
    passed with it (SCM_RIGHTS).
    """

    data: bytes
    sender: bytes = b""
    file_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixName:
    """A bound name: ``name`` exactly as in sun_path, abstract when it starts with a null byte.

    For a path: ``root`` is the root directory that an absolute name was bound under, empty for the
    host's own, ``directory`` the one a relative name starts at; the rest describes the node;
    ``unlinked`` when the node no longer exists. ``boot_id``, ``node`` (st_dev, st_ino) tell the
    destination that a node it finds is the source's own, on a file system that both see.
    """

    name: bytes
    root: str = ""
    directory: str = ""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    unlinked: bool = False
    boot_id: str = ""
    node: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= MAX_NAME_BYTES:
            raise ValueError(f"unix socket name is {len(self.name)} bytes long")
        if self.name[0] and b"\0" in self.name:
            raise ValueError("unix socket path has a null byte")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixSocket:
    """One socket; ``queue`` is what it has received and not read.

    ``backlog`` is -1 unless it listens. ``peer_root`` is for ``peer_name`` what UnixName.root is for a name.
    ``listener`` are the user and group ids with which the process itself called listen(2), None for another process.
    """

    type: int
    options: SocketOptions
    name: UnixName | None = None
    backlog: int = -1
    peer: UnixPeer = UnixPeer.NONE
    peer_id: int = 0
    peer_name: bytes = b""
    peer_root: str = ""
    listener: tuple[int, int] | None = None
    shutdown: int = 0
    queue: tuple[UnixMessage, ...] = ()

    def __post_init__(self) -> None:
        if self.type not in (1, 2, 5):
            raise ValueError(f"unix socket type {self.type} is unknown")
        if self.shutdown & ~0x3:
            raise ValueError(f"unix socket shutdown {self.shutdown:#x} is unknown")

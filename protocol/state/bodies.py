"""What a kind of open file has of its own: the schemas of ``OpenFile.body``."""

from __future__ import annotations

from protocol.state.chardev import CharDevice
from protocol.state.epoll import Epoll
from protocol.state.eventfd import EventFd
from protocol.state.external import External
from protocol.state.inetsk import InetSocket
from protocol.state.memfd import MemFd
from protocol.state.pipe import PipeEnd
from protocol.state.regfile import RegularFile
from protocol.state.signalfd import SignalFd
from protocol.state.timerfd import TimerFd
from protocol.state.unixsk import UnixSocket

FILE_BODIES: dict[str, type] = {
    "chardev": CharDevice,
    "epoll": Epoll,
    "eventfd": EventFd,
    "external": External,
    "inet": InetSocket,
    "memfd": MemFd,
    "pipe": PipeEnd,
    "regular": RegularFile,
    "signalfd": SignalFd,
    "timerfd": TimerFd,
    "unix": UnixSocket,
}
"""The schema of ``OpenFile.body`` by ``OpenFile.kind``."""

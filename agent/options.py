"""What the user asked for: frozen options of one ``agent-send`` or ``agent-recv``.

The command line fills these in and has checked every value; ``agent.source`` and
``agent.destination`` read them. No parsing of arguments and no look at the system here. Times are
seconds, sizes are bytes.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from agent.address import Address
from agent.types import Pid

DEFAULT_DOWNTIME_LIMIT_S = 0.1
"""Predicted downtime at which pre-copy ends. Below the patience of a person or of an RPC timeout;
rounds go on while they shrink, so the real one is mostly much smaller."""
DEFAULT_MAX_ROUNDS = 30
"""Pre-copy rounds before the last one. A writer that has not converged by then will not."""
DEFAULT_CONNECT_TIMEOUT_S = 10.0
"""Connecting takes one round trip; ten seconds outlast several lost SYNs."""
DEFAULT_IO_TIMEOUT_S = 60.0
"""Longest silence of the peer where an answer is due; a restore of many files takes seconds, not a
minute."""
DEFAULT_REMOTE_COMMAND = "agent-recv"

KNOWN_TRACKERS = ("auto", "scan", "log", "bitmap", "soft-dirty", "compare")
"""What --tracker takes."""
DEFAULT_LOG_CAPACITY = 1 << 20
"""Records that the log tracker holds: stores to 4 GiB of memory in one round."""
LOG_WHEN_FULL = ("spill", "stall")
"""What happens when it is full; the first is the default."""
MAX_STREAMS = 1
"""Page streams that this version can use."""


class Compression(enum.Enum):
    """What is done to page contents on the wire."""

    NONE = "none"
    ZSTD = "zstd"
    AUTO = "auto"


class CompressOption(NamedTuple):
    """``--compress``: the method and, for zstd, its level."""

    method: Compression = Compression.AUTO
    level: int = 1

    def __str__(self) -> str:
        return f"zstd:{self.level}" if self.method is Compression.ZSTD else self.method.value


class TlsOptions(NamedTuple):
    """Files (PEM) and names for tls:// addresses."""

    certificate: str = ""
    key: str = ""
    authorities: str = ""
    server_name: str = ""


class SendOptions(NamedTuple):
    """``agent-send``. ``address`` is None with ``check`` (and may be with ``resolve``), ``pid`` is
    0 with ``resolve``."""

    pid: Pid
    address: Address | None
    check: bool = False
    resolve: str = ""
    leave_running: bool = False
    tracker: str = "auto"
    log_capacity: int = DEFAULT_LOG_CAPACITY
    log_when_full: str = LOG_WHEN_FULL[0]
    downtime_limit_s: float = DEFAULT_DOWNTIME_LIMIT_S
    max_rounds: int = DEFAULT_MAX_ROUNDS
    bandwidth_limit: int | None = None
    compress: CompressOption = CompressOption()
    streams: int = 1
    verify: bool = False
    tcp_close: bool = False
    file_locks: bool = False
    external_fds: frozenset[int] = frozenset()
    remote_command: str = DEFAULT_REMOTE_COMMAND
    tls: TlsOptions = TlsOptions()
    connect_timeout_s: float = DEFAULT_CONNECT_TIMEOUT_S
    io_timeout_s: float = DEFAULT_IO_TIMEOUT_S
    state_dir: str = ""
    json: bool = False
    progress: bool | None = None


class RecvOptions(NamedTuple):
    """``agent-recv``. ``inherit_fds`` maps a number in the restored process to one in the agent."""

    address: Address
    once: bool = False
    wait: bool = False
    new_pidns: bool = False
    inherit_fds: Mapping[int, int] = MappingProxyType({})
    pidfile: str = ""
    tls: TlsOptions = TlsOptions()
    io_timeout_s: float = DEFAULT_IO_TIMEOUT_S
    state_dir: str = ""
    json: bool = False
    progress: bool | None = None

"""Connect and listen: from an address to a channel.

The agents of both hosts trust each other completely: whoever may send to agent-recv may run code as
its user, and a stream holds the memory of a process. tcp:// protects neither; ssh://, tls:// and
unix: do. Names are resolved and sockets opened here, and nowhere else. Timeouts are seconds.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from types import TracebackType

from agent.address import Address, Transport, parse_address
from agent.channel import (
    Channel,
    FileReadChannel,
    FileWriteChannel,
    PeerGone,
    PeerSilent,
    SocketChannel,
)
from agent.errors import SetupError, UsageError
from agent.options import DEFAULT_CONNECT_TIMEOUT_S, DEFAULT_REMOTE_COMMAND, TlsOptions

__all__ = [
    "Address",
    "Channel",
    "Listener",
    "PeerGone",
    "PeerSilent",
    "Transport",
    "connect",
    "listen",
    "parse_address",
]

_log = logging.getLogger(__name__)

KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 3
KEEPALIVE_PROBES = 5
USER_TIMEOUT_MS = 30_000
"""tcp(7), TCP_USER_TIMEOUT: unacknowledged data, or a closed window, for this long ends the
connection."""
UNIX_BUFFER_BYTES = 1 << 20
"""unix(7) sockets do not tune their buffers; the default of 208 KiB wakes the reader for every
batch."""
_SO_SNDBUFFORCE = 32  # include/uapi/asm-generic/socket.h


# -- connecting ------------------------------------------------------------------------------------


def connect(
    address: Address,
    *,
    timeout_s: float = DEFAULT_CONNECT_TIMEOUT_S,
    remote_command: str = DEFAULT_REMOTE_COMMAND,
    tls: TlsOptions | None = None,
) -> Channel:
    """Reach the receiving side, or open the image to write.

    :raises SetupError: nobody answers there.
    :raises UsageError: an image that cannot be written, or TLS files that cannot be used.
    """
    if address.transport is Transport.FILE:
        return FileWriteChannel(address.path)
    if address.transport in (Transport.STDIO, Transport.SSH):
        # As with ssl below: subprocess is slow to import.
        from agent.pipes import SshChannel, StdioChannel

        return StdioChannel() if address.transport is Transport.STDIO else SshChannel(address, remote_command)
    if address.transport is Transport.UNIX:
        return SocketChannel(_connect_unix(address, timeout_s), str(address))
    if address.transport is Transport.TLS:
        # ssl takes tens of milliseconds to import; only those who use it pay.
        from agent.tls import connect_tls

        return connect_tls(address, lambda: _connect_tcp(address, timeout_s), tls or TlsOptions())
    return SocketChannel(_connect_tcp(address, timeout_s), str(address))


def _connect_tcp(address: Address, timeout_s: float) -> socket.socket:
    assert address.port is not None
    try:
        sock = socket.create_connection((address.host, address.port), timeout_s)
    except OSError as err:
        raise SetupError(
            f"Cannot connect to {address}: {_reason(err)}",
            hint=_connect_hint(err),
            address=str(address),
        ) from err
    set_tcp_options(sock)
    return sock


def _connect_unix(address: Address, timeout_s: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(address.path)
    except OSError as err:
        sock.close()
        raise SetupError(
            f"Cannot connect to {address}: {_reason(err)}",
            hint=_connect_hint(err),
            address=str(address),
        ) from err
    set_unix_options(sock)
    return sock


def _reason(err: OSError) -> str:
    if isinstance(err, TimeoutError) and err.errno is None:
        return "no answer in time"
    return err.strerror or str(err)


def _connect_hint(err: OSError) -> str:
    if isinstance(err, (ConnectionRefusedError, FileNotFoundError)):
        return "Is agent-recv running there?"
    return ""


def set_tcp_options(sock: socket.socket) -> None:
    """Options for a migration link: no Nagle delay, and a dead peer is noticed within half a
    minute.

    SO_SNDBUF and SO_RCVBUF stay alone: setting them turns off the kernel's own tuning, which goes
    higher.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


def set_unix_options(sock: socket.socket) -> None:
    """Larger buffers: beyond the system's limit where the agent may (CAP_NET_ADMIN)."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, UNIX_BUFFER_BYTES)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES)


# -- listening -------------------------------------------------------------------------------------


class Listener:
    """Where migrations come in. ``address`` is the bound one, with the real port.

    ``one_shot``: an image or stdio, which can be accepted only once.
    """

    def __init__(self, address: Address, sock: socket.socket | None, tls: TlsOptions) -> None:
        self.address = address
        self.one_shot = sock is None
        self._socket = sock
        self._tls = tls
        self._inode = _inode(address.path) if address.transport is Transport.UNIX else None

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def fds(self) -> set[int]:
        """The fd numbers that the listener holds open in the agent."""
        return set() if self._socket is None else {self._socket.fileno()} - {-1}

    def accept(self) -> Channel:
        """Wait for the next migration.

        :raises SetupError: a peer came, but did not get through the TLS handshake; others may.
        :raises UsageError: an image that cannot be read.
        """
        if self._socket is None:
            if self.address.transport is Transport.FILE:
                return FileReadChannel(self.address.path)
            from agent.pipes import StdioChannel

            return StdioChannel()
        while True:
            try:
                sock, peer = self._socket.accept()
                break
            except OSError as err:
                # accept(2): errors of a connection that is already gone are reported here.
                if err.errno not in _ACCEPT_AGAIN:
                    raise SetupError(f"Cannot accept on {self.address}: {err.strerror}") from err
        if self.address.transport is Transport.UNIX:
            set_unix_options(sock)
            return SocketChannel(sock, f"{self.address} ({_unix_peer(sock)})")
        set_tcp_options(sock)
        name = f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
        if self.address.transport is Transport.TLS:
            from agent.tls import accept_tls

            return accept_tls(sock, f"tls://{name}", self._tls)
        return SocketChannel(sock, f"tcp://{name}")

    def close(self) -> None:
        """Stop listening; a unix socket's name goes if it is still ours."""
        if self._socket is None:
            return
        self._socket.close()
        self._socket = None
        if self._inode is not None and self._inode == _inode(self.address.path):
            with contextlib.suppress(OSError):
                os.unlink(self.address.path)


_ACCEPT_AGAIN = frozenset(
    {
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENONET,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EPROTO,
    }
)


def listen(address: Address, *, tls: TlsOptions | None = None) -> Listener:
    """Start to listen, or get ready to play an image.

    :raises SetupError: the address cannot be bound, or somebody listens there already.
    :raises UsageError: the image cannot be read, or TLS files cannot be used.
    """
    sock: socket.socket | None = None
    if address.transport is Transport.UNIX:
        sock = _listen_unix(address)
    elif address.is_network:
        if address.transport is Transport.TLS:
            from agent.tls import check_server_options

            check_server_options(tls or TlsOptions())
        sock = _listen_tcp(address)
        address = Address(
            transport=address.transport, host=address.host, port=int(sock.getsockname()[1])
        )
    elif address.transport is Transport.FILE:
        FileReadChannel(address.path).close()
    elif address.transport is Transport.SSH:
        raise UsageError(f"Cannot listen on {address}: ssh:// is for agent-send")
    return Listener(address, sock, tls or TlsOptions())


def _listen_tcp(address: Address) -> socket.socket:
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, where = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
            sock.listen()
        except OSError:
            sock.close()
            raise
    except OSError as err:
        raise SetupError(
            f"Cannot listen on {address}: {_reason(err)}", address=str(address)
        ) from err
    return sock


def _listen_unix(address: Address) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # connect(2) needs write permission on the socket: from its birth on, for this user only.
    umask = os.umask(0o077)
    try:
        try:
            sock.bind(address.path)
        except OSError as err:
            if err.errno != errno.EADDRINUSE or not _remove_stale_socket(address.path):
                raise
            sock.bind(address.path)
        sock.listen()
    except OSError as err:
        sock.close()
        raise SetupError(
            f"Cannot listen on {address}: {_reason(err)}", address=str(address)
        ) from err
    finally:
        os.umask(umask)
    return sock


def _remove_stale_socket(path: str) -> bool:
    """Remove the socket at ``path`` if it is one that nobody listens on; tell whether that was
    so."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            probe.connect(path)
        return False
    except ConnectionRefusedError:
        _log.info("Removing stale socket %s", path)
        os.unlink(path)
        return True
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _unix_peer(sock: socket.socket) -> str:
    # unix(7), SO_PEERCRED: struct ucred {pid, uid, gid} of the peer when it connected.
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return f"pid {pid}, uid {uid}"

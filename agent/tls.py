"""tls:// channels: both sides prove with a certificate who they are.

The receiver runs what it is sent, so a client without a certificate of the given authority is
turned away, and a sender does not hand a process to a server it cannot verify. There is no switch
that turns this off. TLS 1.2 is the minimum. Bytes pass through the library's buffers: expect less
than half the speed of tcp://.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from agent.address import Address
from agent.channel import SocketChannel
from agent.errors import SetupError, UsageError
from agent.options import TlsOptions

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

HANDSHAKE_TIMEOUT_S = 10.0
"""A client that connects and says nothing holds up a receiver for no longer than this."""
JOIN_BYTES = 16 << 10
"""RFC 8446, 5.1: a record carries 16 KiB; smaller buffers are joined, larger ones passed as they
are."""


class TlsChannel(SocketChannel):
    """A connected TLS socket, which it owns."""

    def __init__(self, sock: ssl.SSLSocket, peer: str) -> None:
        super().__init__(sock, peer)
        self._tls = sock

    def _write(self, buffers: Sequence[ReadableBuffer]) -> int:
        joined = bytearray()
        total = 0
        try:
            for buffer in buffers:
                size = memoryview(buffer).nbytes
                total += size
                if size < JOIN_BYTES:
                    joined += memoryview(buffer).cast("B") if size else b""
                if joined and (size >= JOIN_BYTES or len(joined) >= JOIN_BYTES):
                    self._tls.sendall(joined)
                    joined = bytearray()
                if size >= JOIN_BYTES:
                    self._tls.sendall(buffer)
            if joined:
                self._tls.sendall(joined)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as err:
            raise ConnectionResetError("TLS connection ended") from err
        return total

    def _read_into(self, view: memoryview) -> int:
        try:
            return self._tls.recv_into(view)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return 0

    def _read_ready(self, view: memoryview) -> int | None:
        return None  # one read decrypts a whole record, and may have to wait for it

    def _pending(self) -> bool:
        return self._tls.pending() > 0


def check_server_options(options: TlsOptions) -> None:
    """Find out before anyone connects whether the files can be used.

    :raises UsageError: they cannot.
    """
    _context(ssl.PROTOCOL_TLS_SERVER, options)


def _context(protocol: ssl._SSLMethod, options: TlsOptions) -> ssl.SSLContext:
    wanted = {
        "--tls-cert": options.certificate,
        "--tls-key": options.key,
        "--tls-ca": options.authorities,
    }
    missing = [name for name, value in wanted.items() if not value]
    if missing:
        raise UsageError(f"Cannot use tls://: {' and '.join(missing)} missing")
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(options.certificate, options.key)
    except OSError as err:
        raise UsageError(
            f"Cannot use TLS certificate {options.certificate!r} with key {options.key!r}: "
            f"{_reason(err)}"
        ) from err
    try:
        context.load_verify_locations(options.authorities)
    except OSError as err:
        raise UsageError(
            f"Cannot use TLS authorities {options.authorities!r}: {_reason(err)}"
        ) from err
    return context


def connect_tls(
    address: Address, connect: Callable[[], socket.socket], options: TlsOptions
) -> TlsChannel:
    """Wrap the socket that ``connect`` makes.

    :raises UsageError: the files cannot be used.
    :raises SetupError: the handshake failed: a wrong certificate or name, or not TLS at all.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, options)
    sock = connect()
    sock.settimeout(HANDSHAKE_TIMEOUT_S)
    try:
        wrapped = context.wrap_socket(sock, server_hostname=options.server_name or address.host)
    except OSError as err:
        sock.close()
        raise SetupError(f"Cannot set up TLS with {address}: {_reason(err)}") from err
    return TlsChannel(wrapped, str(address))


def accept_tls(sock: socket.socket, peer: str, options: TlsOptions) -> TlsChannel:
    """Wrap an accepted socket.

    :raises SetupError: the handshake failed.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, options)
    sock.settimeout(HANDSHAKE_TIMEOUT_S)
    try:
        wrapped = context.wrap_socket(sock, server_side=True)
    except OSError as err:
        sock.close()
        raise SetupError(f"Cannot set up TLS with {peer}: {_reason(err)}") from err
    return TlsChannel(wrapped, peer)


def _reason(err: OSError) -> str:
    if isinstance(err, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {err.verify_message}"
    if isinstance(err, ssl.SSLError):
        return (err.reason or err.strerror or str(err)).lower().replace("_", " ")
    if isinstance(err, TimeoutError):
        return "no answer in time"
    return err.strerror or str(err)

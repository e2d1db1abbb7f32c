"""Addresses of the other side: parse ``tcp://HOST:PORT`` and its relatives.

Pure text: nothing is resolved, opened or connected here. A bad address is a UsageError whose text
names the address and what is wrong with it. There is no percent-decoding: a path is taken as it is
written.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple, NoReturn

from agent.errors import UsageError

MAX_UNIX_PATH_BYTES = 107
"""unix(7): sun_path holds 108 bytes with the terminating NUL."""
MAX_HOST_CHARS = 255
"""RFC 1035, 2.3.4: the longest domain name; a zone index does not make a literal longer than
this."""

_HOST_RE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\Z")
_IPV6_RE = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9._-]+)?\Z")
_USER_RE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+-]*\Z")
_FORMS = (
    "tcp://HOST:PORT, tls://HOST:PORT, ssh://[USER@]HOST[:PORT], unix:PATH, file:PATH or stdio:"
)


class Transport(enum.Enum):
    """How the bytes travel."""

    TCP = "tcp"
    TLS = "tls"
    SSH = "ssh"
    UNIX = "unix"
    FILE = "file"
    STDIO = "stdio"


class Address(NamedTuple):
    """One parsed address; the fields that a transport does not use are empty."""

    transport: Transport
    host: str = ""
    port: int | None = None
    user: str = ""
    path: str = ""

    def __str__(self) -> str:
        if self.transport is Transport.STDIO:
            return "stdio:"
        if self.transport in (Transport.UNIX, Transport.FILE):
            return f"{self.transport.value}:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        port = "" if self.port is None else f":{self.port}"
        return f"{self.transport.value}://{user}{host}{port}"

    @property
    def is_network(self) -> bool:
        """True for an address with a host and a port that a socket binds or connects to."""
        return self.transport in (Transport.TCP, Transport.TLS)

    @property
    def is_recorded(self) -> bool:
        """True when the other side is a file, which never answers."""
        return self.transport is Transport.FILE


def parse_address(text: str, *, listening: bool = False) -> Address:
    """Parse an address; ``listening`` says that this side waits for the other one.

    :raises UsageError: when the text is not an address, or not one this side can use.
    """
    scheme, colon, rest = text.partition(":")
    try:
        transport = Transport(scheme)
    except ValueError:
        transport = None
    if not colon or transport is None:
        _refuse_unknown(text)
    if transport is Transport.STDIO:
        if rest:
            _refuse(text, "nothing may follow 'stdio:'")
        return Address(transport=transport)
    if transport in (Transport.UNIX, Transport.FILE):
        return Address(transport=transport, path=_parse_path(text, transport, rest))
    return _parse_authority(text, transport, rest, listening=listening)


def _parse_path(text: str, transport: Transport, path: str) -> str:
    if not path:
        _refuse(text, f"a path must follow '{transport.value}:'")
    if "\0" in path:
        _refuse(text, "the path contains a NUL character")
    if path.endswith("/"):
        _refuse(text, "the path names a directory")
    if (
        transport is Transport.UNIX
        and len(path.encode("utf-8", "surrogateescape")) > MAX_UNIX_PATH_BYTES
    ):
        _refuse(text, f"the path of a unix socket is limited to {MAX_UNIX_PATH_BYTES} bytes")
    return path


def _parse_authority(text: str, transport: Transport, rest: str, *, listening: bool) -> Address:
    if transport is Transport.SSH and listening:
        _refuse(
            text, "ssh:// is for agent-send, which starts 'agent-recv --once stdio:' over there"
        )
    if not rest.startswith("//"):
        _refuse(text, f"'//' must follow '{transport.value}:'")
    authority = rest[2:]
    if "/" in authority:
        _refuse(text, "nothing may follow the host and port")
    user = ""
    if "@" in authority:
        user, _, authority = authority.rpartition("@")
        if transport is not Transport.SSH:
            _refuse(text, "only ssh:// takes a user name")
        # A leading '-' would reach ssh as an option.
        if not _USER_RE.match(user):
            _refuse(text, f"{user!r} is not a user name")
    host, port_text = _split_host(text, authority)
    port = _parse_port(text, port_text)
    if port is None and transport is not Transport.SSH:
        _refuse(text, "the port is missing")
    if port == 0 and not (listening and transport is not Transport.SSH):
        _refuse(text, "port 0 means 'any free port' and is only for agent-recv")
    return Address(transport=transport, host=host, port=port, user=user)


def _split_host(text: str, authority: str) -> tuple[str, str | None]:
    if authority.startswith("["):
        host, bracket, tail = authority[1:].partition("]")
        if not bracket:
            _refuse(text, "']' is missing after the IPv6 address")
        if not _IPV6_RE.match(host) or len(host) > MAX_HOST_CHARS:
            _refuse(text, f"{host!r} is not an IPv6 address")
        if tail and not tail.startswith(":"):
            _refuse(text, f"{tail!r} cannot follow the IPv6 address")
        return host, tail[1:] if tail else None
    if authority.count(":") > 1:
        _refuse(text, "an IPv6 address goes in brackets, as in tcp://[::1]:7000")
    host, colon, port_text = authority.partition(":")
    if not host:
        _refuse(text, "the host is missing (0.0.0.0 or [::] stand for all interfaces)")
    # As for the user name: a host such as '-oProxyCommand=...' must not reach ssh.
    if not _HOST_RE.match(host) or len(host) > MAX_HOST_CHARS:
        _refuse(text, f"{host!r} is not a host name")
    return host, port_text if colon else None


def _parse_port(text: str, port_text: str | None) -> int | None:
    if port_text is None:
        return None
    if not port_text:
        _refuse(text, "the port is missing")
    if not (port_text.isascii() and port_text.isdigit()) or len(port_text) > 5:
        _refuse(text, f"{port_text!r} is not a port number")
    port = int(port_text)
    if port > 65535:
        _refuse(text, f"port {port} is above 65535")
    return port


def _refuse_unknown(text: str) -> NoReturn:
    hint = f"Use {_FORMS}."
    host, colon, port = text.rpartition(":")
    if colon and port.isdigit() and host and "/" not in host:
        hint = f"Did you mean tcp://{text}?"
    elif text.startswith(("/", "./")):
        hint = f"Did you mean unix:{text} or file:{text}?"
    elif text in ("stdio", "-"):
        hint = "Did you mean stdio:?"
    raise UsageError(f"Cannot use address {text!r}: it names no known transport", hint=hint)


def _refuse(text: str, reason: str) -> NoReturn:
    raise UsageError(f"Cannot use address {text!r}: {reason}")

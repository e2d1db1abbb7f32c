"""Addresses: what is accepted, and that every mistake is named."""

from __future__ import annotations

import pytest

from agent.address import Address, Transport, parse_address
from agent.errors import UsageError


@pytest.mark.parametrize(
    ("text", "host", "port", "user"),
    [
        ("tcp://10.0.0.2:7000", "10.0.0.2", 7000, ""),
        ("tcp://some-host.example:1", "some-host.example", 1, ""),
        ("tcp://[::1]:65535", "::1", 65535, ""),
        ("tcp://[fe80::1%eth0]:7000", "fe80::1%eth0", 7000, ""),
        ("tls://host:443", "host", 443, ""),
        ("ssh://host", "host", None, ""),
        ("ssh://root@host:2222", "host", 2222, "root"),
        ("ssh://u@[::1]:22", "::1", 22, "u"),
    ],
)
def test_host_and_port_are_taken_apart_and_put_together(
    text: str, host: str, port: int | None, user: str
) -> None:
    address = parse_address(text)
    assert (address.host, address.port, address.user) == (host, port, user)
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "transport", "path"),
    [
        ("unix:/run/x.sock", Transport.UNIX, "/run/x.sock"),
        ("unix:relative", Transport.UNIX, "relative"),
        ("file:/var/tmp/a b.ferry", Transport.FILE, "/var/tmp/a b.ferry"),
        ("file:a:b", Transport.FILE, "a:b"),
        ("stdio:", Transport.STDIO, ""),
    ],
)
def test_paths_are_taken_as_they_are(text: str, transport: Transport, path: str) -> None:
    address = parse_address(text)
    assert address == Address(transport=transport, path=path)
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no known transport"),
        ("foo", "no known transport"),
        ("http://host:1", "no known transport"),
        ("tcp:host:1", "'//' must follow"),
        ("tcp://", "host is missing"),
        ("tcp://:7000", "0.0.0.0"),
        ("tcp://host", "port is missing"),
        ("tcp://host:", "port is missing"),
        ("tcp://host:x", "not a port number"),
        ("tcp://host:-1", "not a port number"),
        ("tcp://host:+1", "not a port number"),
        ("tcp://host:\u0661", "not a port number"),
        ("tcp://host:65536", "above 65535"),
        ("tcp://host:99999999999", "not a port number"),
        ("tcp://host:0", "any free port"),
        ("tcp://::1:7000", "brackets"),
        ("tcp://[::1:7000", "']' is missing"),
        ("tcp://[::1]7000", "cannot follow"),
        ("tcp://[::1]", "port is missing"),
        ("tcp://[host]:1", "not an IPv6 address"),
        ("tcp://user@host:1", "only ssh://"),
        ("tcp://host:1/path", "nothing may follow"),
        ("tcp://ho st:1", "not a host name"),
        ("tcp://" + "h" * 300 + ":1", "not a host name"),
        ("ssh://-oProxyCommand=evil", "not a host name"),
        ("ssh://-oProxyCommand=evil@host", "not a user name"),
        ("ssh://@host", "not a user name"),
        ("ssh://host:0", "any free port"),
        ("unix:", "a path must follow"),
        ("unix:" + "x" * 108, "limited to 107 bytes"),
        ("unix:/a/", "names a directory"),
        ("file:", "a path must follow"),
        ("file:a\0b", "NUL"),
        ("stdio:x", "nothing may follow"),
    ],
)
def test_bad_address_is_refused_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(text)
    assert reason in str(caught.value)
    assert repr(text) in str(caught.value)


def test_port_zero_and_ssh_depend_on_the_side() -> None:
    assert parse_address("tcp://127.0.0.1:0", listening=True).port == 0
    with pytest.raises(UsageError, match="for agent-send"):
        parse_address("ssh://host", listening=True)


@pytest.mark.parametrize(
    ("text", "hint"),
    [("localhost:80", "tcp://localhost:80"), ("/run/x", "unix:/run/x"), ("-", "stdio:")],
)
def test_unknown_address_suggests_what_was_meant(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(text)
    assert hint in caught.value.hint

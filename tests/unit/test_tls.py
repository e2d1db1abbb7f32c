"""tls://: both sides need a certificate, and bytes pass unchanged."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from agent import net
from agent.address import parse_address
from agent.channel import Channel
from agent.errors import MigrationError, SetupError, TransferError, UsageError
from agent.options import TlsOptions

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")

LISTEN = parse_address("tls://127.0.0.1:0", listening=True)


def openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)


def make_certificate(directory: Path, name: str) -> TlsOptions:
    """A self-signed certificate for 127.0.0.1, which is also its own authority."""
    key, certificate = str(directory / f"{name}.key"), str(directory / f"{name}.pem")
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"),
        *("-keyout", key, "-out", certificate),
    )
    return TlsOptions(certificate=certificate, key=key, authorities=certificate)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> TlsOptions:
    return make_certificate(tmp_path_factory.mktemp("good"), "good")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> TlsOptions:
    return make_certificate(tmp_path_factory.mktemp("stranger"), "stranger")


class Accepted:
    """Accepts one connection in a thread; after join() there is a channel or an error."""

    def __init__(self, listener: net.Listener) -> None:
        self.channel: Channel | None = None
        self.error: SetupError | None = None
        self._thread = threading.Thread(target=self._accept, args=(listener,))
        self._thread.start()

    def _accept(self, listener: net.Listener) -> None:
        try:
            self.channel = listener.accept()
        except SetupError as err:
            self.error = err

    def join(self) -> None:
        self._thread.join(20)


def test_bytes_pass_both_ways(good: TlsOptions) -> None:
    data = [b"a" * 10, b"", b"b" * 100_000, b"c" * 9000, b"d" * 9000, b"e"]
    expected = b"".join(data)
    with net.listen(LISTEN, tls=good) as listener:
        accepted = Accepted(listener)
        left = net.connect(listener.address, tls=good)
        accepted.join()
    assert accepted.channel is not None
    with left, accepted.channel as right:
        received = bytearray(len(expected))
        thread = threading.Thread(target=right.recv_exactly_into, args=(received,))
        thread.start()
        assert left.send_buffers(data) == len(expected)
        thread.join()
        assert received == expected
        # A record is taken from the socket as a whole: its rest must count as readable.
        right.send_buffers([b"12345678"])
        half = bytearray(4)
        left.recv_exactly_into(half)
        assert left.poll_readable()
        left.recv_exactly_into(half)
        assert half == b"5678"
        assert not left.poll_readable()
        right.close()
        with pytest.raises(net.PeerGone):
            left.recv_exactly_into(half)


def test_client_of_another_authority_is_turned_away(good: TlsOptions, stranger: TlsOptions) -> None:
    liar = TlsOptions(
        certificate=stranger.certificate, key=stranger.key, authorities=good.authorities
    )
    with net.listen(LISTEN, tls=good) as listener:
        accepted = Accepted(listener)
        # With TLS 1.3 a client learns only when it reads that its certificate was not accepted.
        with pytest.raises((SetupError, TransferError)):
            with net.connect(listener.address, tls=liar) as left:
                left.recv_exactly_into(bytearray(1), timeout_s=10)
        accepted.join()
    assert accepted.channel is None and accepted.error is not None


def test_server_of_another_authority_is_not_trusted(good: TlsOptions, stranger: TlsOptions) -> None:
    with net.listen(LISTEN, tls=stranger) as listener:
        accepted = Accepted(listener)
        with pytest.raises(SetupError, match="certificate not accepted"):
            net.connect(listener.address, tls=good)
        accepted.join()


def test_wrong_name_is_not_trusted(good: TlsOptions) -> None:
    other = TlsOptions(
        certificate=good.certificate,
        key=good.key,
        authorities=good.authorities,
        server_name="other.example",
    )
    with net.listen(LISTEN, tls=good) as listener:
        accepted = Accepted(listener)
        with pytest.raises(SetupError, match="certificate not accepted"):
            net.connect(listener.address, tls=other)
        accepted.join()


@pytest.mark.parametrize("option", ["certificate", "key", "authorities"])
def test_missing_or_unreadable_file_is_a_usage_error(good: TlsOptions, option: str) -> None:
    values = {
        "certificate": good.certificate,
        "key": good.key,
        "authorities": good.authorities,
    }
    for value in ("", "/nowhere.pem", "/dev/null"):
        with pytest.raises(UsageError, match="Cannot use (tls|TLS)"):
            net.listen(LISTEN, tls=TlsOptions(**{**values, option: value}))


def test_plain_client_does_not_get_through(good: TlsOptions) -> None:
    with net.listen(LISTEN, tls=good) as listener:
        accepted = Accepted(listener)
        plain = parse_address(f"tcp://127.0.0.1:{listener.address.port}")
        with net.connect(plain) as left, pytest.raises(MigrationError):
            left.send_buffers([b"hello hello hello"])
            left.recv_exactly_into(bytearray(1000), timeout_s=10)
        accepted.join()
    assert accepted.error is not None

"""Channels against real sockets, pipes and files."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from array import array
from pathlib import Path

import pytest

from agent import net
from agent.address import parse_address
from agent.channel import Channel, FileReadChannel, FileWriteChannel, SocketChannel
from agent.errors import SetupError, TransferError, UsageError
from agent.frames import FrameReader
from agent.net import PeerGone, PeerSilent
from protocol.errors import RemoteProtocolError
from protocol.framing import FrameType, encode_frame


def channel_pair() -> tuple[SocketChannel, SocketChannel]:
    left, right = socket.socketpair()
    return SocketChannel(left, "right"), SocketChannel(right, "left")


def receive_in_thread(channel: Channel, count: int) -> tuple[threading.Thread, bytearray]:
    received = bytearray(count)
    thread = threading.Thread(target=channel.recv_exactly_into, args=(received,))
    thread.start()
    return thread, received


def test_many_buffers_of_all_kinds_arrive_in_order() -> None:
    left, right = channel_pair()
    buffers = [bytes([i % 251]) * (i % 7) for i in range(5000)]
    mixed: list[bytes | memoryview | array[int]] = [
        *buffers,
        array("Q", [1, 2, 3]),
        b"",
        memoryview(array("I", range(9))),
    ]
    expected = b"".join(bytes(memoryview(b).cast("B")) if memoryview(b) else b"" for b in mixed)
    with left, right:
        thread, received = receive_in_thread(right, len(expected))
        assert left.send_buffers(mixed) == len(expected)
        thread.join()
    assert bytes(received) == expected
    assert left.bytes_sent == right.bytes_received == len(expected)


def test_partial_sends_are_completed() -> None:
    left, right = channel_pair()
    written: list[int] = []

    class Stingy(SocketChannel):
        def _write(self, buffers: object) -> int:
            assert isinstance(buffers, list)
            flat = b"".join(bytes(memoryview(buffer).cast("B")) for buffer in buffers if buffer)
            written.append(self.socket.send(flat[: 1 + len(flat) // 3]))
            return written[-1]

    stingy = Stingy(left.socket, "right")
    data: list[bytes | memoryview | array[int]] = [b"abc", b"", array("Q", range(100)), b"x" * 1000]
    with stingy, right:
        total = stingy.send_buffers(data)
        received = bytearray(total)
        right.recv_exactly_into(received)
    assert len(written) > 3
    assert bytes(received) == b"abc" + array("Q", range(100)).tobytes() + b"x" * 1000


def test_non_blocking_inherited_pipe_works() -> None:
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    os.set_blocking(write_fd, False)
    with Channel(read_fd, -1, "w") as reader, Channel(-1, write_fd, "r") as writer:
        thread, received = receive_in_thread(reader, 1 << 20)
        writer.send_buffers([b"z" * (1 << 20)])
        thread.join()
    assert received == b"z" * (1 << 20)


def test_end_of_stream_names_peer_and_phase() -> None:
    left, right = channel_pair()
    right.phase = "round 3"
    left.send_buffers([b"abc"])
    left.close()
    with right, pytest.raises(PeerGone, match="left closed .* in round 3 after 3 of 10"):
        right.recv_exactly_into(bytearray(10))


def test_last_words_can_be_read_after_a_failed_send() -> None:
    left, right = channel_pair()
    right.send_buffers([b"Abort"])
    right.close()
    with left:
        with pytest.raises(PeerGone, match="while sending in handshake"):
            for _ in range(100):
                left.send_buffers([b"x" * 65536])
        assert left.poll_readable()
        words = bytearray(5)
        left.recv_exactly_into(words)
    assert words == b"Abort"


def test_graceful_close_over_tcp_delivers_last_words_despite_unread_data() -> None:
    with net.listen(parse_address("tcp://127.0.0.1:0", listening=True)) as listener:
        sender = net.connect(listener.address)
        receiver = listener.accept()
    with sender:
        sender.send_buffers([b"x" * 200_000])
        receiver.send_buffers([b"Abort"])
        thread = threading.Thread(target=receiver.close_gracefully)
        thread.start()
        words = bytearray(5)
        sender.recv_exactly_into(words, timeout_s=5)
        assert words == b"Abort"
        sender.close()
        thread.join()
    assert receiver.closed


def test_silent_peer_is_given_up_after_the_time_limit() -> None:
    left, right = channel_pair()
    with left, right, pytest.raises(PeerSilent, match="right sent nothing for 0.05 s"):
        left.recv_exactly_into(bytearray(1), timeout_s=0.05)


def test_poll_readable_tells_data_from_silence() -> None:
    left, right = channel_pair()
    with left, right:
        assert not left.poll_readable()
        right.send_buffers([b"!"])
        assert left.poll_readable()


# -- frames ----------------------------------------------------------------------------------------


def test_frames_reuse_one_buffer_and_grow_for_a_large_one() -> None:
    left, right = channel_pair()
    reader = FrameReader(right)
    with left, right:
        assert reader.poll_frame() is None
        left.send_buffers(encode_frame(FrameType.PAGES, b"one", b"two"))
        first = reader.read_frame()
        assert (first[0], bytes(first[1])) == (FrameType.PAGES, b"onetwo")
        left.send_buffers(encode_frame(FrameType.CONTROL, b"three"))
        second = reader.poll_frame()
        assert second is not None and bytes(second[1]) == b"three"
        assert bytes(first[1]) == b"threeo"
        big = bytes(range(256)) * 20_000
        thread = threading.Thread(target=left.send_buffers, args=(encode_frame(FrameType.CONTROL, big),))
        thread.start()
        assert reader.read_frame()[1] == big
        thread.join()
    assert reader.nr_frames == 3


def test_garbage_instead_of_a_frame_is_the_peers_fault() -> None:
    left, right = channel_pair()
    with left, right:
        left.send_buffers([b"GET / HTTP/1.0\r\n\r\n"])
        with pytest.raises(RemoteProtocolError):
            FrameReader(right).read_frame()


# -- listening and connecting ----------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_tcp_port_zero_reports_the_bound_port(host: str) -> None:
    try:
        listener = net.listen(parse_address(f"tcp://{host}:0", listening=True))
    except SetupError as err:
        pytest.skip(str(err))
    with listener:
        assert listener.address.port
        with net.connect(parse_address(str(listener.address))) as left:
            with listener.accept() as right:
                left.send_buffers([b"hello"])
                words = bytearray(5)
                right.recv_exactly_into(words)
                assert words == b"hello"
                assert host in right.peer
                assert isinstance(left, SocketChannel)
                assert left.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_nobody_listening_is_a_setup_error_with_a_hint(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(SetupError, match="refused") as caught:
            net.connect(parse_address(f"tcp://127.0.0.1:{port}"))
    assert "agent-recv" in caught.value.hint
    with pytest.raises(SetupError, match="No such file"):
        net.connect(parse_address(f"unix:{tmp_path}/none"))


def test_address_in_use_is_a_setup_error() -> None:
    with net.listen(parse_address("tcp://127.0.0.1:0", listening=True)) as listener:
        with pytest.raises(SetupError, match="in use"):
            net.listen(listener.address)


def test_unknown_host_is_a_setup_error() -> None:
    with pytest.raises(SetupError, match="Cannot connect to tcp://no-such-host.invalid:1"):
        net.connect(parse_address("tcp://no-such-host.invalid:1"))


def test_unix_socket_is_private_and_goes_with_its_listener(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with net.listen(parse_address(f"unix:{path}")) as listener:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        with net.connect(listener.address), listener.accept() as right:
            assert f"pid {os.getpid()}" in right.peer
    assert not path.exists()


def test_stale_unix_socket_is_replaced_but_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    address = parse_address(f"unix:{path}")
    with net.listen(address):
        with pytest.raises(SetupError, match="in use"):
            net.listen(address)
        assert path.exists()


def test_other_files_are_never_replaced_by_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(SetupError):
        net.listen(parse_address(f"unix:{path}"))
    assert path.read_text() == "precious"


# -- images ----------------------------------------------------------------------------------------


def test_image_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "i.ferry"
    path.write_text("old")
    channel = net.connect(parse_address(f"file:{path}"))
    assert channel.recorded and not channel.poll_readable()
    channel.send_buffers([b"new ", b"image"])
    assert path.read_text() == "old"
    channel.complete()
    channel.close()
    assert path.read_text() == "new image"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["i.ferry"]


def test_abandoned_image_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "i.ferry"
    with FileWriteChannel(str(path)) as channel:
        channel.send_buffers([b"half"])
    assert os.listdir(tmp_path) == []


def test_image_is_played_and_its_end_is_named(tmp_path: Path) -> None:
    path = tmp_path / "i.ferry"
    path.write_bytes(b"0123456789")
    with net.listen(parse_address(f"file:{path}", listening=True)) as listener:
        assert listener.one_shot
        channel = listener.accept()
    assert channel.recorded
    with channel:
        channel.send_buffers([b"nobody reads this"])
        channel.recv_exactly_into(bytearray(8))
        with pytest.raises(TransferError, match="ends early"):
            channel.recv_exactly_into(bytearray(8))


def test_image_may_go_to_a_device_or_pipe() -> None:
    with FileWriteChannel("/dev/null") as channel:
        channel.send_buffers([b"x" * 100])
        channel.complete()
    assert os.path.exists("/dev/null")


@pytest.mark.parametrize("path", ["", "missing/i.ferry"])
def test_image_that_cannot_be_written_is_a_usage_error(tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError, match="Cannot write image"):
        FileWriteChannel(str(tmp_path / path))


@pytest.mark.parametrize("path", ["", "missing.ferry"])
def test_image_that_cannot_be_read_is_a_usage_error(tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError, match="Cannot read image"):
        FileReadChannel(str(tmp_path / path))


def test_full_disk_is_a_transfer_error() -> None:
    with FileWriteChannel("/dev/full") as channel, pytest.raises(TransferError, match="No space"):
        channel.send_buffers([b"x"])


# -- stdio and ssh ---------------------------------------------------------------------------------

ECHO = """
import sys
from agent.channel import PeerGone
from agent.pipes import StdioChannel
channel = StdioChannel()
print("a stray print")
sys.stdout.flush()
word = bytearray(5)
channel.recv_exactly_into(word)
channel.send_buffers([bytes(word).upper()])
channel.close()
"""


def test_stdio_takes_over_standard_fds_so_that_prints_do_not_mix_in() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ECHO], input=b"hello", capture_output=True, timeout=30
    )
    assert done.stdout == b"HELLO"
    assert b"a stray print" in done.stderr


def fake_ssh(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    directory.joinpath("ssh").write_text("#!/bin/sh\n" + script)
    directory.joinpath("ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def test_ssh_runs_the_remote_command_with_safe_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ssh(tmp_path, monkeypatch, f'printf "%s\\n" "$@" > {tmp_path}/args; cat')
    with net.connect(parse_address("ssh://me@host:2222"), remote_command="sudo agent-recv") as ssh:
        ssh.send_buffers([b"hello"])
        word = bytearray(5)
        ssh.recv_exactly_into(word)
        assert word == b"hello"
    args = (tmp_path / "args").read_text().split("\n")[:-1]
    assert args == ["-T", "-p", "2222", "-l", "me", "--", "host", "sudo agent-recv --once stdio:"]


def test_failing_ssh_is_named_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ssh(tmp_path, monkeypatch, "exit 255")
    with net.connect(parse_address("ssh://host")) as ssh:
        with pytest.raises(PeerGone, match="ssh exited with status 255"):
            ssh.recv_exactly_into(bytearray(1))


def test_ssh_ignores_the_terminals_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ssh(tmp_path, monkeypatch, "kill -INT $$; echo alive; cat > /dev/null")
    before = signal.getsignal(signal.SIGINT)
    with net.connect(parse_address("ssh://host")) as ssh:
        word = bytearray(5)
        ssh.recv_exactly_into(word)
        assert word == b"alive"
    assert signal.getsignal(signal.SIGINT) is before

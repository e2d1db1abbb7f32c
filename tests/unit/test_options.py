"""Value types of the command line: what passes, and that the rest is named."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from agent.cli import options as common
from agent.cli import recv, send
from agent.errors import UsageError
from agent.options import Compression, CompressOption, SendOptions


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1024", 1024),
        ("10k", 10 << 10),
        ("10K", 10 << 10),
        ("3MiB", 3 << 20),
        ("2GB", 2 << 30),
        ("1T", 1 << 40),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert common.size(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (common.size, ""),
        (common.size, "0"),
        (common.size, "-1"),
        (common.size, "1.5M"),
        (common.size, "9999999T"),
        (common.size, "12 M"),
        (common.whole_number(0, 10), ""),
        (common.whole_number(0, 10), "11"),
        (common.whole_number(0, 10), "-1"),
        (common.whole_number(0, 10), "1_0"),
        (common.whole_number(0, 10), " 1"),
        (common.whole_number(0, 10), "\u0661"),
        (common.whole_number(0, 10), "9" * 5000),
        (common.decimal(0, 10), "nan"),
        (common.decimal(0, 10), "inf"),
        (common.decimal(0, 10), "1e1"),
        (common.decimal(0, 10), "10.5"),
        (common.decimal(0, 10), "."),
        (common.compression, ""),
        (common.compression, "gzip"),
        (common.compression, "none:1"),
        (common.compression, "zstd:"),
        (common.compression, "zstd:0"),
        (common.compression, "zstd:20"),
        (common.external_fd, "5"),
        (common.external_fd, "fd[-1]"),
        (common.external_fd, "fd[9999999999]"),
        (common.inherited_fd, "fd[1]"),
        (common.inherited_fd, "fd[1]:fd[x]"),
        (common.session_name, "../../etc/passwd"),
        (common.session_name, "A" * 32),
    ],
)
def test_bad_values_are_refused(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse(text)


@pytest.mark.parametrize("text", ["none", "auto", "zstd:1", "zstd:19"])
def test_compression_reads_back(text: str) -> None:
    assert str(common.compression(text)) == text


def test_inherited_fd_is_target_then_agent() -> None:
    assert common.inherited_fd("fd[7]:fd[3]") == (3, 7)


def parse_send(*words: str) -> SendOptions:
    return send.parse_options(words)[0]


def test_every_send_option_arrives() -> None:
    options = parse_send(
        *("--tracker", "log", "--log-capacity", "4096", "--log-when-full", "stall"),
        *("--downtime-limit", "20.5", "--max-rounds", "0", "4121"),
        *("--bandwidth-limit", "10M", "--compress", "zstd:3", "--streams", "1", "--verify"),
        *("--tcp-close", "--file-locks", "--external", "fd[3]", "--external", "fd[5]"),
        *("--remote-command", "sudo agent-recv", "--connect-timeout", "3", "--io-timeout", "7"),
        *("--state-dir", "/s", "--json", "--progress", "ssh://root@h"),
    )
    assert options.pid == 4121
    assert str(options.address) == "ssh://root@h"
    assert (options.tracker, options.log_capacity, options.log_when_full) == ("log", 4096, "stall")
    assert options.downtime_limit_s == pytest.approx(0.0205)
    assert options.max_rounds == 0
    assert options.bandwidth_limit == 10 << 20
    assert options.compress == CompressOption(method=Compression.ZSTD, level=3)
    assert options.verify and options.tcp_close and options.file_locks and options.json
    assert options.external_fds == {3, 5}
    assert options.remote_command == "sudo agent-recv"
    assert (options.connect_timeout_s, options.io_timeout_s) == (3, 7)
    assert options.state_dir == "/s"
    assert options.progress is True


def test_defaults_of_the_command_line_are_those_of_the_options() -> None:
    options = parse_send("4121", "tcp://h:1")
    assert options == SendOptions(pid=options.pid, address=options.address)


def test_modes_need_fewer_arguments() -> None:
    assert parse_send("--check", "5").address is None
    assert parse_send("--check", "5").check
    options = parse_send("--resolve", "0" * 32)
    assert (options.pid, options.address, options.resolve) == (0, None, "0" * 32)
    assert str(parse_send("--resolve", "0" * 32, "tcp://h:1").address) == "tcp://h:1"
    assert parse_send("--leave-running", "5", "file:x").leave_running


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "PID is missing"),
        ("5", "ADDRESS is missing"),
        ("x tcp://h:1", "'x' is not a pid"),
        ("0 tcp://h:1", "0 is not a pid"),
        ("-5 tcp://h:1", "'-5' is not a pid"),
        ("4194305 tcp://h:1", "is not a pid"),
        ("99999999999999999999 tcp://h:1", "is not a pid"),
        ("5 nonsense", "no known transport"),
        ("5 tcp://h:1 6", "'6' is too much"),
        ("--check 5 tcp://h:1", "--check takes a PID only"),
        ("--resolve xyz", "not a session"),
        ("--resolve 00000000000000000000000000000000 tcp://h:1 5", "too much"),
        ("--resolve 00000000000000000000000000000000 file:x", "Nobody can be asked"),
        ("--check --leave-running 5", "not allowed with"),
        ("--leave-running 5 tcp://h:1", "two running copies"),
        ("--log-capacity 5 5 tcp://h:1", "with --tracker log only"),
        ("--tracker log --log-capacity 0 5 tcp://h:1", "not between"),
        ("--tracker magic 5 tcp://h:1", "invalid choice"),
        ("--streams 4 5 tcp://h:1", "--streams 4 is not supported yet"),
        ("--streams 0 5 tcp://h:1", "not between"),
        ("--shell-job 5 tcp://h:1", "--shell-job is not supported yet"),
        ("--tcp-established 5 tcp://h:1", "--tcp-established is not supported yet"),
        ("--ghost-limit 1M 5 tcp://h:1", "--ghost-limit is not supported yet"),
        ("--remote-command x 5 tcp://h:1", "for ssh:// addresses"),
        ("--tls-cert x 5 tcp://h:1", "mean nothing with"),
        ("--down 5 5 tcp://h:1", "Unrecognized"),
        ("--max-rounds", "expected one argument"),
    ],
)
def test_bad_send_line_is_refused_with_its_reason(line: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_send(*line.split())
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_recv_option_arrives() -> None:
    options, _ = recv.parse_options(
        [
            *("--once", "--wait", "--new-pidns", "--inherit-fd", "fd[1]:fd[9]", "--json"),
            *("--pidfile", "/p", "--state-dir", "/s", "--io-timeout", "5", "unix:/x"),
        ]
    )
    assert options.once and options.wait and options.new_pidns and options.json
    assert options.inherit_fds == {9: 1}
    assert (options.pidfile, options.state_dir, options.io_timeout_s) == ("/p", "/s", 5)


@pytest.mark.parametrize("address", ["file:x", "stdio:"])
def test_one_shot_addresses_imply_once(address: str) -> None:
    assert recv.parse_options(["--wait", address])[0].once


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "ADDRESS is missing"),
        ("tcp://h:1 tcp://h:2", "is too much"),
        ("ssh://h", "for agent-send"),
        ("--wait tcp://h:1", "--wait needs --once"),
        ("--inherit-fd fd[1]:fd[9] tcp://h:1", "--inherit-fd needs --once"),
        ("--once --inherit-fd fd[99999]:fd[9] unix:x", "no open fd 99999"),
        ("--inherit-fd fd[0]:fd[9] stdio:", "carries the migration itself"),
        ("--once --inherit-fd fd[1]:fd[9] --inherit-fd fd[2]:fd[9] unix:x", "given twice"),
        ("--root /x tcp://h:1", "--root is not supported yet"),
        ("--tls-ca x unix:x", "mean nothing with"),
    ],
)
def test_bad_recv_line_is_refused_with_its_reason(line: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        recv.parse_options(line.split())
    assert reason in str(caught.value)

"""The hosts that the migration tests run on are what they claim to be."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.hosts import Host, host_pair, is_alive, join, wait_until
from tests.prerequisites import require_namespaces


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    require_namespaces()


def test_host_has_pids_names_and_network_of_its_own() -> None:
    with Host("lonely") as host:
        assert host.run(["hostname"]).stdout == b"lonely\n"
        assert 1 in [int(name) for name in os.listdir(f"/proc/{host.init_pid}/root/proc") if name.isdigit()]
        assert b"lo" in host.run(["ip", "-o", "link"]).stdout
        assert host.run(["readlink", "/proc/self/ns/net"]).stdout.strip() != os.readlink(
            "/proc/self/ns/net"
        ).encode()


def test_hosts_reach_each_other_over_their_link() -> None:
    with Host("a") as left, Host("b") as right:
        here, there = join(left, right)
        script = "import socket,sys; s=socket.create_server((sys.argv[1], 7000)); s.accept()[0].send(b'hi')"
        server = right.popen([sys.executable, "-c", script, there])
        wait_until(lambda: right.listens_on_tcp(7000), "the server")
        client = "import socket,sys; print(socket.create_connection((sys.argv[1], 7000)).recv(9))"
        assert left.run([sys.executable, "-c", client, there]).stdout == b"b'hi'\n"
        assert server.wait() == 0


def test_everything_inside_ends_with_the_host(tmp_path: Path) -> None:
    with Host("short") as host:
        sleeper = host.start_detached(["sleep", "1000"], tmp_path / "out", last_pid=5000)
        assert sleeper.inner > 5000
        assert host.outer_pid(sleeper.inner) == sleeper.outer
        assert sleeper.alive
    assert not is_alive(sleeper.outer)


def test_stopped_program_ends_with_the_host(tmp_path: Path) -> None:
    with Host("short") as host:
        sleeper = host.start_detached(["sleep", "1000"], tmp_path / "out", last_pid=5000)
        sleeper.kill(signal.SIGSTOP)
        stat = Path(f"/proc/{sleeper.popen.pid}/stat")
        wait_until(lambda: ") T " in stat.read_text(), "nsenter to stop itself")
    assert sleeper.popen.returncode is not None


def test_clocks_of_a_host_can_be_ahead() -> None:
    with host_pair(monotonic_offset_s=1000) as (source, destination):
        clock = [sys.executable, "-c", "import time; print(time.monotonic())"]
        assert float(destination.run(clock).stdout) - float(source.run(clock).stdout) > 999

"""Servers: Redis under load, nginx, a Java virtual machine, one of TCP whose clients stay connected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import REPOSITORY, Host, wait_until
from tests.migrate.crossing import (
    COMPLETED,
    Receiver,
    Workload,
    agent_send,
    migrate,
    start_program,
    start_workload,
)
from tests.prerequisites import require_program

WORKLOADS = Path(__file__).resolve().parent.parent / "workloads"
REDIS_PORT = 6379
ECHO_PORT = 7007
CLIENTS = """
import socket, sys
clients = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(3)]
def told(client):
    try: return client.recv(9)
    except ConnectionResetError: return b"reset"
for client in clients: client.sendall(b"hello")
print([told(client) for client in clients], flush=True)
if "stay" in sys.argv: print([told(client) for client in clients], flush=True)
"""


def start_server(host: Host, directory: Path, name: str, argv: list[str], port: int) -> Workload:
    workload = start_program(host, directory, argv, status=directory / name, wait=False)
    wait_until(lambda: host.listens_on_tcp(port) or not workload.process.alive, f"{name} to listen")
    assert workload.process.alive, workload.printed()
    return workload


@pytest.mark.parametrize("tracker", ["auto", "log", "bitmap", "compare"])
def test_redis_moves_under_load_without_losing_a_write(
    source: Host, destination: Host, tmp_path: Path, tracker: str
) -> None:
    program = require_program("redis-server", "redis-server")
    options = ["--port", str(REDIS_PORT), "--save", "", "--dir", str(tmp_path), "--bind", "0.0.0.0"]
    server = start_server(
        source, tmp_path, "redis", [program, *options, "--protected-mode", "no"], REDIS_PORT
    )
    # On the source host, so that it is no part of what moves and sees both addresses.
    client = start_workload(
        source,
        tmp_path,
        "redis_writer",
        "STATUS",
        f"127.0.0.1:{REDIS_PORT}",
        f"{destination.addresses[0]}:{REDIS_PORT}",
    )
    before = client.last()
    migrate(server, destination, tmp_path, send=["--tcp-close", "--verify", f"--tracker={tracker}"])
    wait_until(lambda: client.last().get("reconnected", 0) >= 1, "the client to reconnect")
    after = client.wait_for_notes(10)
    assert after["acknowledged"] > before["acknowledged"]
    assert after["address"].startswith(destination.addresses[0])
    assert client.errors() == []
    assert after["longest_gap_s"] < 10
    assert destination.outer_pid(server.pid)


def test_nginx_serves_from_its_new_host(source: Host, destination: Host, tmp_path: Path) -> None:
    program = require_program("nginx", "nginx-light")
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "index.html").write_text("carried\n")
    configuration = (WORKLOADS / "nginx.conf").read_text().replace("PREFIX", str(tmp_path))
    (tmp_path / "nginx.conf").write_text(configuration)
    argv = [program, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    server = start_server(source, tmp_path, "nginx", argv, 8080)

    def fetch(host: Host) -> bytes:
        script = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8080/').read())"
        return host.run([sys.executable, "-c", script]).stdout

    assert b"carried" in fetch(source)
    migrate(server, destination, tmp_path, send=["--verify"])
    for _ in range(5):
        assert b"carried" in fetch(destination)
    assert destination.outer_pid(server.pid)


def test_java_virtual_machine_goes_on(source: Host, destination: Host, tmp_path: Path) -> None:
    java = require_program("java", "openjdk-17-jre-headless")
    status = tmp_path / "java.status"
    # UsePerfData maps a file that belongs to one host's /tmp; the heap is small to keep the test quick.
    options = ["-Xmx64m", "-XX:-UsePerfData"]
    workload = start_program(
        source, tmp_path, [java, *options, WORKLOADS / "JavaLoop.java", status], status=status
    )
    before = workload.last()
    migrate(workload, destination, tmp_path, send=["--verify"])
    after = workload.assert_healthy(destination, count=20)
    assert after["nr_errors"] == 0
    for counter in ("allocated", "checked", "passed"):
        assert after[counter] > before[counter], f"{counter} stands still"


def start_echo_server(source: Host, directory: Path) -> tuple[Workload, Any]:
    """A server and three clients of it, which have had an answer and wait for another one."""
    argv = [sys.executable, "-m", "tests.workloads.echoserver", str(ECHO_PORT)]
    server = start_server(source, directory, "echo", argv, ECHO_PORT)
    clients = source.popen([sys.executable, "-c", CLIENTS, str(ECHO_PORT), "stay"])
    assert clients.popen.stdout is not None
    assert clients.popen.stdout.readline().count(b"hello") == 3
    return server, clients


def assert_echoes(host: Host) -> None:
    assert host.run([sys.executable, "-c", CLIENTS, str(ECHO_PORT)]).stdout.count(b"hello") == 3


def sockets_of(host: Host, pid: int) -> list[str]:
    folder = host.proc(pid) / "fd"
    return [link for name in os.listdir(folder) if (link := os.readlink(folder / name)).startswith("socket:")]


@pytest.mark.parametrize("tracker", ["auto", "compare"])
def test_a_server_with_clients_answers_new_ones_on_its_new_host(
    source: Host, destination: Host, tmp_path: Path, tracker: str
) -> None:
    server, clients = start_echo_server(source, tmp_path)
    assert len(sockets_of(source, server.pid)) == 4
    migrate(server, destination, tmp_path, send=["--tcp-close", "--verify", f"--tracker={tracker}"])
    told, _ = clients.communicate()
    assert told.count(b"reset") + told.count(b"b''") == 3, told
    # It has closed what it found reset.
    wait_until(lambda: len(sockets_of(destination, server.pid)) == 1, "the server to close connections")
    assert_echoes(destination)
    assert destination.outer_pid(server.pid)


def test_nothing_of_a_server_with_clients_is_dumped_or_made_in_the_freeze(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    server, _clients = start_echo_server(source, tmp_path)
    image = tmp_path / "image.ferry"
    agent_send(source, tmp_path, "--tcp-close", server.pid, f"file:{image}", check=COMPLETED)
    shown = subprocess.run(
        [sys.executable, REPOSITORY / "tools" / "decode_stream.py", image], capture_output=True, check=True
    )
    lines = [json.loads(line) for line in shown.stdout.splitlines()]
    found = {line["kind"]: line["body"] for line in lines if line.get("message") == "StateSection"}
    ahead = sorted(file["kind"] for file in found["pre_files"]["files"])
    assert [kind for kind in ahead if kind in ("epoll", "inet")] == ["epoll", *["inet"] * 4]
    change = found["files_change"]
    assert not change["files"] and not change["fds"] and not change["closed"]
    received = Receiver(destination, tmp_path, address=f"file:{image}").finish()
    assert received.status == COMPLETED, str(received)
    assert_echoes(destination)

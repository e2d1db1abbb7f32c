"""Every kind of file descriptor, one exhibit of tests/workloads/fdzoo.py at a time and all together.

Also below another root directory: a whole system, which both hosts have mounted there.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import cast

import pytest

from tests.hosts import REPOSITORY, Host
from tests.migrate.crossing import (
    REFUSED,
    Receiver,
    Workload,
    agent_send,
    migrate,
    start_program,
    start_workload,
    traces_of,
)
from tests.workloads.fdzoo import EXHIBITS

# Enough checks on the destination for what needs some turns (the half-closed pipe).
TURNS = 40


def start_zoo(source: Host, directory: Path, kinds: str) -> tuple[Workload, Path]:
    zoo = directory / "zoo"
    zoo.mkdir()
    workload = start_workload(source, directory, "fdzoo", zoo, "STATUS", "--only", kinds)
    (zoo / "still").touch()
    # A turn that began before the file was there may still be at work: wait for two that saw it.
    workload.wait_for_notes(3)
    assert workload.last()["still"]
    return workload, zoo / "still"


@pytest.mark.parametrize("kind", sorted(EXHIBITS))
def test_descriptor_kind_is_carried(
    source: Host, destination: Host, tmp_path: Path, kind: str
) -> None:
    workload, still = start_zoo(source, tmp_path, kind)
    migrate(workload, destination, tmp_path)
    still.unlink()
    workload.assert_healthy(destination, count=TURNS if kind == "pipe" else 8)


def test_whole_zoo_is_carried_there_and_back(source: Host, destination: Host, tmp_path: Path) -> None:
    kinds = ",".join(EXHIBITS)
    workload, still = start_zoo(source, tmp_path, kinds)
    migrate(workload, destination, tmp_path, send=["--verify"])
    workload.assert_healthy(destination, count=3)
    migrate(workload, source, tmp_path)
    still.unlink()
    workload.assert_healthy(source, count=TURNS)


def test_clients_of_a_unix_socket_are_told_who_listens(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    # Nobody may look into the directories of pytest.
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        zoo, status = Path(directory), Path(directory, "zoo.status")
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable]
        if source.run([*nobody, "-c", "import tests.workloads.fdzoo"], check=False).returncode:
            pytest.skip("this clone, or this Python, cannot be read by other users")
        argv: list[str | Path] = [*nobody, "-m", "tests.workloads.fdzoo", zoo, status, "--only", "unix_listener"]
        (zoo / "still").touch()
        workload = start_program(source, tmp_path, argv, status=status)
        migrate(workload, destination, tmp_path)
        (zoo / "still").unlink()
        workload.assert_healthy(destination, count=3)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_table_that_never_stands_still_is_carried_again_and_again(
    source: Host, destination: Host, tmp_path: Path, seed: int
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    workload = start_workload(source, tmp_path, "fdstorm", seed, files, "STATUS")
    for turn in range(6):
        host = source if turn % 2 else destination
        migrate(workload, host, tmp_path, send=["--file-locks"], recv=[])
        workload.assert_healthy(host, count=5)


def start_jailed_zoo(source: Host, directory: Path, jail: Path) -> tuple[Workload, Path]:
    zoo, status = directory / "zoo", directory / "zoo.status"
    zoo.mkdir()
    source.run(["mkdir", jail])
    source.run(["mount", "--rbind", "/", jail])
    argv: list[str | Path] = ["chroot", jail, "env", f"--chdir={REPOSITORY}"]
    argv += [sys.executable, "-m", "tests.workloads.fdzoo", zoo, status]
    (zoo / "still").touch()
    return start_program(source, directory, argv, status=status), zoo / "still"


def links_of(host: Host, pid: int) -> dict[str, str]:
    """Where the links of a process lead, as somebody at the host's own root sees it."""
    return {name: os.readlink(host.proc(pid) / name) for name in ("root", "cwd", "exe", "fd/0", "fd/1")}


def test_a_process_with_another_root_directory_is_carried_there_and_back(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    jail = tmp_path / "jail"
    workload, still = start_jailed_zoo(source, tmp_path, jail)
    destination.run(["mount", "--rbind", "/", jail])
    before = links_of(source, workload.pid)
    assert before["root"] == str(jail)
    assert before["cwd"] == f"{jail}{REPOSITORY}" and before["exe"].startswith(f"{jail}/")
    migrate(workload, destination, tmp_path, send=["--verify"])
    assert links_of(destination, workload.pid) == before
    workload.assert_healthy(destination, count=3)
    migrate(workload, source, tmp_path)
    assert links_of(source, workload.pid) == before
    still.unlink()
    workload.assert_healthy(source, count=3)


def test_a_root_directory_that_the_destination_does_not_have_is_named(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    here = tmp_path / "only-here"
    here.mkdir()
    source.run(["mount", "-t", "tmpfs", "none", here])
    jail = here / "jail"
    workload, _ = start_jailed_zoo(source, tmp_path, jail)
    before = steady_traces(source, workload.pid)
    sent = agent_send(source, tmp_path, workload.pid, Receiver(destination, tmp_path).address, check=REFUSED)
    found = [obstacle for obstacle in sent.outcome["obstacles"] if obstacle["kind"] == "directory"]
    assert {obstacle["what"] for obstacle in found} == {"working directory", "root directory"}
    assert all(str(jail) in obstacle["detail"] for obstacle in found)
    workload.assert_healthy(source, count=3)
    assert steady_traces(source, workload.pid) == before


def steady_traces(host: Host, pid: int) -> list[str]:
    # What is pending for the whole process changes: a signalfd of the zoo takes its signal and has it sent again.
    status = cast("list[str]", traces_of(host, pid)["status"])
    return [line for line in status if not line.startswith("ShdPnd")]

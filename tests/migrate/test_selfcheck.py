"""The first crossing: an eight-thread process that checks itself, by every transport and to and fro."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts import Host
from tests.migrate.crossing import Workload, migrate, start_workload

THREADS = 8


@pytest.fixture
def selfcheck(source: Host, tmp_path: Path) -> Workload:
    return start_workload(source, tmp_path, "selfcheck", "STATUS")


def test_eight_threads_go_on_under_the_same_pid(
    selfcheck: Workload, destination: Host, tmp_path: Path
) -> None:
    before = selfcheck.last()
    crossing = migrate(selfcheck, destination, tmp_path, send=["--verify"])
    after = selfcheck.assert_healthy(destination)
    assert after["threads"] == THREADS
    for counter in ("buffers", "handovers", "pipe", "file", "ticks"):
        assert after[counter] > before[counter], f"{counter} stands still"
    assert crossing.completed["downtime_s"] < 5


def test_nothing_of_the_agent_stays_behind(selfcheck: Workload, destination: Host, tmp_path: Path) -> None:
    fds = sorted((selfcheck.host.proc(selfcheck.pid) / "fd").iterdir())
    names = [fd.name for fd in fds]
    migrate(selfcheck, destination, tmp_path)
    proc = destination.proc(selfcheck.pid)
    # The listing of /proc/self/task that the workload makes for each note comes and goes: look until it is gone.
    assert any(sorted(fd.name for fd in (proc / "fd").iterdir()) == names for _ in range(200))
    status = (proc / "status").read_text()
    assert "TracerPid:\t0\n" in status
    maps = (proc / "maps").read_text()
    assert "uffd" not in maps and "ferry" not in maps.replace(str(tmp_path), "").lower()
    assert list(destination.processes()) == [selfcheck.pid]
    assert list(selfcheck.host.processes()) in ([], [selfcheck.pid])


def test_identity_is_carried(selfcheck: Workload, destination: Host, tmp_path: Path) -> None:
    def identity(host: Host) -> dict[str, object]:
        proc = host.proc(selfcheck.pid)
        names = {task.name: (task / "comm").read_text() for task in (proc / "task").iterdir()}
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
        kept = ("Name", "Umask", "Uid", "Gid", "Groups", "CapEff", "CapBnd", "NoNewPrivs", "SigBlk", "SigIgn", "SigCgt")
        return {
            "threads": names,
            "cmdline": (proc / "cmdline").read_bytes(),
            "environ": (proc / "environ").read_bytes(),
            "auxv": (proc / "auxv").read_bytes(),
            "exe": (proc / "exe").readlink(),
            "cwd": (proc / "cwd").readlink(),
            "limits": (proc / "limits").read_text(),
            **{name: status[name] for name in kept},
        }

    before = identity(selfcheck.host)
    migrate(selfcheck, destination, tmp_path)
    after = identity(destination)
    assert after == before


def test_process_crosses_there_and_back(
    selfcheck: Workload, source: Host, destination: Host, tmp_path: Path
) -> None:
    for here in (destination, source, destination):
        migrate(selfcheck, here, tmp_path, send=["--verify"])
        selfcheck.assert_healthy(here)


def test_process_crosses_a_network(selfcheck: Workload, destination: Host, tmp_path: Path) -> None:
    address = f"tcp://{destination.addresses[0]}:7000"
    crossing = migrate(selfcheck, destination, tmp_path, address=address)
    selfcheck.assert_healthy(destination)
    assert crossing.completed["bytes_total"] > 10_000_000


@pytest.mark.parametrize("compress", ["none", "zstd", "zstd:3", "auto"])
def test_process_crosses_compressed(
    selfcheck: Workload, destination: Host, tmp_path: Path, compress: str
) -> None:
    migrate(selfcheck, destination, tmp_path, send=["--verify", f"--compress={compress}"])
    selfcheck.assert_healthy(destination)


def test_stop_and_copy_needs_one_round(selfcheck: Workload, destination: Host, tmp_path: Path) -> None:
    crossing = migrate(selfcheck, destination, tmp_path, send=["--verify", "--max-rounds=0"])
    assert len(crossing.completed["rounds"]) == 1
    selfcheck.assert_healthy(destination)


def test_precopy_sends_most_before_the_stop(selfcheck: Workload, destination: Host, tmp_path: Path) -> None:
    rounds = migrate(selfcheck, destination, tmp_path).completed["rounds"]
    assert len(rounds) >= 2
    assert rounds[-1]["pages_sent"] < rounds[0]["pages_sent"] / 2
    selfcheck.assert_healthy(destination)


def test_writes_during_a_slow_first_round_arrive(
    selfcheck: Workload, destination: Host, tmp_path: Path
) -> None:
    migrate(selfcheck, destination, tmp_path, send=["--verify", "--bandwidth-limit=20M"])
    selfcheck.assert_healthy(destination)

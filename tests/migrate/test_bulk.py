"""Large memory on its way: huge pages at the destination, compression by what the link takes, a source that dies."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from agent.pages.huge import huge_page_bytes
from tests.hosts import Host, wait_until
from tests.migrate.crossing import (
    COMPLETED,
    FAILED,
    Receiver,
    Workload,
    agent_send,
    migrate,
    start_agent_send,
    start_workload,
    wait_for_event,
)
from tests.prerequisites import require
from tools.benchmark.shaping import NoShaping, shape

MEGABYTES = 24
MEGABYTE = 1 << 20


def start(source: Host, directory: Path, *options: str, megabytes: int = MEGABYTES) -> Workload:
    return start_workload(source, directory, "memory", "STATUS", "--megabytes", megabytes, *options)


def kilobytes(host: Host, pid: int, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", (host.proc(pid) / "smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_the_copy_has_huge_pages_and_no_more_memory(
    source: Host, destination: Host, tmp_path: Path, transport: str, compress: str
) -> None:
    require(huge_page_bytes(), "no transparent huge pages")
    workload = start(source, tmp_path)
    assert not kilobytes(source, workload.pid, "AnonHugePages")
    before = kilobytes(source, workload.pid, "Anonymous")
    address = "" if transport == "unix" else f"tcp://{destination.addresses[0]}:7001"
    migrate(
        workload, destination, tmp_path, send=[f"--compress={compress}", "--verify"], address=address
    )
    assert kilobytes(destination, workload.pid, "AnonHugePages") > 0
    assert kilobytes(destination, workload.pid, "Anonymous") <= before + 256
    workload.assert_healthy(destination)


def test_an_image_is_played_into_huge_pages(source: Host, destination: Host, tmp_path: Path) -> None:
    require(huge_page_bytes(), "no transparent huge pages")
    workload = start(source, tmp_path)
    image = f"file:{tmp_path}/image.ferry"
    agent_send(source, tmp_path, workload.pid, image, check=COMPLETED)
    assert Receiver(destination, tmp_path, address=image).finish().status == COMPLETED
    assert kilobytes(destination, workload.pid, "AnonHugePages") > 0
    workload.assert_healthy(destination)


def test_a_process_that_wants_no_huge_pages_gets_none(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    workload = start(source, tmp_path, "--no-huge-pages")
    migrate(workload, destination, tmp_path)
    assert kilobytes(destination, workload.pid, "AnonHugePages") == 0
    workload.assert_healthy(destination)


def test_what_a_writer_has_written_while_the_freeze_was_prepared_goes_ahead_of_it(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    reasons: list[str] = []
    # On a busy machine the round before may have been too short for it, or too long.
    for attempt in range(6):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        workload = start(source, directory, "--writes", "40")
        crossing = migrate(workload, destination, directory, send=["--verify"])
        assert crossing.completed["verified"]
        workload.assert_healthy(destination)
        # The final round has no decision to make.
        reasons.append(crossing.completed["rounds"][-2]["decision"])
        if "everything ready" in reasons[-1]:
            return
    pytest.fail(f"there never was such a round: {reasons}")


@pytest.mark.parametrize(
    ("options", "least", "most"), [((), 0.4, 0.75), (("--random-all",), 0.99, 1.3)], ids=["half", "random"]
)
def test_what_auto_sends_over_a_slow_link(
    source: Host, destination: Host, tmp_path: Path, options: tuple[str, ...], least: float, most: float
) -> None:
    try:
        shape((source, destination), "200mbit")
    except NoShaping as err:
        require(False, str(err))
    workload = start(source, tmp_path, *options, megabytes=64)
    address = f"tcp://{destination.addresses[0]}:7001"
    crossing = migrate(workload, destination, tmp_path, send=["--compress=auto"], address=address)
    # What is not the block: the interpreter.
    sent = crossing.completed["bytes_total"]
    assert least * 64 * MEGABYTE < sent < most * 64 * MEGABYTE + 12 * MEGABYTE
    workload.assert_healthy(destination)


@pytest.mark.parametrize("victim", ["source", "destination"])
def test_an_agent_that_dies_among_the_pages_leaves_the_original_alone(
    source: Host, destination: Host, tmp_path: Path, victim: str
) -> None:
    workload = start(source, tmp_path)
    receiver = Receiver(destination, tmp_path)
    sender, _ = start_agent_send(
        source, tmp_path, "--bandwidth-limit=8M", "--compress=none", workload.pid, receiver.address
    )
    wait_for_event(sender, event="phase", phase="rounds")
    wait_until(lambda: destination.outer_pid(workload.pid), "the skeleton")
    skeleton = destination.outer_pid(workload.pid)
    wait_until(
        lambda: kilobytes(destination, workload.pid, "AnonHugePages") or not huge_page_bytes(), "huge pages"
    )
    os.kill((sender if victim == "source" else receiver.process).outer, signal.SIGKILL)
    sent, received = sender.communicate(), receiver.process.communicate()
    assert (receiver.process.wait() if victim == "source" else sender.wait()) == FAILED, (sent, received)
    wait_until(lambda: not os.path.exists(f"/proc/{skeleton}"), "the end of the skeleton")
    workload.assert_healthy(source)

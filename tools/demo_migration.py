"""Moves a busy eight-thread process between two hosts and shows what happens; run by tools/demo.

The hosts are namespaces (tests/hosts.py), the process is tests/workloads/selfcheck.py, the two commands are the real
ones. Ends with status 0 only when the process goes on with the same pid and no self-check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.hosts import Host, host_pair, wait_until  # noqa: E402 - needs the repository on the path
from tests.migrate.crossing import AGENT_RECV, AGENT_SEND, Workload, start_workload  # noqa: E402

PORT = 7000


def say(text: str = "") -> None:
    print(text, flush=True)


def describe(workload: Workload) -> str:
    note = workload.last()
    return (
        f"host {note['host']:<11} pid {note['pid']}  threads {note['threads']}  note {note['sequence']:>4}  "
        f"blocks {note['buffers']:>6}  hand-overs {note['handovers']:>5}  ticks {note['ticks']:>5}  "
        f"failed checks {note['nr_errors']}"
    )


def watch(workload: Workload, seconds: float) -> None:
    """Prints what the workload reports, once a second."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(min(1.0, seconds))
        say(f"    {describe(workload)}")


def longest_silence_s(workload: Workload) -> float:
    """The longest time between two notes: the downtime as the workload itself saw it, plus its pause."""
    times: list[int] = [note["realtime_ns"] for note in workload.notes()]
    return max(later - earlier for earlier, later in zip(times, times[1:])) / 1e9


def migrate(workload: Workload, source: Host, destination: Host, arguments: list[str]) -> dict[str, Any]:
    """Runs both commands, progress shown as they go; the "completed" event."""
    address = f"tcp://{destination.addresses[0]}:{PORT}"
    say(f"destination$ agent-recv --once {address}")
    state = workload.status.parent
    received = [*AGENT_RECV, "--once", "--no-progress", f"--state-dir={state / 'destination'}", address]
    receiver = destination.popen(received, stdout=None, stderr=None)
    wait_until(lambda: destination.listens_on_tcp(PORT) or not receiver.alive, "agent-recv to listen")
    command = [*arguments, str(workload.pid), address]
    say(f"source$      agent-send {' '.join(command)}\n")
    sender = source.popen(
        [*AGENT_SEND, "--json", "--progress", f"--state-dir={state / 'source'}", *command], stderr=None
    )
    stdout, _ = sender.communicate(300)
    events = [json.loads(line) for line in stdout.decode().splitlines()]
    if sender.wait() != 0 or not events or events[-1]["event"] != "completed":
        raise SystemExit(f"\nThe migration failed: agent-send exit status {sender.wait()}")
    if receiver.wait() != 0:
        raise SystemExit(f"\nThe migration failed: agent-recv exit status {receiver.wait()}")
    completed: dict[str, Any] = events[-1]
    return completed


def show(report: dict[str, Any]) -> None:
    """The numbers of the report as a table."""
    say("\n    round   dirty pages    pages sent     bytes sent    seconds")
    for number, row in enumerate(report["rounds"]):
        say(
            f"    {number:>5}  {row['pages_dirty']:>12,}  {row['pages_sent']:>12,}  "
            f"{row['bytes_sent']:>13,}  {row['seconds']:>9.4f}"
        )
    say(
        f"\n    {report['pages_total']:,} pages ({report['pages_zero']:,} zero), {report['bytes_total']:,} bytes\n"
        f"    downtime {report['downtime_s'] * 1000:.1f} ms of {report['total_s']:.3f} s in all"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/demo", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=96, help="memory that the process works on (default: 96)")
    parser.add_argument("--seconds", type=float, default=3, help="how long to watch it before and after (default: 3)")
    parser.add_argument("--slow", action="store_true", help="limit the link to 40 MB/s, to see more rounds")
    parser.add_argument("--verify", action="store_true", help="compare digests of all memory; lengthens the downtime")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("tools/demo makes namespaces and moves processes: run it as root")

    with tempfile.TemporaryDirectory(prefix="ferry-demo-") as name, host_pair() as (source, destination):
        directory = Path(name)
        for host in (source, destination):
            (directory / host.name).mkdir(mode=0o700)
        say("Two hosts, each with its own pids, mounts and network, joined by a network link.")
        workload = start_workload(source, directory, "selfcheck", "STATUS", "--megabytes", options.megabytes)
        say(f"A process with eight threads that check themselves runs on the source as pid {workload.pid}:\n")
        watch(workload, options.seconds)
        say("\nIt is moved while it runs:\n")
        arguments = ["--bandwidth-limit=40M", "--compress=none"] if options.slow else []
        arguments += ["--verify"] if options.verify else []
        show(migrate(workload, source, destination, arguments))

        say("\nAnd it goes on, on the destination:\n")
        workload.wait_for_notes(2, destination)
        watch(workload, options.seconds)
        ends = destination.run(["readlink", f"/proc/{workload.pid}/exe"]).stdout.decode().strip()
        same = workload.last()["pid"] == workload.pid and bool(destination.outer_pid(workload.pid))
        gone = not source.outer_pid(workload.pid)
        failed = workload.errors()
        say(f"\n    the destination's /proc/{workload.pid}/exe is {ends}")
        say(f"    same pid: {'yes' if same else 'NO'}; gone from the source: {'yes' if gone else 'NO'}")
        say(f"    failed self-checks: {len(failed)}{': ' + failed[0] if failed else ''}")
        say(f"    longest silence in its own notes (one each 50 ms): {longest_silence_s(workload) * 1000:.0f} ms")
        if not same or not gone or failed:
            raise SystemExit("\nThe demonstration failed.")
        say("\nThe process was moved.")


if __name__ == "__main__":
    try:
        main()
    except subprocess.TimeoutExpired as err:
        raise SystemExit(f"tools/demo: {err}") from None

"""Peers that stop or vanish, targets that die, exec or fork meanwhile, disks that fill up, images that are cut off.

Each gives one clear message and the right exit status, leaves no process, file or record behind, and the target as
it was.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from protocol.framing import HEADER_BYTES, FrameType, parse_header
from protocol.messages import StateSection, decode_message
from tests.faults.arena import Arena, Strike, StrikingReceiver, finish
from tests.hosts import Host, InsideProcess, is_alive, wait_until
from tests.migrate.crossing import (
    AGENT_RECV,
    AGENT_SEND,
    COMPLETED,
    FAILED,
    REFUSED,
    UNDECIDED,
    Receiver,
    Run,
    start_agent_send,
    start_workload,
    state_directory,
    wait_for_event,
)

SOURCE = "agent.source:_Migration."
DESTINATION = "agent.destination:_Migration."
REBUILD = "agent.rebuild:Rebuild."
STOP_SELF = f"0/{signal.SIGSTOP:d}"
EVERY_CUT = int(os.environ.get("FERRY_KILL_ROUNDS", "0")) >= 100

VICTIM = """
import os, signal, sys, time
def act(signum, frame):
    what = sys.argv[1]
    if what == "exit":
        os._exit(3)
    if what == "exec":
        os.execv("/bin/sleep", ["sleep", "1000"])
    if what == "fork" and os.fork() == 0:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        time.sleep(0.3)
        os._exit(0)
    if what == "fork":
        os.wait()
signal.signal(signal.SIGUSR1, act)
print("up", flush=True)
while True:
    time.sleep(0.05)
"""


def one_message(run: Run) -> None:
    """The agent said in one line what failed (obstacles and a hint may follow), and nothing looks like a bug."""
    assert run.stderr.startswith("agent-"), run.stderr
    assert "bug in Ferry" not in run.stderr and "Error(" not in run.stderr, run.stderr
    assert run.outcome["event"] == "failed" and run.outcome["message"], str(run)


def nothing_left(*hosts: Host, but: int = 0) -> None:
    for host in hosts:
        wait_until(
            lambda: not {pid for pid in host.processes() if host.outer_pid(pid)} - {but},  # noqa: B023
            f"nothing to be left on {host.name}: {host.processes()}",
            timeout_s=5,
        )


def no_records(directory: Path) -> None:
    """Nothing is undecided, nothing half-written; decisions and restart hints may stay."""
    kept = (".committed.json", ".aborted.json", ".restart.json")
    found = [path.name for path in directory.glob("state-*/*") if not path.name.endswith(kept)]
    found += [path.name for path in directory.glob("state-*/.*")]
    assert not found, found


# -- the target does something meanwhile ---------------------------------------------------------------------

PHASES = {
    "agent.source:find_obstacles:before": FAILED,
    SOURCE + "_prepare:before": FAILED,
    "agent.source:create_tracker:before": FAILED,
    "agent.tracker.registration:RegisteredMemory.arm:before": FAILED,
    "agent.rounds:RoundSender.send_round:before": FAILED,
    "agent.rounds:RoundSender.send_round:after": FAILED,
    SOURCE + "_freeze:before": FAILED,
    SOURCE + "_freeze:after": FAILED,
    SOURCE + "_send_files:before": FAILED,
    "agent.state.predump:PreDump.dump_change:before": FAILED,
    SOURCE + "_finish:before": FAILED,
}
"""Points of agent-send at which the target is killed, and the exit status."""


def start_victim(host: Host, directory: Path, what: str) -> InsideProcess:
    output = directory / "victim.out"
    output.unlink(missing_ok=True)
    argv = [sys.executable, "-c", VICTIM, what]
    victim = host.start_detached(argv, output, last_pid=5000)
    wait_until(lambda: output.read_bytes() == b"up\n", "the victim")
    return victim


def send_struck(
    source: Host, destination: Host, directory: Path, victim: InsideProcess, strike: Strike
) -> tuple[Run, Run]:
    receiver = Receiver(destination, directory, "--io-timeout=10")
    state = state_directory(source, directory)
    argv = strike.argv(["--json", f"--state-dir={state}", "--io-timeout=10", str(victim.inner)])
    argv.append(receiver.address)
    sent = finish(source.popen(argv), argv)
    if "connected" not in sent.stdout:
        receiver.process.kill(signal.SIGTERM)
    return sent, finish(receiver.process, receiver.argv)


def test_target_killed_in_each_phase(source: Host, destination: Host, tmp_path: Path) -> None:
    for point, status in PHASES.items():
        victim = start_victim(source, tmp_path, "nothing")
        strike = Strike("send", point, victim=str(victim.inner))
        sent, received = send_struck(source, destination, tmp_path, victim, strike)
        assert sent.status == status, f"{point}: {sent}\n{received}"
        one_message(sent)
        assert received.status == FAILED, f"{point}: {received}"
        victim.wait()
        nothing_left(source, destination)
        no_records(tmp_path)


@pytest.mark.parametrize(
    "point", ["agent.rounds:RoundSender.send_round:after", SOURCE + "_freeze:before"]
)
@pytest.mark.parametrize("what", ["exit", "exec", "fork"])
def test_target_exits_execs_or_forks_meanwhile(
    source: Host, destination: Host, tmp_path: Path, what: str, point: str
) -> None:
    victim = start_victim(source, tmp_path, what)
    strike = Strike("send", point, victim=f"{victim.inner}/{signal.SIGUSR1:d}")
    sent, received = send_struck(source, destination, tmp_path, victim, strike)
    story = f"{sent}\n{received}"
    if sent.status == COMPLETED:
        # It was frozen before it could do so, or has done it and was waited for.
        assert not source.outer_pid(victim.inner), story
        # One that was to exit has exited over there.
        assert what == "exit" or destination.outer_pid(victim.inner), story
        return
    assert sent.status in (FAILED, REFUSED), story
    assert what != "fork", story
    one_message(sent)
    nothing_left(destination)
    no_records(tmp_path)
    if what == "exec":
        assert (source.proc(victim.inner) / "comm").read_text() == "sleep\n", story


def test_target_that_did_not_wait_for_the_agent_is_frozen_once_more(
    source: Host, destination: Host, tmp_path: Path
) -> None:
    victim = start_victim(source, tmp_path, "nothing")
    strike = Strike("send", "agent.snapshot:TaskSender.send:before", victim="late")
    sent, received = send_struck(source, destination, tmp_path, victim, strike)
    assert sent.status == received.status == COMPLETED, f"{sent}\n{received}"
    assert [span["phase"] for span in sent.outcome["freeze"]].count("freeze") == 2, str(sent)
    assert destination.outer_pid(victim.inner)


@pytest.mark.parametrize("victim_of", ["reader", "agent"])
def test_target_of_the_log_tracker_outlives_who_it_waits_for(
    source: Host, destination: Host, tmp_path: Path, victim_of: str
) -> None:
    workload = start_workload(source, tmp_path, "selfcheck", "STATUS")
    receiver = Receiver(destination, tmp_path)
    options = ["--tracker=log", "--bandwidth-limit=8M"]
    process, argv = start_agent_send(source, tmp_path, *options, workload.pid, receiver.address)
    wait_for_event(process, event="phase", phase="rounds")
    children = Path(f"/proc/{process.outer}/task/{process.outer}/children")
    wait_until(children.read_text, "the reader")
    (reader,) = map(int, children.read_text().split())
    os.kill(reader if victim_of == "reader" else process.outer, signal.SIGKILL)
    sent = finish(process, argv)
    assert sent.status == (FAILED if victim_of == "reader" else -signal.SIGKILL), str(sent)
    assert victim_of == "agent" or "reader of page faults" in sent.outcome["message"], str(sent)
    assert finish(receiver.process, receiver.argv).status == FAILED
    workload.assert_healthy(source)
    wait_until(lambda: not is_alive(reader), "the reader to end")


# -- the peer stops ------------------------------------------------------------------------------------------


def wake(process: InsideProcess) -> None:
    """Continue a stopped process, and nsenter, which stops itself when its child is stopped."""
    process.kill(signal.SIGCONT)
    os.kill(process.popen.pid, signal.SIGCONT)


def move_with_stopped(
    arena: Arena, strike: Strike, *, send: str = "--io-timeout=2", recv: str = "--io-timeout=2"
) -> tuple[InsideProcess, list[str], StrikingReceiver]:
    """Starts both agents, one of which will stop itself."""
    receiver = StrikingReceiver(
        arena.there, arena.directory, recv, strike=strike if strike.agent == "recv" else None
    )
    state = state_directory(arena.here, arena.directory)
    arguments = ["--json", f"--state-dir={state}", send, str(arena.pid), receiver.address]
    argv = strike.argv(arguments) if strike.agent == "send" else [*AGENT_SEND, *arguments]
    return arena.here.popen(argv), argv, receiver


@pytest.mark.parametrize("point", ["_receive_rounds:before", "_restore:before"])
def test_receiver_that_stops_before_the_commit(arena: Arena, point: str) -> None:
    sender, argv, receiver = move_with_stopped(
        arena, Strike("recv", DESTINATION + point, victim=STOP_SELF)
    )
    sent = finish(sender, argv)
    assert sent.status == FAILED, str(sent)
    one_message(sent)
    wake(receiver.process)
    assert finish(receiver.process, receiver.argv).status == FAILED
    arena.check_end()


def test_receiver_that_stops_within_the_commit(arena: Arena) -> None:
    sender, argv, receiver = move_with_stopped(
        arena, Strike("recv", REBUILD + "hold:before", victim=STOP_SELF)
    )
    sent = finish(sender, argv)
    assert sent.status == UNDECIDED, str(sent)
    assert "--resolve" in sent.stderr
    assert arena.is_stopped(arena.here)
    # It goes on where it was: nobody has asked in between, so it commits.
    wake(receiver.process)
    assert finish(receiver.process, receiver.argv).status == COMPLETED
    assert arena.resolve(arena.undecided(arena.here)) == "committed"
    arena.check_end()


def test_receiver_that_wakes_up_after_the_session_was_aborted(arena: Arena) -> None:
    sender, argv, receiver = move_with_stopped(
        arena, Strike("recv", REBUILD + "hold:after", victim=STOP_SELF)
    )
    assert finish(sender, argv).status == UNDECIDED
    assert arena.resolve(arena.undecided(arena.here)) == "aborted"
    wake(receiver.process)
    received = finish(receiver.process, receiver.argv)
    assert received.status == FAILED, str(received)
    one_message(received)
    arena.check_end()


@pytest.mark.parametrize("point", [SOURCE + "_precopy:before", SOURCE + "_finish:before"])
def test_sender_that_stops_before_the_commit(arena: Arena, point: str) -> None:
    sender, argv, receiver = move_with_stopped(arena, Strike("send", point, victim=STOP_SELF))
    received = finish(receiver.process, receiver.argv)
    assert received.status == FAILED, str(received)
    one_message(received)
    wake(sender)
    sent = finish(sender, argv)
    assert sent.status == FAILED, str(sent)
    one_message(sent)
    arena.check_end()


def test_sender_that_stops_right_before_it_sends_commit(arena: Arena) -> None:
    sender, argv, receiver = move_with_stopped(
        arena, Strike("send", SOURCE + "_commit:before", victim=STOP_SELF)
    )
    received = finish(receiver.process, receiver.argv)
    assert received.status == FAILED, str(received)
    wake(sender)
    sent = finish(sender, argv)
    assert sent.status == FAILED, str(sent)
    one_message(sent)
    arena.check_end()


def test_link_that_is_cut(arena: Arena) -> None:
    address = arena.there.addresses[0]
    receiver = Receiver(
        arena.there, arena.directory, "--io-timeout=3", address=f"tcp://{address}:7007"
    )
    state = state_directory(arena.here, arena.directory)
    argv = [*AGENT_SEND, "--json", f"--state-dir={state}", "--io-timeout=3"]
    argv += ["--bandwidth-limit=1M", "--compress=none", str(arena.pid), receiver.address]
    sender = arena.here.popen(argv)
    wait_for_event(sender, phase="rounds")  # the first one takes seconds at this rate
    interface = next(
        line.split("@")[0]
        for line in arena.here.run(["ip", "-brief", "link"]).stdout.decode().splitlines()
        if line.startswith("fy")
    )
    arena.here.run(["ip", "link", "set", interface, "down"])
    try:
        sent = finish(sender, argv)
        received = finish(receiver.process, receiver.argv)
    finally:
        arena.here.run(["ip", "link", "set", interface, "up"])
    assert sent.status == FAILED, str(sent)
    assert received.status == FAILED, str(received)
    one_message(sent)
    one_message(received)
    arena.check_end()


# -- images --------------------------------------------------------------------------------------------------


def test_full_disk_leaves_no_image_and_the_target_running(arena: Arena) -> None:
    place = arena.directory / "small"
    place.mkdir()
    arena.here.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", place])
    state = state_directory(arena.here, arena.directory)
    argv = [*AGENT_SEND, "--json", f"--state-dir={state}", "--compress=none"]
    argv += [str(arena.pid), f"file:{place}/image.ferry"]
    sent = finish(arena.here.popen(argv), argv)
    left = arena.here.run(["ls", "-A", place]).stdout
    arena.here.run(["umount", place])
    assert sent.status == FAILED, str(sent)
    one_message(sent)
    assert "No space left" in sent.outcome["message"]
    assert left == b""
    arena.check_end()


def frame_ends(image: bytes) -> list[int]:
    ends = [0]
    while ends[-1] < len(image):
        _kind, length = parse_header(image[ends[-1] : ends[-1] + HEADER_BYTES])
        ends.append(ends[-1] + HEADER_BYTES + length)
    return ends


def make_image(arena: Arena) -> bytes:
    path = arena.directory / "whole.ferry"
    state = state_directory(arena.here, arena.directory)
    argv = [*AGENT_SEND, "--json", f"--state-dir={state}", "--leave-running", "--max-rounds=1"]
    argv += [str(arena.pid), f"file:{path}"]
    assert finish(arena.here.popen(argv), argv).status == COMPLETED
    arena.check_end()
    return path.read_bytes()


def play(arena: Arena, image: bytes) -> Run:
    path = arena.directory / "played.ferry"
    path.write_bytes(image)
    state = state_directory(arena.there, arena.directory)
    argv = [*AGENT_RECV, "--json", f"--state-dir={state}", f"file:{path}"]
    return finish(arena.there.popen(argv), argv)


def test_image_cut_off_anywhere_leaves_nothing(arena: Arena) -> None:
    image = make_image(arena)
    ends = frame_ends(image)[:-1]
    cuts = sorted({*ends, *(end + 5 for end in ends), len(image) - 1})
    if not EVERY_CUT:
        cuts = [*cuts[:2], *cuts[2:-3:9], *cuts[-3:]]
    for size in cuts:
        run = play(arena, image[:size])
        assert run.status == FAILED, f"{size} of {len(image)}: {run}"
        one_message(run)
        nothing_left(arena.there)
    no_records(arena.directory)
    print(f"{len(cuts)} cuts of {len(ends)} frames")


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (["files", "mm"], "sent 'files' out of turn"),
        (["limits", "files"], "sent 'files' out of turn"),
        (["mm", "mm"], "sent 'mm' out of turn"),
        (["mm", "limits"], "did not send 'files'"),
    ],
)
def test_state_in_another_order_is_refused_by_name(arena: Arena, frozen: list[str], message: str) -> None:
    image = make_image(arena)
    ends = frame_ends(image)
    frames = [image[start:end] for start, end in zip(ends, ends[1:])]
    section_at = {}
    for index, frame in enumerate(frames):
        if parse_header(frame[:HEADER_BYTES])[0] is FrameType.CONTROL:
            control = decode_message(memoryview(frame)[HEADER_BYTES:])
            if isinstance(control, StateSection):
                section_at[control.kind.removesuffix("_change")] = index  # the last one counts
    assert section_at["mm"] < section_at["files"]
    swapped = list(frames)
    for place, kind in zip(("mm", "files"), frozen):
        swapped[section_at[place]] = frames[section_at[kind]]
    run = play(arena, b"".join(swapped))
    assert run.status == FAILED, str(run)
    one_message(run)
    assert message in run.outcome["message"], str(run)
    nothing_left(arena.there)
    arena.check_end()


# -- the destination cannot ----------------------------------------------------------------------------------


def test_receiver_without_rights_refuses_clearly(arena: Arena) -> None:
    arena.directory.chmod(0o777)
    own = arena.directory / "state-nobody"
    own.mkdir(mode=0o700)
    os.chown(own, 65534, 65534)
    address = f"unix:{arena.directory}/nobody.sock"
    argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *AGENT_RECV]
    argv += ["--json", "--once", f"--state-dir={own}", address]
    receiver = arena.there.popen(argv)
    path = Path(address.partition(":")[2])
    wait_until(lambda: arena.there.listens_on_unix(path) or not receiver.alive, "agent-recv")
    state = state_directory(arena.here, arena.directory)
    send = [*AGENT_SEND, "--json", f"--state-dir={state}", str(arena.pid), address]
    sent = finish(arena.here.popen(send), send)
    received = finish(receiver, argv)
    arena.directory.chmod(0o755)
    assert sent.status in (FAILED, REFUSED), f"{sent}\n{received}"
    assert received.status in (FAILED, REFUSED), f"{sent}\n{received}"
    one_message(sent)
    one_message(received)
    arena.check_end()

"""The programs as a user runs them: messages, exit status, streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import ModuleType

import pytest

from agent import net
from agent.address import Transport, parse_address
from agent.cli import options as common
from agent.cli import recv, send
from agent.errors import MigrationError, RefusedError, TransferError, UndecidedError, UsageError
from agent.options import RecvOptions, SendOptions
from agent.report import Reporter
from agent.types import Obstacle, Pid
from protocol.errors import RemoteProtocolError


def run(program: str, *words: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-m", f"agent.cli.{program}", *words],
        **{"capture_output": True, "text": True, "timeout": 60, **more},
    )


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.wait()


class FakeSource:
    """Stands in for what does the work: records the options, ends as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.options: list[SendOptions | RecvOptions] = []
        self.outcome: BaseException | int = 0
        for name, function in {
            "source": "send", "check": "check", "resolve": "resolve", "destination": "receive"
        }.items():  # fmt: skip
            module = ModuleType(f"agent.{name}")
            setattr(module, function, self.carry_out)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr("agent.interrupts.install", lambda: None)
        monkeypatch.setattr("agent.log.set_up_logging", lambda **kw: None)

    def carry_out(self, options: SendOptions | RecvOptions, reporter: Reporter) -> int:
        self.options.append(options)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    return FakeSource(monkeypatch)


# -- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["send", "recv"])
def test_help_explains_options_addresses_examples_and_exit_status(program: str) -> None:
    done = run(program, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("usage:", "--json", "addresses:", "examples:", "exit status:", "tcp://HOST:PORT"):
        assert word in done.stdout
    assert all(len(line) <= 90 for line in done.stdout.splitlines())
    assert run(program, "-h").stdout == done.stdout


def test_version() -> None:
    assert run("recv", "--version").stdout.startswith("agent-recv (Ferry) ")


def test_every_option_has_a_help_text() -> None:
    for parser in (send.build_parser(), recv.build_parser()):
        assert [action.dest for action in parser._actions if not action.help] == []


SLOW = frozenset(
    {"asyncio", "hashlib", "pkgutil", "random", "shutil", "socket", "ssl", "subprocess", "uuid", "zstandard"}
)
"""Modules of others that take long to import, or bring many more."""


def imported(code: str, *arguments: object) -> set[str]:
    """The modules that a fresh Python has after some code."""
    code += "\nprint(*sys.modules, file=sys.stderr)"
    # Without site, which imports what editable packages and debuggers want.
    argv = [sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path!r}\n{code}", *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_nothing_slow_is_imported_for_help() -> None:
    found = imported("from agent.cli import send, recv; [cli.main(['--help']) for cli in (send, recv)]")
    assert not found & {*SLOW, "ctypes", "dataclasses", "inspect", "json", "logging", "msgpack"}
    ours = {name for name in found if name.partition(".")[0] in ("agent", "protocol")}
    assert ours == {
        "agent", "agent.address", "agent.errors", "agent.options", "agent.types", "agent.version",
        "agent.cli", "agent.cli.options", "agent.cli.recv", "agent.cli.send",
    }  # fmt: skip


def test_check_imports_what_it_looks_at_and_no_more() -> None:
    nothing = subprocess.DEVNULL
    with subprocess.Popen(["sleep", "60"], stdin=nothing, stdout=nothing, stderr=nothing) as program:
        try:
            found = imported("from agent.cli.send import main; main()", "--check", program.pid)
        finally:
            program.kill()
    assert "agent.state.chardev" in found  # /dev/null
    assert not found & SLOW
    assert not found & {f"agent.state.{name}" for name in ("inetsk", "unixsk", "epoll", "pipe", "timerfd", "signalfd")}
    for name in ("messages", "session", "framing", "pages", "sections", "state.bodies", "state.thread"):
        assert f"protocol.{name}" not in found
    for name in ("hostfacts", "pages", "target", "tracker.scan", "source", "destination", "warmup", "net"):
        assert f"agent.{name}" not in found


def test_neither_side_imports_what_few_addresses_need() -> None:
    assert not imported("import agent.source, agent.destination") & {"ssl", "subprocess", "agent.pipes", "agent.tls"}


def test_reader_of_the_help_may_go_away() -> None:
    command = f"{sys.executable} -m agent.cli.send --help | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "line"),
    [("send", "--check x"), ("send", "5 nonsense"), ("recv", "tcp://:1"), ("recv", "--bogus")],
)
def test_mistake_is_one_message_and_exit_2(program: str, line: str) -> None:
    done = run(program, *line.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"agent-{program}: ")
    assert len(done.stderr.splitlines()) <= 2


def test_mistake_with_json_also_ends_in_a_failed_event() -> None:
    done = run("send", "--json", "--check", "x")
    (line,) = done.stdout.splitlines()
    event = json.loads(line)
    assert (event["event"], event["exit_code"]) == ("failed", 2)
    assert done.returncode == 2


def test_with_stdio_as_the_address_nothing_goes_to_stdout() -> None:
    done = run("send", "--json", "--nonsense", "5", "stdio:")
    assert done.stdout == ""
    assert '"failed"' in done.stderr


@pytest.mark.parametrize("path", ["/nowhere/log", "/"])
def test_bad_log_file_is_exit_2(path: str) -> None:
    done = run("send", "--log-file", path, "--check", str(os.getpid()))
    assert done.returncode == 2
    assert "Cannot open log file" in done.stderr


# -- pids ------------------------------------------------------------------------------------------


def test_pid_of_nobody_is_refused() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    done = run("send", "--check", str(child.pid))
    assert (done.returncode, done.stderr) == (
        2,
        f"agent-send: There is no process {child.pid}\n",
    )


def test_zombie_thread_kernel_thread_and_self_are_refused() -> None:
    child = subprocess.Popen(["true"])
    deadline = time.monotonic() + 10
    while open(f"/proc/{child.pid}/stat").read().split()[2] != "Z":
        assert time.monotonic() < deadline
    with pytest.raises(UsageError, match="has exited"):
        send.check_pid(Pid(child.pid))
    child.wait()
    with pytest.raises(UsageError, match="itself"):
        send.check_pid(Pid(os.getpid()))
    started, finish = threading.Event(), threading.Event()
    tids: list[int] = []

    def body() -> None:
        tids.append(threading.get_native_id())
        started.set()
        finish.wait()

    thread = threading.Thread(target=body)
    thread.start()
    started.wait()
    try:
        with pytest.raises(UsageError, match=f"is a thread of process {os.getpid()}"):
            send.check_pid(Pid(tids[0]))
    finally:
        finish.set()
        thread.join()


# -- outcomes --------------------------------------------------------------------------------------

OBSTACLE = Obstacle(kind="fd", what="fd 5", detail="is a terminal", hint="close it")


@pytest.mark.parametrize(
    ("outcome", "status", "message"),
    [
        (0, 0, ""),
        (4, 4, ""),
        (TransferError("Lost it", hint="Look"), 1, "agent-send: Lost it\nLook\n"),
        (UndecidedError("Undecided"), 3, "agent-send: Undecided\n"),
        (
            RefusedError("Refused", [OBSTACLE]),
            4,
            "agent-send: Refused\n  fd: fd 5: is a terminal (close it)\n",
        ),
        (RemoteProtocolError("Bad"), 1, "agent-send: RemoteProtocolError: Bad\n"),
        (KeyboardInterrupt(), 1, "agent-send: Interrupted\n"),
        (
            ValueError("oops"),
            1,
            "agent-send: ValueError: oops\nThis is a bug in Ferry; -vv shows where it happened.\n",
        ),
    ],
)
def test_outcome_becomes_message_and_status(
    fake: FakeSource,
    sleeper: subprocess.Popen[bytes],
    capfd: pytest.CaptureFixture[str],
    outcome: BaseException | int,
    status: int,
    message: str,
) -> None:
    fake.outcome = outcome
    assert send.main([str(sleeper.pid), "tcp://h:1"]) == status
    out, err = capfd.readouterr()
    assert (out, err) == ("", message)


def test_failure_with_json_is_reported_once(
    fake: FakeSource, sleeper: subprocess.Popen[bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    fake.outcome = MigrationError("no")
    assert send.main(["--json", str(sleeper.pid), "tcp://h:1"]) == 1
    assert [json.loads(line)["event"] for line in capfd.readouterr().out.splitlines()] == ["failed"]


def test_recv_hands_its_options_on(fake: FakeSource) -> None:
    assert recv.main(["--once", "unix:/x"]) == 0
    (options,) = fake.options
    assert isinstance(options, RecvOptions)
    assert options.once and options.address.transport is Transport.UNIX


def test_events_of_stdio_go_to_stderr() -> None:
    reporter = common.make_reporter("x", json=True, progress=False, stdio=True)
    assert reporter.json_stream is sys.stderr
    reporter = common.make_reporter("x", json=True, progress=None, stdio=False)
    assert reporter.json_stream is sys.stdout


RECEIVER = """
import sys, types
from agent.cli import recv
from agent.serve import serve
stub = types.ModuleType("agent.destination")
stub.receive = lambda options, reporter: serve(options, reporter, lambda channel: 0)
sys.modules["agent.destination"] = stub
sys.exit(recv.main())
"""


def test_receiver_says_where_it_listens_and_ends_cleanly_on_sigterm() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", RECEIVER, "--json", "tcp://127.0.0.1:0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stderr is not None
    event = json.loads(child.stdout.readline())
    assert event["event"] == "listening"
    with net.connect(parse_address(event["address"])):
        pass
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=20)
    assert child.returncode == 1
    assert err == "agent-recv: Interrupted by SIGTERM\n"
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["failed"]


def test_closed_standard_fds_do_no_harm() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m agent.cli.send --check 0 <&- >&- 2>&-"], timeout=60
    )
    assert done.returncode == 2


def test_a_check_does_not_wait_for_what_only_a_migration_needs() -> None:
    program = "import sys, agent.check; print({'agent.source', 'agent.net', 'agent.pages'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

"""Session records: the first decision stands, and nothing else passes for a record."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.errors import SetupError, UsageError
from agent.session_store import ABORTED, COMMITTED, SessionStore, start_ticks
from tests.prerequisites import require_namespaces

SESSION = "0123456789abcdef" * 2
OTHER = "f" * 32


@pytest.fixture
def store(tmp_path: Path) -> SessionStore:
    return SessionStore(str(tmp_path / "state"))


def test_decision_is_recorded_and_found(store: SessionStore) -> None:
    assert store.lookup(SESSION) is None
    store.prepare(SESSION, os.getpid())
    assert store.lookup(SESSION) is None
    prepared = store.lookup_prepared(SESSION)
    assert prepared is not None and prepared.pid == os.getpid() and prepared.still_exists()
    assert store.commit(SESSION) == COMMITTED
    assert SessionStore(store.directory).lookup(SESSION) == (COMMITTED, prepared)
    assert os.stat(store.directory).st_mode & 0o777 == 0o700


def test_aborted_session_still_names_its_copy(store: SessionStore) -> None:
    store.prepare(SESSION, os.getpid())
    assert store.abort(SESSION) == ABORTED
    found = store.lookup(SESSION)
    assert found is not None and found.decision == ABORTED
    assert found.copy.pid == os.getpid() and found.copy.still_exists()


@pytest.mark.parametrize("first", [COMMITTED, ABORTED])
@pytest.mark.parametrize("second", [COMMITTED, ABORTED])
def test_first_decision_stands(store: SessionStore, first: str, second: str) -> None:
    store.prepare(SESSION, 4121)
    assert store.decide(SESSION, first) == first
    assert store.decide(SESSION, second) == first
    found = store.lookup(SESSION)
    assert found is not None and found.decision == first
    assert store.lookup_prepared(SESSION) is None


def test_one_of_two_agents_that_decide_at_once_wins(store: SessionStore) -> None:
    rounds = 30
    sessions = [f"{number:032x}" for number in range(rounds)]
    for session in sessions:
        store.prepare(session, 1)
    answers: dict[str, list[str]] = {}
    barrier = threading.Barrier(2)

    def decide(decision: str) -> None:
        own = answers[decision] = []
        for session in sessions:
            barrier.wait()
            own.append(store.decide(session, decision))

    threads = [threading.Thread(target=decide, args=(name,)) for name in (COMMITTED, ABORTED)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    standing = [getattr(store.lookup(session), "decision") for session in sessions]
    assert answers[COMMITTED] == answers[ABORTED] == standing and len(standing) == rounds


@pytest.mark.parametrize("decide", [SessionStore.commit, SessionStore.abort])
def test_session_that_was_not_prepared_cannot_be_decided(
    store: SessionStore, decide: Callable[[SessionStore, str], str]
) -> None:
    with pytest.raises(SetupError, match="was not prepared"):
        decide(store, SESSION)
    assert store.lookup_prepared(SESSION) is None and store.lookup(SESSION) is None


def test_failure_to_record_leaves_the_session_open(store: SessionStore) -> None:
    store.prepare(SESSION, 4121)
    # What a directory is in the way of, rename(2) does not replace.
    blocked = Path(store.directory, SESSION + ".committed.json")
    blocked.mkdir()
    with pytest.raises(SetupError, match="Cannot record"):
        store.commit(SESSION)
    blocked.rmdir()
    assert store.lookup_prepared(SESSION) is not None
    assert store.abort(SESSION) == ABORTED


def test_deciding_needs_no_room_on_the_disk(store: SessionStore) -> None:
    require_namespaces()
    os.makedirs(store.directory, mode=0o700)
    # No block and no inode is left; mode= because others must not be able to write there.
    options = "size=16k,nr_inodes=5,mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", store.directory], check=True)
    try:
        store.prepare(SESSION, 1)
        store.prepare(OTHER, 1)
        with contextlib.suppress(OSError), open(Path(store.directory, "ballast"), "wb") as ballast:
            ballast.write(bytes(1 << 20))
        with pytest.raises(SetupError, match="Cannot record"):
            store.prepare("e" * 32, 1)
        assert store.commit(SESSION) == COMMITTED
        assert store.abort(OTHER) == ABORTED
    finally:
        subprocess.run(["umount", store.directory], check=True)


def test_decisions_of_long_ago_are_forgotten(store: SessionStore) -> None:
    for session, decide in ((OTHER, store.abort), ("e" * 32, store.commit), ("d" * 32, None)):
        store.prepare(session, 1)
        if decide is not None:
            decide(session)
    for name in os.listdir(store.directory):
        os.utime(os.path.join(store.directory, name), (0, 0))
    store.prepare(SESSION, 1)
    assert os.listdir(store.directory) == [SESSION + ".prepared.json"]


@pytest.mark.parametrize("age_s, stays", [(60, True), (86400, False)])
def test_what_a_killed_agent_was_writing_is_removed_later(
    store: SessionStore, age_s: int, stays: bool
) -> None:
    store.prepare(SESSION, 1)
    left = Path(store.directory, f".{OTHER}.17.tmp")
    left.write_text("{")
    then = time.time() - age_s
    os.utime(left, (then, then))
    store.record_undecided(OTHER, 1, "tcp://h:1")
    assert left.exists() == stays
    assert store.lookup_prepared(SESSION) is not None


def test_no_temporary_files_are_left(store: SessionStore) -> None:
    store.prepare(SESSION, 1)
    store.commit(SESSION)
    store.abort(SESSION)
    store.record_undecided(OTHER, 1, "tcp://h:1")
    assert len(os.listdir(store.directory)) == 2


def test_undecided_session_names_the_very_process(store: SessionStore) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        store.record_undecided(SESSION, child.pid, "unix:/x", tracker="scan")
        (record,) = store.list_undecided()
        assert record == store.lookup_undecided(SESSION)
        assert (record.pid, record.address, record.facts) == (
            child.pid,
            "unix:/x",
            {"tracker": "scan"},
        )
        assert record.still_exists()
    finally:
        child.kill()
        child.wait()
    assert not record.still_exists()
    store.forget_undecided(SESSION)
    store.forget_undecided(SESSION)
    assert store.list_undecided() == []


def test_source_and_destination_on_one_host_do_not_collide(store: SessionStore) -> None:
    store.record_undecided(SESSION, os.getpid(), "unix:/x")
    store.prepare(SESSION, 7)
    store.commit(SESSION)
    assert store.lookup_undecided(SESSION) is not None
    assert store.lookup(SESSION) is not None


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 32, "0" * 31, "0" * 32 + "\n"])
def test_session_name_from_the_peer_cannot_leave_the_directory(
    store: SessionStore, name: str
) -> None:
    for use in (store.lookup, store.forget_undecided, store.lookup_undecided):
        with pytest.raises(ValueError, match="Not a session"):
            use(name)
    with pytest.raises(ValueError, match="Not a session"):
        store.prepare(name, 1)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"session": 1}', "{", '{"pid": 1}'])
@pytest.mark.parametrize("decision", [COMMITTED, ABORTED])
def test_damaged_record_is_an_error_and_not_an_answer(
    store: SessionStore, decision: str, text: str
) -> None:
    os.makedirs(store.directory, mode=0o700)
    Path(store.directory, f"{SESSION}.{decision}.json").write_text(text)
    with pytest.raises(SetupError, match="not a session record"):
        store.lookup(SESSION)


def test_directory_that_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    store = SessionStore(str(tmp_path))
    with pytest.raises(UsageError, match="others may write"):
        store.prepare(SESSION, 1)
    with pytest.raises(UsageError, match="others may write"):
        store.lookup(SESSION)


def test_directory_that_cannot_be_made_is_an_error_with_a_hint() -> None:
    with pytest.raises(SetupError, match="Cannot record") as caught:
        SessionStore("/proc/nowhere").prepare(SESSION, 1)
    assert "--state-dir" in caught.value.hint


def test_start_ticks_of_nobody_is_none() -> None:
    assert start_ticks(os.getpid())
    assert start_ticks(1 << 23) is None

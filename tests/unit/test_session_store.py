"""Session records: the first decision stands, and nothing else passes for a record."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from agent.errors import SetupError, UsageError
from agent.session_store import ABORTED, COMMITTED, SessionStore, start_ticks

SESSION = "0123456789abcdef" * 2
OTHER = "f" * 32


@pytest.fixture
def store(tmp_path: Path) -> SessionStore:
    return SessionStore(str(tmp_path / "state"))


def test_decision_is_recorded_and_found(store: SessionStore) -> None:
    assert store.lookup(SESSION) is None
    store.prepare(SESSION, os.getpid())
    assert store.lookup(SESSION) is None
    record = store.commit(SESSION)
    store.forget_prepared(SESSION)
    assert (record.decision, record.pid) == (COMMITTED, os.getpid())
    assert record.still_exists()
    assert SessionStore(store.directory).lookup(SESSION) == record
    assert os.stat(store.directory).st_mode & 0o777 == 0o700


def test_first_decision_stands(store: SessionStore) -> None:
    store.prepare(SESSION, 4121)
    assert store.abort(SESSION).decision == ABORTED
    assert store.commit(SESSION).decision == ABORTED
    store.forget_prepared(SESSION)
    assert store.commit(SESSION).decision == ABORTED
    found = store.lookup(SESSION)
    assert found is not None and found.decision == ABORTED and not found.still_exists()


def test_commit_stands_against_a_later_abort(store: SessionStore) -> None:
    store.prepare(SESSION, 4121)
    store.commit(SESSION)
    assert store.abort(SESSION).decision == COMMITTED


def test_session_that_was_not_prepared_cannot_be_committed(store: SessionStore) -> None:
    with pytest.raises(SetupError, match="Cannot read the recorded decision"):
        store.commit(SESSION)
    assert store.lookup_prepared(SESSION) is None


def test_decisions_of_long_ago_are_forgotten(store: SessionStore) -> None:
    store.prepare(OTHER, 1)
    store.abort(OTHER)
    for name in os.listdir(store.directory):
        os.utime(os.path.join(store.directory, name), (0, 0))
    store.prepare(SESSION, 1)
    assert store.lookup(OTHER) is None and store.lookup_prepared(OTHER) is None
    assert store.lookup_prepared(SESSION) is not None


def test_no_temporary_files_are_left(store: SessionStore) -> None:
    store.prepare(SESSION, 1)
    store.commit(SESSION)
    store.abort(SESSION)
    store.forget_prepared(SESSION)
    store.record_undecided(OTHER, 1, "tcp://h:1")
    assert len(os.listdir(store.directory)) == 2


def test_undecided_session_names_the_very_process(store: SessionStore) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        store.record_undecided(SESSION, child.pid, "unix:/x", hold="sigstop", tracker="scan")
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


@pytest.mark.parametrize("text", ["", "[]", "null", '{"session": 1}', "{", '{"decision": "x"}'])
def test_damaged_record_is_an_error_and_not_an_answer(store: SessionStore, text: str) -> None:
    os.makedirs(store.directory, mode=0o700)
    Path(store.directory, SESSION + ".decision.json").write_text(text)
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

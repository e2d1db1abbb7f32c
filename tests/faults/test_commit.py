"""Agents killed around the commit, and at random instants of whole migrations: nothing is lost, nothing doubled.

FERRY_KILL_ROUNDS: how many instants each test tries (default: a few). FERRY_KILL_SEED repeats a run.
"""

from __future__ import annotations

import errno
import os
import random

import pytest

from tests.faults.arena import Arena, Strike
from tests.migrate.crossing import FAILED, UNDECIDED

ROUNDS = int(os.environ.get("FERRY_KILL_ROUNDS", "3"))
SEED = int(os.environ.get("FERRY_KILL_SEED", "1"))

STORE = "agent.session_store:SessionStore."
SOURCE = "agent.source:_Migration."
DESTINATION = "agent.destination:_Migration."
TRACER = "agent.target.tracer:Tracer."
HOLD = "agent.target.hold:Hold."
REBUILD = "agent.rebuild:Rebuild."
AHEAD = "agent.state.ahead:"


# What must have come of it: the process runs where it was ("here"), over there, or is frozen until resolved.
SENDER_POINTS = {
    STORE + "record_undecided:before": "here",
    STORE + "record_undecided:after": "here (record left)",
    TRACER + "stop_some:after": "here (record left)",
    AHEAD + "park:before": "here (record left)",
    AHEAD + "park:after": "here (record left)",
    AHEAD + "ThreadsAhead.dump:after": "here (record left)",
    SOURCE + "_freeze:after": "here (record left)",
    AHEAD + "ThreadsAhead._holds:after": "here (record left)",
    "agent.source:interrupt_parked:after": "here (record left)",
    HOLD + "take:before": "here (record left)",
    HOLD + "take:after": "aborted by resolve",
    SOURCE + "_commit:after": "committed by resolve",
    SOURCE + "_kill_original:after": "there (record left)",
    STORE + "forget_undecided:after": "there",
}
RECEIVER_POINTS = {
    STORE + "prepare:before": "here",
    STORE + "prepare:after": "here",
    REBUILD + "finish_task:after": "here",
    DESTINATION + "_commit:before": "aborted by resolve",
    REBUILD + "hold:before": "aborted by resolve",
    REBUILD + "hold:after": "aborted by resolve",
    STORE + "commit:after": "committed by resolve",
    HOLD + "drop:after": "committed by resolve",
    REBUILD + "release:after": "committed by resolve",
}


@pytest.mark.parametrize("point", SENDER_POINTS)
def test_sender_killed_around_the_commit(arena: Arena, point: str) -> None:
    assert arena.move(Strike("send", point)) == SENDER_POINTS[point]


@pytest.mark.parametrize("point", RECEIVER_POINTS)
def test_receiver_killed_around_the_commit(arena: Arena, point: str) -> None:
    assert arena.move(Strike("recv", point)) == RECEIVER_POINTS[point]


# The destination fails between COMMIT and its own decision, and lives to tell.
COPY = "the copy"
RECEIVER_FAILURES = {
    "copy killed": (REBUILD + "hold:before", COPY),
    "copy not held": (REBUILD + "hold:before", f"error/{errno.EPERM}"),
    "copy held, error": (REBUILD + "hold:after", f"error/{errno.EIO}"),
    "not recorded": (STORE + "commit:before", f"error/{errno.ENOSPC}"),
}


@pytest.mark.parametrize("failure", RECEIVER_FAILURES)
def test_receiver_that_fails_within_the_commit_says_so(arena: Arena, failure: str) -> None:
    point, victim = RECEIVER_FAILURES[failure]
    strike = Strike("recv", point, victim=str(arena.pid) if victim == COPY else victim)
    assert arena.move(strike) == "here"
    assert arena.sent is not None and arena.sent.status == FAILED, str(arena.sent)
    assert "gave up in commit" in arena.sent.outcome["message"]


def test_receiver_in_doubt_about_its_own_record_keeps_silent(arena: Arena) -> None:
    strike = Strike("recv", STORE + "commit:after", victim=f"error/{errno.EIO}")
    assert arena.move(strike) == "committed by resolve"
    assert arena.sent is not None and arena.sent.status == UNDECIDED, str(arena.sent)


def test_sender_too_slow_to_dump_idle_threads_ahead_moves_all_the_same(arena: Arena) -> None:
    assert arena.move(Strike("send", AHEAD + "ThreadsAhead.dump:after", victim="late")) == "there"


@pytest.mark.parametrize("agent", ["send", "recv"])
@pytest.mark.timeout(120 + 20 * ROUNDS)
def test_agent_killed_at_random_instants(arena: Arena, agent: str) -> None:
    chance = random.Random(SEED)
    for index in range(ROUNDS):
        if index % 10 == 0:
            # How long things take now, on this machine.
            arena.move(NOBODY)
        (point, share), at_least_us = chance.choice(WINDOWS[agent])
        span_us = int(1e6 * share(arena))
        strike = Strike(agent, point, chance.randrange(1, max(span_us, at_least_us)))
        outcome = arena.move(strike)
        print(f"{strike}: {outcome}", flush=True)
    print(arena.outcomes)


@pytest.mark.timeout(120 + 20 * ROUNDS)
def test_agent_killed_while_it_stops_the_threads(arena: Arena) -> None:
    """One call, rarely two, may return EINTR, not that of every thread which sleeps in such a one."""
    chance = random.Random(SEED)
    for _ in range(ROUNDS):
        arena.move(Strike("send", SOURCE + "_freeze:before", chance.randrange(800, 2500)))
    print(f"{arena.known_errors} failed self-checks of sleeps that were cut short")


def total(arena: Arena) -> float:
    return 1.1 * arena.last_total_s


def downtime(arena: Arena) -> float:
    return arena.last_downtime_s


NOBODY = Strike("nobody", "start")
# Where the clock starts, how far the instant may be from there, and how far at least (us).
WINDOWS = {
    "send": (
        ((SOURCE + "run:before", total), 1000),
        ((SOURCE + "run:before", total), 1000),
        ((SOURCE + "_handshake:before", lambda arena: 0.1 * total(arena)), 1000),
        ((TRACER + "stop:before", lambda arena: 0.2 * total(arena)), 1000),
        ((AHEAD + "ThreadsAhead.dump:before", downtime), 1000),
        ((SOURCE + "_freeze:before", downtime), 1000),
        ((SOURCE + "_send_final:before", downtime), 1000),
        ((HOLD + "take:before", lambda arena: 0.05 * downtime(arena)), 3000),
    ),
    "recv": (
        ((DESTINATION + "run:before", total), 1000),
        ((DESTINATION + "run:before", total), 1000),
        ((REBUILD + "start:before", lambda arena: 0.2 * total(arena)), 1000),
        ((DESTINATION + "_restore:before", downtime), 1000),
        ((REBUILD + "hold:before", lambda arena: 0.02 * downtime(arena)), 1500),
        ((STORE + "commit:before", lambda arena: 0.02 * downtime(arena)), 1500),
    ),
}

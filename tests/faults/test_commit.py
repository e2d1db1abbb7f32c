"""Agents killed around the commit, and at random instants of whole migrations: nothing is lost, nothing doubled.

FERRY_KILL_ROUNDS: how many instants each test tries (default: a few). FERRY_KILL_SEED repeats a run.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.arena import Arena, Strike
from tests.hosts import Host

ROUNDS = int(os.environ.get("FERRY_KILL_ROUNDS", "3"))
SEED = int(os.environ.get("FERRY_KILL_SEED", "1"))

STORE = "agent.session_store:SessionStore."
SOURCE = "agent.source:_Migration."
DESTINATION = "agent.destination:_Migration."
TRACER = "agent.target.tracer:Tracer."
REBUILD = "agent.rebuild:Rebuild."


@pytest.fixture
def arena(source: Host, destination: Host, tmp_path: Path) -> Iterator[Arena]:
    with contextlib.closing(Arena(source, destination, tmp_path)) as arena:
        yield arena


# What must have come of it: the process runs where it was ("here"), over there, or is frozen until resolved.
SENDER_POINTS = {
    STORE + "record_undecided:before": "here",
    STORE + "record_undecided:after": "here (record left)",
    TRACER + "stop_all:after": "here (record left)",
    TRACER + "hold:before": "here (record left)",
    TRACER + "hold:after": "aborted by resolve",
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
    TRACER + "unhold:after": "committed by resolve",
    REBUILD + "release:after": "committed by resolve",
}


@pytest.mark.parametrize("point", SENDER_POINTS)
def test_sender_killed_around_the_commit(arena: Arena, point: str) -> None:
    assert arena.move(Strike("send", point)) == SENDER_POINTS[point]


@pytest.mark.parametrize("point", RECEIVER_POINTS)
def test_receiver_killed_around_the_commit(arena: Arena, point: str) -> None:
    assert arena.move(Strike("recv", point)) == RECEIVER_POINTS[point]


def instants(agent: str, number: int) -> Iterator[Strike]:
    """Random instants: half of them over everything, the others where much happens in little time."""
    chance = random.Random(SEED * 10_000 + number)
    whole, windows = WINDOWS[agent]
    for index in range(number):
        point, span_us = whole if index % 2 == 0 else windows[index // 2 % len(windows)]
        yield Strike(agent, point, chance.randrange(1, span_us))


WINDOWS = {
    "send": (
        (SOURCE + "run:before", 250_000),
        (
            (TRACER + "stop:before", 20_000),
            (TRACER + "stop_all:before", 40_000),
            (SOURCE + "_send_final:before", 30_000),
            (SOURCE + "_finish:before", 20_000),
            (TRACER + "hold:before", 5_000),
        ),
    ),
    "recv": (
        (DESTINATION + "run:before", 220_000),
        (
            (REBUILD + "start:before", 40_000),
            (DESTINATION + "_restore:before", 50_000),
            (REBUILD + "finish_task:before", 40_000),
            (REBUILD + "hold:before", 2_000),
            (STORE + "commit:before", 3_000),
        ),
    ),
}


@pytest.mark.parametrize("agent", ["send", "recv"])
@pytest.mark.timeout(120 + 10 * ROUNDS)
def test_agent_killed_at_random_instants(arena: Arena, agent: str) -> None:
    for strike in instants(agent, ROUNDS):
        outcome = arena.move(strike)
        print(f"{strike}: {outcome}", flush=True)
    print(arena.outcomes)

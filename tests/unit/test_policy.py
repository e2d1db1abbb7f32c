"""The convergence policy, case by case."""

from __future__ import annotations

from agent.policy import Action, PolicyLimits, RoundStats, decide

LINK = 1e9  # bytes/s


def rounds(*dirty: int) -> list[RoundStats]:
    return [
        RoundStats(pages_dirty=n, pages_sent=n, bytes_sent=n * 4096, seconds=n * 4096 / LINK + 1e-4)
        for n in dirty
    ]


def test_goes_on_after_the_first_copy() -> None:
    assert decide(rounds(262144), PolicyLimits()).action is Action.CONTINUE


def test_nothing_sent_yet_goes_on() -> None:
    assert decide([], PolicyLimits()).action is Action.CONTINUE


def test_idle_target_switches_over_at_once() -> None:
    decision = decide(rounds(262144, 0), PolicyLimits())
    assert decision.action is Action.SWITCHOVER
    assert decision.predicted_downtime_s < 0.05


def test_goes_on_below_the_limit_while_rounds_shrink() -> None:
    assert decide(rounds(262144, 40000, 8000), PolicyLimits()).action is Action.CONTINUE


def test_within_the_limit_and_no_longer_shrinking_switches_over() -> None:
    decision = decide(rounds(262144, 9000, 8500), PolicyLimits())
    assert decision.action is Action.SWITCHOVER
    assert "no longer shrinking" in decision.reason


def test_writer_faster_than_the_link_ends_by_stalling() -> None:
    stalled = rounds(262144, 200000, 200000, 200000, 200000, 200000)
    assert decide(stalled[:3], PolicyLimits()).action is Action.CONTINUE
    assert decide(stalled, PolicyLimits()).action is Action.SWITCHOVER
    assert decide(stalled, PolicyLimits(strict=True)).action is Action.GIVE_UP


def test_maximum_of_rounds() -> None:
    shrinking = rounds(262144, 200000, 150000)
    assert decide(shrinking, PolicyLimits(max_rounds=3)).action is Action.SWITCHOVER
    assert decide(shrinking, PolicyLimits(max_rounds=3, strict=True)).action is Action.GIVE_UP


def test_noise_between_neighbours_is_no_stall() -> None:
    noisy = rounds(262144, 150000, 160000, 100000, 110000, 70000)
    assert decide(noisy, PolicyLimits()).action is Action.CONTINUE


def test_every_reason_names_the_prediction() -> None:
    assert "downtime" in decide(rounds(1000, 10), PolicyLimits()).reason

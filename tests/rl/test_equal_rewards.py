"""A run that cannot learn because its rewards do not differ says so."""

import logging

import pytest

from vilavt_rl.equal_rewards import BATCHES, REWARDS, EqualRewards

ZERO, ONE = [0.0] * 8, [1.0] * 8


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_batches_of_one_reward_are_told_once_and_again_when_twice_as_many(caplog: pytest.LogCaptureFixture) -> None:
    equal = EqualRewards()
    for batch in range(BATCHES - 1):
        equal.see(ZERO, batch)
    assert not warned(caplog)
    equal.see(ZERO, BATCHES)
    assert f"all {8 * BATCHES} rewards of the last {BATCHES} batches are 0" in warned(caplog)[0]
    assert "no answer was right" in warned(caplog)[0]
    for batch in range(BATCHES + 1, 2 * BATCHES + 1):
        equal.see(ZERO, batch)
    assert len(warned(caplog)) == 2


def test_all_rewards_right_is_told_with_another_cause(caplog: pytest.LogCaptureFixture) -> None:
    equal = EqualRewards()
    for batch in range(BATCHES):
        equal.see(ONE, batch)
    assert "too easy" in warned(caplog)[0]


def test_one_other_reward_starts_the_count_again(caplog: pytest.LogCaptureFixture) -> None:
    equal = EqualRewards()
    for batch in range(3 * BATCHES):
        equal.see([*ZERO, 0.5] if batch % (BATCHES - 1) == 0 else ZERO, batch)
    assert not warned(caplog)


def test_rewards_that_come_one_by_one_are_counted_by_their_batch(caplog: pytest.LogCaptureFixture) -> None:
    equal = EqualRewards()
    for step in range(BATCHES):
        for _ in range(4):
            equal.see([0.0], step)
    assert len(warned(caplog)) == 1


def test_few_rewards_and_unknown_batches_need_more(caplog: pytest.LogCaptureFixture) -> None:
    few, unknown = EqualRewards(), EqualRewards()
    for step in range(REWARDS - 1):
        few.see([0.0], step)
    for _ in range(BATCHES * REWARDS - REWARDS):
        unknown.see([0.0], None)
    assert not warned(caplog)
    for _ in range(REWARDS):
        unknown.see([0.0], None)
    assert len(warned(caplog)) == 1

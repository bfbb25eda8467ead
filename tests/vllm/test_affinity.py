"""Which of several data-parallel engines a conversation's turns go to; no engine is needed."""

import gc
import random
from contextlib import ExitStack

import pytest

from vilavt_vllm.affinity import Affinity
from vilavt_vllm.errors import RequestError


class Question:
    """Stands for a `Driver`."""


def test_with_one_engine_nobody_is_told_which():
    affinity, first, second = Affinity(lambda: 1), Question(), Question()
    with affinity.home(first) as rank:
        assert rank is None
    affinity.follow(first, second)
    with affinity.home(second, 0) as rank:
        assert rank is None


@pytest.mark.parametrize("engines", [2, 3, 8])
def test_whatever_happens_meanwhile_a_conversation_stays_and_new_ones_go_where_least_is_under_way(engines):
    affinity, draws = Affinity(lambda: engines), random.Random(engines)
    homes: dict[Question, int] = {}
    running: dict[Question, tuple[ExitStack, int]] = {}
    busy = [0] * engines
    for _ in range(2000):
        kind = draws.choice(("new", "follow", "end", "end"))
        if kind == "end":
            if running:
                question = draws.choice(list(running))
                stack, rank = running.pop(question)
                stack.close()
                busy[rank] -= 1
            continue
        question, stack, least = Question(), ExitStack(), min(busy)
        before = draws.choice(list(homes)) if kind == "follow" and homes else None
        if before is not None:
            affinity.follow(before, question)
        rank = stack.enter_context(affinity.home(question))
        assert rank == homes[before] if before is not None else busy[rank] == least
        homes[question], running[question] = rank, (stack, rank)
        busy[rank] += 1
    assert set(homes.values()) == set(range(engines))


def test_engines_that_are_equally_busy_take_turns():
    affinity, ranks = Affinity(lambda: 3), []
    for _ in range(6):
        with affinity.home(Question()) as rank:
            ranks.append(rank)
    assert ranks == [0, 1, 2, 0, 1, 2]


def test_a_question_that_failed_is_under_way_no_more():
    affinity = Affinity(lambda: 2)
    with pytest.raises(RuntimeError), affinity.home(Question()):
        raise RuntimeError
    with affinity.home(Question()) as first, affinity.home(Question()) as second:
        assert {first, second} == {0, 1}


def test_where_a_client_wants_it_a_conversation_moves_and_stays():
    affinity, first, second, third = Affinity(lambda: 2), Question(), Question(), Question()
    with affinity.home(first) as rank:
        other = 1 - rank
    affinity.follow(first, second)
    with affinity.home(second, other) as rank:
        assert rank == other
    affinity.follow(second, third)
    with affinity.home(third) as rank:
        assert rank == other


def test_a_conversation_whose_engine_was_taken_away_gets_another_home():
    count, question, after = 3, Question(), Question()
    affinity = Affinity(lambda: count)
    with affinity.home(question, 2):
        pass
    count = 2
    affinity.follow(question, after)
    with affinity.home(after) as rank:
        assert rank in (0, 1)
    count = 1
    with affinity.home(after) as rank:
        assert rank is None


@pytest.mark.parametrize(
    "engines, wrong, there", [(1, 1, "is one engine, of rank 0"), (2, 2, "ranks 0 to 1"), (2, -1, "0 to 1")]
)
def test_an_engine_that_is_not_there_is_named(engines, wrong, there):
    affinity = Affinity(lambda: engines)
    assert affinity.check(engines - 1) == engines - 1
    with pytest.raises(RequestError, match=f"X-Data-Parallel-Rank is {wrong}, and there .*{there}"):
        affinity.check(wrong)


def test_nothing_is_kept_of_conversations_that_are_gone():
    affinity = Affinity(lambda: 2)
    for _ in range(10):
        with affinity.home(Question()):
            pass
    gc.collect()
    assert len(affinity._homes) == 0

"""Who may go on, by clocks alone."""

import itertools
import math
import re

import pytest

from lightning_easgd.gates import RoundRobin, StaleSynchronous


def test_bounded_staleness():
    gate = StaleSynchronous(2)
    assert gate.admits(0, [2, 0, 5])
    assert not gate.admits(0, [3, 0, 5])
    assert gate.admits(0, [3, math.inf, 5])


@pytest.mark.parametrize("slack", [-1, 1.0, True, None])
def test_slack_must_be_a_count(slack):
    with pytest.raises(ValueError, match=re.escape(f"StaleSynchronous(slack={slack!r}): must be an integer >= 0")):
        StaleSynchronous(slack)


def test_turns_go_round():
    gate, clocks = RoundRobin(), [0, 0, 0]
    for turn in range(9):
        assert [i for i in range(3) if gate.admits(i, clocks)] == [turn % 3]
        clocks[turn % 3] += 1


def test_who_is_away_is_passed_over():
    gate = RoundRobin()
    assert gate.admits(2, [1, math.inf, 0])
    assert gate.admits(1, [math.inf, 4, 4])


@pytest.mark.parametrize("gate", [StaleSynchronous(0), StaleSynchronous(2), RoundRobin()], ids=repr)
def test_who_is_admitted_stays_so_when_others_go_on(gate):
    for clocks in itertools.product(range(4), repeat=3):
        for other in (1, 2):
            if gate.admits(0, clocks):
                assert gate.admits(0, [c + (i == other) for i, c in enumerate(clocks)])

"""Who waits at a gate, and for whom."""

import math
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from lightning_easgd.communication import TransportError
from lightning_easgd.communication._turnstile import Turnstile
from lightning_easgd.gates import StaleSynchronous
from tests.helpers import TIMEOUT, run_threads


def turnstile(store, replica, num_replicas=2, slack=1, timeout=TIMEOUT, check=lambda: None) -> Turnstile:
    return Turnstile(
        StaleSynchronous(slack), store, replica=replica, num_replicas=num_replicas, timeout=timeout, check=check
    )


@pytest.mark.parametrize("slack", [-1, 1.5, True, "2"])
def test_a_slack_that_is_no_count_is_refused(slack):
    with pytest.raises(ValueError, match=r"StaleSynchronous\(slack=.*must be an integer >= 0"):
        StaleSynchronous(slack)


def test_the_gate_compares_with_the_slowest_that_is_there():
    gate = StaleSynchronous(2)
    assert gate.admits(0, [2, 0, 5])
    assert not gate.admits(0, [3, 0, 5])
    assert gate.admits(0, [3, math.inf, 5])
    assert StaleSynchronous(0).admits(1, [4, 4])


@pytest.mark.parametrize("slack", [0, 1, 3])
def test_no_replica_gets_further_ahead_than_the_slack(slack):
    clocks = [0] * 3
    lead: list[int] = []
    lock = threading.Lock()

    def body(replica, store):
        gate = turnstile(store, replica, 3, slack)
        for _ in range(40):
            gate.enter()
            with lock:  # begins an exchange
                lead.append(clocks[replica] - min(clocks))
                clocks[replica] += 1
            gate.advance()
        gate.leave()

    run_threads(body, 3)
    assert clocks == [40] * 3
    assert max(lead) <= slack


def test_who_is_away_is_not_waited_for_until_the_next_round():
    def body(replica, store):
        gate = turnstile(store, replica, slack=0)
        if replica == 1:
            gate.leave()
            store.get("alone")
            gate.begin_round(1)
            for _ in range(3):
                gate.enter()
                gate.advance()
            return gate.waited_s
        for _ in range(5):
            gate.enter()
            gate.advance()
        gate.begin_round(1)
        gate.enter()
        gate.advance()
        store.set("alone", "1")
        for _ in range(2):
            gate.enter()  # from here on with the other
            gate.advance()
        return gate.waited_s

    waited = run_threads(body, 2)
    assert waited[0] > 0


def test_a_peer_that_does_not_move_runs_into_the_timeout():
    store = dist.HashStore()
    gates = [turnstile(store, replica, slack=0, timeout=timedelta(seconds=0.3)) for replica in range(2)]
    gates[0].enter()
    gates[0].advance()
    with pytest.raises(TransportError, match=r"replica 0 has waited .*clocks are \[1.0, 0.0\]"):
        gates[0].enter()
    assert gates[0].waited_s >= 0.3


def test_waiting_ends_when_it_has_become_pointless():
    store = dist.HashStore()

    def failed() -> None:
        raise RuntimeError("a peer failed")

    gates = [turnstile(store, replica, slack=0, check=failed) for replica in range(2)]
    gates[0].advance()
    with pytest.raises(RuntimeError, match="a peer failed"):
        gates[0].enter()

"""Lets a replica through when its gate admits it: the replicas' clocks in a store, and the waiting."""

import math
import time
from collections.abc import Callable
from datetime import timedelta

from lightning_easgd.communication._c10d import PrefixStore, Store
from lightning_easgd.communication._transport import TransportError
from lightning_easgd.gates import Gate

__all__ = ["DoubleTurnstile", "Turnstile"]

_SHORTEST_S, _LONGEST_S = 0.0005, 0.05


class Turnstile:
    """One replica's way through a gate. Every replica has one over the same store.

    Args:
        gate: the condition.
        store: used with the caller's prefix, by this turnstile alone.
        replica: index of the caller.
        num_replicas: how many replicas pass the gate.
        timeout: the longest wait for a peer that does not move.
        check: called while waiting; raises if waiting has become pointless.

    Attributes:
        waited_s: seconds spent waiting so far.
    """

    def __init__(
        self,
        gate: Gate,
        store: Store,
        *,
        replica: int,
        num_replicas: int,
        timeout: timedelta,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._gate, self._store = gate, store
        self._replica, self._timeout, self._check = replica, timeout, check
        self._clocks: list[float] = [0.0] * num_replicas
        self._round = store
        self.waited_s = 0.0
        self.begin_round(0)

    def begin_round(self, number: int) -> None:
        """Sets all clocks to zero: what was done before no longer counts. Every replica calls it alike; local."""
        self._round = PrefixStore(f"round/{number}", self._store)
        self._clocks = [0.0] * len(self._clocks)
        self._publish()

    def enter(self) -> None:
        """Returns when the gate admits this replica's next exchange.

        The others' clocks only grow, so that what is known of them admits for good: the store is asked only when that
        is not enough.

        Raises:
            TransportError: no other replica moved for the timeout.
        """
        if self._gate.admits(self._replica, self._clocks):
            return
        began = moved = time.monotonic()
        pause = _SHORTEST_S
        try:
            while True:
                before = list(self._clocks)
                self._look()
                if self._gate.admits(self._replica, self._clocks):
                    return
                self._check()
                now = time.monotonic()
                if before != self._clocks:
                    moved = now
                if now - moved > self._timeout.total_seconds():
                    raise TransportError(
                        f"replica {self._replica} has waited {now - began:.1f} s at {self._gate!r}: the replicas' "
                        f"clocks are {self._clocks}, and none moved for {self._timeout.total_seconds():.0f} s"
                    )
                time.sleep(pause)  # between two looks; what is waited for is the clocks
                pause = min(2 * pause, _LONGEST_S)
        finally:
            self.waited_s += time.monotonic() - began

    def has_read(self) -> None:
        """Does nothing: reading and adding are one here."""

    def enter_addition(self) -> None:
        """Does nothing: a replica that may read may also add."""

    def advance(self) -> None:
        """Says that this replica has completed an exchange. Does not wait."""
        self._clocks[self._replica] += 1
        self._publish()

    def leave(self) -> None:
        """Says that nobody is to wait for this replica until the next round. Does not wait."""
        self._clocks[self._replica] = math.inf
        self._publish()

    def _publish(self) -> None:
        self._round.set(_key(self._replica), str(self._clocks[self._replica]))

    def _look(self) -> None:
        others = [replica for replica in range(len(self._clocks)) if replica != self._replica]
        if not others:
            return
        for replica, clock in zip(others, self._round.multi_get([_key(r) for r in others]), strict=True):
            self._clocks[replica] = float(clock)


class DoubleTurnstile:
    """Two turnstiles that a replica passes with each exchange: one before it reads, one before it adds.

    With the first alone a slow replica may read what a fast one has added in the step that both are in: with slack 0
    that would be no lock-step.

    Args:
        additions: counts additions, and admits a reading.
        readings: counts readings, and admits an addition; over the same gate.
    """

    def __init__(self, additions: Turnstile, readings: Turnstile) -> None:
        self._additions, self._readings = additions, readings
        self._has_read = False  # and not added since, in this round

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting so far."""
        return self._additions.waited_s + self._readings.waited_s

    def enter(self) -> None:
        """Returns when this replica may read. Blocks for the others' additions; raises like ``Turnstile.enter``."""
        self._additions.enter()

    def has_read(self) -> None:
        """Says that this replica has read. Does not wait."""
        self._has_read = True
        self._readings.advance()

    def enter_addition(self) -> None:
        """Returns when this replica may add. Blocks for the others' readings; raises like ``Turnstile.enter``."""
        if not self._has_read:  # in this round, which has begun in the middle of its period
            self.has_read()
        self._readings.enter()

    def advance(self) -> None:
        """Says that this replica has added. Does not wait."""
        self._has_read = False
        self._additions.advance()

    def leave(self) -> None:
        """See ``Turnstile.leave``."""
        self._readings.leave()
        self._additions.leave()

    def begin_round(self, number: int) -> None:
        """See ``Turnstile.begin_round``."""
        self._has_read = False
        self._readings.begin_round(number)
        self._additions.begin_round(number)


def _key(replica: int) -> str:
    return f"clock/{replica}"

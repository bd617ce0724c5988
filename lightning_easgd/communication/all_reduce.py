"""A center that every replica holds, kept equal by one all-reduce an exchange.

The elastic force of synchronous EASGD needs only the replica's parameters and the center that it already holds; the
*sum* over replicas is not needed before the next exchange. So ``push`` starts the all-reduce and returns, and the next
``pull`` completes it: communication hides behind a whole period of compute, with the arithmetic unchanged.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.algorithms._interfaces import Exchange, Snapshot
from lightning_easgd.communication._c10d import Group, Store, Work, new_group
from lightning_easgd.communication._transport import (
    Completed,
    OpenCenter,
    Traffic,
    Transport,
    TransportError,
    check_open,
)
from lightning_easgd.rules import CenterRule

__all__ = ["AllReduce"]


class AllReduce(Transport):
    """Synchronous transport: the center replicated in every replica, one all-reduce (sum) an exchange.

    The replicas' n-th pushes and abstentions belong together. The sum is applied to the center as one delta and counts
    as ``num_replicas`` additions. All copies stay bit-identical, since a sum is computed once and then distributed.
    Memory: the center, a message of the same size, and what the rule remembers.
    """

    synchronous = True

    def open(
        self,
        initial: Tensor,
        *,
        replica: int,
        num_replicas: int,
        rule: CenterRule,
        store: Store,
        timeout: timedelta,
        num_slots: int = 0,
    ) -> OpenCenter:
        """Opens the center; see ``Transport.open``."""
        check_open(self, initial, replica, num_replicas, rule)
        return _ReplicatedCenter(initial, replica, num_replicas, rule, store, timeout, num_slots)

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return "AllReduce()"


class _ReplicatedCenter(OpenCenter):
    synchronous = True

    def __init__(
        self,
        initial: Tensor,
        replica: int,
        num_replicas: int,
        rule: CenterRule,
        store: Store,
        timeout: timedelta,
        num_slots: int,
    ) -> None:
        super().__init__(replica=replica, num_replicas=num_replicas, num_slots=num_slots, dtype=initial.dtype)
        self._rule = rule
        self._timeout = timeout
        self._clock = 0
        self._value = initial.clone()
        self._memory = [torch.zeros_like(initial) for _ in range(rule.num_vectors)]
        # The sums of the deltas, of how many of them there are, and of the slots.
        self._message = initial.new_empty(initial.numel() + 1 + num_slots)
        self._work: Work | None = None
        self._launched_at = 0.0
        self._completed_at: float | None = None
        try:
            self._group: Group | None = new_group(store, replica, num_replicas, initial.device, timeout)
            self._group.broadcast(self._value, 0).wait(timeout)
        except RuntimeError as error:
            raise TransportError(
                f"replica {replica} of {num_replicas} could not open the all-reduce center: {error}"
            ) from error

    @property
    def value(self) -> Tensor:
        return self._value

    @property
    def clock(self) -> int:
        return self._clock

    def pull(self) -> Snapshot:
        self._require_open()
        self.drain()
        return Snapshot(self._value, self._clock)

    def push(self, delta: Tensor, *, read_at: int) -> None:
        self._add(delta, read_at, 1.0)

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        snapshot = self.pull()
        delta(x, snapshot.value)
        self._add(x, snapshot.clock, scale)
        return Completed(x)

    def _add(self, delta: Tensor, read_at: int, scale: float) -> None:
        self._require_open()
        self.drain()
        self._refuse_nonfinite(delta)
        # All replicas add at once, so a delta is as old as the exchange before this one: the weight is everyone's.
        weight = self._rule.weight(self._clock - read_at)
        torch.mul(delta, scale * weight, out=self._message[: delta.numel()])
        self._launch(num_deltas=1)
        self.traffic.exchanges += 1

    def abstain(self) -> None:
        self._require_open()
        self.drain()
        self._message.zero_()
        self._launch(num_deltas=0)

    def _require_open(self) -> None:
        if self._group is None:
            raise TransportError(f"replica {self.replica}: the all-reduce center is closed")

    def _launch(self, *, num_deltas: int) -> None:
        assert self._group is not None
        size = self._value.numel()
        self._message[size].fill_(num_deltas)
        self._message[size + 1 :].copy_(self.announcement)
        self._completed_at = None
        self._launched_at = time.perf_counter()
        self._work = self._group.allreduce([self._message])
        self._work.get_future().add_done_callback(self._note_completion)
        # What a ring all-reduce sends: every chunk but one, once to be summed and once to be distributed.
        sent = 2 * (self.num_replicas - 1) * self._message.numel() * self._message.element_size()
        self.traffic.bytes_sent += sent // self.num_replicas

    def _note_completion(self, _: object) -> None:
        self._completed_at = time.perf_counter()

    def drain(self, timeout: timedelta | None = None) -> None:
        work, self._work = self._work, None
        if work is None:
            return
        began = time.perf_counter()
        try:
            work.wait(self._timeout if timeout is None else timeout)
        except RuntimeError as error:
            raise TransportError(
                f"replica {self.replica} of {self.num_replicas}: the all-reduce that began "
                f"{began - self._launched_at:.1f} s ago did not complete and was not applied: {error}"
            ) from error
        ended = time.perf_counter()
        completed = min(self._completed_at or ended, ended)
        self.traffic.exposed_s += ended - began
        self.traffic.hidden_s += max(0.0, min(completed, began) - self._launched_at)
        size = self._value.numel()
        if self._message[size] > 0:  # where all abstain, a rule with momentum must not take it for a step of zero
            self._rule.apply_(self._value, self._message[:size], *self._memory)
        self.announced.copy_(self._message[size + 1 :])
        self._clock += self.num_replicas

    def lost(self) -> list[int]:
        return []  # the exchange that misses one raises

    def state_dict(self) -> dict[str, Any]:
        return {
            "clock": self._clock,
            "rule": self._rule.state_dict(),
            "memory": [vector.clone() for vector in self._memory],
            "traffic": vars(self.traffic).copy(),
        }

    def load_state_dict(self, state: dict[str, Any], value: Tensor) -> None:
        self._value.copy_(value)
        self._clock = int(state["clock"])
        self._rule.load_state_dict(state["rule"])
        for vector, saved in zip(self._memory, state["memory"], strict=True):
            vector.copy_(saved)
        self.traffic = Traffic(**state["traffic"])

    def close(self) -> None:
        group, self._group = self._group, None
        # A group waits for its operations when it is destroyed; one that a lost peer never answers must not hold us.
        if group is not None and self._work is not None and hasattr(group, "abort"):
            group.abort()
        self._work = None
        self._value = self._message = self._value.new_empty(0)
        self._memory = []

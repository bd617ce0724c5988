"""The event-driven simulation: each replica at its own pace, messages that take time."""

import copy
import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from lightning_easgd.algorithms import Algorithm, Exchange, Replica, Snapshot
from lightning_easgd.gates import Gate
from lightning_easgd.rules import CenterRule
from lightning_easgd.simulation.centers import AsynchronousCenter, SynchronousCenter, pull_and_push
from lightning_easgd.simulation.objectives import Objective, Separable
from lightning_easgd.simulation.replicas import OptimizerFactory, Vector, descent
from lightning_easgd.simulation.rows import LARGEST_ROW, Row, Rows

__all__ = ["Duration", "Event", "Simulation"]

Duration = float | Callable[[random.Random], float] | Sequence[Iterable[float]]
"""Virtual seconds, >= 0: always the same; drawn by a function of the replica's own generator; or a list of scripts."""


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        time: when, in virtual seconds.
        kind: "step": a replica made a step; where that reads the center, this is when the center answers. "add": a
            delta was added.
        replica: the replica that made the step or the delta.
        clock: the center's, afterwards.
        staleness: of what was added, in additions; 0 for a step.
    """

    time: float
    kind: str
    replica: int
    clock: int
    staleness: int


_ADD, _STEP = 0, 1  # at equal times additions come before reads, then the replicas' order


class _Link:
    """A replica's way to the center: it sees to it that nothing is done out of time.

    A step is executed at the moment at which it reads the center. The work before and after it concerns its replica
    alone, so that nobody can tell when that was computed; but what it pushes after its local update must be added
    later.
    """

    def __init__(self, simulation: "Simulation", replica: int, local_update: Callable[[], None]) -> None:
        self.num_replicas = len(simulation.replicas)
        self.replica = replica
        self.deliveries: list[tuple[Tensor, int, Sequence[float]]] = []  # pushed after the local update of this step
        self.is_ahead = False
        self.is_updated = False
        self.reads_late = False
        self._simulation = simulation
        self._numbers: Sequence[float] = ()  # told with each push
        self._center = simulation.center
        self._scratch: Tensor | None = None
        self._local_update = local_update

    def local_update(self) -> None:
        self.is_updated = True
        self._local_update()

    def tell(self, numbers: Sequence[float] | Tensor) -> None:
        self._numbers = [float(number) for number in numbers]

    def told(self) -> Tensor:
        return self._center.told()

    def pull(self) -> Snapshot:
        if self.is_ahead:
            self._refuse("reads the center in a step that is neither due nor ending", "is_due")
        if self.is_updated and not self.reads_late:
            self._refuse("reads the center after its local update", "reads_late")
        return self._center.pull(self.replica)

    def push(self, delta: Tensor, *, read_at: int) -> None:
        if self.is_ahead:
            self._refuse("adds to the center in a step that is neither due nor ending", "is_ending")
        if self.is_updated and not self.reads_late:
            self.deliveries.append((delta.clone(), read_at, self._numbers))
        else:
            self._simulation._add(self.replica, delta, read_at, self._numbers)

    def _refuse(self, what: str, attribute: str) -> NoReturn:
        raise RuntimeError(f"replica {self.replica} {what}; its algorithm must say so: {attribute}")

    def borrow(self) -> Tensor:
        if self._scratch is None:
            self._scratch = torch.empty_like(self._center.value)
        return self._scratch

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        return pull_and_push(self, x, delta, scale)


class Simulation:
    """Replicas that step in virtual time.

    A step takes its compute time. Over an asynchronous center a step that is due also takes a round trip, of two
    latencies, before it computes; a push arrives one latency later and holds nobody up; messages of one replica arrive
    in the order in which they were sent. Over a synchronous center a round is complete one latency after its last push,
    and a replica that reads earlier waits. There is one virtual order, whatever the host does: equal arguments give
    equal bits.

    Attributes:
        algorithms: one for each replica.
        replicas: the parameters of each, moved in place.
        center: the center.
        gate: which replica may begin an exchange; None where no replica waits.
        time: now, in virtual seconds.
        clocks: exchanges that each replica has completed.
        steps: steps that each replica has made.
    """

    def __init__(
        self,
        algorithms: Sequence[Algorithm],
        replicas: Sequence[Replica],
        local_updates: Sequence[Callable[[], None]],
        *,
        synchronous: bool,
        center: Tensor | None = None,
        rule: CenterRule | None = None,
        gate: Gate | None = None,
        compute_time: Duration = 1.0,
        latency: Duration = 0.0,
        seed: int = 0,
        start: bool = True,
        observe: Callable[[Event], None] | None = None,
    ) -> None:
        """Prepares; nothing runs yet.

        Args:
            algorithms: one object for each replica.
            replicas: p of them, p >= 1.
            local_updates: the local update of each replica.
            synchronous: which center.
            center: (d,) its value. Default: replica 0's.
            rule: what it does with a delta. Default: the algorithm's.
            gate: over an asynchronous center, which replica may begin an exchange. Default: the algorithm's.
            compute_time: of one step.
            latency: of one message.
            seed: of the drawn times, a generator for each replica and kind.
            start: whether to call the algorithms' ``start``, which refuses hyper-parameters that cannot work.
            observe: called after each event.

        Raises:
            ValueError: the sequences differ in length, a gate is given with a synchronous center, or what the
                algorithm is made for is the other center.
        """
        p = len(replicas)
        if not p == len(algorithms) == len(local_updates) > 0:
            raise ValueError(
                f"Simulation(<{len(algorithms)} algorithms, {p} replicas, {len(local_updates)} local updates>): must "
                "be as many, and at least 1"
            )
        rule = algorithms[0].rule(p) if rule is None else rule
        name = type(algorithms[0]).__name__
        if not synchronous and (algorithms[0].synchronous_only or rule.synchronous_only):
            raise ValueError(f"Simulation(synchronous=False): {name} with {rule!r} needs a synchronous center")
        if synchronous and (algorithms[0].asynchronous_only or gate is not None):
            raise ValueError(f"Simulation(synchronous=True): {name} with gate {gate!r} needs an asynchronous center")
        self.algorithms, self.replicas = list(algorithms), list(replicas)
        initial = replicas[0].read() if center is None else center
        self.center: SynchronousCenter | AsynchronousCenter = (
            SynchronousCenter(initial, p, rule, algorithms[0].num_told)
            if synchronous
            else AsynchronousCenter(initial, p, rule, algorithms[0].num_told)
        )
        self.gate = None if synchronous else algorithms[0].gate(p) if gate is None else gate
        self.time = 0.0
        self.clocks = [0] * p
        self.steps = [0] * p
        self._compute_time = _durations(compute_time, p, f"{seed}/compute")
        self._latency = _durations(latency, p, f"{seed}/latency")
        self._observe = observe
        self._local_updates = list(local_updates)
        self._links = [_Link(self, i, update) for i, update in enumerate(local_updates)]
        self._heap: list[tuple[float, int, int, int]] = []  # time, kind, replica, number of the entry
        self._entries = 0
        self._in_flight: dict[int, tuple[int, Tensor, int, Sequence[float]]] = {}  # by the number of the entry
        self._arrival = [0.0] * p  # of each replica's last message
        self._duration = [0.0] * p  # compute time of the step that is scheduled
        self._free_at = [0.0] * p
        self._left = [0.0] * p  # steps that may still begin
        self._idle = set(range(p))
        self._waiting: set[int] = set()  # at the gate, or for a round
        self._round_at = 0.0  # when the last round is complete for its replicas
        self._until = math.inf
        self._ahead = 0.0  # when the last step was begun that had no event
        if start:
            for algorithm, replica, handle in zip(algorithms, replicas, self.center.handles, strict=True):
                algorithm.start(replica, handle)

    @classmethod
    def of(
        cls,
        algorithm: Algorithm,
        objective: Objective,
        begin: Tensor,
        *,
        num_replicas: int,
        synchronous: bool,
        lr: float | None = None,
        optimizer: OptimizerFactory | None = None,
        center: Tensor | None = None,
        rule: CenterRule | None = None,
        gate: Gate | None = None,
        compute_time: Duration = 1.0,
        latency: Duration = 0.0,
        seed: int = 0,
        start: bool = True,
        observe: Callable[[Event], None] | None = None,
    ) -> "Simulation":
        """Returns a simulation of one algorithm, copied for each replica, on one objective.

        Args:
            algorithm: copied for each replica.
            objective: the function that all replicas descend, each with noise from its own generator.
            begin: (d,) where all begin, or (p, d), where each does. Copied.
            num_replicas: p.
            synchronous: which center.
            lr: the rate of plain SGD; or
            optimizer: called with the list of a replica's one parameter; the algorithm is bound to what it returns.
            center: (d,) the center's value. Default: replica 0's.
            rule: see the constructor, as for all that follow.
            gate: see there.
            compute_time: see there.
            latency: see there.
            seed: of the noise and of the times.
            start: see there.
            observe: see there.
        """
        values = begin.expand(num_replicas, begin.shape[-1]).clone(memory_format=torch.contiguous_format)
        algorithms = [copy.deepcopy(algorithm) for _ in range(num_replicas)]
        generators = [torch.Generator().manual_seed(seed * num_replicas + i) for i in range(num_replicas)]
        replicas: list[Replica]
        steps: list[Callable[[], None]]
        if (
            lr is not None
            and optimizer is None
            and isinstance(objective, Separable)
            and not algorithm.needs_loss  # of each step, when it is made
            and len(values[0]) <= LARGEST_ROW
        ):
            rows = Rows(algorithms, objective, values, lr, generators)
            replicas = [Row(rows, i) for i in range(num_replicas)]
            steps = [partial(rows.step, i) for i in range(num_replicas)]
        else:
            replicas = [Vector(row) for row in values]
            steps = [
                descent(a, objective, row, lr, optimizer, generator)
                for a, row, generator in zip(algorithms, values, generators, strict=True)
            ]
        return cls(
            algorithms,
            replicas,
            steps,
            synchronous=synchronous,
            center=center,
            rule=rule,
            gate=gate,
            compute_time=compute_time,
            latency=latency,
            seed=seed,
            start=start,
            observe=observe,
        )

    @torch.no_grad()
    def run(self, num_steps: int | None = None, *, until: float = math.inf) -> None:
        """Goes on; may be called again.

        Args:
            num_steps: how many more steps each replica makes. Default: no limit; then ``until`` must be given.
            until: virtual time at which to return; what happens at this very time has happened.

        Raises:
            ValueError: neither is given.
            RuntimeError: replicas wait for ever, or an algorithm does what no center allows.
        """
        if num_steps is None and until == math.inf:
            raise ValueError("Simulation.run(num_steps=None, until=inf): give at least one")
        for i, left in enumerate(self._left):
            if num_steps is None:
                self._left[i] = math.inf
            else:  # of those without a limit one step more is scheduled already
                self._left[i] = num_steps - 1 if math.isinf(left) else left + num_steps
        for i in sorted(self._idle):
            self._schedule(i)
        heap, self._until = self._heap, until
        while heap and heap[0][0] <= until:
            self.time, kind, replica, number = heapq.heappop(heap)
            if kind == _ADD:
                self._add(*self._in_flight.pop(number))
            else:
                self._step(replica)
        self.time = until if until < math.inf else max(self.time, self._ahead)
        if until == math.inf and self._waiting:
            raise RuntimeError(f"replicas {sorted(self._waiting)} wait for ever for others that have made their steps")

    def _put(self, time: float, kind: int, replica: int) -> int:
        self._entries += 1
        heapq.heappush(self._heap, (time, kind, replica, self._entries))
        return self._entries

    def _schedule(self, i: int) -> None:
        """Schedules the replica's next step for when it reads the center, or begins."""
        if self._left[i] <= 0:
            self._idle.add(i)
            self._admit()  # nobody is to wait for it
            return
        self._idle.discard(i)
        self._left[i] -= 1
        algorithm, time = self.algorithms[i], self._free_at[i]
        self._duration[i] = self._compute_time[i]()
        if algorithm.is_due:
            if algorithm.reads_late:
                time += self._duration[i]
            if isinstance(self.center, AsynchronousCenter):
                time = self._message(i, time)
        self._put(time, _STEP, i)

    def _message(self, i: int, sent: float) -> float:
        """Returns when a message arrives that the replica sends to the center."""
        self._arrival[i] = max(self._arrival[i], sent + self._latency[i]())
        return self._arrival[i]

    def _must_wait(self, i: int) -> bool:
        if isinstance(self.center, SynchronousCenter):
            return self.center.is_outstanding(i)
        if self.gate is None:
            return False
        away = self._idle - {replica for replica, *_ in self._in_flight.values()}  # and all it has sent has come
        return not self.gate.admits(i, [math.inf if j in away else c for j, c in enumerate(self.clocks)])

    def _step(self, i: int) -> None:
        algorithm, link, time = self.algorithms[i], self._links[i], self.time
        is_due, duration = algorithm.is_due, self._duration[i]
        if is_due:
            if self._must_wait(i):
                self._waiting.add(i)
                return
            if time < self._round_at:
                self._put(self._round_at, _STEP, i)
                return
        link.is_updated, link.reads_late = False, algorithm.reads_late
        algorithm.step(self.replicas[i], link, link.local_update)
        self.steps[i] += 1
        if is_due and isinstance(self.center, AsynchronousCenter):
            time += self._latency[i]()  # the answer
        self._free_at[i] = time if is_due and algorithm.reads_late else time + duration
        for delivery in link.deliveries:
            asynchronous = isinstance(self.center, AsynchronousCenter)
            arrival = self._message(i, self._free_at[i]) if asynchronous else self._free_at[i]
            self._in_flight[self._put(arrival, _ADD, i)] = (i, *delivery)
        link.deliveries.clear()
        if self._observe is not None:
            self._observe(Event(self.time, "step", i, self.center.clock, 0))
        else:
            self._go_ahead(i)
        self._schedule(i)

    def _go_ahead(self, i: int) -> None:
        """Makes the replica's next steps that neither read the center nor add to it: nobody sees when they are made.

        Not the last that it may make: with that it goes idle, which others wait for.
        """
        algorithm, replica, link = self.algorithms[i], self.replicas[i], self._links[i]
        step, local_update, compute_time = algorithm.step, self._local_updates[i], self._compute_time[i]
        time, left = self._free_at[i], self._left[i]
        link.is_ahead = True
        while left > 1 and time <= self._until and not (algorithm.is_due or algorithm.is_ending):
            step(replica, link, local_update)
            self.steps[i] += 1
            left -= 1
            self._ahead = max(self._ahead, time)
            time += compute_time()
        link.is_ahead = False
        self._free_at[i], self._left[i] = time, left

    def _add(self, i: int, delta: Tensor, read_at: int, numbers: Sequence[float]) -> None:
        center, before = self.center, self.center.clock
        if numbers:
            center.tell(i, numbers)
        center.push(i, delta, read_at)
        self.clocks[i] += 1
        if self._observe is not None:
            staleness = center.staleness if isinstance(center, AsynchronousCenter) else before - read_at
            self._observe(Event(self.time, "add", i, center.clock, staleness))
        if isinstance(center, SynchronousCenter):
            if center.clock == before:
                return  # the round goes on
            self._round_at = self.time + max(latency() for latency in self._latency)
        self._admit()

    def _admit(self) -> None:
        """Lets the replicas go on whose wait is over."""
        for i in sorted(self._waiting):
            if not self._must_wait(i):
                self._waiting.discard(i)
                self._put(max(self.time, self._round_at), _STEP, i)


def _durations(duration: Duration, num_replicas: int, seed: str) -> list[Callable[[], float]]:
    """Returns a function for each replica that gives the next of its durations."""
    if callable(duration):
        return [partial(duration, random.Random(f"{seed}/{i}")) for i in range(num_replicas)]
    if isinstance(duration, Sequence):
        if len(duration) != num_replicas:
            raise ValueError(f"<{len(duration)} scripts of durations>: must be one for each of {num_replicas} replicas")
        return [_Script(i, iter(script)) for i, script in enumerate(duration)]
    return [partial(float, duration)] * num_replicas


class _Script:
    def __init__(self, replica: int, durations: Iterator[float]) -> None:
        self._replica, self._durations = replica, durations

    def __call__(self) -> float:
        for duration in self._durations:
            return duration
        raise ValueError(f"the script of replica {self._replica}'s durations is over; it must last for all steps")

"""Any algorithm, center rule and gate with p replicas in one process, in virtual time: exact, and reproducible.

The algorithm objects that train are the ones that run here. Two drivers:

* ``Simulation`` is event-driven: each replica takes its own time for a step, messages take time to reach the center,
  and whatever happens at the center happens in the order of that time. Any replica, any local update.
* ``LockStep`` is the synchronous case at once: since nothing that a replica does between two exchanges can be seen by
  another, all replicas step as one (p, d) tensor. It computes what ``Simulation`` does, to the last bit, at a cost a
  step that hardly grows with p; for algorithms that treat every number of the vector alike.

Objectives act on each coordinate by itself, so d coordinates are d runs of a one-dimensional problem: Monte Carlo at
the price of a few vector operations. A ``Loss`` is any function of the vector.

::

    simulation = Simulation.of(
        EASGD(period=4),
        Quadratic(noise=1.0),
        torch.ones(1000),
        num_replicas=8,
        lr=0.1,
        synchronous=False,
        compute_time=lambda random: random.expovariate(1.0),
    )
    simulation.run(num_steps=100)
    simulation.center.value.var()
"""

import copy
import heapq
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.algorithms import Algorithm, Center, Exchange, Replica, Snapshot
from lightning_easgd.gates import Gate
from lightning_easgd.rules import Addition, CenterRule

__all__ = [
    "AsynchronousCenter",
    "DoubleWell",
    "Duration",
    "Event",
    "LockStep",
    "Loss",
    "MultiplicativeNoise",
    "Objective",
    "Quadratic",
    "Simulation",
    "SynchronousCenter",
    "Vector",
]

OptimizerFactory = Callable[[list[Tensor]], Optimizer]
Duration = float | Callable[[random.Random], float] | Sequence[Iterable[float]]
"""Virtual seconds, >= 0: always the same; drawn by a function of the replica's own generator; or a script a replica."""


# --- objectives -------------------------------------------------------------------------------------------------------


class Objective(Protocol):
    """What the replicas descend."""

    def gradient(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns a stochastic gradient at ``x``, a new tensor of its shape: (d,), or (p, d), one row a replica."""
        ...


@dataclass(frozen=True)
class Quadratic:
    """``curvature x^2 / 2`` in each coordinate; its gradient with normal noise of standard deviation ``noise``.

    Attributes:
        curvature: h; a number, or (d,).
        noise: sigma, >= 0.
    """

    curvature: float | Tensor = 1.0
    noise: float = 0.0

    def gradient(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns ``curvature x - noise xi``."""
        gradient = x * self.curvature
        return _subtract_noise(gradient, self.noise, generator)


@dataclass(frozen=True)
class DoubleWell:
    """``(x^2 - 1)^2 / 4`` in each coordinate: minima at -1 and 1. Noise as in ``Quadratic``."""

    noise: float = 0.0

    def gradient(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns ``x^3 - x - noise xi``."""
        return _subtract_noise(x * x * x - x, self.noise, generator)


@dataclass(frozen=True)
class MultiplicativeNoise:
    """A quadratic whose curvature is drawn anew for each gradient and coordinate, Gamma-distributed.

    Attributes:
        mean: of the curvature, > 0.
        std: its standard deviation, > 0.
    """

    mean: float
    std: float

    def gradient(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns ``h x`` with a fresh h."""
        shape, scale = (self.mean / self.std) ** 2, self.std**2 / self.mean
        return torch._standard_gamma(torch.full_like(x, shape), generator=generator).mul_(scale).mul_(x)


@dataclass(frozen=True)
class Loss:
    """A user's function, differentiated by autograd.

    Attributes:
        function: takes x, (d,) or (p, d), and returns a loss, or one a row; draws nothing at random but from the
            generator that it gets as second argument.
    """

    function: Callable[[Tensor, torch.Generator], Tensor]

    def gradient(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the gradient of the sum of what the function returns: each row's own."""
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.function(point, generator).sum(), point)
        return gradient


def _subtract_noise(gradient: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    if noise:
        xi = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
        gradient.sub_(xi, alpha=noise)
    return gradient


class Vector:
    """A replica that is one tensor, ``value``; what is written may be broadcast to its shape."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def read(self, out: Tensor | None = None) -> Tensor:
        """Copies the vector into ``out`` (allocated when None) and returns it."""
        return self.value.clone() if out is None else out.copy_(self.value)

    def add_(self, update: Tensor, *, alpha: float = 1.0) -> None:
        """Adds ``alpha * update`` in place."""
        self.value.add_(update, alpha=alpha)

    def write_(self, value: Tensor) -> None:
        """Replaces the vector by ``value``."""
        self.value.copy_(value)


def _descent(
    objective: Objective, x: Tensor, lr: float | None, optimizer: OptimizerFactory | None, generator: torch.Generator
) -> Callable[[], None]:
    """Returns one step on ``objective`` that moves ``x``: plain SGD with rate ``lr``, or the optimizer's."""
    gradient = objective.gradient
    if lr is not None and optimizer is None:
        rate = -lr

        def descend() -> None:
            x.add_(gradient(x, generator), alpha=rate)

        return descend
    if optimizer is not None and lr is None:
        parameter = torch.nn.Parameter(x)  # shares its memory
        stepper = optimizer([parameter])

        def step() -> None:
            parameter.grad = gradient(x, generator)
            stepper.step()

        return step
    raise ValueError(f"lr={lr!r}, optimizer={optimizer!r}: give the one or the other")


# --- centers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Done:
    """An exchange that is over."""

    delta: Tensor

    def wait(self) -> Tensor:
        return self.delta


class _Handle:
    """A center as one replica reaches it."""

    def __init__(self, center: "SynchronousCenter | AsynchronousCenter", replica: int) -> None:
        self.num_replicas = center.num_replicas
        self._center = center
        self._replica = replica

    def pull(self) -> Snapshot:
        return self._center.pull(self._replica)

    def push(self, delta: Tensor, *, read_at: int) -> None:
        self._center.push(self._replica, delta, read_at)

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        snapshot = self.pull()
        delta(x, snapshot.value)
        self.push(x if scale == 1 else x * scale, read_at=snapshot.clock)
        return _Done(x)


class SynchronousCenter:
    """A center that adds the pushes of a round, one of each replica, as one sum when the round is complete.

    It is what an all-reduce does, which is launched by the push and completed by the next pull. What would hang there,
    or differ between replicas, raises ``RuntimeError`` here.

    Args:
        initial: (d,), copied.
        num_replicas: p.
        rule: what it does with a round's sum. Default: ``Addition``.

    Attributes:
        num_replicas: p.
        clock: additions so far; p a round.
        rule: the rule.
        handles: the center as each replica reaches it.
        pulls: how often each replica has pulled.
        pushed: the deltas of the last complete round, in the order of the replicas.
    """

    def __init__(self, initial: Tensor, num_replicas: int, rule: CenterRule | None = None) -> None:
        self.num_replicas = num_replicas
        self.clock = 0
        self.rule = Addition() if rule is None else rule
        self.handles: list[Center] = [_Handle(self, i) for i in range(num_replicas)]
        self.pulls = [0] * num_replicas
        self.pushed: list[Tensor] = []
        self._value = initial.clone()
        self._version = self._value._version
        self._memory = [torch.zeros_like(initial) for _ in range(self.rule.num_vectors)]
        self._round: dict[int, Tensor] = {}

    @property
    def value(self) -> Tensor:
        """(d,) the center after the last complete round. Not a copy."""
        _require_unwritten(self._value, self._version)
        return self._value

    def is_outstanding(self, replica: int) -> bool:
        """Returns whether the replica has pushed to a round that is not complete: a pull would wait for the others."""
        return replica in self._round

    def pull(self, replica: int) -> Snapshot:
        """Returns the center; refuses a replica whose push is outstanding."""
        value = self.value
        if replica in self._round:
            raise RuntimeError(f"replica {replica} pulls before all have pushed: it would wait for ever")
        self.pulls[replica] += 1
        return Snapshot(value, self.clock)

    def push(self, replica: int, delta: Tensor, read_at: int) -> None:
        """Adds to the round, and the round to the center when it is complete."""
        if replica in self._round:
            raise RuntimeError(f"replica {replica} pushes twice in one round")
        if read_at != self.clock:
            raise RuntimeError(f"replica {replica} read the center at {read_at}; it is at {self.clock}")
        value = self.value
        _require_like(delta, value)
        self._round[replica] = delta * self.rule.weight(self.clock - read_at)
        if len(self._round) == self.num_replicas:
            # Whoever pushed first, the sum is taken in the order of the replicas.
            self.pushed = [self._round[i] for i in range(self.num_replicas)]
            self.rule.apply_(value, torch.stack(self.pushed).sum(0), *self._memory)
            self._version = value._version
            self.clock += self.num_replicas
            self._round.clear()


class AsynchronousCenter:
    """A center that adds each push by itself, as it comes.

    Args:
        initial: (d,), copied.
        num_replicas: p.
        rule: what it does with a delta. Default: ``Addition``.

    Attributes:
        num_replicas: p.
        clock: additions so far.
        rule: the rule.
        handles: the center as each replica reaches it.
        staleness: of the last addition, in additions.
    """

    def __init__(self, initial: Tensor, num_replicas: int, rule: CenterRule | None = None) -> None:
        self.num_replicas = num_replicas
        self.clock = 0
        self.rule = Addition() if rule is None else rule
        self.handles: list[Center] = [_Handle(self, i) for i in range(num_replicas)]
        self.staleness = 0
        self._value = initial.clone()
        self._version = self._value._version
        self._memory = [torch.zeros_like(initial) for _ in range(self.rule.num_vectors)]

    @property
    def value(self) -> Tensor:
        """(d,) the center. Not a copy: it moves with the next addition."""
        _require_unwritten(self._value, self._version)
        return self._value

    def pull(self, replica: int) -> Snapshot:
        """Returns the center."""
        del replica
        return Snapshot(self.value, self.clock)

    def push(self, replica: int, delta: Tensor, read_at: int) -> None:
        """Adds ``delta`` to the center, with the weight that its staleness gets."""
        del replica
        value = self.value
        _require_like(delta, value)
        self.staleness = self.clock - read_at
        weight = self.rule.weight(self.staleness)
        self.rule.apply_(value, delta if weight == 1 else delta * weight, *self._memory)
        self._version = value._version
        self.clock += 1


def _require_unwritten(value: Tensor, version: int) -> None:
    if value._version != version:
        raise RuntimeError("somebody wrote to the center's value, which is only lent")


def _require_like(delta: Tensor, value: Tensor) -> None:
    if delta.shape != value.shape or delta.dtype != value.dtype:
        raise RuntimeError(
            f"a delta of {delta.dtype}, shape {tuple(delta.shape)}, was pushed to a center of {value.dtype}, shape "
            f"{tuple(value.shape)}"
        )


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        time: when, in virtual seconds.
        kind: "step": a replica made a step; where that reads the center, this is when the center answers. "add": a
            delta was added.
        replica: whose.
        clock: the center's, afterwards.
        staleness: of what was added, in additions; 0 for a step.
    """

    time: float
    kind: str
    replica: int
    clock: int
    staleness: int


_ADD, _STEP = 0, 1  # at the same time, what arrives is added before anyone reads; then in the replicas' order


class _Link:
    """A replica's way to the center: it sees to it that nothing is done out of time.

    A step is executed at the moment at which it reads the center. What it does before and after is its replica's own,
    so that nobody can tell when that was computed; but what it pushes after its local update must be added later.
    """

    def __init__(self, simulation: "Simulation", replica: int) -> None:
        self.num_replicas = len(simulation.replicas)
        self.deliveries: list[tuple[Tensor, int]] = []  # pushed after the local update of this step
        self.is_updated = False
        self.reads_late = False
        self._simulation, self._replica = simulation, replica
        self._handle = simulation.center.handles[replica]

    def pull(self) -> Snapshot:
        if self.is_updated and not self.reads_late:
            raise RuntimeError(
                f"replica {self._replica} reads the center after its local update; its algorithm must say so: "
                "reads_late"
            )
        return self._handle.pull()

    def push(self, delta: Tensor, *, read_at: int) -> None:
        if self.is_updated and not self.reads_late:
            self.deliveries.append((delta.clone(), read_at))
        else:
            self._simulation._add(self._replica, delta, read_at)

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        snapshot = self.pull()
        delta(x, snapshot.value)
        self.push(x if scale == 1 else x * scale, read_at=snapshot.clock)
        return _Done(x)


class Simulation:
    """Replicas that step in virtual time.

    A step takes its compute time. Over an asynchronous center a step that is due also takes a round trip, of two
    latencies, before it computes; a push arrives one latency later and holds nobody up; messages of one replica arrive
    in the order in which they were sent. Over a synchronous center a round is complete one latency after its last push,
    and who reads before that waits. One virtual order, whatever the host does: equal arguments give equal bits.

    Attributes:
        algorithms: one for each replica.
        replicas: the parameters of each, moved in place.
        center: the center.
        gate: who may begin an exchange; None where nobody waits.
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
            gate: over an asynchronous center, who may begin an exchange. Default: the algorithm's.
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
            SynchronousCenter(initial, p, rule) if synchronous else AsynchronousCenter(initial, p, rule)
        )
        self.gate = None if synchronous else algorithms[0].gate(p) if gate is None else gate
        self.time = 0.0
        self.clocks = [0] * p
        self.steps = [0] * p
        self._compute_time = _durations(compute_time, p, f"{seed}/compute")
        self._latency = _durations(latency, p, f"{seed}/latency")
        self._observe = observe
        self._links = [_Link(self, i) for i in range(p)]
        self._updates = [
            partial(_update, link, update) for link, update in zip(self._links, local_updates, strict=True)
        ]
        self._heap: list[tuple[float, int, int, int]] = []  # time, kind, replica, number of the entry
        self._entries = 0
        self._in_flight: dict[int, tuple[int, Tensor, int]] = {}  # by the number of the entry
        self._arrival = [0.0] * p  # of each replica's last message
        self._duration = [0.0] * p  # compute time of the step that is scheduled
        self._free_at = [0.0] * p
        self._left = [0.0] * p  # steps that may still begin
        self._idle = set(range(p))
        self._waiting: set[int] = set()  # at the gate, or for a round
        self._round_at = 0.0  # when the last round is complete for its replicas
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
            objective: what all descend, each with noise from a generator of its own.
            begin: (d,) where all begin, or (p, d), where each does. Copied.
            num_replicas: p.
            synchronous: which center.
            lr: the rate of plain SGD; or
            optimizer: called with the list of a replica's one parameter.
            center: (d,) the center's value. Default: replica 0's.
            rule: see the constructor, as for all that follow.
            gate: see there.
            compute_time: see there.
            latency: see there.
            seed: of the noise and of the times.
            start: see there.
            observe: see there.
        """
        replicas = [Vector(row.clone()) for row in begin.expand(num_replicas, begin.shape[-1])]
        steps = [
            _descent(objective, r.value, lr, optimizer, torch.Generator().manual_seed(seed * num_replicas + i))
            for i, r in enumerate(replicas)
        ]
        return cls(
            [copy.deepcopy(algorithm) for _ in replicas],
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
        for i in range(len(self.replicas)):
            self._left[i] = math.inf if num_steps is None else self._left[i] + num_steps
        for i in sorted(self._idle):
            self._schedule(i)
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.time, kind, replica, number = heapq.heappop(heap)
            if kind == _ADD:
                self._add(*self._in_flight.pop(number))
            else:
                self._step(replica)
        if until < math.inf:
            self.time = until
        elif self._waiting:
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
        away = self._idle - {replica for replica, _, _ in self._in_flight.values()}  # and all it has sent has come
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
        algorithm.step(self.replicas[i], link, self._updates[i])
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
        self._schedule(i)

    def _add(self, i: int, delta: Tensor, read_at: int) -> None:
        center, before = self.center, self.center.clock
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
        """Lets those go on who wait for what has come."""
        for i in sorted(self._waiting):
            if not self._must_wait(i):
                self._waiting.discard(i)
                self._put(max(self.time, self._round_at), _STEP, i)


def _update(link: _Link, local_update: Callable[[], None]) -> None:
    link.is_updated = True
    local_update()


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


# --- all at once ------------------------------------------------------------------------------------------------------


class LockStep:
    """All replicas over a synchronous center as one (p, d) tensor, with one algorithm object for all.

    For algorithms that treat every number of the vector alike, so that p rows are no different from a longer vector.
    Without noise the trajectory is that of ``Simulation(synchronous=True)`` to the last bit; the noise is drawn for all
    replicas at once and differs.

    Args:
        algorithm: the algorithm; used, not copied.
        objective: what all descend.
        begin: (d,) where all begin, or (p, d), where each does. Copied.
        num_replicas: p.
        lr: the rate of plain SGD; or
        optimizer: called with the list of one parameter, (p, d): an optimizer that treats every number alike.
        center: (d,) its value. Default: replica 0's.
        rule: what it does with a round's sum. Default: the algorithm's.
        seed: of the noise.
        start: whether to call the algorithm's ``start``, which refuses hyper-parameters that cannot work.

    Raises:
        ValueError: the algorithm needs an asynchronous center, or ``lr`` and ``optimizer`` are not one of the two.

    Attributes:
        algorithm: the algorithm.
        num_replicas: p.
        replicas: (p, d), moved in place.
        center: (d,), moved in place.
        clock: additions so far; p a round.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        objective: Objective,
        begin: Tensor,
        *,
        num_replicas: int,
        lr: float | None = None,
        optimizer: OptimizerFactory | None = None,
        center: Tensor | None = None,
        rule: CenterRule | None = None,
        seed: int = 0,
        start: bool = True,
    ) -> None:
        if algorithm.asynchronous_only:
            raise ValueError(f"LockStep(algorithm={algorithm!r}): must be one for a synchronous center")
        self.algorithm, self.num_replicas = algorithm, num_replicas
        self.replicas = begin.expand(num_replicas, begin.shape[-1]).clone()
        self.center = self.replicas[0].clone() if center is None else center.clone()
        self.clock = 0
        self.rule = algorithm.rule(num_replicas) if rule is None else rule
        self._memory = [torch.zeros_like(self.center) for _ in range(self.rule.num_vectors)]
        self._vector = Vector(self.replicas)
        self._update = _descent(objective, self.replicas, lr, optimizer, torch.Generator().manual_seed(seed))
        if start:
            algorithm.start(self._vector, self)

    @torch.no_grad()
    def run(self, num_steps: int, observe: Callable[[int], None] | None = None) -> None:
        """Goes on; may be called again.

        Args:
            num_steps: how many more steps each replica makes.
            observe: called after each, with the number of steps done in this call.
        """
        for t in range(num_steps):
            self.algorithm.step(self._vector, self, self._update)
            if observe is not None:
                observe(t + 1)

    def pull(self) -> Snapshot:
        """Returns the center, for the algorithm."""
        return Snapshot(self.center, self.clock)

    def push(self, delta: Tensor, *, read_at: int) -> None:
        """Adds all replicas' deltas, (p, d), as one sum."""
        weight = self.rule.weight(self.clock - read_at)
        self.rule.apply_(self.center, (delta * weight).sum(0), *self._memory)
        self.clock += self.num_replicas

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        """Pulls, computes and pushes for all replicas."""
        snapshot = self.pull()
        delta(x, snapshot.value)
        self.push(x if scale == 1 else x * scale, read_at=snapshot.clock)
        return _Done(x)

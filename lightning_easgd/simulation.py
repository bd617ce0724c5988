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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, Protocol

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

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the loss of which ``gradient`` is the gradient, given as the generator is now: a number, or (p,).

        Called only for algorithms that need it.
        """
        ...


class _Separable(ABC):
    """An objective that draws its noise first, by replica, and can then give many replicas' gradients at once.

    ``slope`` is elementwise, so that one row of many has the bits that it has alone.
    """

    @property
    @abstractmethod
    def is_noisy(self) -> bool:
        """Whether anything is drawn."""

    @abstractmethod
    def draw_(self, out: Tensor, generator: torch.Generator) -> None:
        """Fills ``out``, contiguous, with what a gradient needs; not called where nothing is drawn."""

    @abstractmethod
    def slope(self, x: Tensor, drawn: Tensor | None) -> Tensor:
        """Returns the gradient at ``x``, a new tensor of its shape, given what was drawn."""

    @abstractmethod
    def height(self, x: Tensor, drawn: Tensor | None) -> Tensor:
        """Returns the loss of each coordinate of ``x``, a new tensor of its shape, given what was drawn."""

    def gradient(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns a stochastic gradient at ``x``. See ``Objective``."""
        return self.slope(x, self._drawn(x, generator))

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the sum over the coordinates. See ``Objective``."""
        return self.height(x, self._drawn(x, generator)).sum(-1)

    def _drawn(self, x: Tensor, generator: torch.Generator) -> Tensor | None:
        if not self.is_noisy:
            return None
        drawn = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.draw_(drawn, generator)
        return drawn


class _NormalNoise(_Separable):
    """Gradients minus normal noise of standard deviation ``noise``."""

    noise: float

    @property
    def is_noisy(self) -> bool:
        return self.noise != 0

    def draw_(self, out: Tensor, generator: torch.Generator) -> None:
        out.normal_(generator=generator)

    def slope(self, x: Tensor, drawn: Tensor | None) -> Tensor:
        exact = self.exact(x)
        return exact if drawn is None else exact.sub_(drawn, alpha=self.noise)

    def height(self, x: Tensor, drawn: Tensor | None) -> Tensor:
        exact = self.exact_height(x)
        return exact if drawn is None else exact.sub_(drawn * x, alpha=self.noise)

    @abstractmethod
    def exact(self, x: Tensor) -> Tensor:
        """Returns the gradient without noise, a new tensor."""

    @abstractmethod
    def exact_height(self, x: Tensor) -> Tensor:
        """Returns the loss of each coordinate without noise, a new tensor."""


@dataclass(frozen=True)
class Quadratic(_NormalNoise):
    """``curvature x^2 / 2`` in each coordinate; its gradient with normal noise of standard deviation ``noise``.

    Attributes:
        curvature: h; a number, or (d,).
        noise: sigma, >= 0.
    """

    curvature: float | Tensor = 1.0
    noise: float = 0.0

    def exact(self, x: Tensor) -> Tensor:
        """Returns ``curvature x``."""
        return x * self.curvature

    def exact_height(self, x: Tensor) -> Tensor:
        """Returns ``curvature x^2 / 2``."""
        return x * x * self.curvature / 2


@dataclass(frozen=True)
class DoubleWell(_NormalNoise):
    """``(x^2 - 1)^2 / 4`` in each coordinate: minima at -1 and 1. Noise as in ``Quadratic``."""

    noise: float = 0.0

    def exact(self, x: Tensor) -> Tensor:
        """Returns ``x^3 - x``."""
        return x * x * x - x

    def exact_height(self, x: Tensor) -> Tensor:
        """Returns ``(x^2 - 1)^2 / 4``."""
        return (x * x - 1) ** 2 / 4


@dataclass(frozen=True)
class MultiplicativeNoise(_Separable):
    """A quadratic whose curvature is drawn anew for each gradient and coordinate, Gamma-distributed.

    Attributes:
        mean: of the curvature, > 0.
        std: its standard deviation, > 0.
    """

    mean: float
    std: float

    @property
    def is_noisy(self) -> bool:
        """Returns that it is."""
        return True

    def draw_(self, out: Tensor, generator: torch.Generator) -> None:
        """Draws the curvatures."""
        shape, scale = (self.mean / self.std) ** 2, self.std**2 / self.mean
        torch.mul(torch._standard_gamma(out.fill_(shape), generator=generator), scale, out=out)

    def slope(self, x: Tensor, drawn: Tensor | None) -> Tensor:
        """Returns ``h x``."""
        assert drawn is not None
        return drawn * x

    def height(self, x: Tensor, drawn: Tensor | None) -> Tensor:
        """Returns ``h x^2 / 2``."""
        assert drawn is not None
        return drawn * x * x / 2


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

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns what the function does."""
        return self.function(x, generator)


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
    algorithm: Algorithm,
    objective: Objective,
    x: Tensor,
    lr: float | None,
    optimizer: OptimizerFactory | None,
    generator: torch.Generator,
) -> Callable[[], None]:
    """Returns one local update that moves ``x``: plain SGD with rate ``lr``, or the optimizer's.

    The algorithm's proximal term joins the gradient, and the algorithm is bound to the optimizer. Where it needs the
    loss it hears of that which is differentiated.
    """
    proximal_term = algorithm.proximal_term
    twin = torch.Generator()

    def gradient() -> Tensor:
        if algorithm.needs_loss:
            twin.set_state(generator.get_state())  # the gradient is to draw the same
            algorithm.observe_loss(objective.loss(x, twin))
        slope, term = objective.gradient(x, generator), proximal_term()
        return slope if term is None else slope.add(x - term.anchor, alpha=term.stiffness)

    if lr is not None and optimizer is None:
        rate = -lr

        def descend() -> None:
            x.add_(gradient(), alpha=rate)

        return descend
    if optimizer is not None and lr is None:
        parameter = torch.nn.Parameter(x)  # shares its memory
        stepper = optimizer([parameter])
        algorithm.bind(stepper, [parameter])

        def step() -> None:
            parameter.grad = gradient()
            stepper.step()

        return step
    raise ValueError(f"lr={lr!r}, optimizer={optimizer!r}: give the one or the other")


_ROWS_A_ROUND = 4  # from here on a step of many rows at once costs less than one by one
_LARGEST_ROW = 256  # in numbers; beyond it is memory and not the number of operations that costs


class _Rows:
    """Replicas as rows of one tensor, whose steps of plain SGD are put off until somebody looks at them.

    Then the steps of all are made together. Nobody can tell: a step reads nothing but its own row and its replica's own
    generator, and is elementwise.

    Args:
        algorithms: the replicas', for their proximal terms.
        objective: what all descend.
        values: (p, d), moved in place.
        lr: the rate.
        generators: one for each replica.
    """

    def __init__(
        self,
        algorithms: Sequence[Algorithm],
        objective: _Separable,
        values: Tensor,
        lr: float,
        generators: Sequence[torch.Generator],
    ) -> None:
        self._values, self._rows = values, list(values.unbind())
        self._drawn = torch.empty_like(values) if objective.is_noisy else None
        self._drawn_rows = [] if self._drawn is None else list(self._drawn.unbind())
        self._objective, self._rate, self._generators = objective, -lr, generators
        self._proximal_terms = [algorithm.proximal_term for algorithm in algorithms]
        self._owed: dict[int, int] = {}  # steps that were put off, by replica
        self._total = 0
        self._most = 0  # at least as many as any replica's

    def step(self, i: int) -> None:
        """Makes a step, or puts it off."""
        term = self._proximal_terms[i]()
        if term is not None:
            x = self.settled(i)
            slope = self._objective.gradient(x, self._generators[i])
            x.add_(slope.add(x - term.anchor, alpha=term.stiffness), alpha=self._rate)
            return
        self._owed[i] = owed = self._owed.get(i, 0) + 1
        self._total += 1
        if owed > self._most:
            self._most = owed

    def settled(self, i: int) -> Tensor:
        """Returns (d,), the replica's row with all its steps made."""
        x, owed = self._rows[i], self._owed.get(i, 0)
        if not owed:
            return x
        # All rows cost as many rounds of operations as the most that one owes, this one by itself what it owes.
        if self._total * owed >= _ROWS_A_ROUND * self._most**2:
            self._settle_all()
            return x
        del self._owed[i]
        self._total -= owed
        for _ in range(owed):
            x.add_(self._objective.gradient(x, self._generators[i]), alpha=self._rate)
        return x

    def _settle_all(self) -> None:
        order = sorted(self._owed, key=self._owed.__getitem__, reverse=True)
        index = torch.tensor(order)
        x, drawn = self._values[index], None
        num_rows = len(order)
        for t in range(self._owed[order[0]]):
            while self._owed[order[num_rows - 1]] <= t:
                num_rows -= 1
            rows = x[:num_rows]
            if self._drawn is not None:
                for i, out in zip(order[:num_rows], self._drawn_rows, strict=False):
                    self._objective.draw_(out, self._generators[i])
                drawn = self._drawn[:num_rows]
            rows.add_(self._objective.slope(rows, drawn), alpha=self._rate)
        self._values[index] = x
        self._owed.clear()
        self._total = self._most = 0


class _Row:
    """A replica that is one of ``_Rows``."""

    def __init__(self, rows: _Rows, replica: int) -> None:
        self._settled = partial(rows.settled, replica)

    @property
    def value(self) -> Tensor:
        """(d,) the vector as it is now."""
        return self._settled()

    def read(self, out: Tensor | None = None) -> Tensor:
        """Copies the vector into ``out`` (allocated when None) and returns it."""
        return self._settled().clone() if out is None else out.copy_(self._settled())

    def add_(self, update: Tensor, *, alpha: float = 1.0) -> None:
        """Adds ``alpha * update`` in place."""
        self._settled().add_(update, alpha=alpha)

    def write_(self, value: Tensor) -> None:
        """Replaces the vector by ``value``."""
        self._settled().copy_(value)


# --- centers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Done:
    """An exchange that is over."""

    delta: Tensor

    def wait(self) -> Tensor:
        return self.delta

    def done(self) -> None:
        pass


class _Handle:
    """A center as one replica reaches it."""

    def __init__(self, center: "SynchronousCenter | AsynchronousCenter", replica: int) -> None:
        self.num_replicas = center.num_replicas
        self.replica = replica
        self._center = center
        self._scratch: Tensor | None = None

    def tell(self, numbers: Sequence[float] | Tensor) -> None:
        self._center.tell(self.replica, numbers)

    def told(self) -> Tensor:
        return self._center.told()

    def pull(self) -> Snapshot:
        return self._center.pull(self.replica)

    def push(self, delta: Tensor, *, read_at: int) -> None:
        self._center.push(self.replica, delta, read_at)

    def borrow(self) -> Tensor:
        if self._scratch is None:
            self._scratch = torch.empty_like(self._center.value)
        return self._scratch

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
        num_told: how many numbers each replica tells the others with a push.

    Attributes:
        num_replicas: p.
        clock: additions so far; p a round.
        rule: the rule.
        handles: the center as each replica reaches it.
        pulls: how often each replica has pulled.
        pushed: the deltas of the last complete round, in the order of the replicas.
    """

    def __init__(self, initial: Tensor, num_replicas: int, rule: CenterRule | None = None, num_told: int = 0) -> None:
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
        self._next_rows, self._sent, self._told = ([(0.0,) * num_told] * num_replicas for _ in range(3))

    @property
    def value(self) -> Tensor:
        """(d,) the center after the last complete round. Not a copy."""
        _require_unwritten(self._value, self._version)
        return self._value

    def is_outstanding(self, replica: int) -> bool:
        """Returns whether the replica has pushed to a round that is not complete: a pull would wait for the others."""
        return replica in self._round

    def tell(self, replica: int, numbers: Sequence[float] | Tensor) -> None:
        """Sets what the replica tells the others with its next push, and from then on."""
        self._next_rows[replica] = tuple(float(number) for number in numbers)

    def told(self) -> Tensor:
        """Returns (num_replicas, num_told), what was told in the last complete round."""
        return torch.tensor(self._told, dtype=self._value.dtype)

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
        self._sent[replica] = self._next_rows[replica]
        if len(self._round) == self.num_replicas:
            # Whoever pushed first, the sum is taken in the order of the replicas.
            self.pushed = [self._round[i] for i in range(self.num_replicas)]
            self.rule.apply_(value, torch.stack(self.pushed).sum(0), *self._memory)
            self._version = value._version
            self._told = list(self._sent)
            self.clock += self.num_replicas
            self._round.clear()


class AsynchronousCenter:
    """A center that adds each push by itself, as it comes.

    Args:
        initial: (d,), copied.
        num_replicas: p.
        rule: what it does with a delta. Default: ``Addition``.
        num_told: how many numbers each replica tells the others with a push.

    Attributes:
        num_replicas: p.
        clock: additions so far.
        rule: the rule.
        handles: the center as each replica reaches it.
        staleness: of the last addition, in additions.
    """

    def __init__(self, initial: Tensor, num_replicas: int, rule: CenterRule | None = None, num_told: int = 0) -> None:
        self.num_replicas = num_replicas
        self.clock = 0
        self.rule = Addition() if rule is None else rule
        self.handles: list[Center] = [_Handle(self, i) for i in range(num_replicas)]
        self.staleness = 0
        self._value = initial.clone()
        self._version = self._value._version
        self._memory = [torch.zeros_like(initial) for _ in range(self.rule.num_vectors)]
        self._next_rows, self._told = ([(0.0,) * num_told] * num_replicas for _ in range(2))

    @property
    def value(self) -> Tensor:
        """(d,) the center. Not a copy: it moves with the next addition."""
        _require_unwritten(self._value, self._version)
        return self._value

    def tell(self, replica: int, numbers: Sequence[float] | Tensor) -> None:
        """Sets what the replica tells the others with its next push, and from then on."""
        self._next_rows[replica] = tuple(float(number) for number in numbers)

    def told(self) -> Tensor:
        """Returns (num_replicas, num_told), what each has told with its last push."""
        return torch.tensor(self._told, dtype=self._value.dtype)

    def pull(self, replica: int) -> Snapshot:
        """Returns the center."""
        del replica
        return Snapshot(self.value, self.clock)

    def push(self, replica: int, delta: Tensor, read_at: int) -> None:
        """Adds ``delta`` to the center, with the weight that its staleness gets."""
        value = self.value
        _require_like(delta, value)
        self.staleness = self.clock - read_at
        weight = self.rule.weight(self.staleness)
        self.rule.apply_(value, delta if weight == 1 else delta * weight, *self._memory)
        self._version = value._version
        self._told[replica] = self._next_rows[replica]
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
            objective: what all descend, each with noise from a generator of its own.
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
            and isinstance(objective, _Separable)
            and not algorithm.needs_loss  # of each step, when it is made
            and len(values[0]) <= _LARGEST_ROW
        ):
            rows = _Rows(algorithms, objective, values, lr, generators)
            replicas = [_Row(rows, i) for i in range(num_replicas)]
            steps = [partial(rows.step, i) for i in range(num_replicas)]
        else:
            replicas = [Vector(row) for row in values]
            steps = [
                _descent(a, objective, row, lr, optimizer, generator)
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
        """Lets those go on who wait for what has come."""
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
        optimizer: called with the list of one parameter, (p, d): an optimizer that treats every number alike. The
            algorithm is bound to it.
        center: (d,) its value. Default: replica 0's.
        rule: what it does with a round's sum. Default: the algorithm's.
        seed: of the noise.
        start: whether to call the algorithm's ``start``, which refuses hyper-parameters that cannot work.

    Raises:
        ValueError: the algorithm needs an asynchronous center, or tells replicas apart; or ``lr`` and ``optimizer`` are
            not one of the two.

    Attributes:
        algorithm: the algorithm.
        num_replicas: p.
        replica: 0; to the algorithm all replicas are one.
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
        if algorithm.num_told or algorithm.needs_loss:
            raise ValueError(f"LockStep(algorithm={algorithm!r}): it tells replicas apart; take Simulation")
        self.algorithm, self.num_replicas, self.replica = algorithm, num_replicas, 0
        self.replicas = begin.expand(num_replicas, begin.shape[-1]).clone()
        self.center = self.replicas[0].clone() if center is None else center.clone()
        self.clock = 0
        self.rule = algorithm.rule(num_replicas) if rule is None else rule
        self._memory = [torch.zeros_like(self.center) for _ in range(self.rule.num_vectors)]
        self._scratch: Tensor | None = None
        self._vector = Vector(self.replicas)
        generator = torch.Generator().manual_seed(seed)
        self._update = _descent(algorithm, objective, self.replicas, lr, optimizer, generator)
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

    def tell(self, numbers: Sequence[float] | Tensor) -> None:
        """Takes the no numbers of an algorithm that tells nothing."""
        del numbers

    def told(self) -> Tensor:
        """Returns (num_replicas, 0)."""
        return self.center.new_zeros(self.num_replicas, 0)

    def pull(self) -> Snapshot:
        """Returns the center, for the algorithm."""
        return Snapshot(self.center, self.clock)

    def push(self, delta: Tensor, *, read_at: int) -> None:
        """Adds all replicas' deltas, (p, d), as one sum."""
        weight = self.rule.weight(self.clock - read_at)
        self.rule.apply_(self.center, (delta * weight).sum(0), *self._memory)
        self.clock += self.num_replicas

    def borrow(self) -> Tensor:
        """Lends (p, d) memory, for the algorithm."""
        if self._scratch is None:
            self._scratch = torch.empty_like(self.replicas)
        return self._scratch

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        """Pulls, computes and pushes for all replicas."""
        snapshot = self.pull()
        delta(x, snapshot.value)
        self.push(x if scale == 1 else x * scale, read_at=snapshot.clock)
        return _Done(x)

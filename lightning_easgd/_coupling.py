"""One optimizer's parameters tied to one center: the flat vector, the algorithm and its clock, and what it reports."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_easgd.algorithms import Algorithm, Exchange, Snapshot
from lightning_easgd.averages import CenterAverage
from lightning_easgd.communication import NonFiniteDeltaError, OpenCenter
from lightning_easgd.communication._line import Line
from lightning_easgd.flatten import ParameterVector

__all__ = ["Coupling", "Passage", "Report", "num_slots", "settle_in_line"]

# The slots of an exchange: three votes, then the figures of each replica's report, in FIGURES' order.
STOP, DONE, END = 0, 1, 2
_PART = 1 << 24  # numbers of a vector on a device that are measured at a time
_VOTES = 3
# Those from the second on stay on a device until an exchange has brought them to all: the host does not wait for them.
_LATE = ("distance", "force", "update", "center_norm")
FIGURES = (
    "present",
    "distance",
    "force",
    "update",
    "center_norm",
    "exposed_s",
    "hidden_s",
    "wait_s",
    "gate_s",
    "staleness",
    "drift",
)


def num_slots(num_replicas: int, num_told: int = 0) -> int:
    """Returns how many slots an exchange carries: votes, figures, and what the algorithm tells the other replicas."""
    return _VOTES + num_replicas * (len(FIGURES) + num_told)


@dataclass(frozen=True)
class Report:
    """What the coupling did in one exchange: n figures of each kind, one for each replica that was still training.

    Over an asynchronous center the figures of the other replicas are the last that each has announced.

    Attributes:
        exchange: number of the exchange, counted from 1.
        at: what the caller of ``Coupling.step`` said of the moment: this process's count of training steps.
        distance: (n,) ||x^i - c|| before the exchange.
        force: (n,) norm of the delta that each replica pushed.
        update: (n,) norm of the local update of the step that exchanged.
        exposed_s: (n,) seconds each replica has stood still for communication since the start.
        hidden_s: (n,) seconds of communication behind compute since the start.
        wait_s: (n,) seconds of both spent waiting for a lock or a server.
        gate_s: (n,) seconds spent at the gate since the start.
        staleness: (n,) additions that the center saw between a delta's reading and its addition.
        drift: (n,) distance that the center moved meanwhile.
        center_norm: ||c||.
        bytes_sent: bytes that this replica has sent since the start.
        clock: additions that the center has seen.
        additions_per_s: additions a second since this replica's report before.
    """

    exchange: int
    at: int
    distance: Tensor
    force: Tensor
    update: Tensor
    exposed_s: Tensor
    hidden_s: Tensor
    wait_s: Tensor
    gate_s: Tensor
    staleness: Tensor
    drift: Tensor
    center_norm: float
    bytes_sent: int
    clock: int
    additions_per_s: float


class Passage(Protocol):
    """A replica's way through a gate: one turnstile, or several that stand for one. See ``Turnstile``."""

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting so far."""
        ...

    def enter(self) -> None:
        """Returns when the gate admits this replica's next exchange. Blocks for other replicas."""
        ...

    def has_read(self) -> None:
        """Says that this replica has read the center for that exchange. Does not wait."""
        ...

    def enter_addition(self) -> None:
        """Returns when it may add to the center, after ``has_read``. Blocks for other replicas."""
        ...

    def advance(self) -> None:
        """Says that this replica has completed an exchange. Does not wait."""
        ...

    def leave(self) -> None:
        """Says that nobody is to wait for this replica until the next round. Does not wait."""
        ...

    def begin_round(self, number: int) -> None:
        """Sets all clocks to zero. Every replica calls it alike; local."""
        ...


class Coupling:
    """A replica's side of one center.

    Args:
        names: the parameters' names, in the vector's order.
        vector: the parameters.
        algorithm: this coupling's own copy.
        center: open; closed by ``close``.
        average: of the center over time, which then stands for it in evaluations; None for the center itself.

    Attributes:
        stop: whether this replica asks all to stop at once, from its next exchange on.
        end: whether it asks all to end training after this epoch, likewise; its next exchange may be a meeting's.
        ended: whether some replica has asked for it, as of the last completed exchange.
        report_every: make a report every so many exchanges; 0 for never.
        reports: the last complete reports, oldest first.
        turnstile: what lets this replica exchange when its gate does; None where nobody waits.
    """

    def __init__(
        self,
        names: list[str],
        vector: ParameterVector,
        algorithm: Algorithm,
        center: OpenCenter,
        average: CenterAverage | None = None,
    ) -> None:
        self.names, self.vector, self.algorithm, self.center = names, vector, algorithm, center
        self.average = average
        self.turnstile: Passage | None = None
        self.stop = self.end = self.ended = False
        self.report_every = 0
        self.reports: deque[Report] = deque(maxlen=256)
        self._at = 0
        self._measured: dict[str, Any] | None = None  # this replica's figures, not yet announced
        self._announced: dict[str, Any] | None = None  # those that are in the slots now
        self._recover: Callable[[], None] | None = None  # as the last step was told
        self._last_seen = (0, time.monotonic())  # the center's clock at this replica's last measurement, and when
        self._snapshot: Snapshot | None = None  # what the algorithm pulled last, maybe some steps ago
        self._stash: list[Tensor] | None = None
        self._holds_center = False
        self._has_entered = False  # the next step's exchange, through the turnstile
        algorithm.start(vector, _ObservedCenter(self))
        self._follow_center()

    def rebind(self, names: list[str], vector: ParameterVector, center: OpenCenter, value: Tensor) -> None:
        """Goes on with other parameters and their own center, of value ``value`` (d,). Nothing may be outstanding.

        An average goes on with what it has of the parameters that stay; those that join begin at their center.
        """
        if self.average is not None:
            before = dict(zip(self.names, self.vector.views(self.average.value), strict=True))
            whole = value.to(self.average.value.dtype, copy=True)
            for name, view in zip(names, vector.views(whole), strict=True):
                if name in before:
                    view.copy_(before[name])
            self.average.load_state_dict({**self.average.state_dict(), "value": whole})
        center.load_state_dict(self.center.state_dict(), value)
        self.center.close()
        self.names, self.vector, self.center = names, vector, center
        self.algorithm.start(vector, _ObservedCenter(self))

    # --- training ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Does what the next step begins with, before its forward pass; see ``Algorithm.begin``. Blocks for the gate.

        Nobody has to call it, since ``step`` does what was not done. Once called it has no effect until that step.
        """
        passes = self.turnstile is not None and self.algorithm.is_due and not self._has_entered
        if self.turnstile is not None and passes:
            self.turnstile.enter()
            self._has_entered = True
        self.algorithm.begin(self.vector, _ObservedCenter(self))
        if self.turnstile is not None and passes:
            self.turnstile.has_read()

    def step(self, local_update: Callable[[], None], *, recover: Callable[[], None] | None, at: int = 0) -> None:
        """Performs one iteration of the algorithm.

        Args:
            local_update: the optimizer's step; called exactly once.
            recover: called when this replica's delta is not finite, after the replica was put on the center; None to
                let ``NonFiniteDeltaError`` through instead.
            at: what a report of this step is marked with.
        """
        self._at, self._recover = at, recover
        is_ending = self.algorithm.is_ending
        self.begin()
        called = False

        def update() -> None:
            nonlocal called
            called = True
            if observed.measured is not None:
                before = self.vector.read()
                local_update()
                if self.measures_late:
                    observed.measured["update"] = self.vector.distance_on_device(before)
                else:
                    observed.measured["update"] = self.vector.distance(before)
            else:
                local_update()
            if self.turnstile is not None and is_ending:
                self.turnstile.enter_addition()

        observed = _ObservedCenter(self)
        try:
            self.algorithm.step(self.vector, observed, update)
        except NonFiniteDeltaError:
            if recover is None:
                raise
            observed.measured = None
            self._start_again(recover, abstain=True)
            if self.measures_late:  # gradients that are there were taken at weights that a device has found late
                for parameter in self.vector.parameters:
                    if parameter.grad is not None:
                        parameter.grad.zero_()
            if not called:
                local_update()
            self.algorithm.clock += 1
        if observed.measured is not None:
            self._measured = {**observed.measured, **self._costs(at)}
        if self.average is not None and is_ending and not self.center.synchronous:
            self.center.pull()  # which an exchange alone does not
            self._follow_center()
        self._has_entered = False
        if self.turnstile is not None and is_ending:
            self.turnstile.advance()

    def add_force(self) -> None:
        """Adds the force of the algorithm's proximal term, if it has one, to the parameters' gradients."""
        term = self.algorithm.proximal_term()
        if term is not None and term.stiffness != 0:
            self.vector.add_proximal_gradient(term.stiffness, term.anchor)

    def _start_again(self, recover: Callable[[], None], *, abstain: bool) -> None:
        """Puts the replica on the center after its delta was refused."""
        self._measured = None
        self.vector.write_(self.center.pull().value)
        self.center.announcement[num_slots(self.center.num_replicas) :].zero_()
        if abstain:
            self.center.abstain()
        recover()
        self.algorithm.start(self.vector, _ObservedCenter(self))

    @property
    def measures_late(self) -> bool:
        """Whether figures stay on the device until an exchange has brought them to all replicas."""
        return self.center.synchronous and self.vector.device.type == "cuda"

    def _costs(self, at: int) -> dict[str, float]:
        traffic, now = self.center.traffic, time.monotonic()
        before, then = self._last_seen
        self._last_seen = self.center.clock, now
        return {
            **vars(traffic),
            "exchange": traffic.exchanges,
            "at": at,
            "present": 1.0,
            "gate_s": 0.0 if self.turnstile is None else self.turnstile.waited_s,
            "clock": self.center.clock,
            "additions_per_s": max(0, self.center.clock - before) / max(now - then, 1e-9),
        }

    def abstain(self) -> None:
        """Takes part in one exchange without adding anything, saying that this replica is done. Blocks for it."""
        self.begin_abstention()
        self.drain()

    def begin_abstention(self) -> None:
        """Begins what ``abstain`` does; the next ``drain`` completes it. Blocks for an outstanding exchange.

        Raises:
            NonFiniteDeltaError: a device has found this replica's last delta not to be finite, and the last step was
                not told how to recover.
        """
        self.drain()
        self._announce(done=True)
        try:
            self.center.abstain()
        except NonFiniteDeltaError:
            if self._recover is None:
                raise
            self._start_again(self._recover, abstain=True)

    def reset(self) -> None:
        """Puts the replica on the center, where the algorithm starts anew. Blocks for an outstanding exchange."""
        self.refresh()
        self.vector.write_(self.center.value)
        self.algorithm.start(self.vector, _ObservedCenter(self))

    def drain(self, timeout: timedelta | None = None) -> None:
        """Completes an outstanding exchange. Blocks, but asks nothing of the others that they have not done already."""
        self.center.drain(timeout)
        self._receive()

    def refresh(self) -> None:
        """Reads the center anew, after what is outstanding. Blocks for it; over an asynchronous one not for peers."""
        self.center.pull()
        self._receive()

    @property
    def turn(self) -> int:
        """Number of the next exchange. A synchronous center's clock counts it, since who abstains pushes less often."""
        center = self.center
        return center.clock // center.num_replicas if center.synchronous else center.traffic.exchanges

    def _follow_center(self) -> None:
        if self.average is not None:
            self.average.update(self.center.value, self.center.additions)

    def _complete_last(self) -> None:
        if self.center.synchronous:
            self.center.drain()
        self._receive()

    @property
    def is_apart(self) -> bool:
        """Whether the replica is anywhere else than the center as of the last completed exchange."""
        return self.vector.distance(self.center.value) > 0

    @property
    def stop_votes(self) -> int:
        """How many replicas asked to stop, as of the last completed exchange."""
        return int(self.center.announced[STOP])

    @property
    def all_done(self) -> bool:
        """Whether every replica said in the last completed exchange that it is done."""
        return int(self.center.announced[DONE]) == self.center.num_replicas

    # --- reports ----------------------------------------------------------------------------------------------------

    def _announce(self, *, done: bool) -> None:
        """Puts this replica's votes and last figures into the slots of the exchange that is about to be sent."""
        self.center.announcement[STOP] = float(self.stop)
        self.center.announcement[DONE] = float(done)
        self.center.announcement[END] = float(self.end)
        if self.center.synchronous:  # elsewhere the last figures stand until there are newer ones
            self.center.announcement[_VOTES : num_slots(self.center.num_replicas)].zero_()
        measured, self._measured = self._measured, None
        self._announced = measured
        if measured is not None:
            first = _VOTES + self.center.replica * len(FIGURES)
            self.center.announcement[first : first + len(FIGURES)] = _row(measured)
            late = [measured.get(figure) for figure in _LATE]
            if any(isinstance(figure, Tensor) for figure in late):
                numbers = [f if isinstance(f, Tensor) else torch.zeros((), device=self.vector.device) for f in late]
                self.center.announce_late(first + 1, torch.stack([n.to(self.center.announced.dtype) for n in numbers]))

    def _receive(self) -> None:
        """Reads the figures of all replicas from the exchange that was just completed."""
        self._follow_center()
        self.ended = self.ended or int(self.center.announced[END]) > 0
        announced, self._announced = self._announced, None
        if announced is None:
            return
        n = self.center.num_replicas
        figures = self.center.announced[_VOTES : num_slots(n)].view(n, len(FIGURES)).clone()
        if not self.center.synchronous:  # whose slots may have been read before this replica's were written
            figures[self.center.replica] = _row(announced)
        present = figures[:, 0] > 0
        own = {name: figures[present, i] for i, name in enumerate(FIGURES) if name not in ("present", "center_norm")}
        center_norm = announced["center_norm"]
        if isinstance(center_norm, Tensor):
            center_norm = float(figures[self.center.replica, FIGURES.index("center_norm")])
        self.reports.append(
            Report(
                exchange=int(announced["exchange"]),
                at=int(announced["at"]),
                center_norm=center_norm,
                bytes_sent=int(announced["bytes_sent"]),
                clock=int(announced["clock"]),
                additions_per_s=announced["additions_per_s"],
                **own,
            )
        )

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns CPU copies of what is private to this replica, and the center. Nothing may be outstanding."""
        parameters, center = self.vector.parameters, self.center.value
        if self._holds_center and self._stash is None:  # the two have changed places
            parameters = self.vector.views(center)
            center = ParameterVector(self.vector.parameters, self.vector.dtype, self.vector.device).read()
        elif self._holds_center and self._stash is not None:
            parameters = self._stash
        return {
            "names": self.names,
            "parameters": [_copied(p) for p in parameters],
            "remainder": None if self.vector.remainder is None else _copied(self.vector.remainder),
            "center": _copied(center),
            "center_state": self.center.state_dict(),
            "algorithm": self.algorithm.state_dict(),
            "told": self.center.announced[num_slots(self.center.num_replicas) :].clone(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned, to the last bit.

        Raises:
            ValueError: it belongs to other parameters.
        """
        shapes = [tuple(p.shape) for p in self.vector.parameters]
        if state["names"] != self.names or [tuple(p.shape) for p in state["parameters"]] != shapes:
            raise ValueError(
                f"the checkpoint's replica couples {len(state['names'])} parameters, this module {len(self.names)}, "
                "and their names or shapes differ: it was written by another module or with other optimizers"
            )
        for parameter, value in zip(self.vector.parameters, state["parameters"], strict=True):
            parameter.copy_(value)
        remainder = state["remainder"]
        self.vector.remainder = None if remainder is None else remainder.to(self.vector.device)
        self.center.load_state_dict(state["center_state"], state["center"])
        self.algorithm.load_state_dict(_on(self.vector.device, state["algorithm"]))
        self.center.announced[num_slots(self.center.num_replicas) :].copy_(state["told"])
        if self.algorithm.num_told:  # once more in every exchange: the next may be one without a step, at an evaluation
            told = state["told"].view(self.center.num_replicas, self.algorithm.num_told)
            _ObservedCenter(self).tell(told[self.center.replica].tolist())
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(_on(self.vector.device, state["average"]))

    # --- weights ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the parameters' content with the center's; a second call puts both back to the last bit.

        Where there is an average, it is what the parameters get, and the replica is set aside. Where the parameters
        have the center's dtype the two change places, so that no further memory is needed (the center's own vector is
        the replica's meanwhile); else the replica is set aside.
        """
        if self._holds_center:
            if self._stash is None:
                self._trade()
            else:
                torch._foreach_copy_(self._contents, self._stash)
                self._stash = None
        elif self.average is None and all(p.dtype == self.vector.dtype for p in self.vector.parameters):
            self._trade()
        else:
            shown = self.center.value if self.average is None else self.average.value.to(self.vector.device)
            self._stash = [p.detach().clone() for p in self.vector.parameters]
            torch._foreach_copy_(self._contents, self.vector.views(shown))
        self._holds_center = not self._holds_center

    @property
    def _contents(self) -> list[Tensor]:
        """The parameters' memory: a backward pass that is yet to come does not mind that it was changed meanwhile."""
        return [p.data for p in self.vector.parameters]

    def _trade(self) -> None:
        for p, c in zip(self._contents, self.vector.views(self.center.value), strict=True):
            kept = p.clone()
            p.copy_(c)
            c.copy_(kept)


class _ObservedCenter:
    """The center as the algorithm sees it, with what the glue adds to an exchange: votes and figures."""

    def __init__(self, coupling: Coupling) -> None:
        self._coupling = coupling
        self.num_replicas = coupling.center.num_replicas
        self.replica = coupling.center.replica
        self.measured: dict[str, Any] | None = None

    def tell(self, numbers: Sequence[float] | Tensor) -> None:
        center, size = self._coupling.center, self._coupling.algorithm.num_told
        first = num_slots(self.num_replicas) + self.replica * size
        if isinstance(numbers, Tensor):
            center.announce_late(first, numbers.to(center.announcement.dtype))
        else:
            center.announcement[first : first + size] = torch.tensor(numbers, dtype=center.announcement.dtype)

    def told(self) -> Tensor:
        told = self._coupling.center.announced[num_slots(self.num_replicas) :]
        return told.view(self.num_replicas, self._coupling.algorithm.num_told).clone()

    @property
    def _is_wanted(self) -> bool:
        coupling = self._coupling
        return coupling.report_every > 0 and coupling.turn % coupling.report_every == 0

    def pull(self) -> Snapshot:
        snapshot = self._coupling._snapshot = self._coupling.center.pull()
        self._coupling._receive()
        return snapshot

    def push(self, delta: Tensor, *, read_at: int) -> None:
        coupling, snapshot = self._coupling, self._coupling._snapshot
        if self._is_wanted and snapshot is not None and coupling.measures_late:
            self.measured = {
                "distance": coupling.vector.distance_on_device(snapshot.value),
                "force": _square(delta) ** 0.5,
                "center_norm": _square(snapshot.value) ** 0.5,
            }
        elif self._is_wanted and snapshot is not None:
            self.measured = {
                "distance": coupling.vector.distance(snapshot.value),
                "force": float(torch.linalg.vector_norm(delta)),
                "center_norm": float(torch.linalg.vector_norm(snapshot.value)),
            }
        coupling.center.measures_drift = self.measured is not None
        coupling._announce(done=False)
        coupling.center.push(delta, read_at=read_at)

    def borrow(self) -> Tensor:
        self._coupling._complete_last()
        return self._coupling.center.borrow()

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        coupling = self._coupling
        coupling._complete_last()
        if not self._is_wanted:
            coupling.center.measures_drift = False
            coupling._announce(done=False)
            return coupling.center.exchange(x, delta, scale=scale)
        squares: dict[str, Any] = {"distance": 0.0, "force": 0.0, "center_norm": 0.0}
        read = _keep if coupling.measures_late else float

        def measured(x: Tensor, center: Tensor) -> None:  # chunk by chunk, while both are in the cache
            squares["center_norm"] += read(_square(center))
            squares["distance"] += read(_square(x, center))
            delta(x, center)
            squares["force"] += scale**2 * read(_square(x))

        coupling.center.measures_drift = True
        coupling._announce(done=False)
        pending = coupling.center.exchange(x, measured, scale=scale)
        self.measured = {}
        return _Measured(pending, squares, self.measured)


class _Measured:
    """An exchange whose figures are complete with it."""

    def __init__(self, pending: Exchange, squares: dict[str, Any], measured: dict[str, Any]) -> None:
        self._pending, self._squares, self._measured = pending, squares, measured

    def wait(self) -> Tensor:
        delta = self._pending.wait()
        self._measured.update({name: square**0.5 for name, square in self._squares.items()})
        return delta

    def done(self) -> None:
        self._pending.done()


def settle_in_line(couplings: Sequence[Coupling], line: Line) -> None:
    """Takes part in others' exchanges until all replicas are here, and completes what is outstanding. Blocks for them.

    Args:
        couplings: all that share the line, each at its index.
        line: theirs.
    """
    for coupling in couplings:
        coupling.drain()
    while (index := line.ask()) is not None:
        couplings[index].abstain()
    with line.all_together():
        for coupling in couplings:
            coupling.begin_abstention()
        for coupling in couplings:
            coupling.drain()


def _row(measured: dict[str, Any]) -> Tensor:
    """Returns a replica's figures in their order; those of algorithms that have no such thing are zero."""
    figures = (measured.get(figure, 0.0) for figure in FIGURES)
    return torch.tensor([0.0 if isinstance(figure, Tensor) else figure for figure in figures])


def _on(device: torch.device, state: dict[str, Any]) -> dict[str, Any]:
    """Returns a state with its tensors on a device: a checkpoint's files are read to the CPU."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in state.items()}


def _copied(vector: Tensor) -> Tensor:
    """Returns a copy on the CPU: on a device there may be no room for it."""
    return vector.detach().to("cpu", copy=True)


def _keep(figure: Tensor) -> Tensor:
    return figure


def _square(vector: Tensor, other: Tensor | None = None) -> Tensor:
    """Returns the square, (), of the norm of a vector, or of its difference to another, in float64."""
    if vector.device.type == "cpu":
        norm: Tensor = torch.linalg.vector_norm(vector if other is None else vector - other, dtype=torch.float64)
        return norm.square()
    # In float64 from the start the norm would first make such a copy of the vector.
    parts: Iterable[Tensor] = torch.split(vector, _PART)
    if other is not None:
        parts = (a - b for a, b in zip(parts, torch.split(other, _PART), strict=True))
    norms: Tensor = torch.stack([torch.linalg.vector_norm(part) for part in parts])
    return norms.double().square().sum()

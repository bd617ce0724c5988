"""One optimizer's parameters tied to one center: the flat vector, the algorithm and its clock."""

from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_easgd.algorithms import Algorithm
from lightning_easgd.averages import CenterAverage
from lightning_easgd.communication import NonFiniteDeltaError, OpenCenter
from lightning_easgd.communication._line import Line
from lightning_easgd.core.observed import ObservedCenter
from lightning_easgd.core.report import Report
from lightning_easgd.core.swap import Swap
from lightning_easgd.flatten import ParameterVector

__all__ = ["Coupling", "Passage", "settle_in_line"]


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
        center: open; closed by ``rebind``, else by whoever opened it.
        average: of the center over time, which then stands for it in evaluations; None for the center itself.

    Attributes:
        center: the one that it is tied to now.
        observed: the same with its votes and figures, as the algorithm sees it.
        slots: its votes.
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
        self.names, self.vector, self.algorithm, self.average = names, vector, algorithm, average
        self.turnstile: Passage | None = None
        self.observed = ObservedCenter(center, vector, num_told=algorithm.num_told, average=average)
        self.slots = self.observed.slots
        self._swap = Swap()
        self._recover: Callable[[], None] | None = None  # as the last step was told
        self._has_entered = False  # the next step's exchange, through the turnstile
        algorithm.start(vector, self.observed)
        self.observed.follow()

    @property
    def center(self) -> OpenCenter:
        """See the class."""
        return self.observed.center

    @property
    def reports(self) -> deque[Report]:
        """The last complete reports, oldest first."""
        return self.observed.meter.reports

    @property
    def report_every(self) -> int:
        """A report is made of each so many exchanges; 0 for none. Set it alike on all ranks."""
        return self.observed.meter.every

    @report_every.setter
    def report_every(self, every: int) -> None:
        self.observed.meter.every = every

    @torch.no_grad()
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
        self.names, self.vector = names, vector
        self.observed.attach(center, vector)
        self.algorithm.start(vector, self.observed)

    # --- training ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Does what the next step begins with, before its forward pass; see ``Algorithm.begin``. Blocks for the gate.

        Nobody has to call it, since ``step`` does what was not done. Once called it has no effect until that step.
        """
        passes = self.turnstile is not None and self.algorithm.is_due and not self._has_entered
        if self.turnstile is not None and passes:
            self.turnstile.enter()
            self._has_entered = True
        self.algorithm.begin(self.vector, self.observed)
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
        meter = self.observed.meter
        self._recover = recover
        is_ending = self.algorithm.is_ending
        self.begin()
        meter.begin_step()
        called = False

        def update() -> None:
            nonlocal called
            called = True
            meter.of_update(local_update)
            if self.turnstile is not None and is_ending:
                self.turnstile.enter_addition()

        try:
            self.algorithm.step(self.vector, self.observed, update)
        except NonFiniteDeltaError:
            if recover is None:
                raise
            self._start_again(recover)
            if meter.measures_late:  # gradients that are there were taken at weights that a device has found late
                for parameter in self.vector.parameters:
                    if parameter.grad is not None:
                        parameter.grad.zero_()
            if not called:
                local_update()
            self.algorithm.clock += 1
        meter.end_step(at=at, gate_s=0.0 if self.turnstile is None else self.turnstile.waited_s)
        if self.average is not None and is_ending and not self.center.synchronous:
            self.center.pull()  # which an exchange alone does not
            self.observed.follow()
        self._has_entered = False
        if self.turnstile is not None and is_ending:
            self.turnstile.advance()

    def add_force(self) -> None:
        """Adds the force of the algorithm's proximal term, if it has one, to the parameters' gradients."""
        term = self.algorithm.proximal_term()
        if term is not None and term.stiffness != 0:
            self.vector.add_proximal_gradient(term.stiffness, term.anchor)

    def _start_again(self, recover: Callable[[], None]) -> None:
        """Puts the replica on the center after its delta was refused."""
        self.observed.meter.forget()
        self.vector.write_(self.center.pull().value)
        self.slots.fall_silent()
        self.center.abstain()
        recover()
        self.algorithm.start(self.vector, self.observed)

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
        try:
            self.observed.abstain()
        except NonFiniteDeltaError:
            if self._recover is None:
                raise
            self._start_again(self._recover)

    def settle(self) -> None:
        """Abstains from exchanges until every replica does: the center is then at rest. Blocks for all replicas."""
        self.abstain()
        while not self.slots.all_done:
            self.abstain()

    def reset(self) -> None:
        """Puts the replica on the center, where the algorithm starts anew. Blocks for an outstanding exchange."""
        self.refresh()
        self.vector.write_(self.center.value)
        self.algorithm.start(self.vector, self.observed)

    def drain(self, timeout: timedelta | None = None) -> None:
        """Completes an outstanding exchange. Blocks, but asks nothing of the others that they have not done already."""
        self.observed.drain(timeout)

    def refresh(self) -> None:
        """Reads the center anew, after what is outstanding. Blocks for it; over an asynchronous one not for peers."""
        self.observed.refresh()

    @property
    def is_apart(self) -> bool:
        """Whether the replica is anywhere else than the center as of the last completed exchange."""
        return self.vector.distance(self.center.value) > 0

    def swap(self) -> None:
        """Exchanges the parameters' content with the center's; a second call puts both back to the last bit.

        Where there is an average, it is what the parameters get.
        """
        self._swap(self.vector, self.center, self.average)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns CPU copies of what is private to this replica, and the center. Nothing may be outstanding."""
        parameters, center = self._swap.apart(self.vector, self.center)
        return {
            "names": self.names,
            "parameters": [_copied(p) for p in parameters],
            "remainder": None if self.vector.remainder is None else _copied(self.vector.remainder),
            "center": _copied(center),
            "center_state": self.center.state_dict(),
            "algorithm": self.algorithm.state_dict(),
            "told": self.slots.state_dict(),
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
        self.slots.load_state_dict(state["told"])
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(_on(self.vector.device, state["average"]))


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


def _on(device: torch.device, state: dict[str, Any]) -> dict[str, Any]:
    """Returns a state with its tensors on a device: a checkpoint's files are read to the CPU."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in state.items()}


def _copied(vector: Tensor) -> Tensor:
    """Returns a copy on the CPU: on a device there may be no room for it."""
    return vector.detach().to("cpu", copy=True)

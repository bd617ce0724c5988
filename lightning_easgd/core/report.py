"""What a replica measures of its exchanges, and the reports that all replicas' figures make."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.communication import OpenCenter
from lightning_easgd.core.slots import FIGURES, Slots, row
from lightning_easgd.flatten import ParameterVector

__all__ = ["Meter", "Report"]

_PART = 1 << 24  # numbers of a vector on a device that are measured at a time
Delta = Callable[[Tensor, Tensor], None]


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
        additions_per_s: additions per second since this replica's report before.
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


class Meter:
    """Measures one replica's exchanges and collects all replicas' figures.

    A figure passes through three places: it is measured in a step that exchanges, announced with the exchange after
    it, and part of a report when that exchange is complete.

    Args:
        vector: the replica's parameters.
        center: what it exchanges with.
        slots: the center's, in which figures travel.

    Attributes:
        every: measure each n-th exchange; 0 measures none.
        reports: the last complete reports, oldest first.
    """

    def __init__(self, vector: ParameterVector, center: OpenCenter, slots: Slots) -> None:
        self.every = 0
        self.reports: deque[Report] = deque(maxlen=256)
        self._slots = slots
        self._measuring: dict[str, Any] | None = None  # in the step that is going on
        self._complete: dict[str, Any] | None = None  # of a step that is over, not yet announced
        self._announced: dict[str, Any] | None = None  # those that are in the slots now
        self._last_seen = (0, time.monotonic())  # the center's clock at this replica's last measurement, and when
        self.attach(vector, center)

    def attach(self, vector: ParameterVector, center: OpenCenter) -> None:
        """Goes on with other parameters and their center."""
        self._vector, self._center = vector, center

    @property
    def is_wanted(self) -> bool:
        """Whether the next exchange is to be measured."""
        return self.every > 0 and self._turn % self.every == 0

    @property
    def measures_late(self) -> bool:
        """Whether figures stay on the device until an exchange has brought them to all replicas."""
        return self._center.synchronous and self._vector.device.type == "cuda"

    @property
    def _turn(self) -> int:
        """Number of the next exchange. A synchronous center's clock counts it: abstentions are no pushes."""
        center = self._center
        return center.clock // center.num_replicas if center.synchronous else center.traffic.exchanges

    # --- in a step --------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Begins to measure; what an earlier step left unfinished is forgotten."""
        self._measuring = None

    def of_push(self, delta: Tensor, center: Tensor) -> None:
        """Measures a push of ``delta`` (d,), computed from the center's value ``center`` (d,)."""
        if self.measures_late:
            self._measuring = {
                "distance": self._vector.distance_on_device(center),
                "force": _square(delta) ** 0.5,
                "center_norm": _square(center) ** 0.5,
            }
        else:
            self._measuring = {
                "distance": self._vector.distance(center),
                "force": float(torch.linalg.vector_norm(delta)),
                "center_norm": float(torch.linalg.vector_norm(center)),
            }

    def of_exchange(self, delta: Delta, scale: float) -> "tuple[Delta, Callable[[], None]]":
        """Returns ``delta``, see ``Center.exchange``, that measures chunk by chunk, and what to call when it is over.

        A chunk is measured while it is in the cache.
        """
        squares: dict[str, Any] = {"distance": 0.0, "force": 0.0, "center_norm": 0.0}
        read = _keep if self.measures_late else float
        measuring: dict[str, Any] = {}
        self._measuring = measuring

        def measured(x: Tensor, center: Tensor) -> None:
            squares["center_norm"] += read(_square(center))
            squares["distance"] += read(_square(x, center))
            delta(x, center)
            squares["force"] += scale**2 * read(_square(x))

        def over() -> None:
            measuring.update({name: square**0.5 for name, square in squares.items()})

        return measured, over

    def of_update(self, local_update: Callable[[], None]) -> None:
        """Makes the local update, and measures it if the step's exchange is measured."""
        if self._measuring is None:
            local_update()
            return
        before = self._vector.read()
        local_update()
        far = self._vector.distance_on_device if self.measures_late else self._vector.distance
        self._measuring["update"] = far(before)

    def end_step(self, *, at: int, gate_s: float) -> None:
        """Completes a step's figures, which the next exchange announces.

        Args:
            at: what the report is marked with.
            gate_s: seconds spent at the gate since the start.
        """
        if self._measuring is None:
            return
        traffic, now = self._center.traffic, time.monotonic()
        before, then = self._last_seen
        self._last_seen = self._center.clock, now
        self._complete = {
            **self._measuring,
            **vars(traffic),
            "exchange": traffic.exchanges,
            "at": at,
            "present": 1.0,
            "gate_s": gate_s,
            "clock": self._center.clock,
            "additions_per_s": max(0, self._center.clock - before) / max(now - then, 1e-9),
        }

    def forget(self) -> None:
        """Forgets what was measured of a delta that was refused."""
        self._measuring = self._complete = None

    # --- between steps ----------------------------------------------------------------------------------------------

    def take(self) -> dict[str, Any] | None:
        """Returns the figures to announce now, if any."""
        self._announced, self._complete = self._complete, None
        return self._announced

    def hear(self) -> None:
        """Makes a report of all replicas' figures, if this replica's were in the exchange that was just completed."""
        announced, self._announced = self._announced, None
        if announced is None:
            return
        center, figures = self._center, self._slots.figures()
        if not center.synchronous:  # whose slots may have been read before this replica's were written
            figures[center.replica] = row(announced)
        present = figures[:, 0] > 0
        own = {name: figures[present, i] for i, name in enumerate(FIGURES) if name not in ("present", "center_norm")}
        center_norm = announced["center_norm"]
        if isinstance(center_norm, Tensor):
            center_norm = float(figures[center.replica, FIGURES.index("center_norm")])
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

"""What travels in an exchange beside the delta: votes, the figures of reports, and what an algorithm tells.

A center sums a few numbers, its *slots*, over the replicas with every exchange. Their layout, for n replicas::

    0 .. 2                     votes: stop, done, end
    3 .. 3 + 11 n              figures: one row of ``FIGURES`` per replica, zero in every other replica's announcement
    3 + 11 n .. the end        told: ``num_told`` numbers per replica, likewise

So a sum over the replicas is a count of votes, and a table of everybody's figures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_easgd.communication import OpenCenter

__all__ = ["FIGURES", "Slots", "num_slots", "row"]

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
# These stay on a device until an exchange has brought them to all replicas: the host does not wait for them.
_LATE = FIGURES[1:5]
_STOP, _DONE, _END = 0, 1, 2
_VOTES = 3


def num_slots(num_replicas: int, num_told: int = 0) -> int:
    """Returns how many slots an exchange carries: votes, figures, and what the algorithm tells the other replicas."""
    return _VOTES + num_replicas * (len(FIGURES) + num_told)


class Slots:
    """One replica's view of a center's slots: what it announces with its next exchange, and what it heard in the last.

    Args:
        center: open, with ``num_slots(num_replicas, num_told)`` slots.
        num_told: how many numbers each replica tells all others.

    Attributes:
        stop: whether this replica votes to stop at once, from its next exchange on.
        end: whether it votes to end training after this epoch, likewise.
        ended: whether some replica has voted to end, as of the last completed exchange. It stays true.
    """

    def __init__(self, center: OpenCenter, num_told: int) -> None:
        self.stop = self.end = self.ended = False
        self._num_told = num_told
        self.attach(center)

    def attach(self, center: OpenCenter) -> None:
        """Goes on with another center; the votes stay."""
        self._center = center

    @property
    def _first_told(self) -> int:
        return num_slots(self._center.num_replicas)

    # --- votes ------------------------------------------------------------------------------------------------------

    def announce(self, *, done: bool, figures: Mapping[str, Any] | None = None) -> None:
        """Writes this replica's votes and figures into the slots of the exchange that is about to be sent.

        Args:
            done: whether this replica has nothing to add until all are done: it waits at a meeting.
            figures: by name; those that are tensors on the center's device are not read by the host.
        """
        announcement, replica = self._center.announcement, self._center.replica
        announcement[_STOP], announcement[_DONE] = float(self.stop), float(done)
        announcement[_END] = float(self.end)
        if self._center.synchronous:  # elsewhere the last figures stand until there are newer ones
            announcement[_VOTES : self._first_told].zero_()
        if figures is None:
            return
        first = _VOTES + replica * len(FIGURES)
        announcement[first : first + len(FIGURES)] = row(figures)
        late = [figures.get(name) for name in _LATE]
        if any(isinstance(figure, Tensor) for figure in late):
            device = next(figure.device for figure in late if isinstance(figure, Tensor))
            numbers = [f if isinstance(f, Tensor) else torch.zeros((), device=device) for f in late]
            self._center.announce_late(first + 1, torch.stack([n.to(announcement.dtype) for n in numbers]))

    def hear(self) -> None:
        """Takes in the votes of the exchange that was just completed."""
        self.ended = self.ended or int(self._center.announced[_END]) > 0

    @property
    def stop_votes(self) -> int:
        """How many replicas asked to stop, as of the last completed exchange."""
        return int(self._center.announced[_STOP])

    @property
    def all_done(self) -> bool:
        """Whether every replica said in the last completed exchange that it is done."""
        return int(self._center.announced[_DONE]) == self._center.num_replicas

    # --- figures ----------------------------------------------------------------------------------------------------

    def figures(self) -> Tensor:
        """Returns (num_replicas, len(FIGURES)), on the CPU: what each replica has announced; not a view."""
        return self._center.announced[_VOTES : self._first_told].view(self._center.num_replicas, len(FIGURES)).clone()

    # --- what an algorithm tells ------------------------------------------------------------------------------------

    def tell(self, numbers: Sequence[float] | Tensor) -> None:
        """Sets what this replica tells with each exchange from the next one on. See ``Center.tell``."""
        first = self._first_told + self._center.replica * self._num_told
        announcement = self._center.announcement
        if isinstance(numbers, Tensor):
            self._center.announce_late(first, numbers.to(announcement.dtype))
        else:
            announcement[first : first + self._num_told] = torch.tensor(numbers, dtype=announcement.dtype)

    def told(self) -> Tensor:
        """Returns (num_replicas, num_told), on the CPU: what each replica told. Not a view. See ``Center.told``."""
        told = self._center.announced[self._first_told :]
        return told.view(self._center.num_replicas, self._num_told).clone()

    def fall_silent(self) -> None:
        """Tells zeros from the next exchange on: what this replica would have told belongs to a refused delta."""
        self._center.announcement[self._first_told :].zero_()

    def state_dict(self) -> Tensor:
        """Returns what all replicas have told last."""
        return self._center.announced[self._first_told :].clone()

    def load_state_dict(self, state: Tensor) -> None:
        """Restores what ``state_dict`` returned, and tells this replica's part of it once more.

        The next exchange may be one without a step, at an evaluation.
        """
        self._center.announced[self._first_told :].copy_(state)
        if self._num_told:
            self.tell(state.view(self._center.num_replicas, self._num_told)[self._center.replica].tolist())


def row(figures: Mapping[str, Any]) -> Tensor:
    """Returns a replica's figures in their order; those that are missing, or on a device, are zero."""
    values = (figures.get(name, 0.0) for name in FIGURES)
    return torch.tensor([0.0 if isinstance(value, Tensor) else value for value in values])

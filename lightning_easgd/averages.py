"""Averages of the center over time, for evaluation and checkpoints: they follow a center and never move it.

t is the center's clock, which ticks with every addition; c_t is the center at clock t, z the average::

    z_{t+1} = (1 - a_{t+1}) z_t + a_{t+1} c_t

=====================  ===============  ==============================================================================
average                a_{t+1}          in arXiv:1412.6651, section 5
=====================  ===============  ==============================================================================
``PolyakAverage``      1 / (t + 1)      ADOWNPOUR; ASGD where c is the iterate of a single optimizer and t its step
``MovingAverage``      a, constant      MVADOWNPOUR, MVASGD; a = 0.001
``TailAverage``        1 / (t - s + 1)  none; Jain, Kakade, Kidambi, Netrapalli, Sidford, arXiv:1610.03774
=====================  ===============  ==============================================================================

``update(c_t, t)`` makes z_{t+1} of z_t, exactly, when it is called once before the first addition and once after each.
Where n > 1 additions have come since the last call, the centers in between were not seen: c_t stands for them, as if
all n additions had been made at once and the line above n times. A synchronous center does make p additions at once.

The average is kept in the center's dtype, or in float32 where that is of lower precision. In float32 a Polyak or tail
average of millions of centers stops moving: its steps fall below what float32 resolves. ``dtype=torch.float64`` is for
that. Memory: one vector of the center's size. No communication; every rank that holds the center may call it.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

__all__ = ["CenterAverage", "MovingAverage", "PolyakAverage", "TailAverage"]


class CenterAverage(ABC):
    """An average of the center over time. Picklable. Abstract or final, as an ``Algorithm`` is.

    Attributes:
        clock: the center's at the last ``update``; None before the first.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """Creates the average; nothing is allocated before the first ``update``.

        Args:
            dtype: to keep the average in. Default: the center's, or float32 where that is of lower precision.

        Raises:
            ValueError: ``dtype`` is not a floating point type.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"{type(self).__name__}(dtype={dtype}): must be a floating point type, or None")
        self.clock: int | None = None
        self._dtype = dtype
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """(d,) the average so far, on the center's device. Not a copy: it moves with the next ``update``.

        Raises:
            RuntimeError: there was no ``update`` yet.
        """
        if self._value is None:
            raise RuntimeError(f"{type(self).__name__}.value: there is no average before the first update")
        return self._value

    @torch.no_grad()
    def update(self, center: Tensor, clock: int) -> None:
        """Takes the current center into account. The first center seen is z_0; an unchanged clock changes nothing.

        Args:
            center: (d,) its value. Only read.
            clock: the additions that it contains, >= 0.

        Raises:
            ValueError: the clock is below that of the last update, or the center's shape is another.
        """
        name = type(self).__name__
        if clock < (self.clock or 0):
            raise ValueError(f"{name}.update(clock={clock}): must not be below {self.clock or 0}, as it was before")
        if self._value is None or self.clock is None:
            dtype = self._dtype or torch.promote_types(center.dtype, torch.float32)
            self._value = center.to(dtype, copy=True)
        else:
            if center.shape != self._value.shape:
                raise ValueError(
                    f"{name}.update(<center of shape {tuple(center.shape)}>): must be {tuple(self._value.shape)}, as "
                    "it was before"
                )
            if clock > self.clock:
                value = self._value = self._value.to(center.device)  # restored ones may be elsewhere
                value.lerp_(center.to(value.dtype), self._weight(clock, clock - self.clock))
        self.clock = clock

    @abstractmethod
    def _weight(self, clock: int, num: int) -> float:
        """Returns the weight, in (0, 1], of a center that stands for the ``num`` >= 1 additions up to ``clock``."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what must survive a restart: clock and average, as plain numbers and tensors."""
        return {"clock": self.clock, "value": None if self._value is None else self._value.to("cpu", copy=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned. The average may be on another device than the center."""
        self.clock = None if state["clock"] is None else int(state["clock"])
        self._value = None if state["value"] is None else state["value"].clone()


class PolyakAverage(CenterAverage):
    """The mean of all centers since the first ``update``: after that at clock t, of c_0, ..., c_t.

    With gradient noise it is statistically optimal on a quadratic, whatever the rates: T Var[z_T] tends to
    sigma^2 / (p h^2). An average that begins at a later clock is the mean from there on.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """Creates the average. See ``CenterAverage``."""
        super().__init__(dtype)
        self._first = 0

    def update(self, center: Tensor, clock: int) -> None:
        """Takes the current center into account. See ``CenterAverage.update``."""
        if self._value is None:
            self._first = clock
        super().update(center, clock)

    def _weight(self, clock: int, num: int) -> float:
        return num / (clock - self._first + 1)

    def state_dict(self) -> dict[str, Any]:
        """Returns clock, average and the clock of the first center."""
        return {**super().state_dict(), "first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        super().load_state_dict(state)
        self._first = int(state["first"])

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return f"PolyakAverage({_dtype_argument(self._dtype)})"


class MovingAverage(CenterAverage):
    """Moves towards the center by a constant fraction with every addition: it forgets what is 1 / rate additions old.

    A center that stands for n additions has the weight ``1 - (1 - rate)^n``.
    """

    def __init__(self, rate: float = 0.001, dtype: torch.dtype | None = None) -> None:
        """Creates the average.

        Args:
            rate: a, an addition's weight, in (0, 1). Default 0.001 (the paper).
            dtype: see ``CenterAverage``.

        Raises:
            ValueError: ``rate`` is out of range.
        """
        super().__init__(dtype)
        if not 0 < rate < 1:
            raise ValueError(f"MovingAverage(rate={rate!r}): must be above 0 and below 1")
        self.rate = rate

    def _weight(self, clock: int, num: int) -> float:
        del clock
        return -math.expm1(num * math.log1p(-self.rate))

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return f"MovingAverage({_dtype_argument(self._dtype, f'rate={self.rate}')})"


class TailAverage(CenterAverage):
    """The mean of the centers in the last fraction of training; before that, the newest center.

    The tail begins with the clock s = ceil((1 - fraction) num_additions). Beyond ``num_additions`` it goes on growing.
    """

    def __init__(self, num_additions: int, fraction: float = 0.5, dtype: torch.dtype | None = None) -> None:
        """Creates the average.

        Args:
            num_additions: the center's clock at the end of training, >= 1: optimizer steps of all replicas, over the
                period.
            fraction: of these, how many the tail has, in (0, 1]. Default 0.5. With 1 this is ``PolyakAverage``.
            dtype: see ``CenterAverage``.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__(dtype)
        if isinstance(num_additions, bool) or not isinstance(num_additions, int) or num_additions < 1:
            raise ValueError(f"TailAverage(num_additions={num_additions!r}): must be an integer >= 1")
        if not 0 < fraction <= 1:
            raise ValueError(f"TailAverage(fraction={fraction!r}): must be above 0 and at most 1")
        self.num_additions = num_additions
        self.fraction = fraction
        # In floating point (1 - 0.9) * 10 is not 1 and may be above it; what is meant is the integer.
        self._first = math.ceil(num_additions * (1 - fraction) - 1e-9 * num_additions)

    def _weight(self, clock: int, num: int) -> float:
        length = clock - self._first + 1  # of the tail, so far
        return 1.0 if num >= length else num / length

    def __repr__(self) -> str:
        """Returns the constructor call."""
        given = f"num_additions={self.num_additions}, fraction={self.fraction}"
        return f"TailAverage({_dtype_argument(self._dtype, given)})"


def _dtype_argument(dtype: torch.dtype | None, *others: str) -> str:
    return ", ".join(others if dtype is None else (*others, f"dtype={dtype}"))

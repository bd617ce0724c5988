"""Streaming DiLoCo: Douillard et al., "Streaming DiLoCo with overlapping communication", arXiv:2501.18512.

DiLoCo whose outer step is applied some steps after it was sent, to a replica that has gone on in the meantime::

    x^i <- x^i - inner optimizer                         every step
    D   =  mean_i (x^i - c)                              every ``period`` steps: sent
    v   <- mu v + D
    c   <- c + lr (D + mu v)                             while the replica goes on
    x^i <- a x^i + (1 - a) c                             ``delay`` steps after the sending

====================  =====================================================================================
symbol                name
====================  =====================================================================================
x^i, c, p             ``replica``, ``center``, ``num_replicas``
H                     ``period``, in optimizer steps
tau                   ``delay``, in optimizer steps
a (alpha)             ``mixing``: the replica's own share where the two are mixed
lr, mu                ``outer_lr``, ``outer_momentum``; Nesterov's
inner optimizer       ``local_update``; its state stays with the replica
====================  =====================================================================================

The paper's other half, the fragments of the model with different steps, belongs to the strategy: ``fragments=P``, as
the name ``streaming_diloco`` has it; the wire format is the transport's (its float of 4 bits is not offered, int8 is).

Mean type: the effective step size does not grow with the number of replicas.

Departures: over a synchronous center the all-reduce hides behind a period or a delay alike; a delay of 0 waits for it
where the next period begins. Fragments are dealt out by size here, in strides of layers there.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_easgd.algorithms._accumulation import Accumulation
from lightning_easgd.algorithms.local_sgd import LocalSGD
from lightning_easgd.interfaces import Center, Replica
from lightning_easgd.rules import CenterRule

__all__ = ["StreamingDiLoCo"]


class StreamingDiLoCo(Accumulation):
    """DiLoCo that does not wait for its outer step, and mixes it with the replica's steps in the meantime.

    Reductions: ``delay=0, mixing=0`` with one fragment is ``LocalSGD.diloco`` with the same values, bit for bit.
    Effective step size: mean type. Extra memory: three vectors of the parameters' size: anchor, message, and the outer
    velocity.
    """

    synchronous_only = True  # an outer step is one of all replicas' mean

    def __init__(
        self,
        period: int = 100,
        delay: int = 1,
        mixing: float = 0.5,
        outer_lr: float = 0.4,
        outer_momentum: float = 0.9,
    ) -> None:
        """Creates the algorithm. Mixing and the outer step are the paper's; period and delay are chosen here.

        Args:
            period: H, optimizer steps from one sending to the next, >= 1.
            delay: tau, optimizer steps from the sending to the mixing, 0 to ``period - 1``. The paper finds up to 10
                harmless.
            mixing: a, in [0, 1): 0 takes the center unchanged and forgets the steps of the delay.
            outer_lr: factor of the outer step, > 0.
            outer_momentum: mu, in [0, 1).

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__(period)
        if isinstance(delay, bool) or not isinstance(delay, int) or not 0 <= delay < period:
            raise ValueError(
                f"StreamingDiLoCo(period={period}, delay={delay!r}): delay must be a number of optimizer steps below "
                "the period"
            )
        if not 0 <= mixing < 1:
            raise ValueError(f"StreamingDiLoCo(mixing={mixing!r}): must be at least 0 and below 1")
        self.delay = delay
        self.mixing = mixing
        self._has_sent = False
        self._outer = LocalSGD.diloco(period, outer_lr, outer_momentum)

    @property
    def is_due(self) -> bool:
        """Whether the next ``step`` begins with the center: that of the last sending, or the first of all."""
        return self._anchor is None or (self._has_sent and self.clock % self.period == self.delay)

    def gain(self, num_replicas: int) -> float:
        """Returns 1 / p: what the center sums is the mean."""
        return self._outer.gain(num_replicas)

    def rule(self, num_replicas: int) -> CenterRule:
        """Returns the outer step."""
        return self._outer.rule(num_replicas)

    def start(self, replica: Replica, center: Center) -> None:
        """Forgets what was sent and accumulated: the next step begins at the center. See ``Algorithm.start``."""
        super().start(replica, center)
        self._has_sent = False

    def step(self, replica: Replica, center: Center, local_update: Callable[[], None]) -> None:
        """Performs one iteration. Blocks only where a delay ends, for the center."""
        is_ending = self.is_ending
        super().step(replica, center, local_update)
        self._has_sent = self._has_sent or is_ending

    def _adopt(self, replica: Replica, center: Tensor) -> None:
        if self.mixing == 0:
            replica.write_(center)
        else:
            apart = replica.read(out=self._delta).sub_(center)
            replica.add_(apart, alpha=self.mixing - 1)  # x <- a x + (1 - a) c

    def hyperparameters(self, num_replicas: int) -> dict[str, Any]:
        """Returns algorithm, period, delay, mixing and the outer step's values."""
        outer = self._outer.hyperparameters(num_replicas)
        return {**outer, **super().hyperparameters(num_replicas), "delay": self.delay, "mixing": self.mixing}

    def state_dict(self) -> dict[str, Any]:
        """Returns clock, anchor, and whether anything was sent."""
        return {**super().state_dict(), "has_sent": self._has_sent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        super().load_state_dict(state)
        self._has_sent = bool(state["has_sent"])

    def __repr__(self) -> str:
        """Returns the constructor call."""
        outer = f"outer_lr={self._outer.outer_lr}, outer_momentum={self._outer.outer_momentum}"
        return f"StreamingDiLoCo(period={self.period}, delay={self.delay}, mixing={self.mixing}, {outer})"

"""Local SGD with an outer optimizer: model averaging, BMUF, SlowMo, DiLoCo.

Each replica, every ``period`` steps::

    x^i <- c
    x^i <- x^i - inner optimizer                         period times
    D   =  mean_i (x^i - c)                              minus the pseudo-gradient
    v   <- mu v + D
    c   <- c + lr (D + mu v)  (Nesterov)  or  c + lr v

====================  =====================================================================================
symbol                name
====================  =====================================================================================
x^i, c, p             ``replica``, ``center``, ``num_replicas``
tau (DiLoCo: H)       ``period``, in optimizer steps
lr (BMUF: zeta)       ``outer_lr``
mu                    ``outer_momentum``
inner optimizer       ``local_update``; its state stays with the replica
====================  =====================================================================================

* ``LocalSGD(period)``: the mean of the replicas becomes the center (FedAvg, post-local SGD).
* ``LocalSGD.bmuf``: block-wise model update filtering, Chen and Huo, ICASSP 2016. Its Nesterov form, in the coordinates
  of the broadcast model, is the outer step above; its classical form is the one without ``nesterov``.
* ``LocalSGD.slowmo``: Wang, Tantia, Ballas, Rabbat, arXiv:1910.00643, without Nesterov.
* ``LocalSGD.diloco``: Douillard et al., arXiv:2311.08105, with AdamW as the inner optimizer.

Mean type: the effective step size does not grow with the number of replicas; the outer step multiplies it by
lr / (1 - mu).

Departures: BMUF's text chooses zeta / (1 - mu) near the number of replicas, which ``LocalSGD.bmuf`` does by default.
SlowMo's velocity is in units of the inner learning rate, so that it is rescaled when that changes; here it is not.
"""

from lightning_easgd.algorithms._accumulation import Accumulation
from lightning_easgd.rules import Addition, CenterRule, MomentumCenter

__all__ = ["LocalSGD"]


class LocalSGD(Accumulation):
    """Averages the replicas every period; the center makes an outer step towards their mean.

    Reductions: one replica with ``outer_lr=1, outer_momentum=0`` is the inner optimizer alone, up to rounding.
    Effective step size: mean type. Extra memory: two vectors of the parameters' size, and the outer velocity where the
    momentum is not 0. For another outer optimizer override ``rule``::

        class LocalSGDWithAdam(LocalSGD):
            def rule(self, num_replicas):
                return OuterOptimizer(functools.partial(torch.optim.Adam, lr=0.1))
    """

    synchronous_only = True  # an outer step is one of all replicas' mean

    def __init__(
        self, period: int = 50, outer_lr: float = 1.0, outer_momentum: float | None = 0.0, *, nesterov: bool = False
    ) -> None:
        """Creates the algorithm; the defaults are model averaging.

        Args:
            period: optimizer steps from one averaging to the next, >= 1. Default 50.
            outer_lr: factor of the outer step, > 0.
            outer_momentum: mu, in [0, 1), or None for 1 - 1/p (BMUF).
            nesterov: whether the outer momentum is Nesterov's.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__(period)
        if not 0 < outer_lr < float("inf"):
            raise ValueError(f"LocalSGD(outer_lr={outer_lr!r}): must be a finite number above 0")
        if outer_momentum is not None and not 0 <= outer_momentum < 1:
            raise ValueError(f"LocalSGD(outer_momentum={outer_momentum!r}): must be at least 0 and below 1, or None")
        self.outer_lr = outer_lr
        self.outer_momentum = outer_momentum
        self.nesterov = nesterov

    @classmethod
    def bmuf(cls, period: int = 50, outer_lr: float = 1.0, *, nesterov: bool = True) -> "LocalSGD":
        """Returns BMUF with block learning rate 1 and block momentum 1 - 1/p (ICASSP 2016; period: fairseq's)."""
        return cls(period, outer_lr, None, nesterov=nesterov)

    @classmethod
    def slowmo(cls, period: int = 12, outer_lr: float = 1.0, outer_momentum: float = 0.7) -> "LocalSGD":
        """Returns SlowMo with the values of the paper's CIFAR-10 runs."""
        return cls(period, outer_lr, outer_momentum)

    @classmethod
    def diloco(cls, period: int = 500, outer_lr: float = 0.7, outer_momentum: float = 0.9) -> "LocalSGD":
        """Returns DiLoCo with the paper's H = 500, outer learning rate 0.7 and Nesterov momentum 0.9."""
        return cls(period, outer_lr, outer_momentum, nesterov=True)

    def gain(self, num_replicas: int) -> float:
        """Returns 1 / p: what the center sums is the mean."""
        return 1.0 / num_replicas

    def rule(self, num_replicas: int) -> CenterRule:
        """Returns the outer step."""
        momentum = self.momentum(num_replicas)
        if self.outer_lr == 1 and momentum == 0:
            return Addition()
        return MomentumCenter(momentum, self.outer_lr, nesterov=self.nesterov)

    def momentum(self, num_replicas: int) -> float:
        """Returns mu for this number of replicas."""
        return 1 - 1 / num_replicas if self.outer_momentum is None else self.outer_momentum

    def hyperparameters(self, num_replicas: int) -> dict[str, object]:
        """Returns algorithm, period and the outer step's values."""
        return {
            **super().hyperparameters(num_replicas),
            "outer_lr": self.outer_lr,
            "outer_momentum": self.momentum(num_replicas),
            "nesterov": self.nesterov,
        }

    def __repr__(self) -> str:
        """Returns the constructor call."""
        return (
            f"LocalSGD(period={self.period}, outer_lr={self.outer_lr}, outer_momentum={self.outer_momentum}, "
            f"nesterov={self.nesterov})"
        )

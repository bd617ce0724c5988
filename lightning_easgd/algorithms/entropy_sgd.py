"""Entropy-SGD: Chaudhari, Choromanska, Soatto, LeCun, Baldassi, Borgs, Chayes, Sagun, Zecchina, arXiv:1611.01838.

One replica that descends its local entropy, with Langevin dynamics inside::

    y <- y - eta' [g(y) + (y - x) / gamma] + sqrt(2 eta') epsilon N(0, 1)       every step
    z <- alpha z + (1 - alpha) y                                                every step
    x <- x - eta (x - z)                                                        every L steps, Nesterov momentum mu
    y <- x;  z <- x;  gamma <- max(min, s gamma)

====================  =====================================================================================
symbol                name
====================  =====================================================================================
y                     ``replica``: the module's parameters
x, z                  the outer point, which is the ``center``; the average
L                     ``period``, in optimizer steps
eta, mu               ``outer_lr`` times what the module's scheduler does to the rate, ``outer_momentum``
eta' g                ``local_update``: the module's optimizer; eta' is ``inner_lr``
gamma, alpha, s       ``scope``, ``averaging_decay``, ``scoping``
epsilon               ``noise``
====================  =====================================================================================

The noise is that of the authors' code (``ucla-vision/entropy-sgd``, ``python/optim.py``): it adds
``epsilon / sqrt(eta' / 2) N(0, 1)`` to the gradient, behind the momentum, and moves by eta' times that.

Departures: that code gives gamma as a stiffness, its reciprocal, resets the inner momentum at each outer step, decays
weights in the outer step, too, and never advances the counter that its scoping follows. Here the module's optimizer
keeps its state and alone decays weights, and gamma shrinks with every outer step as in Parle.
"""

import math
import random
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.algorithms._local_entropy import InnerRate, LocalEntropy, nesterov_bound
from lightning_easgd.interfaces import Center, Replica

__all__ = ["EntropySGD"]


class EntropySGD(LocalEntropy):
    """Descent of the local entropy with one replica, which may span all devices (arXiv:1611.01838).

    Reductions: ``noise=0`` is bit-identical to ``Parle`` with one replica and ``coupling=inf``. Effective step size:
    the outer step's, eta / (1 - mu) of the way from x to z. Extra memory: the outer point, the average, the outer
    velocity and a buffer, four vectors of the parameters' size.

    The noise is a function of ``seed`` and the clock, so that the ranks that make up the replica draw the same, and a
    resumed run draws what the interrupted one would have.
    """

    single_replica = True

    def __init__(
        self,
        period: int = 20,
        outer_lr: float = 0.1,
        outer_momentum: float = 0.9,
        scope: float = 100.0,
        min_scope: float = 1.0,
        averaging_decay: float = 0.75,
        scoping: float | None = None,
        inner_lr: InnerRate = "constant",
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Creates the algorithm; nothing is allocated before ``start``.

        Args:
            period: L, optimizer steps from one outer step to the next, >= 1. Default 20 (the README of the code).
            outer_lr: eta, > 0; see ``Parle``. Default 0.1.
            outer_momentum: mu, in [0, 1). Default 0.9.
            scope: gamma, > 0; infinity for no force towards the outer point. Default 100, as in Parle; the code's are
                the stiffnesses 1e-4 (MNIST) and 0.03 (CIFAR-10).
            min_scope: least gamma, > 0. Default 1, as in Parle.
            averaging_decay: alpha, in [0, 1). Default 0.75.
            scoping: s, in (0, 1], the factor of gamma an outer step. Default 1 - 1 / (2 B), with B mini-batches in an
                epoch.
            inner_lr: "constant" or "scheduled"; see ``Parle``.
            noise: epsilon, >= 0, the square root of the temperature. Default 0; the code's is 1e-4.
            seed: of the noise.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__(period, outer_lr, outer_momentum, scope, min_scope, averaging_decay, scoping, inner_lr)
        if not 0 <= noise < math.inf:
            raise ValueError(f"EntropySGD(noise={noise!r}): must be a finite number, at least 0")
        self.noise = noise
        self.seed = seed
        self._sizes: list[tuple[int, int]] = []  # of each parameter, and the index of its parameter group
        self._generator: torch.Generator | None = None

    @property
    def current_stiffness(self) -> float:
        """0: there is no other replica."""
        return 0.0

    def bind(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Takes the optimizer, whose learning rates the outer rate and the noise follow. See ``Algorithm.bind``.

        Raises:
            ValueError: the optimizer has no learning rate above 0.
        """
        super().bind(optimizer, parameters)
        groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._sizes = [(p.numel(), groups[id(p)]) for p in parameters]

    def check(self, num_replicas: int) -> None:
        """Refuses more than one replica; warns of an outer rate that overshoots where the loss curves strongly.

        Raises:
            ValueError: there is more than one replica.
        """
        if num_replicas > 1:
            raise ValueError(
                f"EntropySGD with {num_replicas} replicas: it has one; let it span all devices with replica_size, or "
                "take 'parle', which couples several"
            )
        bound = nesterov_bound(self.outer_momentum)
        if self.outer_lr >= bound:
            warnings.warn(
                f"EntropySGD(outer_lr={self.outer_lr}, outer_momentum={self.outer_momentum}): unstable where the loss "
                f"curves strongly; outer_lr should be below {bound:g}",
                stacklevel=2,
            )

    def start(self, replica: Replica, center: Center) -> None:
        """Begins a period at the replica's parameters. See ``LocalEntropy.start``.

        Raises:
            ValueError: there is more than one replica, or noise, whose size the learning rate sets, without ``bind``.
        """
        super().start(replica, center)
        if not self.noise:
            return
        if self._schedule is None:
            raise ValueError(
                "EntropySGD.start: call bind(optimizer, parameters) first; the learning rate sets the noise"
            )
        self._generator = torch.Generator(self._vectors()[0].device)

    def _perturb(self, replica: Replica) -> None:
        """``y <- y + sqrt(2 eta') epsilon N(0, 1)``."""
        if self._generator is None or self._schedule is None:
            return
        schedule = self._schedule
        lrs = schedule.rates() if self.inner_lr == "scheduled" else schedule.references()
        generator = self._generator.manual_seed(random.Random(f"{self.seed}/{self.clock}").getrandbits(63))
        noise = self._vectors()[3].normal_(generator=generator)
        views = noise.view(-1).split_with_sizes([size for size, _ in self._sizes])
        torch._foreach_mul_(views, [self.noise * math.sqrt(2 * lrs[group]) for _, group in self._sizes])
        replica.add_(noise)

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "noise": self.noise, "seed": self.seed}

"""What is exchanged, with what, and when: the choices of a run, checked, and the parts of the parameters they make."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from lightning_easgd.algorithms import EASGD, Algorithm
from lightning_easgd.averages import CenterAverage
from lightning_easgd.communication import AllReduce, Asynchronous, Transport
from lightning_easgd.core.buffers import BufferRules
from lightning_easgd.core.fragments import by_fragment, refuse_fragments
from lightning_easgd.core.layerwise import by_layer, refuse_algorithm
from lightning_easgd.flatten import coupled_parameters
from lightning_easgd.gates import Gate, StaleSynchronous

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """The choices that make an exchange; the same on all ranks. ``EASGDStrategy`` says what each of them does.

    Attributes:
        algorithm: the loop of one replica. Default ``EASGD()``.
        transport: how a replica reaches the center. Default ``AllReduce()``, or ``Asynchronous()`` where the algorithm
            needs that.
        average: of the center over time; None for none.
        fragments: in how many parts the parameters are exchanged.
        slack: how many exchanges a replica may be ahead of the slowest; None for any number.
        layerwise: whether each layer has a center and a clock of its own.
        on_nonfinite: what happens to a replica whose delta is not finite.
        buffers: what the center has of each buffer.
        owner: who is called with these, for messages.

    Raises:
        ValueError: they do not go together.
    """

    algorithm: Algorithm = field(default_factory=EASGD)
    transport: Transport | None = None  # never None once it is made
    average: CenterAverage | None = None
    fragments: int = 1
    slack: int | None = None
    layerwise: bool = False
    on_nonfinite: Literal["raise", "reset"] = "raise"
    buffers: BufferRules = field(default_factory=BufferRules)
    replica_size: int | None = None
    owner: str = "Elastic"

    def __post_init__(self) -> None:
        for name, value, kind in (
            ("algorithm", self.algorithm, Algorithm),
            ("transport", self.transport, Transport),
            ("average", self.average, CenterAverage),
        ):
            if not isinstance(value, kind) and not (value is None and name != "algorithm"):
                raise ValueError(f"{self.owner}({name}={value!r}): must be a lightning_easgd {kind.__name__} or None")
        if self.on_nonfinite not in ("raise", "reset"):
            raise ValueError(f"{self.owner}(on_nonfinite={self.on_nonfinite!r}): must be one of 'raise', 'reset'")
        if self.transport is None:
            object.__setattr__(self, "transport", Asynchronous() if self.algorithm.asynchronous_only else AllReduce())
        self._check_transport()
        if self.layerwise:
            refuse_algorithm(self.algorithm, synchronous=self.is_synchronous, replica_size=self.replica_size)
        refuse_fragments(self.algorithm, self.fragments, layerwise=self.layerwise, slack=self.slack)
        if self.gate is not None and self.is_synchronous:
            raise ValueError(
                f"{self.owner}(slack={self.slack}): over {self.transport!r} all replicas exchange at once; a slack "
                "needs an asynchronous transport, such as Asynchronous()"
            )

    def _check_transport(self) -> None:
        if self.is_synchronous and self.algorithm.asynchronous_only:
            raise ValueError(
                f"{self.owner}({self.algorithm!r}, {self.transport!r}): its replicas exchange one by one, which needs "
                "an asynchronous transport, such as Asynchronous()"
            )
        if not self.is_synchronous and self.algorithm.synchronous_only:
            raise ValueError(
                f"{self.owner}({self.algorithm!r}, {self.transport!r}): this algorithm steps the center with the mean "
                "of all replicas at once; it needs a synchronous transport, such as AllReduce()"
            )

    @property
    def is_synchronous(self) -> bool:
        """Whether all replicas' n-th exchanges are one operation."""
        assert self.transport is not None
        return self.transport.synchronous

    @property
    def gate(self) -> Gate | None:
        """Which replica may exchange, as the user asks for it; None for all."""
        return None if self.slack is None else StaleSynchronous(self.slack)

    def parts(
        self, module: nn.Module, optimizers: Sequence[Optimizer], *, say: bool = False
    ) -> list[tuple[Optimizer, dict[str, nn.Parameter]]]:
        """Returns, for each coupling, its parameters by name and the optimizer that steps them.

        Args:
            module: whose parameters they are.
            optimizers: what its parameters are trained by.
            say: whether to warn where the fragments are of very different size.

        Raises:
            ValueError: the parameters cannot be parted so.
        """
        left_out = self.buffers.ignored(module)
        if self.layerwise and any(p.requires_grad and n in left_out for n, p in module.named_parameters()):
            raise ValueError(
                f"{self.owner}(layerwise=True) with trained parameters in _ddp_params_and_buffers_to_ignore: a layer "
                "is updated when it exchanges, and these do not; leave them out there, or use layerwise=False"
            )
        pairs = zip(optimizers, coupled_parameters(module, optimizers, left_out), strict=True)
        if self.layerwise:
            return [(o, layer) for o, parameters in pairs for layer in by_layer(module, parameters)]
        if self.fragments > 1:
            parted = [(o, by_fragment(module, parameters, self.fragments)) for o, parameters in pairs]
            if say:
                self._say_sizes(parts for _, parts in parted)
            return [(o, part) for o, parts in parted for part in parts]
        return list(pairs)

    def _say_sizes(self, parted: Iterable[list[dict[str, nn.Parameter]]]) -> None:
        for parts in parted:
            sizes = [sum(p.numel() for p in part.values()) for part in parts]
            if max(sizes) * self.fragments > 2 * sum(sizes):
                warnings.warn(
                    f"{self.owner}(fragments={self.fragments}): the largest one has {max(sizes):,} of {sum(sizes):,} "
                    "parameters, since no tensor is cut: what travels at a time falls less than half as much as it "
                    "could",
                    stacklevel=2,
                )

"""The strategy's own arguments: one record, checked before anything runs."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_easgd.algorithms import EASGD, Algorithm
from lightning_easgd.averages import CenterAverage
from lightning_easgd.communication import Transport
from lightning_easgd.core.buffers import BufferRules
from lightning_easgd.core.members import Layout
from lightning_easgd.core.plan import Plan
from lightning_easgd.trainer.seams import callbacks_of, is_a

__all__ = ["Options", "refuse_callbacks", "refuse_devices", "refuse_layerwise_training"]

Data = Literal["shard", "replicate", "dynamic"] | float


@dataclass(frozen=True)
class Options:
    """What a user asks of ``EASGDStrategy``, beyond what DDPStrategy takes. See its constructor.

    Attributes:
        plan: what is exchanged, with what, and when.
        replica_size: ranks of a replica; None for the default.
        evaluate: whose weights evaluations use.
        center_buffers: the center's batch-norm statistics.
        data: who trains on what.
        resume: what a checkpoint gives back.
        resume_optimizer: the optimizers' states of replicas that start from the center.
        max_silence: how long a rank may stand still; None for the default.
    """

    plan: Plan
    replica_size: int | None
    evaluate: Literal["center", "replica"]
    center_buffers: Literal["mean"] | int
    data: Data
    resume: Literal["replicas", "center"]
    resume_optimizer: Literal["fresh", "copy"]
    max_silence: timedelta | None

    def __post_init__(self) -> None:
        """Refuses what has the wrong type or value."""
        for name, choice, choices in (
            ("evaluate", self.evaluate, ("center", "replica")),
            ("resume", self.resume, ("replicas", "center")),
            ("resume_optimizer", self.resume_optimizer, ("fresh", "copy")),
        ):
            if choice not in choices:
                raise ValueError(f"EASGDStrategy({name}={choice!r}): must be one of {', '.join(map(repr, choices))}")
        if self.fraction is None and self.data not in ("shard", "replicate", "dynamic"):
            raise ValueError(
                f"EASGDStrategy(data={self.data!r}): must be 'shard', 'replicate', 'dynamic', or a fraction above 0 "
                "and below 1"
            )
        silence, size, buffers = self.max_silence, self.replica_size, self.center_buffers
        if silence is not None and not (isinstance(silence, timedelta) and silence > timedelta(0)):
            raise ValueError(f"EASGDStrategy(max_silence={silence!r}): must be a timedelta above 0, or None")
        if size is not None and not (_is_int(size) and size >= 1):
            raise ValueError(f"EASGDStrategy(replica_size={size!r}): must be a number of ranks >= 1, or None")
        if self.data == "dynamic" and size is not None and size > 1:
            raise ValueError(
                f"EASGDStrategy(data='dynamic', replica_size={size}): the ranks of a replica must have equally many "
                "batches; use replica_size=1, or data='shard'"
            )
        if buffers != "mean" and not (_is_int(buffers) and int(buffers) >= 1):
            raise ValueError(
                f"EASGDStrategy(center_buffers={buffers!r}): must be 'mean' or a number of training batches >= 1"
            )

    @classmethod
    def of(
        cls,
        algorithm: Algorithm | None,
        transport: Transport | None,
        *,
        average: CenterAverage | None,
        on_nonfinite: Literal["raise", "reset"],
        buffers: Mapping[Any, Literal["mean", "replica0", "own"]] | None,
        fragments: int,
        slack: int | None,
        layerwise: bool,
        replica_size: int | None,
        **others: Any,
    ) -> "Options":
        """Returns the record of these arguments.

        Raises:
            ValueError: an argument has the wrong type or value, or two do not go together.
        """
        plan = Plan(
            EASGD() if algorithm is None else algorithm,
            transport,
            average=average,
            on_nonfinite=on_nonfinite,
            buffers=BufferRules(buffers),
            fragments=fragments,
            slack=slack,
            layerwise=layerwise,
            replica_size=replica_size,
            owner="EASGDStrategy",
        )
        return cls(plan, 1 if layerwise else replica_size, **others)

    @property
    def fraction(self) -> float | None:
        """Which part of the training set each replica has; None where ``data`` is a word."""
        return self.data if isinstance(self.data, float) and 0 < self.data < 1 else None

    def layout(self, num_nodes: int, num_processes: int) -> Layout:
        """Returns which ranks form which replica.

        Args:
            num_nodes: of the job.
            num_processes: on each of them.

        Raises:
            ValueError: ``replica_size`` does not divide the number of ranks.
        """
        world_size, size = num_nodes * num_processes, self.replica_size
        if size is None:
            several = num_nodes > 1 and self.data != "dynamic"
            size = world_size if self.plan.algorithm.single_replica else num_processes if several else 1
        if world_size % max(size, 1):
            divisors = ", ".join(str(d) for d in range(1, world_size + 1) if world_size % d == 0)
            raise ValueError(
                f"EASGDStrategy(replica_size={size}): must divide the number of ranks, which is {world_size} "
                f"({num_nodes} nodes with {num_processes} devices); {divisors} do"
            )
        return Layout(world_size, max(size, 1))

    def hyperparameters(self, layout: Layout) -> dict[str, Any]:
        """Returns what a logger should keep of them: plain values."""
        plan = self.plan
        return {
            "transport": type(plan.transport).__name__,
            "num_replicas": layout.num_replicas,
            "replica_size": layout.replica_size,
            "replicas": layout.describe(),
            "data": self.data,
            **({} if plan.average is None else {"average": repr(plan.average)}),
            **({} if plan.slack is None else {"slack": plan.slack}),
            **({"layerwise": True} if plan.layerwise else {}),
            **({"fragments": plan.fragments} if plan.fragments > 1 else {}),
            **plan.algorithm.hyperparameters(layout.num_replicas),
        }


def refuse_devices(strategy: Any) -> None:
    """Raises ``ValueError`` for devices and precision plugins that replicas cannot have; warns where nobody has tried.

    Args:
        strategy: a DDPStrategy whose devices and precision are known.
    """
    kind = strategy.parallel_devices[0].type if strategy.parallel_devices else "cpu"
    if kind not in ("cpu", "cuda"):
        raise ValueError(
            f"EASGDStrategy does not run on {kind!r} devices, which have no collectives: pass Trainer("
            "accelerator='cpu', devices=2) or use CUDA devices"
        )
    name = type(strategy.precision_plugin).__name__
    if name.startswith(("FSDP", "DeepSpeed", "XLA")):
        raise ValueError(
            f"EASGDStrategy(precision_plugin=<{name}>): this plugin needs the strategy of its name; use "
            "Trainer(precision=...), for example 'bf16-mixed'"
        )
    if sys.platform != "linux":
        rank_zero_warn(
            f"EASGDStrategy is developed and tested on Linux; nobody has tried it on {sys.platform!r}, and centers "
            "in shared memory need Linux"
        )


def refuse_callbacks(trainer: Any) -> None:
    """Raises ``ValueError`` for callbacks that cannot work where replicas train."""
    for callback in callbacks_of(trainer):
        # As a callback it trains inside of fit, ends that training, and lets another begin in its place.
        if is_a(callback, "callbacks.LearningRateFinder") and not getattr(callback, "_early_exit", False):
            raise ValueError(
                "EASGDStrategy: the callback LearningRateFinder runs a training inside of fit; call "
                "Tuner(trainer).lr_find(module) before fit instead"
            )


def refuse_layerwise_training(trainer: Any, module: Any) -> None:
    """Raises ``ValueError`` where a Trainer or module needs all gradients before the first update.

    Args:
        trainer: a Lightning Trainer, before it trains.
        module: its LightningModule.
    """
    asked = "EASGDStrategy(layerwise=True)"
    gradients = "a layer is updated in the backward pass, when its own gradient is there and others are not"
    if not module.automatic_optimization:
        raise ValueError(
            f"{asked} with manual optimization: its hooks belong to Lightning's own; use automatic optimization"
        )
    if trainer.gradient_clip_val or not _is_lightnings(module.configure_gradient_clipping):
        raise ValueError(
            f"{asked} with Trainer(gradient_clip_val={trainer.gradient_clip_val!r}) or configure_gradient_clipping: "
            f"{gradients}; leave clipping out"
        )
    schedules = (c for c in callbacks_of(trainer) if is_a(c, "callbacks.GradientAccumulationScheduler"))
    if trainer.accumulate_grad_batches != 1 or any(
        schedule.going_to_accumulate_grad_batches() for schedule in schedules
    ):
        raise ValueError(
            f"{asked} with Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) or "
            "GradientAccumulationScheduler: every backward pass updates the layers; use larger batches"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"{asked} with a GradScaler (precision='16-mixed'): it skips a step for one gradient in all that is not "
            f"finite, and {gradients}; use precision='bf16-mixed'"
        )
    is_compiled = getattr(module, "_compiler_ctx", None) is not None or any(
        isinstance(part, torch._dynamo.OptimizedModule) or part._compiled_call_impl is not None
        for part in module.modules()
    )
    if is_compiled:
        raise ValueError(
            f"{asked} with a compiled module: a compiled graph knows of no layers; leave torch.compile out"
        )


def _is_lightnings(method: Any) -> bool:
    """Returns whether a method of a LightningModule is the one that it inherits."""
    return method.__func__.__module__.partition(".")[0] in ("lightning", "pytorch_lightning")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

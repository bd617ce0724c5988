"""The Lightning strategy: a table of Lightning's hooks, each of which hands over to the object whose subject it is.

``ElasticStrategy`` is written against ``DDPStrategy``'s interface alone; ``_lightning`` binds it to the namespaces
``pytorch_lightning`` and ``lightning.pytorch``, under the name ``EASGDStrategy``.

======================================= ===============================================
what the user asks for                  ``options.Options``
what there is of one run                ``run.Run``
how the ranks find each other           ``launch.Launch``
exchanges, weights, how replicas meet   ``core.Elastic``
steps, evaluations, epochs              ``loops.Loops``
signals, time limits, ``should_stop``   ``stopping.Stopping``
what is saved, and how a run goes on    ``checkpoints.Checkpoints``
======================================= ===============================================
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_easgd.algorithms import Algorithm
from lightning_easgd.averages import CenterAverage
from lightning_easgd.communication import Transport
from lightning_easgd.core.coupling import Coupling
from lightning_easgd.core.elastic import check_whose
from lightning_easgd.core.ending import own_default_group
from lightning_easgd.core.members import Layout
from lightning_easgd.trainer.arguments import refuse_unknown
from lightning_easgd.trainer.options import Options, refuse_devices
from lightning_easgd.trainer.parent import announce, may_leave, refuse_orphan, watch
from lightning_easgd.trainer.presets import register
from lightning_easgd.trainer.run import Run

if TYPE_CHECKING:
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.accelerators import Accelerator
    from pytorch_lightning.plugins import CheckpointIO, Precision
    from pytorch_lightning.strategies import DDPStrategy as _DDPStrategy
else:
    _DDPStrategy = object

__all__ = ["ElasticStrategy"]


class ElasticStrategy(_DDPStrategy):
    """Trains replicas on their own and ties them by an elastic force to a center variable.

    Each replica is one process, or ``replica_size`` of them as a DDP group of their own, with the module's own
    optimizer, scheduler, precision, accumulation and clipping. Validation, test, predict, the checkpoint's
    ``state_dict`` and the module after ``fit`` are the center's. Between two exchanges a training step makes no call to
    ``torch.distributed``, Lightning's own per-batch broadcast included.

    As a string, ``Trainer(strategy="easgd")`` has the defaults of every argument; the other names are presets of it.
    """

    # Set by the binding: the namespace and its version, two callbacks, and what Lightning raises after a signal.
    _bound_to: str
    _lightning_version: str
    _monitor_type: type[Any]
    hooks_type: type[Any]
    sigterm_exception: type[BaseException]

    def __init__(
        self,
        algorithm: Algorithm | None = None,
        transport: Transport | None = None,
        *,
        replica_size: int | None = None,
        average: CenterAverage | None = None,
        evaluate: Literal["center", "replica"] = "center",
        on_nonfinite: Literal["raise", "reset"] = "raise",
        center_buffers: Literal["mean"] | int = "mean",
        buffers: Mapping[Any, Literal["mean", "replica0", "own"]] | None = None,
        fragments: int = 1,
        slack: int | None = None,
        layerwise: bool = False,
        data: Literal["shard", "replicate", "dynamic"] | float = "shard",
        resume: Literal["replicas", "center"] = "replicas",
        resume_optimizer: Literal["fresh", "copy"] = "fresh",
        accelerator: "Accelerator | None" = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: "ClusterEnvironment | None" = None,
        checkpoint_io: "CheckpointIO | None" = None,
        precision_plugin: "Precision | None" = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        max_silence: timedelta | None = None,
        **kwargs: Any,
    ) -> None:
        """Creates the strategy; nothing is started before the Trainer runs.

        Args:
            algorithm: the loop of one replica. Each optimizer gets its own copy. Default ``EASGD()``.
            transport: how a replica reaches the center. Default ``AllReduce()``.
            replica_size: how many consecutive ranks form one replica. It must divide the number of ranks. Inside a
                replica ``DistributedDataParallel`` averages the gradients at every step, with SyncBatchNorm and its
                broadcast of buffers. An exchange moves each parameter once per replica: each rank moves one slice.
                Default: the ranks of one node if there are several nodes, else 1; all ranks for Entropy-SGD.
            average: of the center over time, such as ``MovingAverage()``. Each optimizer's center gets its own copy.
                Evaluations, the checkpoint's ``state_dict`` and the module after ``fit`` then have the average.
                Training goes on from the center itself. Costs a vector of the parameters' size and a pass per exchange.
            evaluate: whose weights validation, test and predict use while fitting: the center's, which are the same on
                all ranks, or those of each rank's own replica.
            on_nonfinite: what happens to a replica whose delta is not finite. ``"raise"`` ends the job and names the
                replica. ``"reset"`` puts it back on the center with a fresh optimizer state, and training goes on.
            center_buffers: the center's batch-norm statistics. ``"mean"``: the mean of the replicas' statistics. A
                number of batches (>= 1): an estimate with the center's weights over so many training batches of each
                replica. It makes so many forward passes before each evaluation and checkpoint. The module is called on
                the batch, or on its first element if it is a list or tuple, as in ``torch.optim.swa_utils.update_bn``.
            buffers: what the center has of each buffer, and of each parameter that no optimizer holds. A mapping from
                names, patterns of names (``"encoder.*"``) or module types to a rule: ``"mean"`` is the replicas' mean,
                ``"replica0"`` is replica 0's value, ``"own"`` leaves each rank its own (a checkpoint has rank 0's), as
                ``_ddp_params_and_buffers_to_ignore`` does. The first key that fits counts. A type is for what its
                modules own directly. Where no key fits, these are averaged: floating-point statistics of batch norm and
                instance norm, ranges of quantisation observers, buffers named ``running_*``, and parameters that no
                optimizer holds (momentum encoders, target networks). All else (masks, queues, tables, counters, unit
                vectors of spectral norm) is replica 0's. Integers are never averaged.
            fragments: in how many parts of about equal size the parameters are exchanged, from 1 to the period. Each
                fragment is exchanged once per period. Their steps are spread evenly, which divides the peak traffic by
                ``fragments``. No tensor is cut, so the largest tensor bounds the gain. Works with ``EASGD``, ``EAMSGD``
                and the methods that push what a period has accumulated; there the first period of all fragments but the
                first is shorter. Each fragment has its own reports.
            slack: with an asynchronous transport, how many exchanges (>= 0) a replica may be ahead of the slowest
                replica before it waits (stale synchronous parallel; 0 is lock-step). None: no replica ever waits.
            layerwise: whether each layer (a module that owns parameters directly) has its own center and clock, all
                with one slack (arXiv:1512.02728). A layer is updated and added to its center in the backward pass, as
                soon as its gradient is there. The next forward pass reads it when it comes to it. Needs ``Downpour`` or
                its kin with period 1, an asynchronous transport, one process per replica, and an optimizer that treats
                parameters separately. Hooks that run after the backward pass, such as ``on_before_optimizer_step``, see
                gradients that have been used already.
            data: which replica trains on what. ``"shard"``: each replica on its part of every epoch (Lightning's own
                sampler). ``"replicate"``: each replica on the whole set, in its own order. A fraction in (0, 1): each
                replica on a fixed part of that size, rounded up, in its own order; the parts overlap evenly.
                ``"dynamic"``: the replicas draw batches from one shared epoch; a faster replica does more, and all end
                together. The ranks of one replica share its data. Validation and test data are always sharded.
            resume: what ``fit(ckpt_path=...)`` starts from: every replica's own state, exactly as it was, or the center
                alone. A checkpoint with another number of replicas always gives the center.
            resume_optimizer: which optimizer state replicas get that start from the center of such a checkpoint: none,
                or a copy of replica 0's.
            accelerator: as for DDPStrategy.
            parallel_devices: as for DDPStrategy.
            cluster_environment: as for DDPStrategy.
            checkpoint_io: as for DDPStrategy.
            precision_plugin: as for DDPStrategy.
            process_group_backend: the backend of Lightning's process group. The exchange has its own group.
            timeout: the longest wait of any communication, Lightning's and the exchange's. Default 30 minutes.
            start_method: as for DDPStrategy.
            max_silence: how long (above 0) a living rank may be stopped by a signal, or hold Python's lock in one call,
                before the job ends and names it. Also how long a starting job waits for a rank that never comes, but no
                longer than ``timeout``. Default 5 minutes. The others notice a rank that dies within seconds, by its
                connection, and a host that vanishes within about a minute.
            **kwargs: as for DDPStrategy: what ``DistributedDataParallel`` gets if a replica has several ranks, such as
                ``find_unused_parameters``. With one rank per replica they have no effect, and a warning says so.

        Raises:
            TypeError: there is no such argument; names where it belongs, if anywhere.
            ValueError: an argument has the wrong type or value.
        """
        refuse_unknown(kwargs, type(self))
        self.options = Options.of(
            algorithm,
            transport,
            replica_size=replica_size,
            average=average,
            evaluate=evaluate,
            on_nonfinite=on_nonfinite,
            center_buffers=center_buffers,
            buffers=buffers,
            fragments=fragments,
            slack=slack,
            layerwise=layerwise,
            data=data,
            resume=resume,
            resume_optimizer=resume_optimizer,
            max_silence=max_silence,
        )
        self._run: Run | None = None
        self._report_every = 0
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            **kwargs,
        )

    def __repr__(self) -> str:
        """Returns algorithm and transport, and what the class is bound to: Lightning's own error shows it."""
        plan = self.options.plan
        return f"<{type(self).__name__}({plan.algorithm!r}, {plan.transport!r}) bound to {self._bound_to}>"

    # --- who there is -----------------------------------------------------------------------------------------------

    @property
    def algorithm(self) -> Algorithm:
        """The loop of one replica; each optimizer has a copy."""
        return self.options.plan.algorithm

    @property
    def transport(self) -> Transport:
        """How a replica reaches the center."""
        assert self.options.plan.transport is not None
        return self.options.plan.transport

    @property
    def layout(self) -> Layout:
        """Which ranks form which replica.

        Raises:
            ValueError: ``replica_size`` does not divide the number of ranks.
        """
        return self.options.layout(int(self.num_nodes), int(self.num_processes))

    @property
    def num_replicas(self) -> int:
        """How many replicas there are."""
        return self.layout.num_replicas

    @property
    def replica(self) -> int:
        """Index of this process's replica."""
        return int(self.global_rank) // self.layout.replica_size

    @property
    def couplings(self) -> list[Coupling]:
        """What ties each optimizer's parameters to a center; empty outside of ``fit``."""
        return [] if self._run is None or self._run.elastic is None else self._run.elastic.couplings

    @property
    def run(self) -> Run:
        """What there is of the run that is going on."""
        assert self._run is not None
        return self._run

    # --- start ------------------------------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        refuse_devices(self)  # they are known by now, as nodes and precision are, and nothing runs yet
        self.algorithm.check(self.num_replicas)
        super()._configure_launcher()
        watch()
        if self._start_method == "popen":
            announce(self._launcher)

    @override
    def setup_environment(self) -> None:
        refuse_orphan()
        self._run = Run(self, self._lightning_version)
        self._run.report(self._report_every)
        super().setup_environment()
        self._run.launch.complete()
        may_leave()

    @override
    def setup_distributed(self) -> None:
        with own_default_group(self.run.timeout), self.run.launch.arriving():
            super().setup_distributed()

    @override
    def setup(self, trainer: "Trainer") -> None:
        run = self.run
        run.begin(trainer)
        if trainer.state.fn == "fit":
            run.add_monitor(self._monitor_type)
        super().setup(trainer)
        if trainer.state.fn == "fit":
            run.couple()
        else:
            run.stopping.take_over_signals()

    @override
    def configure_ddp(self) -> None:
        # Where DDPStrategy wraps the module. Here it stays as it is where a replica is one process.
        self.run.open_company(super().configure_ddp)

    # --- steps ------------------------------------------------------------------------------------------------------

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        run.raise_if_failed()
        run.checkpoints.resumption.own = None  # whatever had to be put back has been
        if run.elastic is None:
            return super().training_step(*args, **kwargs)
        with run.steps.batch(int(run.trainer.accumulate_grad_batches)):
            output = super().training_step(*args, **kwargs)
        if self.algorithm.needs_loss:
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if isinstance(loss, Tensor):
                run.elastic.observe_loss(loss.detach())
        return output

    @override
    def batch_to_device(self, *args: Any, **kwargs: Any) -> Any:
        if self._run is not None:  # with every batch of an evaluation, too
            self._run.raise_if_failed()
        return super().batch_to_device(*args, **kwargs)

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: "LightningModule | nn.Module | None" = None,
        **kwargs: Any,
    ) -> Any:
        if self.options.plan.layerwise:
            # The precision plugin's part of an optimizer step, without the update: the layers have had it by then.
            update = partial(self.precision_plugin._wrap_closure, self.run.module, optimizer, closure)
        else:
            # DDPStrategy's own adds nothing without its model averager, which this strategy never has.
            update = partial(super().optimizer_step, optimizer, closure, model, **kwargs)
        return self.run.loops.take_step(optimizer, update)

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self.run.loops.after_training()  # Lightning calls this after the callbacks and the module

    # --- whose weights the module holds -----------------------------------------------------------------------------

    @contextmanager
    def weights_of(self, whose: Literal["center", "replica"]) -> Iterator[None]:
        """Puts the center's or this replica's weights and buffers into the module, and then what was there.

        Collective while fitting: all ranks must enter it at the same point, and it blocks for an outstanding exchange.
        Over an asynchronous transport it is each rank's own and waits for nobody: the center as it is at the moment,
        inside an epoch with the replica's own buffers. Outside of ``fit`` the module stays as it is. In
        ``on_train_end`` the module holds the center, and this gives the replica once more. ``ValueError`` if it is
        neither.
        """
        check_whose(whose)
        with nullcontext() if self._run is None else self._run.weights_of(whose):
            yield

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the center's state dict: a copy on global rank zero, which writes it. Collective while fitting."""
        own = super().lightning_module_state_dict
        return own() if self._run is None else self._run.checkpoints.module_state(own)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes the replica's file, then, on global rank zero, the checkpoint. Collective while fitting."""
        write = partial(super().save_checkpoint, filepath=filepath, storage_options=storage_options)
        if self._run is None:
            write(checkpoint)
        else:
            self._run.checkpoints.save(write, checkpoint, filepath)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if self._run is not None:
            self._run.checkpoints.remove(filepath)

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        return checkpoint if self._run is None else self._run.checkpoints.load(checkpoint, checkpoint_path)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        if self._run is None or self._run.elastic is None:
            return super().load_optimizer_state_dict(checkpoint)
        self._run.loops.couple_anew()  # a callback may have thawed parameters in on_fit_start, as far as it had got
        super().load_optimizer_state_dict(self._run.checkpoints.optimizer_states(checkpoint))
        return self._run.checkpoints.restore()

    # --- what Lightning asks of all ranks ---------------------------------------------------------------------------

    @property
    def _answers_alone(self) -> bool:
        return self._run is not None and self._run.answers_alone

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self._answers_alone:
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self._answers_alone else super().broadcast(obj, src)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return tensor if self._answers_alone else super().reduce(tensor, group, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision if self._answers_alone else super().reduce_boolean_decision(decision, all)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        if self._answers_alone:
            own = tensor if sync_grads else tensor.detach()
            return own.unsqueeze(0).expand(self.layout.world_size, *tensor.shape).clone()
        gathered: Tensor = super().all_gather(tensor, group, sync_grads)
        return gathered

    # --- end --------------------------------------------------------------------------------------------------------

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self._run is not None:
            self._run.fail(exception)

    @override
    def teardown(self) -> None:
        run, self._run = self._run, None
        try:
            if run is not None:
                run.close()
        finally:
            super().teardown()
            if run is not None:
                run.checkpoints.close()

    # --- for callbacks ----------------------------------------------------------------------------------------------

    def request_reports(self, every: int) -> None:
        """Makes every coupling report each ``every``-th exchange (0: never). All ranks call it alike before ``fit``."""
        if self._run is None:
            self._report_every = every
        else:
            self._run.report(every)

    def hyperparameters(self) -> dict[str, Any]:
        """Returns what a logger should keep of this run's strategy: plain values."""
        return {"name": type(self).__name__, **self.options.hyperparameters(self.layout)}

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        register(cls, strategy_registry)

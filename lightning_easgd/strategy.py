"""The Lightning strategy: lifetime, launch, loops and checkpoints' moments around an algorithm and a transport.

``ElasticStrategy`` is written against ``DDPStrategy``'s interface alone; ``_lightning`` binds it to the namespaces
``pytorch_lightning`` and ``lightning.pytorch``, under the name ``EASGDStrategy``.
"""

import copy
import itertools
import json
import logging
import math
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_easgd._arguments import for_ddp, refuse_unknown
from lightning_easgd._buffers import BufferRules, CenterBuffers
from lightning_easgd._coupling import Coupling, Passage, num_slots, settle_in_line
from lightning_easgd._dynamic import DynamicData
from lightning_easgd._ending import own_default_group
from lightning_easgd._fragments import by_fragment, first_clock, refuse_fragments, step_fragments
from lightning_easgd._free_running import (
    END_OF_EPOCH,
    END_OF_TRAINING,
    EVALUATION,
    STOP,
    FreeRunning,
    StoppedByAnother,
)
from lightning_easgd._layerwise import Layerwise, by_layer, refuse_algorithm, refuse_training
from lightning_easgd._lock_step import meets
from lightning_easgd._members import Layout, Members, SharedTurnstile
from lightning_easgd._modes import OptimizerModes
from lightning_easgd._parent import announce, may_leave, refuse_orphan, watch
from lightning_easgd._presets import presets
from lightning_easgd._replicated import ReplicatedData
from lightning_easgd._resume import Resumption, differences
from lightning_easgd._seams import callbacks_of, is_a, missing, verify
from lightning_easgd._start import check_same_couplings, check_same_parameters, start_from_rank_0
from lightning_easgd._steps import Steps
from lightning_easgd.algorithms import EASGD, Algorithm
from lightning_easgd.averages import CenterAverage
from lightning_easgd.checkpoint import (
    KEY,
    ReplicaFile,
    ReplicaFileError,
    Saves,
    local_path,
    private_part,
    rng_state,
    set_apart,
    set_rng_state,
)
from lightning_easgd.communication import AllReduce, Asynchronous, OpenCenter, Transport, TransportError
from lightning_easgd.communication._c10d import Group, PrefixStore, new_group
from lightning_easgd.communication._line import Line
from lightning_easgd.communication._notice import Notice
from lightning_easgd.communication._rendezvous import MAX_SILENCE, Rendezvous
from lightning_easgd.communication._turnstile import DoubleTurnstile, Turnstile
from lightning_easgd.flatten import ParameterVector, coupled_parameters
from lightning_easgd.gates import Gate, StaleSynchronous

if TYPE_CHECKING:
    from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.accelerators import Accelerator
    from pytorch_lightning.plugins import CheckpointIO, Precision
    from pytorch_lightning.strategies import DDPStrategy as _DDPStrategy
else:
    _DDPStrategy = object

__all__ = ["ElasticStrategy"]

log = logging.getLogger(__name__)

# How long a request to stop, or to end, waits for an exchange to carry it before it goes without one.
_STOP_PATIENCE_S = 10.0
# How long a process that already failed waits for an outstanding exchange, to save what it has.
_LAST_DRAIN = timedelta(seconds=15)


class ElasticStrategy(_DDPStrategy):
    """Trains replicas on their own and ties them by an elastic force to a center variable.

    Each replica is one process, or ``replica_size`` of them as a DDP group of their own, with the module's own
    optimizer, scheduler, precision, accumulation and clipping.
    Validation, test, predict, the checkpoint's ``state_dict`` and the module after ``fit`` are the center's. Between
    two exchanges a training step makes no call to ``torch.distributed``, Lightning's own per-batch broadcast included.

    As a string, ``Trainer(strategy="easgd")`` has the defaults of every argument; the other names are presets of it.
    """

    # Set by the binding: the namespace, and how a user of the other one imports the class that fits; its version; the
    # monitor; what Lightning raises after a signal.
    _bound_to: str
    _lightning_version: str
    _monitor_type: type[Any]
    _sigterm_exception: type[BaseException]

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
            algorithm: the loop of one replica; each optimizer gets a copy. Default ``EASGD()``.
            transport: how a replica reaches the center. Default ``AllReduce()``.
            replica_size: ranks of a replica, consecutive ones; it divides their number. Inside a replica gradients are
                averaged at every step by ``DistributedDataParallel``, SyncBatchNorm and the broadcast of buffers
                included; the exchange across replicas moves each parameter once a replica, a slice a rank. Default:
                a node's ranks where there are several nodes, else 1; all ranks where the algorithm has one replica.
            average: of the center over time, such as ``MovingAverage()``; each optimizer's center gets a copy. It then
                stands for the center in evaluations, in the checkpoint's ``state_dict`` and after ``fit``; training
                goes on from the center itself. Costs a vector of the parameters' size and a pass an exchange.
            evaluate: whose weights validation, test and predict use while fitting: the center's, the same on all
                ranks, or each rank's own replica.
            on_nonfinite: what happens to a replica whose delta is not finite: ``"raise"`` ends the job and names it;
                ``"reset"`` puts it back on the center with a fresh optimizer state and goes on.
            center_buffers: the center's batch-norm statistics: the replicas' mean, or an estimate of their own, with
                the center's weights, over so many training batches of each replica (>= 1). The latter makes that many
                forward passes for each evaluation and checkpoint, calling the module on the batch, or on its first
                element where that is a list or tuple, like ``torch.optim.swa_utils.update_bn``.
            buffers: what the center has of each buffer, and of each parameter that no optimizer holds: a mapping of
                names, patterns of names (``"encoder.*"``) or module types to ``"mean"``, the replicas' mean;
                ``"replica0"``, replica 0's value; or ``"own"``, which leaves it each rank's own (a checkpoint has rank
                0's), as does DDP's ``_ddp_params_and_buffers_to_ignore``. The first key that fits counts; a type is
                for what its modules own directly. Without one that fits, floating statistics of batch and instance
                norm, ranges of quantisation observers, buffers named ``running_*`` and parameters that no optimizer
                holds (momentum encoders, target networks) are averaged, and all else (masks, queues, tables, counters,
                unit vectors of spectral norm) is replica 0's. Integers are never averaged.
            fragments: in how many parts of about equal size the parameters are exchanged, 1 to the period. Each is
                exchanged once a period, at steps of its own spread evenly over it, so that what travels at a time falls
                that many times. No parameter tensor is cut: the largest one bounds it. For ``EASGD``, ``EAMSGD`` and
                the methods that push what a period has accumulated, whose first period is shorter for all fragments
                but the first. Each fragment reports by itself.
            slack: over an asynchronous transport, how many exchanges (>= 0) a replica may be ahead of the slowest
                before it waits (stale synchronous parallel; 0 is lock-step). None: nobody ever waits.
            layerwise: whether each layer (a module that owns parameters directly) has a center and a clock of its own,
                of the same slack: it is updated and added in the backward pass, as soon as its gradient is there, and
                read when the next forward pass comes to it (arXiv:1512.02728). For ``Downpour`` and its kin with
                period 1, over an asynchronous transport, with one process a replica and an optimizer that treats
                parameters separately. Hooks that run after the backward pass, such as ``on_before_optimizer_step``,
                see gradients that have been used already.
            data: who trains on what: ``"shard"``, each replica on its part of every epoch (Lightning's own sampler);
                ``"replicate"``, each replica on the whole set, in an order of its own; a fraction in (0, 1), each
                replica on a fixed part of that size, rounded up, the parts overlapping evenly, in an order of its own;
                ``"dynamic"``, replicas draw batches from one shared epoch, so that a faster one does more and all end
                it together. The ranks of a replica share its data out. Validation and test data are always sharded.
            resume: what ``fit(ckpt_path=...)`` starts from: every replica's own state, exactly as it was, or the center
                alone. Where the checkpoint has another number of replicas it is always the center.
            resume_optimizer: the optimizers' state of replicas that start from the center of such a checkpoint: none,
                or a copy of replica 0's.
            accelerator: as for DDPStrategy.
            parallel_devices: as for DDPStrategy.
            cluster_environment: as for DDPStrategy.
            checkpoint_io: as for DDPStrategy.
            precision_plugin: as for DDPStrategy.
            process_group_backend: of Lightning's own process group; the exchange has one of its own.
            timeout: the longest wait of any communication, Lightning's and the exchange's. Default 30 minutes.
            start_method: as for DDPStrategy.
            max_silence: how long a rank may stand still altogether, above 0, before the job is ended and it is named:
                stopped by a signal, or in one call that holds Python's lock (a huge JSON file); and how long a job
                waits, at most ``timeout``, for a rank that never comes when it starts, since it died in its imports
                and its launcher does not say so. Default 5 minutes. A rank that has come and dies is noticed by its
                connection, within seconds, and a host that vanishes within about a minute. Lightning's own launcher
                ends all within seconds of any death, also in the imports.
            **kwargs: as for DDPStrategy: what ``DistributedDataParallel`` gets where a replica has several ranks, such
                as ``find_unused_parameters``. Without effect, and with a warning, where a replica is one rank.

        Raises:
            TypeError: there is no such argument; names where it belongs, if anywhere.
            ValueError: an argument has the wrong type or value.
        """
        refuse_unknown(kwargs, type(self))
        for name, value, kind in (
            ("algorithm", algorithm, Algorithm),
            ("transport", transport, Transport),
            ("average", average, CenterAverage),
        ):
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"EASGDStrategy({name}={value!r}): must be a lightning_easgd {kind.__name__} or None")
        for name, choice, choices in (
            ("evaluate", evaluate, ("center", "replica")),
            ("on_nonfinite", on_nonfinite, ("raise", "reset")),
            ("resume", resume, ("replicas", "center")),
            ("resume_optimizer", resume_optimizer, ("fresh", "copy")),
        ):
            if choice not in choices:
                raise ValueError(f"EASGDStrategy({name}={choice!r}): must be one of {', '.join(map(repr, choices))}")
        is_fraction = isinstance(data, float) and 0 < data < 1
        if not is_fraction and data not in ("shard", "replicate", "dynamic"):
            raise ValueError(
                f"EASGDStrategy(data={data!r}): must be 'shard', 'replicate', 'dynamic', or a fraction above 0 and "
                "below 1"
            )
        if max_silence is not None and not (isinstance(max_silence, timedelta) and max_silence > timedelta(0)):
            raise ValueError(f"EASGDStrategy(max_silence={max_silence!r}): must be a timedelta above 0, or None")
        if replica_size is not None and (
            isinstance(replica_size, bool) or not isinstance(replica_size, int) or replica_size < 1
        ):
            raise ValueError(f"EASGDStrategy(replica_size={replica_size!r}): must be a number of ranks >= 1, or None")
        if data == "dynamic" and replica_size is not None and replica_size > 1:
            raise ValueError(
                f"EASGDStrategy(data='dynamic', replica_size={replica_size}): the ranks of a replica must have equally "
                "many batches; use replica_size=1, or data='shard'"
            )
        is_count = isinstance(center_buffers, int) and not isinstance(center_buffers, bool) and center_buffers >= 1
        if center_buffers != "mean" and not is_count:
            raise ValueError(
                f"EASGDStrategy(center_buffers={center_buffers!r}): must be 'mean' or a number of training batches >= 1"
            )
        self._buffer_rules = BufferRules(buffers)
        self.algorithm = EASGD() if algorithm is None else algorithm
        if transport is None:
            transport = Asynchronous() if self.algorithm.asynchronous_only else AllReduce()
        self.transport = transport
        self._check_combination()
        if layerwise:
            refuse_algorithm(self.algorithm, synchronous=self.transport.synchronous, replica_size=replica_size)
            replica_size = 1
        refuse_fragments(self.algorithm, fragments, layerwise=layerwise, slack=slack)
        self.layerwise = layerwise
        self.fragments = fragments
        self.gate = None if slack is None else StaleSynchronous(slack)
        if self.gate is not None and self.transport.synchronous:
            raise ValueError(
                f"EASGDStrategy(slack={slack}): over {self.transport!r} all replicas exchange at once; a slack needs "
                "an asynchronous transport, such as Asynchronous()"
            )
        self.replica_size = replica_size
        self.average = average
        self.data = data
        self.evaluate = evaluate
        self.on_nonfinite = on_nonfinite
        self.center_buffers = center_buffers
        self.resume = resume
        self.resume_optimizer = resume_optimizer
        self.max_silence = max_silence
        self.couplings: list[Coupling] = []
        self._by_optimizer: dict[int, list[Coupling]] = {}
        self._layerwise: Layerwise | None = None
        self._steps: Steps | None = None
        self._group: Group | None = None  # over all ranks, for what is not a center; None for one
        self._members: Members | None = None  # the ranks of this replica
        self._buffers: CenterBuffers | None = None
        self._modes: OptimizerModes | None = None
        self._holds_center = False
        self._center_is_new = False
        self._rendezvous: Rendezvous | None = None
        self._dynamic: DynamicData | None = None  # with data="dynamic"
        self._free_running: FreeRunning | None = None  # over an asynchronous transport
        self._is_leading = False  # replica 0 alone does something that others take part in when they wait
        self._dump: dict[str, Any] | None = None  # what this replica would write of a checkpoint
        self._center_state: dict[str, Any] | None = None  # of the checkpoint that is put together
        self._saves = Saves()
        self._replaced: list[tuple[str, list[str]]] = []  # what rank 0 has yet to tell the others of ``_saves``
        self._cleanup = ExitStack()
        self._trainer: Trainer | None = None
        self._stop_seen_at: float | None = None
        self._stopped_together = False
        self._wants_end = self._end_is_agreed = False
        self._end_wanted_at: float | None = None
        self._report_every = 0
        self._last_seen = (0, 0)  # steps and additions at the last evaluation
        self._additions_at_start = 0
        self._has_said_unchanged = False
        self._generation = 0
        self._line: Line | None = None  # what the couplings' centers share on CUDA devices
        self._resumption = Resumption()
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

    def _check_combination(self) -> None:
        if self.transport.synchronous and self.algorithm.asynchronous_only:
            raise ValueError(
                f"EASGDStrategy({self.algorithm!r}, {self.transport!r}): its replicas exchange one by one, which "
                "needs an asynchronous transport, such as Asynchronous()"
            )
        if not self.transport.synchronous and self.algorithm.synchronous_only:
            raise ValueError(
                f"EASGDStrategy({self.algorithm!r}, {self.transport!r}): this algorithm steps the center with the mean "
                "of all replicas at once; it needs a synchronous transport, such as AllReduce()"
            )

    def __repr__(self) -> str:
        """Returns algorithm and transport, and what the class is bound to: Lightning's own error shows it."""
        return f"<{type(self).__name__}({self.algorithm!r}, {self.transport!r}) bound to {self._bound_to}>"

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a launcher sends to a process that it starts."""
        state: dict[str, Any] = super().__getstate__()
        state["_cleanup"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what ``__getstate__`` returned."""
        state["_cleanup"] = ExitStack()
        super().__setstate__(state)

    # --- before any process is started ------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """Which ranks form which replica.

        Raises:
            ValueError: ``replica_size`` does not divide the number of ranks.
        """
        world_size = int(self.num_nodes * self.num_processes)
        size = self.replica_size
        if size is None:
            several = self.num_nodes > 1 and self.data != "dynamic"
            size = world_size if self.algorithm.single_replica else self.num_processes if several else 1
        if world_size % max(size, 1):
            divisors = ", ".join(str(d) for d in range(1, world_size + 1) if world_size % d == 0)
            raise ValueError(
                f"EASGDStrategy(replica_size={size}): must divide the number of ranks, which is {world_size} "
                f"({self.num_nodes} nodes with {self.num_processes} devices); {divisors} do"
            )
        return Layout(world_size, max(size, 1))

    @property
    def num_replicas(self) -> int:
        """How many replicas there are."""
        return self.layout.num_replicas

    @property
    def replica(self) -> int:
        """Index of this process's replica."""
        return int(self.global_rank) // self.layout.replica_size

    @override
    def _configure_launcher(self) -> None:
        # The Trainer's constructor calls this when devices, nodes and precision are known and nothing runs yet.
        self._check_devices()
        if sys.platform != "linux":
            rank_zero_warn(
                f"EASGDStrategy is developed and tested on Linux; nobody has tried it on {sys.platform!r}, and centers "
                "in shared memory need Linux"
            )
        self.algorithm.check(self.num_replicas)
        super()._configure_launcher()
        watch()
        if self._start_method == "popen":
            announce(self._launcher)

    def _check_devices(self) -> None:
        kind = self.parallel_devices[0].type if self.parallel_devices else "cpu"
        if kind not in ("cpu", "cuda"):
            raise ValueError(
                f"EASGDStrategy does not run on {kind!r} devices, which have no collectives: pass Trainer("
                "accelerator='cpu', devices=2) or use CUDA devices"
            )
        name = type(self.precision_plugin).__name__
        if name.startswith(("FSDP", "DeepSpeed", "XLA")):
            raise ValueError(
                f"EASGDStrategy(precision_plugin=<{name}>): this plugin needs the strategy of its name; use "
                "Trainer(precision=...), for example 'bf16-mixed'"
            )

    # --- start ------------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        refuse_orphan()
        super().setup_environment()
        if self._rendezvous is None:  # a default group was there before, or there is but one rank
            self._rendezvous = self._open_rendezvous(None)
        may_leave()

    @override
    def setup_distributed(self) -> None:
        timeout = self._timeout
        with own_default_group(self._wait):
            self._timeout = min(self._wait, self.max_silence or MAX_SILENCE)  # until all have come
            try:
                notice = self._put_up_notice(self._timeout)
                if notice is not None:
                    # From here on nobody waits for a process that is gone, be it in the making of the default group.
                    self._rendezvous = self._open_rendezvous(notice)
                    self._rendezvous.roll_call.gather("start together", "")
                super().setup_distributed()
                del notice
            finally:
                self._timeout = timeout

    def _put_up_notice(self, timeout: timedelta) -> Notice | None:
        """Returns where the ranks find each other before there is a default group; None where they need not."""
        if self.layout.world_size == 1 or torch.distributed.is_initialized():
            return None
        assert self.cluster_environment is not None
        self.set_world_ranks()
        host, port = self.cluster_environment.main_address, self.cluster_environment.main_port
        return Notice(host, port, rank=self.global_rank, timeout=timeout)

    @override
    def setup(self, trainer: "Trainer") -> None:
        self._trainer = trainer
        verify(trainer, self._lightning_version)
        if self._layer_sync is not None and self.layout.replica_size == 1:
            # It would synchronise statistics over all replicas at every forward.
            self._layer_sync = None
            rank_zero_warn(
                "Trainer(sync_batchnorm=True) has no effect on EASGDStrategy with one process a replica: batch "
                "statistics are each replica's own"
            )
        if trainer.state.fn == "fit":
            self._refuse_callbacks(trainer)
            if self.layerwise:
                refuse_training(trainer, self._module)
            if trainer.loggers:
                self._add_monitor(trainer)
        super().setup(trainer)
        if trainer.state.fn != "fit":
            self._patch(trainer._signal_connector, "_sigterm_notifier_fn", self._on_sigterm)
            return
        self._open_couplings()
        self._take_over(trainer)
        if self._dynamic is not None:
            self._dynamic.start()

    def _refuse_callbacks(self, trainer: "Trainer") -> None:
        for callback in callbacks_of(trainer):
            # As a callback it trains inside of fit, ends that training, and lets another begin in its place.
            if is_a(callback, "callbacks.LearningRateFinder") and not getattr(callback, "_early_exit", False):
                raise ValueError(
                    "EASGDStrategy: the callback LearningRateFinder runs a training inside of fit; call "
                    "Tuner(trainer).lr_find(module) before fit instead"
                )

    def _add_monitor(self, trainer: "Trainer") -> None:
        """Adds an ElasticMonitor where there is none: with the strategy's name alone, a run shows its coupling."""
        callbacks: list[Any] = callbacks_of(trainer)
        if not any(isinstance(callback, self._monitor_type) for callback in callbacks):
            monitor = self._monitor_type()
            callbacks.insert(0, monitor)  # ModelCheckpoint stays last
            monitor.setup(trainer, trainer.lightning_module, stage="fit")

    @override
    def configure_ddp(self) -> None:
        # Where DDPStrategy wraps the module. Here it stays as it is where a replica is one process.
        layout = self.layout
        assert self._rendezvous is not None
        left_out = self._buffer_rules.not_shared(self._module)
        check_same_parameters(self._module, self._rendezvous.roll_call, layout, left_out)
        self._members = Members(
            layout,
            self.global_rank,
            store=PrefixStore("members", self._rendezvous.store),
            device=self.root_device,
            timeout=self._wait,
        )
        self._cleanup.callback(self._members.close)
        if layout.world_size > 1:
            store = PrefixStore("module", self._rendezvous.store)
            self._group = new_group(store, self.global_rank, layout.world_size, self.root_device, self._wait)
            start_from_rank_0(
                self._module,
                self._group,
                rank=self.global_rank,
                size=layout.world_size,
                device=self.root_device,
                left_out=left_out,
            )
        self._members.confine_batch_norm(self._module)
        if layout.replica_size > 1:
            self._ddp_kwargs["process_group"] = self._members.ddp_group
            if self._ddp_comm_hook is not None and self._ddp_comm_state is None:  # torch's hooks would take WORLD
                self._ddp_comm_state = self._members.ddp_group
            elif getattr(self._ddp_comm_state, "process_group", self._members) is None:
                raise ValueError(
                    f"EASGDStrategy(ddp_comm_state=<{type(self._ddp_comm_state).__name__} without process_group>): it "
                    "would average gradients over all replicas; a hook without state gets the replica's own group"
                )
            super().configure_ddp()
        else:
            self._stand_for_ddp()
        self._show_layout(layout)
        self._buffers = CenterBuffers(
            self._module,
            self._group,
            layout.world_size,
            self._members.group,
            rank=self.global_rank,
            replica_size=layout.replica_size,
            device=self.root_device,
            rules=self._buffer_rules,
            held=lambda: (p for coupling in self.couplings for p in coupling.vector.parameters),
        )
        self._set_up_sampling(self._rendezvous, self._members)

    def _stand_for_ddp(self) -> None:
        """Lets scripts that were written for ``ddp`` find at ``trainer.model`` what its wrapper has for them.

        Here the module is not wrapped: ``trainer.model.module`` is the module, and ``no_sync()`` has nothing to do.
        """
        if asked := for_ddp(self._ddp_kwargs):
            rank_zero_warn(
                f"EASGDStrategy({', '.join(f'{name}=...' for name in asked)}) has no effect with one process a "
                "replica: these are arguments of DistributedDataParallel, which wraps a replica of several ranks"
            )
        own: Any = vars(self._module)  # not setattr, which would make the module a part of itself
        for name, value in (("module", self._module), ("no_sync", nullcontext)):
            if not hasattr(self._module, name):
                own[name] = value
                self._cleanup.callback(own.pop, name, None)

    def _show_layout(self, layout: Layout) -> None:
        """Says which ranks form which replica."""
        assert self._rendezvous is not None
        hosts = self._rendezvous.roll_call.gather("say which hosts they are on", platform.node())
        if layout.world_size > 1:
            rank_zero_info(layout.describe(hosts))

    def _set_up_sampling(self, rendezvous: Rendezvous, members: Members) -> None:
        assert self._trainer is not None
        seed = int(os.getenv("PL_GLOBAL_SEED", "0"))  # as Lightning's own sampler
        if self.data == "replicate" or isinstance(self.data, float):
            ReplicatedData(
                self._trainer,
                replica=self.replica,
                num_replicas=self.num_replicas,
                member=members.index,
                replica_size=members.size,
                fraction=self.data if isinstance(self.data, float) else None,
                seed=seed,
                patch=self._patch,
            )
        if self.data == "dynamic":
            self._dynamic = DynamicData(
                self._trainer,
                PrefixStore("data", rendezvous.store),
                replica=self.replica,
                num_replicas=self.num_replicas,
                seed=seed,
                timeout=self._wait,
                patch=self._patch,
                ahead=self.num_nodes > 1,
            )
            self._cleanup.callback(self._dynamic.close)
            if self._resumption.shared_epoch is not None:
                self._dynamic.load_state_dict(self._resumption.shared_epoch, of_all=True)

    def _open_rendezvous(self, notice: Notice | None) -> Rendezvous:
        assert self.cluster_environment is not None
        connect = partial(
            Rendezvous,
            self.cluster_environment.main_address,
            rank=self.global_rank,
            world_size=self.layout.world_size,
            timeout=self._wait,
            poll=timedelta(seconds=1 if self.transport.synchronous else 0.2),
            max_silence=self.max_silence,
            arrival=None if notice is None else self._timeout,
        )
        if notice is None:
            # A default group that was there before says nothing of when its ranks come: they may be minutes apart, in
            # a script between two of its calls. Only from here on are all expected within half a minute.
            self.barrier()
        if self.is_global_zero:
            rendezvous = connect(None)
            (self.broadcast if notice is None else notice.post)(rendezvous.port)
        else:
            rendezvous = connect(self.broadcast(None) if notice is None else notice.read())
        self._cleanup.callback(rendezvous.close)
        return rendezvous

    def _open_couplings(self) -> None:
        assert self._rendezvous is not None
        assert self._members is not None
        for optimizer in self.optimizers:
            if type(optimizer).__name__ in ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer"):
                raise ValueError(
                    f"EASGDStrategy: {type(optimizer).__name__} synchronises the replicas at every step; return the "
                    "optimizer that it wraps from configure_optimizers"
                )
        coupled = self._coupled_parameters()
        trained = [(type(optimizer).__name__, parameters) for optimizer, parameters in coupled]
        check_same_couplings(trained, self._rendezvous.roll_call, self.layout)
        self._line = self._open_line(len(coupled))
        for index, (optimizer, parameters) in enumerate(coupled):
            vector = ParameterVector(parameters.values(), device=self.root_device)
            center = self._open_center(f"coupling/{index}", vector.read(), index)
            algorithm = copy.deepcopy(self.algorithm)
            algorithm.bind(optimizer, list(parameters.values()))
            algorithm.clock = first_clock(index % self.fragments, self.fragments, algorithm)
            coupling = Coupling(list(parameters), vector, algorithm, center, copy.deepcopy(self.average))
            coupling.report_every = self._report_every
            coupling.turnstile = self._open_turnstile(f"gate/{index}")
            self.couplings.append(coupling)
            self._by_optimizer.setdefault(id(optimizer), []).append(coupling)
        self._modes = OptimizerModes(self.optimizers, self._lightning_optimizers, lambda: self._holds_center)
        self._cleanup.callback(self._modes.close)
        if self.layerwise:
            self._layerwise = Layerwise(self._module, self.optimizers[0], self.couplings)
            self._cleanup.callback(self._layerwise.close)
        self._steps = Steps(
            self._module,
            self.optimizers,
            is_automatic=bool(self._module.automatic_optimization),
            take=self._take_step,
            add_force=self._add_force_of,
            is_training=lambda: self._trainer is not None and bool(self._trainer.training),
        )
        self._steps.open()
        self._cleanup.callback(self._steps.close)
        if not self.transport.synchronous:
            self._free_running = FreeRunning(
                self.couplings,
                self._rendezvous,
                rank=self.global_rank,
                world_size=self.layout.world_size,
                timeout=self._wait,
            )

    def _coupled_parameters(self) -> list[tuple[Optimizer, dict[str, nn.Parameter]]]:
        """Returns, for each coupling, its parameters by name and the optimizer that steps them."""
        left_out = self._buffer_rules.ignored(self._module)
        if self.layerwise and any(p.requires_grad and n in left_out for n, p in self._module.named_parameters()):
            raise ValueError(
                "EASGDStrategy(layerwise=True) with trained parameters in _ddp_params_and_buffers_to_ignore: a layer "
                "is updated when it exchanges, and these do not; leave them out there, or use layerwise=False"
            )
        pairs = zip(self.optimizers, coupled_parameters(self._module, self.optimizers, left_out), strict=True)
        if self.layerwise:
            return [(o, layer) for o, parameters in pairs for layer in by_layer(self._module, parameters)]
        if self.fragments > 1:
            return [(o, part) for o, parameters in pairs for part in self._fragments_of(parameters)]
        return list(pairs)

    def _fragments_of(self, parameters: dict[str, nn.Parameter]) -> list[dict[str, nn.Parameter]]:
        parts = by_fragment(self._module, parameters, self.fragments)
        sizes = [sum(p.numel() for p in part.values()) for part in parts]
        if not self.couplings and max(sizes) * self.fragments > 2 * sum(sizes):
            rank_zero_warn(
                f"EASGDStrategy(fragments={self.fragments}): the largest one has {max(sizes):,} of {sum(sizes):,} "
                "parameters, since no tensor is cut: what travels at a time falls less than half as much as it could"
            )
        return parts

    def _open_turnstile(self, name: str) -> Passage | None:
        gate: Gate | None = self.gate
        if gate is None and not self.transport.synchronous:
            gate = self.algorithm.gate(self.num_replicas)
        if gate is None:
            return None
        assert self._rendezvous is not None
        assert self._members is not None
        open_one = partial(
            Turnstile,
            gate,
            replica=self.replica,
            num_replicas=self.num_replicas,
            timeout=self._wait,
            check=self._rendezvous.raise_if_failed,
        )
        turnstile: Turnstile | DoubleTurnstile
        turnstile = additions = open_one(PrefixStore(name, self._rendezvous.store))
        # Where a step begins with reading and ends with adding, the gate is for both.
        if isinstance(gate, StaleSynchronous) and type(self.algorithm).begin is not Algorithm.begin:
            readings = open_one(PrefixStore(f"{name}/readings", self._rendezvous.store))
            turnstile = DoubleTurnstile(additions, readings)
        return SharedTurnstile(turnstile, self._members) if self._members.size > 1 else turnstile

    def _open_line(self, size: int) -> Line | None:
        """Returns the communicator that all couplings share on a CUDA device; None where each has its own group."""
        if self.root_device.type != "cuda" or not isinstance(self.transport, AllReduce):
            return None
        assert self._rendezvous is not None
        assert self._members is not None
        group = self._group if self.layout.replica_size == 1 else None
        if group is None:
            store = PrefixStore(f"exchanges/{self._members.index}", self._rendezvous.store)
            group = new_group(store, self.replica, self.num_replicas, self.root_device, self._wait)
        return Line(group, size, self.root_device, self._wait)

    def _open_center(self, name: str, initial: Tensor, index: int) -> OpenCenter:
        rendezvous, line = self._rendezvous, self._line
        assert rendezvous is not None
        assert self._members is not None

        transport: Any = self.transport  # the argument ``place`` is AllReduce's own

        def open_slice(part: Tensor, member: int) -> OpenCenter:
            opened: OpenCenter = transport.open(
                part,
                replica=self.replica,
                num_replicas=self.num_replicas,
                rule=self.algorithm.rule(self.num_replicas),
                store=PrefixStore(f"{name}/{member}", rendezvous.store),
                timeout=self._wait,
                num_slots=num_slots(self.num_replicas, self.algorithm.num_told),
                **({} if line is None else {"place": line.place(index)}),
            )
            return opened

        center = self._members.open_center(name, initial, open_slice)
        self._cleanup.callback(center.close)
        return center

    @torch.no_grad()
    def _couple_anew(self) -> None:
        """Couples the parameters that an optimizer holds and trains by now, where these are others than before.

        One that joins (thawed by BackboneFinetuning, say) has the replicas' mean as its center; one that leaves is set
        to its center. All replicas call it at the same point; collective where something has changed.
        """
        has_changed = False
        for index, (optimizer, parameters) in enumerate(self._coupled_parameters()):
            coupling = self.couplings[index]
            if list(parameters) == coupling.names:
                continue
            has_changed = True
            self._meet("the start of an epoch")
            center = dict(zip(coupling.names, coupling.vector.views(coupling.center.value), strict=True))
            for name, parameter in zip(coupling.names, coupling.vector.parameters, strict=True):
                if name not in parameters:
                    parameter.copy_(center[name])
            vector = ParameterVector(parameters.values(), coupling.vector.dtype, coupling.vector.device)
            initial = vector.read()
            if self._group is not None and initial.numel() > 0:
                self._group.allreduce([initial]).wait()
                initial /= self.layout.world_size
            for name, view in zip(parameters, vector.views(initial), strict=True):
                if name in center:
                    view.copy_(center[name])
            self._generation += 1
            coupling.algorithm.bind(optimizer, list(parameters.values()))
            opened = self._open_center(f"coupling/{index}/{self._generation}", initial, index)
            coupling.rebind(list(parameters), vector, opened, initial)
            if self._layerwise is not None:
                self._layerwise.attach()
        if has_changed and isinstance(self.model, nn.parallel.DistributedDataParallel):
            # It averages the gradients of what was trainable when it was made.
            self.model.reducer._remove_autograd_hooks()
            with torch.enable_grad():
                self.model = self._setup_model(self._module)
            self._register_ddp_hooks()

    @property
    def _module(self) -> "LightningModule":
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _wait(self) -> timedelta:
        return timedelta(minutes=30) if self._timeout is None else self._timeout

    def _take_over(self, trainer: "Trainer") -> None:
        """Puts this strategy into the places of the Trainer's loops for which a Strategy has no hook."""
        fit_loop = trainer.fit_loop
        epoch_loop = fit_loop.epoch_loop
        # A WORLD broadcast at every batch.
        self._patch(epoch_loop, "_broadcast_sigterm_tensor", lambda: None)
        self._patch(trainer._signal_connector, "_sigterm_notifier_fn", self._on_sigterm)
        # Around the whole of an evaluation, so that callbacks' hooks see its weights too, and an error puts them back.
        self._patch(epoch_loop.val_loop, "run", partial(self._evaluate, epoch_loop.val_loop.run))
        self._patch(fit_loop, "on_advance_end", partial(self._end_epoch, fit_loop.on_advance_end))
        if self._free_running is None and self.layout.world_size > 1:
            self._patch(epoch_loop, "on_advance_end", partial(self._end_batch, epoch_loop.on_advance_end))
        for callback in callbacks_of(trainer):
            # A time limit broadcasts at every batch, where replicas with more batches than rank 0 would wait for good.
            if is_a(callback, "callbacks.Timer"):
                self._patch(callback, "on_train_batch_end", partial(self._check_time, callback))
        if self._free_running is not None:
            for callback in callbacks_of(trainer):
                if is_a(callback, "callbacks.Checkpoint"):
                    self._let_0_decide(callback)
        if any(c.algorithm.proximal_term.__func__ is not Algorithm.proximal_term for c in self.couplings):  # type: ignore[attr-defined]
            plugin = self.precision_plugin
            self._patch(plugin, "_after_closure", partial(self._add_force, plugin._after_closure))
        leaves_out = self._dynamic is not None
        set_up_data = partial(self._resumption.set_up_data, trainer, fit_loop.setup_data, leaves_out=leaves_out)
        self._patch(fit_loop, "setup_data", set_up_data)
        self._patch(epoch_loop, "on_run_start", partial(self._start_epoch, trainer, epoch_loop.on_run_start))
        self._patch(fit_loop, "run", partial(self._train, fit_loop.run))
        # Around hooks and writing, which get the center from the module, from named_parameters() as from state_dict().
        self._patch(trainer, "save_checkpoint", partial(self._save_center, trainer.save_checkpoint))
        connector = trainer._checkpoint_connector
        self._patch(connector, "dump_checkpoint", partial(self._dump_center, connector.dump_checkpoint))
        # Before the callbacks' on_train_end: what an averaging callback puts into the module there stays.
        self._patch(fit_loop, "on_run_end", partial(self._end_training, fit_loop.on_run_end))

    def _let_0_decide(self, callback: Any) -> None:
        """Makes a callback that saves checkpoints act in replica 0 alone, without a question to the others."""
        for name in ("on_train_batch_end", "on_train_epoch_end", "on_validation_end", "on_train_end", "on_exception"):
            if hasattr(callback, name):
                hook = partial(self._lead, getattr(callback, name)) if self.is_global_zero else self._follow
                if name == "on_train_epoch_end":
                    hook = partial(self._after_metrics, hook)
                self._patch(callback, name, hook)

    def _after_metrics(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Computes an epoch's metrics first, for which all ask all: replica 0 would do it by itself in the hook."""
        assert self._trainer is not None
        _ = self._trainer.callback_metrics  # Lightning computes them when they are looked at, and once
        return hook(*args, **kwargs)

    def _lead(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before, self._is_leading = self._is_leading, True
        try:
            return hook(*args, **kwargs)
        finally:
            self._is_leading = before

    def _follow(self, *_: Any, **__: Any) -> None:
        """Keeps what this replica would write if replica 0 saved a checkpoint in the same hook."""
        assert self._trainer is not None
        assert self._free_running is not None
        if self._free_running.at_rest and not self._interrupted:
            self._dump = self._dump_own(self._trainer)

    def _dump_own(self, trainer: "Trainer") -> dict[str, Any]:
        return private_part(trainer._checkpoint_connector.dump_checkpoint(weights_only=False), self._center_state)

    def _write_replica_file(self, path: str, save: str, replaced: list[tuple[str, list[str]]]) -> None:
        """As replica 0 asks for it, while this replica waits."""
        assert self._trainer is not None
        dump = self._dump or self._dump_own(self._trainer)
        for written, saves in replaced:  # replica 0 does not see another host's
            ReplicaFile.remove(written, owner=self._file_owner, but=saves)
        ReplicaFile(path, save, self._file_owner).write(dump, self._own_state(), self.num_replicas)

    def _part(self, *, has_ended: bool = False) -> None:
        """Ends what the replicas of an asynchronous run have met for, and stops all if one was asked to stop.

        Args:
            has_ended: whether training has, for all.
        """
        assert self._free_running is not None
        assert self._rendezvous is not None
        if self._free_running.part(self._write_replica_file, stop=self._is_asked_to_stop):
            # All know it now, and meet to stop in their next step: who left without would take the store along.
            self._rendezvous.stop_requested = True
            if has_ended:
                self._set_received_sigterm()
        self._dump = None

    def _patch(self, owner: object, name: str, value: Any) -> None:
        """Hides an attribute of one object by ``value`` until teardown, which puts back what the object itself had.

        Raises:
            RuntimeError: the object has no such attribute, in this version of Lightning.
        """
        if not hasattr(owner, name):
            raise missing(f"{type(owner).__name__}.{name}", self._lightning_version)
        own = vars(owner)
        has_own, before = name in own, own.get(name)
        setattr(owner, name, value)
        if has_own:
            self._cleanup.callback(setattr, owner, name, before)
        else:
            self._cleanup.callback(own.pop, name, None)

    # --- steps ------------------------------------------------------------------------------------------------------

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: "LightningModule | nn.Module | None" = None,
        **kwargs: Any,
    ) -> Any:
        output = None

        def local_update() -> None:
            nonlocal output
            # DDPStrategy's own adds nothing without its model averager, which this strategy never has.
            output = super(ElasticStrategy, self).optimizer_step(optimizer, closure, model, **kwargs)

        if self._layerwise is None:
            self._take_step(optimizer, local_update)
            return output
        # The precision plugin's part of an optimizer step, without the update: the layers have had it by then.
        return self._take_step(
            optimizer, partial(self.precision_plugin._wrap_closure, self._module, optimizer, closure)
        )

    def _take_step(self, optimizer: Optimizer, update: Callable[[], Any]) -> Any:
        """Makes one step of an optimizer's replica, exchange included, and attends to what others ask for.

        Args:
            optimizer: one of those that configure_optimizers returned.
            update: its own step; with layers their forward and backward pass alone.

        Returns:
            What ``update`` returned, with layers.
        """
        couplings = self._by_optimizer.get(id(optimizer))
        if couplings is None:
            raise RuntimeError(
                f"EASGDStrategy: this {type(optimizer).__name__} is none of the optimizers that configure_optimizers "
                "returned when training began; add parameters to those with add_param_group instead of replacing them"
            )
        if self._is_leaving:  # in a step with several optimizers
            raise self._sigterm_exception()
        assert self._trainer is not None
        assert self._steps is not None
        at = self._trainer.fit_loop.epoch_loop._batches_that_stepped  # the step of Lightning's own log entries
        recover = partial(self._recover, optimizer) if self.on_nonfinite == "reset" else None
        output = None
        with self._steps.counted(optimizer):
            if self.fragments > 1:
                step_fragments(couplings, update, recover=recover, at=at)
            elif self._layerwise is None:
                [coupling] = couplings
                coupling.step(update, recover=recover, at=at)
            else:
                output = self._layerwise.step(update, recover=recover, at=at)
        self._rendezvous_progress()
        if any(coupling.ended for coupling in couplings):
            self._trainer.should_stop = True
        # What this rank knows by itself, and what all ranks of its replica act upon.
        assert self._members is not None
        stop, overdue, end = self._members.agree(self._is_asked_to_stop, self._is_overdue, self._is_ending)
        if self._rendezvous is not None:
            self._rendezvous.raise_if_failed()
        if self._is_free and end:
            self._share_end()
        for each in self.couplings if end and self._free_running is None else ():
            each.end = True
        has_votes = any(coupling.stop_votes for coupling in couplings)
        if has_votes or stop or self._stop_seen_at is not None:
            self._attend_to_stop(has_votes=has_votes, overdue=overdue)
        return output

    def _add_force(self, after_closure: Callable[..., None], model: Any, optimizer: Any) -> None:
        """Before Lightning's own, which calls ``on_before_optimizer_step`` and clips: gradients are unscaled here."""
        self._add_force_of(optimizer)
        after_closure(model, optimizer)

    def _add_force_of(self, optimizer: Optimizer) -> None:
        """Adds what the algorithm adds to the gradients.

        Raises:
            ValueError: the optimizer unscales them by itself, and would scale the force down with them.
        """
        couplings = self._by_optimizer.get(id(optimizer), [])
        scaler = getattr(self.precision_plugin, "scaler", None)
        has_force = any(coupling.algorithm.proximal_term() is not None for coupling in couplings)
        if has_force and scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                f"EASGDStrategy({self.algorithm!r}) with a GradScaler (precision='16-mixed') and "
                f"{type(optimizer).__name__}(fused=True): this algorithm's force joins the gradients before the "
                "optimizer's step, and this optimizer unscales them in it; use fused=False, or precision='bf16-mixed'"
            )
        for coupling in couplings:
            coupling.add_force()

    def _recover(self, optimizer: Optimizer, parameters: Sequence[Tensor] | None = None) -> None:
        log.warning(
            "replica %d: its delta was not finite; it starts again from the center with a fresh optimizer state",
            self.replica,
        )
        for parameter in list(optimizer.state) if parameters is None else parameters:
            optimizer.state.pop(parameter, None)

    @property
    def _is_overdue(self) -> bool:
        """Whether a request to stop has waited long enough for an exchange to carry it."""
        return self._stop_seen_at is not None and time.monotonic() - self._stop_seen_at > _STOP_PATIENCE_S

    def _attend_to_stop(self, *, has_votes: bool, overdue: bool) -> None:
        """Ends training on all replicas together: a request to stop rides on the exchanges until all have seen it."""
        if self._stop_seen_at is None:
            self._stop_seen_at = time.monotonic()
            for each in self.couplings:
                each.stop = True
        # A vote that all have read stops all at the same exchange. Where none comes for long, meeting does it.
        if has_votes or overdue or self._free_running is not None:
            if self._free_running is not None:
                self._free_running.is_free = False
            self._meet(STOP)
            self._stopped_together = True
            self._set_received_sigterm()

    @property
    def _is_leaving(self) -> bool:
        """Whether the replicas of an asynchronous run have met to stop, each at another point of its epoch.

        Lightning raises at the end of the batch. Whatever this one would do together with the others until then, or in
        place of that, they would not come to: an exchange, an evaluation, the end of an epoch.
        """
        return self._stopped_together and self._free_running is not None

    @property
    def _is_asked_to_stop(self) -> bool:
        return self._rendezvous is not None and self._rendezvous.stop_requested

    @property
    def _is_free(self) -> bool:
        """Whether this replica is where nothing may wait for another."""
        return self._free_running is not None and self._free_running.is_free

    def _rendezvous_progress(self) -> None:
        if self._rendezvous is not None:
            self._rendezvous.progress += 1

    @property
    def _is_ending(self) -> bool:
        assert self._trainer is not None
        assert self._rendezvous is not None
        return self._wants_end or bool(self._trainer.should_stop) or self._rendezvous.end_requested

    def _share_end(self) -> None:
        """Tells the others that this replica is to end training, or has heard it from them."""
        assert self._trainer is not None
        assert self._rendezvous is not None
        self._rendezvous.request_end()
        self._trainer.should_stop = True

    def _check_time(self, timer: Any, *_: Any) -> None:
        """Rank 0 decides; the others learn of it in its next exchange, at the latest when they meet."""
        if self.is_global_zero and timer._interval == "step" and timer._duration is not None:
            over = timer.time_elapsed() >= timer._duration
            if over and self._free_running is not None and self._rendezvous is not None:
                self._rendezvous.request_end()
            if over:
                self._want_end()

    def _want_end(self) -> None:
        """Has all replicas end training, when the exchanges have told them or at the end of the epoch."""
        self._wants_end = True
        if self.layout.replica_size == 1:  # else the ranks of a replica first agree on it, in their next step
            for coupling in self.couplings:
                coupling.end = True

    def _end_batch(self, on_advance_end: Callable[[Any], None], data_fetcher: Any) -> None:
        """Keeps a rank that alone was told to stop from leaving its epoch before all others know it."""
        assert self._trainer is not None
        is_known = self._end_is_agreed or any(coupling.ended for coupling in self.couplings)
        if self._trainer.should_stop and not is_known:
            self._trainer.should_stop = False
            self._want_end()
            self._end_wanted_at = self._end_wanted_at or time.monotonic()
        # No exchange has told the others for long: it leaves by itself, and tells them where they exchange or meet.
        waited = self._end_wanted_at is not None and time.monotonic() - self._end_wanted_at >= _STOP_PATIENCE_S
        if waited and not is_known and self.layout.replica_size == 1:
            self._trainer.should_stop = self._end_is_agreed = True
        on_advance_end(data_fetcher)

    def _agree(self, *flags: bool) -> list[bool]:
        """Returns for each flag whether some rank has raised it. Collective, where all have met."""
        if self._group is None:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.float32, device=self.root_device)
        self._group.allreduce([raised]).wait()
        return [count > 0 for count in raised.tolist()]

    def _set_received_sigterm(self) -> None:
        # Lightning raises its SIGTERMException at the end of the batch where this is set.
        assert self._trainer is not None
        self._trainer._signal_connector.received_sigterm = True

    def _on_sigterm(self, signum: int, _: object) -> None:
        """Replaces Lightning's handler, which broadcasts over WORLD wherever the process happens to be."""
        assert self._trainer is not None
        log.info("rank %d received signal %d", self.global_rank, signum)
        if self._rendezvous is None or not self.couplings or self.layout.world_size == 1:
            self._set_received_sigterm()
        else:
            self._rendezvous.request_stop()

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._rendezvous is not None:
            self._rendezvous.raise_if_failed()
        self._resumption.own = None  # whatever had to be put back has been
        with nullcontext() if self._steps is None else self._steps.batch(self._accumulated):
            output = super().training_step(*args, **kwargs)
        if self.algorithm.needs_loss:
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if isinstance(loss, Tensor):
                for coupling in self.couplings:
                    coupling.algorithm.observe_loss(loss.detach())
        return output

    @property
    def _accumulated(self) -> int:
        assert self._trainer is not None
        return int(self._trainer.accumulate_grad_batches)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._rendezvous is not None:
            self._rendezvous.raise_if_failed()
        return super().validation_step(*args, **kwargs)

    # --- meeting points ---------------------------------------------------------------------------------------------

    def _meet(self, reason: str, *, for_center: bool = False, ending: bool = False) -> bool:
        """Waits for all replicas, and completes what is outstanding. Collective and blocking.

        A replica that is here while others still train takes its turn in their exchanges without adding anything;
        the exchange in which all say that they are here is the last. All centers are then equal and at rest. Over an
        asynchronous center the replicas meet at the rendezvous, and read the same center.

        Args:
            reason: what comes next; see ``FreeRunning.meet``.
            for_center: whether the center's buffers are wanted too; over an asynchronous center they always are.
            ending: whether training ends for all with this.

        Returns:
            Whether all met for this reason. If not, some have ended their epoch and this one goes on without.
        """
        if self._free_running is not None:
            try:
                together = self._free_running.meet(reason, ending=ending or self._is_ending)
            except StoppedByAnother:
                self._gather_buffers()
                self._stopped_together = True
                self._set_received_sigterm()
                raise self._sigterm_exception() from None
            if self._free_running.ending and self._trainer is not None:
                self._trainer.should_stop = True
            if not together:
                return False
        elif not self._settle_together(reason):
            return False
        if self._trainer is not None and any(coupling.ended for coupling in self.couplings):
            self._trainer.should_stop = True
        if for_center or self._free_running is not None:
            self._gather_buffers()
        return True

    def _gather_buffers(self) -> None:
        if self._free_running is not None and self._group is not None:
            for coupling in self.couplings:
                if coupling.average is not None:  # each replica saw the center at other times
                    self._group.broadcast(coupling.average.value, 0).wait()
        if self._buffers is not None:
            self._buffers.gather()
            self._center_is_new = True

    def _settle_together(self, reason: str) -> bool:
        """Completes all couplings' exchanges until all replicas are here, and returns whether for this reason."""
        assert self._rendezvous is not None
        while True:
            if len(self.couplings) == 1:
                self._settle(self.couplings[0])
            elif self._line is not None:
                settle_in_line(self.couplings, self._line)
            elif self.couplings:  # another replica may need an answer from any of them first
                with ThreadPoolExecutor(len(self.couplings)) as pool:
                    list(pool.map(self._settle, self.couplings))
            try:
                together = meets(self._rendezvous.roll_call.gather("meet", reason), reason)
            except StoppedByAnother:
                self._stopped_together = True
                self._set_received_sigterm()
                raise self._sigterm_exception() from None
            if together is not None:
                return together

    @staticmethod
    def _settle(coupling: Coupling) -> None:
        coupling.abstain()
        while not coupling.all_done:
            coupling.abstain()

    def _evaluate(self, run: Callable[[], Any]) -> Any:
        if self._free_running is not None:
            return self._evaluate_between(self._free_running, run)
        assert self._trainer is not None
        if not self._meet(EVALUATION, for_center=self.evaluate == "center"):
            log.warning("replica %d leaves an evaluation out: others have ended their epoch already", self.replica)
            return []
        self._say_if_unchanged()
        with self._holding(self.evaluate):
            result = run()
        if self._group is not None:  # a signal has come to all by now, or to none
            asked, ends = self._agree(self._is_asked_to_stop, self._trainer.should_stop)
            if asked:
                self._stopped_together = True
                self._set_received_sigterm()
            if ends:
                self._trainer.should_stop = self._end_is_agreed = True
        return result

    def _say_if_unchanged(self, *, at_end: bool = False) -> None:
        """Warns, once a run, of an evaluation whose center is that of the one before, and of an end without exchange.

        Args:
            at_end: whether training ends here; else this is an evaluation.
        """
        assert self._steps is not None
        steps, additions = self._steps.count, sum(coupling.center.additions for coupling in self.couplings)
        (steps_before, additions_before), self._last_seen = self._last_seen, (steps, additions)
        if additions != (self._additions_at_start if at_end else additions_before):
            return
        period = f"an exchange is due every {self.algorithm.period} optimizer steps"
        if at_end and steps == 0 and self._steps.num_batches > 0 and any(c.is_apart for c in self.couplings):
            rank_zero_warn(
                f"EASGDStrategy: training ended after {self._steps.num_batches} batches without a step of an optimizer "
                "that configure_optimizers returned, and yet parameters have changed. The center, which is saved and "
                "which the module now holds, knows nothing of it: make the updates with such an optimizer"
            )
        elif at_end and steps > 0:
            rank_zero_warn(
                f"EASGDStrategy: training ended after {steps} optimizer steps without an exchange ({period}). The "
                "center, which is saved and which the module now holds, is what training began with: train longer, or "
                f"exchange more often, for example {type(self.algorithm).__name__}(period={max(1, steps // 2)})"
            )
        elif not at_end and steps > steps_before and self.evaluate == "center" and not self._has_said_unchanged:
            self._has_said_unchanged = True
            rank_zero_warn(
                f"EASGDStrategy: this evaluation, after {steps} optimizer steps, sees the same center as the one "
                f"before, {steps - steps_before} steps ago, or as the start of training: {period}. Metrics repeat "
                "until then, and EarlyStopping counts that against its patience: exchange more often, or evaluate "
                "less often"
            )

    def _evaluate_between(self, free_running: FreeRunning, run: Callable[[], Any]) -> Any:
        if self._is_leaving:
            return []
        was_free, free_running.is_free = free_running.is_free, False
        if not self._meet(EVALUATION):
            log.warning("replica %d leaves an evaluation out: others have ended their epoch already", self.replica)
            free_running.is_free = was_free
            return []
        self._say_if_unchanged()
        with self._holding(self.evaluate):
            result = run()
        self._part()
        if was_free:
            self._go_free(free_running)
        return result

    def _go_free(self, free_running: FreeRunning) -> None:
        if self._buffers is not None:
            self._buffers.forget()  # nobody gathers them meanwhile
        free_running.at_rest = False
        free_running.is_free = self.layout.world_size > 1

    def _end_epoch(self, on_advance_end: Callable[[], None]) -> None:
        assert self._trainer is not None
        assert self._rendezvous is not None
        has_used_up = 0 <= self._trainer.max_steps <= self._trainer.global_step
        if self._free_running is None:
            self._meet(END_OF_EPOCH)
            on_advance_end()
            wants_end = self._wants_end or self._trainer.should_stop
            may_end = wants_end and self._trainer.fit_loop._can_stop_early
            # A rank that has made all its steps, or was told to stop, ends training for all.
            wants_end, ends = self._agree(wants_end or has_used_up, may_end or has_used_up)
            if wants_end and not has_used_up:
                self._trainer.should_stop = self._end_is_agreed = True
            if ends:
                self._end_before_minimum()
            return
        if self._is_leaving:  # Lightning leaves it to the epoch's end after the last batch
            raise self._sigterm_exception()
        self._free_running.is_free = False
        if self._trainer.should_stop or (has_used_up and self.data == "dynamic"):
            self._rendezvous.request_end()  # or the others would do what is left of a shared epoch
        # What comes is collective, so that nobody may go on alone: who has made all its steps ends training for all.
        if not self._meet(END_OF_EPOCH, ending=has_used_up):
            log.warning("replica %d goes on while others have ended training", self.replica)
            self._free_running.is_free = True
            on_advance_end()
            return
        on_advance_end()
        self._part()

    def _end_before_minimum(self) -> None:
        """Lets a request to stop end training here although ``min_epochs`` or ``min_steps`` is not reached.

        With streams of different length another rank has reached it, or its last step: it ends, and is not there any
        more for what all do together.
        """
        assert self._trainer is not None
        fit_loop = self._trainer.fit_loop
        self._patch(fit_loop, "min_epochs", None)
        self._patch(fit_loop.epoch_loop, "min_steps", None)

    def _train(self, run: Callable[[], None]) -> None:
        """Lightning's own, which calls no hook of its end where nothing is left to do."""
        run()
        if not self._holds_center:
            self._end_training(lambda: None)

    def _end_training(self, on_run_end: Callable[[], None]) -> None:
        if self._free_running is not None:
            self._meet(END_OF_TRAINING)
            self._say_if_unchanged(at_end=True)
            self._hold("center")
            on_run_end()
            self._part(has_ended=True)
            self._share_checkpoints()
            self.barrier()
            return
        self._meet(END_OF_TRAINING, for_center=True)
        self._say_if_unchanged(at_end=True)
        self._hold("center")
        on_run_end()

    def _share_checkpoints(self) -> None:
        """Tells all what replica 0's callbacks have saved: ``ckpt_path="best"`` names one file. Collective."""
        assert self._trainer is not None
        for callback in callbacks_of(self._trainer):
            if is_a(callback, "callbacks.ModelCheckpoint"):
                state = self.broadcast(callback.state_dict())
                if not self.is_global_zero:
                    callback.load_state_dict(state)

    # --- whose weights the module holds -----------------------------------------------------------------------------

    @contextmanager
    def weights_of(self, whose: Literal["center", "replica"]) -> Iterator[None]:
        """Puts the center's or this replica's weights and buffers into the module, and then what was there.

        Collective while fitting: all ranks must enter it at the same point of the loop. Blocks for an outstanding
        exchange. Over an asynchronous transport it is each rank's own and waits for nobody: the center as it is at the
        moment, inside an epoch with the replica's own buffers. Outside of ``fit`` the module is the only copy and stays
        as it is. After training has ended, in ``on_train_end``, the module holds the center and this gives the replica
        once more.

        Raises:
            ValueError: ``whose`` is neither.
        """
        if whose not in ("center", "replica"):
            raise ValueError(f"weights_of({whose!r}): must be 'center' or 'replica'")
        if whose == "center" and not self._holds_center:
            self._obtain_center()
        with self._holding(whose):
            yield

    def _obtain_center(self) -> None:
        if self._free_running is None:
            self._meet("", for_center=True)
        elif not self._free_running.at_rest:
            for coupling in self.couplings:
                coupling.refresh()

    @contextmanager
    def _holding(self, whose: str) -> Iterator[None]:
        before = "center" if self._holds_center else "replica"
        self._hold(whose)
        try:
            yield
        finally:
            self._hold(before)

    def _hold(self, whose: str) -> None:
        if self._buffers is None or self._holds_center == (whose == "center"):
            return
        for coupling in self.couplings:
            coupling.swap()
        if whose == "center":
            self._buffers.swap_in()
            if self._center_is_new and self.center_buffers != "mean":
                self._reestimate(self._buffers, self.center_buffers)
            self._center_is_new = False
        else:
            self._buffers.swap_out()
        self._holds_center = whose == "center"
        if self._modes is not None and not self._holds_center:
            self._modes.settle()

    def _reestimate(self, buffers: CenterBuffers, num_batches: int) -> None:
        assert self._trainer is not None
        combined = self._trainer.fit_loop._combined_loader
        if combined is None:
            return  # before the first epoch the statistics are as the module made them
        loader = copy.copy(combined.flattened[0])
        if getattr(loader, "persistent_workers", False):
            loader._iterator = None  # the original's own belongs to the epoch that is going on
        before = rng_state()
        apart = nullcontext() if self._dynamic is None else self._dynamic.apart()
        with self.precision_plugin.forward_context(), apart:
            buffers.reestimate(self.batch_to_device(batch) for batch in itertools.islice(loader, num_batches))
        set_rng_state(before)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the center's state dict: a copy on global rank zero, which writes it.

        Collective while fitting over a synchronous transport.
        """
        if self._holds_center or self._buffers is None:
            self._center_state = state = super().lightning_module_state_dict()
            return state
        with self._holding_to_save():
            state = super().lightning_module_state_dict()
            if not self.is_global_zero:
                return state  # not written
            # On the CPU: with the replica's state, a device may have no room for a copy.
            return {k: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in state.items()}

    @contextmanager
    def _holding_to_save(self) -> Iterator[None]:
        if not self._holds_center and self._buffers is not None:
            if self._interrupted:
                self._last_drain()
            else:
                self._obtain_center()
        with self._holding("center"):
            yield

    def _save_center(self, save: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """The Trainer's own, while the module holds the center. Collective like ``lightning_module_state_dict``."""
        with self._holding_to_save():
            try:
                save(*args, **kwargs)
            finally:
                self._center_state = None

    def _dump_center(self, dump: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Lightning's own, which calls the hooks. What they took of the module stays the center's."""
        stays = self._holds_center and (self._free_running is None or self.is_global_zero)
        with self._holding_to_save():
            checkpoint = dump(*args, **kwargs)
            # Another replica's of the weights are not written; what is put beside them is, maybe later.
            unwritten = None if self.is_global_zero else self._center_state
            return checkpoint if stays else set_apart(checkpoint, self._module, but=unwritten)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes the replica's file, then, on global rank zero, the checkpoint. Collective while fitting.

        Over an asynchronous transport replica 0 alone decides; between a meeting and its end it has the others write
        their files, elsewhere it writes the center alone.
        """
        if self._free_running is not None and not self._interrupted:
            self._save_from_0(self._free_running, checkpoint, filepath, storage_options)
            return
        path = self._place_of_files(checkpoint, filepath) if self.couplings and not self._interrupted else None
        if path is None:
            super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)
            return
        save = self.broadcast(uuid.uuid4().hex[:8])
        if self.is_global_zero:
            self._saves.begin(path, save)
        private = private_part(checkpoint, self._center_state)
        ReplicaFile(path, save, self._file_owner).write(private, self._own_state(), self.num_replicas)
        self.barrier()  # the checkpoint refers to all files
        checkpoint[KEY] = {"save": save, **self._saved_layout}
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)
        settled = self._saves.settle(writes_later=self._writes_later) if self.is_global_zero else []
        for written, saves in self.broadcast(settled):
            ReplicaFile.remove(written, owner=self._file_owner, but=saves)

    def _save_from_0(
        self, free_running: FreeRunning, checkpoint: dict[str, Any], filepath: Any, storage_options: Any
    ) -> None:
        at_rest = free_running.at_rest or self.layout.world_size == 1
        path = self._place_of_files(checkpoint, filepath) if at_rest else None
        if not self.is_global_zero:
            if path is not None:  # all were asked to save, by the user
                free_running.serve(self._write_replica_file, wait=True)
            return
        saved: dict[str, Any] = {"save": None, **self._saved_layout}
        if path is not None:
            saved["save"] = save = uuid.uuid4().hex[:8]
            self._saves.begin(path, save)
            private = private_part(checkpoint, self._center_state)
            ReplicaFile(path, save, self._file_owner).write(private, self._own_state(), self.num_replicas)
            free_running.request_files(path, save, self._replaced)
            self._replaced = []
        elif self._dynamic is not None:
            saved["data"] = self._dynamic.state_dict()
        super().save_checkpoint({**checkpoint, KEY: saved}, filepath, storage_options=storage_options)
        self._remove_replaced(writes_later=self._writes_later)

    def _place_of_files(self, checkpoint: dict[str, Any], filepath: Any) -> str | None:
        """Returns the local path of a checkpoint that gets replicas' files; None of any other."""
        if "optimizer_states" not in checkpoint:
            return None
        path = local_path(filepath)
        if path is None:
            rank_zero_warn(f"no replicas' files beside {filepath!r}: a run resumed from it starts from the center")
        return path

    def _remove_replaced(self, *, writes_later: bool) -> None:
        """On global rank zero: removes all files that it sees of saves that later ones have replaced by now."""
        for written, saves in (settled := self._saves.settle(writes_later=writes_later)):
            ReplicaFile.remove(written, but=saves)
        self._replaced += settled

    @property
    def _writes_later(self) -> bool:
        """Whether a checkpoint is written in a thread."""
        io: Any = self.checkpoint_io
        while io is not None:
            if any("Async" in kind.__name__ for kind in type(io).__mro__):
                return True
            io = getattr(io, "checkpoint_io", None)
        return False

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        path = local_path(filepath)
        if path is not None:
            self._saves.forget(path)
            ReplicaFile.remove(path, owner=None if self.is_global_zero else self._file_owner)

    @property
    def _saved_layout(self) -> dict[str, int]:
        layout = {"num_replicas": self.num_replicas, "replica_size": self.layout.replica_size}
        return {**layout, "layerwise": self.layerwise, "fragments": self.fragments}

    @property
    def _file_owner(self) -> str:
        """Whose file this rank writes beside a checkpoint: random states and data are each rank's own."""
        replica, member = divmod(int(self.global_rank), self.layout.replica_size)
        return str(replica) if self.layout.replica_size == 1 else f"{replica}-{member}"

    def _own_state(self) -> dict[str, Any]:
        assert self._buffers is not None
        return {
            "couplings": [coupling.state_dict() for coupling in self.couplings],
            "buffers": self._buffers.state_dict(),
            "extra": {k: v for k, v in (self._center_state or {}).items() if k.endswith("_extra_state")},
            "rng": rng_state(),
            "epoch_rng": self._resumption.epoch_rng,
            "data": None if self._dynamic is None else self._dynamic.state_dict(),
        }

    @torch.no_grad()
    def _load_own_state(self, state: dict[str, Any]) -> None:
        for coupling, own in zip(self.couplings, state["couplings"], strict=True):
            coupling.load_state_dict(own)
        assert self._buffers is not None
        self._buffers.load_state_dict(state["buffers"])
        if state.get("extra"):  # of set_extra_state, beside the tensors; the first versions did not keep it
            self._module.load_state_dict(state["extra"], strict=False)
        if self._dynamic is not None and state["data"] is not None:
            self._dynamic.load_state_dict(state["data"])

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        resumption = self._resumption
        resumption.own, resumption.fresh_optimizers, resumption.shared_epoch = None, False, None
        if self._module.trainer.state.fn != "fit":
            return checkpoint
        saved = checkpoint.get(KEY)
        resumption.shared_epoch = None if saved is None else saved.get("data")
        path, why = local_path(checkpoint_path), differences(saved, self._saved_layout)
        if path is None and not why:
            why = "its replicas' files cannot be read at a URL"
        if saved is None or path is None or why or self.resume == "center":
            # Without replicas' files it is any other strategy's checkpoint, whose optimizer states are one for all.
            resumption.fresh_optimizers = saved is not None and self.resume_optimizer == "fresh"
            rank_zero_warn(
                f"EASGDStrategy resumes {self.num_replicas} replicas from the center of {str(checkpoint_path)!r} "
                f"({why if self.resume == 'replicas' else 'as asked'}), each with "
                + ("fresh optimizer states" if resumption.fresh_optimizers else "a copy of its optimizer states")
            )
            return checkpoint
        error, content = None, {}
        try:
            content = ReplicaFile(path, saved["save"], self._file_owner).read()
        except ReplicaFileError as found:
            error = found
        if not self.reduce_boolean_decision(error is None):  # nobody goes on with half of it
            raise error or ReplicaFileError(f"another replica's file of {str(checkpoint_path)!r} could not be loaded")
        resumption.own = content["own"]
        return {**checkpoint, **content["lightning"]}

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        if self._resumption.fresh_optimizers:  # the groups' learning rates belong to the schedulers' state
            fresh = [{**state, "state": {}} for state in checkpoint["optimizer_states"]]
            checkpoint = {**checkpoint, "optimizer_states": fresh}
        self._couple_anew()  # a callback may have thawed parameters in on_fit_start, as far as it had got
        super().load_optimizer_state_dict(checkpoint)
        if self._resumption.own is not None:
            self._load_own_state(self._resumption.own)

    def _start_epoch(self, trainer: "Trainer", on_run_start: Callable[[Any], None], data_fetcher: Any) -> None:
        self._couple_anew()
        self._tell_epoch_length(trainer)
        self._resumption.start_epoch(trainer, on_run_start, data_fetcher)
        if self._steps is not None and self._steps.count == 0:
            self._additions_at_start = sum(coupling.center.additions for coupling in self.couplings)
            self._last_seen = (0, self._additions_at_start)
        if self._free_running is not None:
            self._go_free(self._free_running)

    def _tell_epoch_length(self, trainer: "Trainer") -> None:
        """Tells the algorithms that ask for it how many mini-batches an epoch has: replica 0's number, on all.

        What is accumulated into one optimizer step is one of them.
        """
        asking = [c.algorithm for c in self.couplings if c.algorithm.needs_batches_per_epoch]
        if all(algorithm.batches_per_epoch is not None for algorithm in asking):
            return
        assert self._rendezvous is not None
        num_batches = trainer.num_training_batches
        known = num_batches != float("inf")
        own = json.dumps(math.ceil(num_batches / trainer.accumulate_grad_batches) if known else None)
        agreed = json.loads(self._rendezvous.roll_call.gather("say how long an epoch is", own)[0])
        for algorithm in asking:
            algorithm.batches_per_epoch = agreed

    def _last_drain(self) -> None:
        if self.layout.replica_size > 1 and self.root_device.type == "cuda":
            # One member cannot gather all slices, and a NCCL operation that is not answered ends the process.
            log.warning("saving the center as it was before the last exchange: it is not gathered any more")
            return
        for coupling in self.couplings:
            try:
                coupling.drain(_LAST_DRAIN)
                if self._free_running is not None:
                    coupling.refresh()
            except TransportError as error:
                log.warning("saving the center as it was before the last exchange: %s", error)

    @property
    def _interrupted(self) -> bool:
        # A stop that all agreed on leaves them at the same step, where collectives work as ever.
        return self._trainer is not None and bool(self._trainer.interrupted) and not self._stopped_together

    # --- what Lightning asks of all ranks ---------------------------------------------------------------------------

    # A process that failed is alone: ModelCheckpoint(save_on_exception=True) broadcasts and ends in a barrier. Inside
    # an epoch over an asynchronous center every replica answers for itself, and once it is to leave; what replica 0
    # answers is saved and logged.

    @property
    def _is_alone(self) -> bool:
        return self._interrupted or self._is_free or self._is_leading or self._is_leaving

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self._is_alone:
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self._is_alone else super().broadcast(obj, src)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return tensor if self._is_alone else super().reduce(tensor, group, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision if self._is_alone else super().reduce_boolean_decision(decision, all)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        if self._is_alone:
            own = tensor if sync_grads else tensor.detach()
            return own.unsqueeze(0).expand(self.layout.world_size, *tensor.shape).clone()
        gathered: Tensor = super().all_gather(tensor, group, sync_grads)
        return gathered

    # --- end --------------------------------------------------------------------------------------------------------

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self._stopped_together and self._free_running is not None and self._free_running.at_rest:
            self._part()  # replica 0 may have saved a checkpoint
        if self._rendezvous is not None and not isinstance(exception, self._sigterm_exception):
            own = f"{type(exception).__name__}: {exception}"
            first = self._rendezvous.report_failure(own)
            if first is not None and first not in own and own not in first:  # not if all fail by the same
                # This process only lost its peer; the user wants to know why.
                exception.args = (f"{exception}\nAnother process failed first: {first}",)

    @override
    def teardown(self) -> None:
        try:
            self._cleanup.close()
        finally:
            self.couplings.clear()
            self._buffers = self._group = self._modes = None
            self._holds_center = False
            self._by_optimizer.clear()
            self._layerwise = self._steps = self._line = None
            self._rendezvous = self._free_running = self._dynamic = None
            self._dump = None
            self._stop_seen_at = None
            self._stopped_together = self._has_said_unchanged = False
            self._last_seen, self._additions_at_start = (0, 0), 0
            self._wants_end, self._end_is_agreed, self._end_wanted_at = False, False, None
            self._resumption = Resumption()
            self._members = None
            self._ddp_kwargs.pop("process_group", None)
            if isinstance(self._ddp_comm_state, torch.distributed.ProcessGroup):
                self._ddp_comm_state = None
            super().teardown()
            if self.is_global_zero:  # a CheckpointIO that writes in a thread has written by now
                self._remove_replaced(writes_later=False)
            self._saves, self._replaced = Saves(), []
            self._trainer = None

    # --- for callbacks ----------------------------------------------------------------------------------------------

    def request_reports(self, every: int) -> None:
        """Makes every coupling report each ``every``-th exchange (0: never). All ranks call it alike, before ``fit``.

        A report costs a pass over the parameters and rides in the exchanges: no message of its own.
        """
        self._report_every = every
        for coupling in self.couplings:
            coupling.report_every = every

    def hyperparameters(self) -> dict[str, Any]:
        """Returns what a logger should keep of this run's strategy: plain values."""
        return {
            "name": type(self).__name__,
            "transport": type(self.transport).__name__,
            "num_replicas": self.num_replicas,
            "replica_size": self.layout.replica_size,
            "replicas": self.layout.describe(),
            "data": self.data,
            **({} if self.average is None else {"average": repr(self.average)}),
            **({} if self.gate is None else {"slack": self.gate.slack}),
            **({"layerwise": True} if self.layerwise else {}),
            **({"fragments": self.fragments} if self.fragments > 1 else {}),
            **self.algorithm.hyperparameters(self.num_replicas),
        }

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Registers each name and, as for DDP's names, its forms by start method."""
        for name, (description, arguments) in presets().items():
            for suffix, start_method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
                strategy_registry.register(
                    f"{name}{suffix}",
                    cls,
                    description=f"{description} with start_method {start_method!r}",
                    override=True,
                    start_method=start_method,
                    **arguments,
                )

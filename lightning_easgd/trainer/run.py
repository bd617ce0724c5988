"""One run of a Trainer with this strategy: what it consists of, from the strategy's setup to its teardown."""

import copy
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_easgd.core.buffers import CenterBuffers
from lightning_easgd.core.company import Company
from lightning_easgd.core.elastic import Elastic
from lightning_easgd.core.formation import Agreement, Phase
from lightning_easgd.core.start import begin_equal
from lightning_easgd.core.steps import Steps
from lightning_easgd.trainer import ddp
from lightning_easgd.trainer.checkpoint import rng_state, set_rng_state
from lightning_easgd.trainer.checkpoints import Checkpoints
from lightning_easgd.trainer.data.dynamic import DynamicData
from lightning_easgd.trainer.data.set_up import set_up_sampling
from lightning_easgd.trainer.launch import Launch, say_layout
from lightning_easgd.trainer.loops import Loops
from lightning_easgd.trainer.options import refuse_callbacks, refuse_layerwise_training
from lightning_easgd.trainer.seams import Patches, callbacks_of, verify
from lightning_easgd.trainer.stopping import Stopping

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    from lightning_easgd.trainer.strategy import ElasticStrategy

__all__ = ["Run"]

log = logging.getLogger(__name__)

# How long a process that already failed waits for an outstanding exchange, to save what it has.
_LAST_DRAIN = timedelta(seconds=15)


class Run:
    """What there is of one run. Each object is there from the moment on at which Lightning has what it is made of.

    Args:
        strategy: whose run it is.
        version: of Lightning, in words.

    Attributes:
        options: what the user asks for.
        launch: how the ranks find each other.
        patches: what stands in the place of Lightning's methods.
        cleanup: what is to be called at the end, the last first.
        checkpoints: what is saved, and how a run goes on from it.
        stopping: signals, time limits, ``should_stop``.
        loops: steps, evaluations, epochs.
        elastic: this process's replica; None outside of ``fit``, and before its optimizers are there.
        report_every: how many exchanges make a report; 0 for none.
        dynamic_data: the epochs that all replicas share, with ``data="dynamic"``.
    """

    def __init__(self, strategy: "ElasticStrategy", version: str) -> None:
        self.strategy, self.options, self._version = strategy, strategy.options, version
        self.cleanup, self.patches = ExitStack(), Patches(version)
        self.launch, self.checkpoints = Launch(self), Checkpoints(self)
        self.stopping, self.loops = Stopping(self), Loops(self)
        self.report_every = 0
        self.elastic: Elastic | None = None
        self.dynamic_data: DynamicData | None = None
        self._company: Company | None = None
        self._steps: Steps | None = None
        self._trainer: Trainer | None = None

    # --- what is there from some moment on --------------------------------------------------------------------------

    @property
    def trainer(self) -> "Trainer":
        """The Trainer, from the strategy's setup on."""
        assert self._trainer is not None
        return self._trainer

    @property
    def module(self) -> "LightningModule":
        """What is trained."""
        assert self.strategy.lightning_module is not None
        return self.strategy.lightning_module

    @property
    def company(self) -> Company:
        """The processes of the job, in ``fit``, from the module's wrapping on."""
        assert self._company is not None
        return self._company

    @property
    def replica(self) -> Elastic:
        """``elastic``, where there must be one."""
        assert self.elastic is not None
        return self.elastic

    @property
    def steps(self) -> Steps:
        """The optimizers' steps so far."""
        assert self._steps is not None
        return self._steps

    @property
    def phase(self) -> Phase | None:
        """Where this replica is in relation to the others; None where it does not train, or has failed."""
        return None if self.elastic is None or self.has_failed else self.elastic.formation.phase

    @property
    def has_failed(self) -> bool:
        """Whether an error ends the run here. A stop that all have agreed on does not count as one."""
        if self._trainer is None or not self._trainer.interrupted:
            return False
        return self.elastic is None or self.elastic.formation.stop is not Agreement.AGREED

    @property
    def answers_alone(self) -> bool:
        """Whether this rank answers by itself what Lightning asks of all ranks.

        A process that failed does: ModelCheckpoint(save_on_exception=True) broadcasts and ends in a barrier. So does
        every replica within an epoch over an asynchronous center, and once it is to leave. What replica 0 answers is
        saved and logged.
        """
        if self.has_failed or self.checkpoints.is_leading:
            return True
        return self.phase in (Phase.APART, Phase.LEAVING, Phase.GONE)

    @contextmanager
    def weights_of(self, whose: Literal["center", "replica"]) -> Iterator[None]:
        """Makes the module hold the center or the replica within; outside of ``fit`` it stays as it is.

        After a failure the center is what can be had of it without the others.
        """
        elastic = self.elastic
        if elastic is None:
            yield
            return
        if whose == "center" and not elastic.weights.holds_center:
            if self.has_failed:
                elastic.rescue(_LAST_DRAIN)
            else:
                with self.stopping.following():
                    elastic.formation.catch_up()
        with elastic.weights.holding(whose):
            yield

    # --- start ------------------------------------------------------------------------------------------------------

    def begin(self, trainer: "Trainer") -> None:
        """Looks at the Trainer before the strategy sets up anything for it.

        Raises:
            ValueError: it asks for what cannot be.
            RuntimeError: this version of Lightning lacks something.
        """
        self._trainer, strategy = trainer, self.strategy
        verify(trainer, self._version)
        if strategy._layer_sync is not None and strategy.layout.replica_size == 1:
            # It would synchronise statistics over all replicas at every forward.
            strategy._layer_sync = None
            rank_zero_warn(
                "Trainer(sync_batchnorm=True) has no effect on EASGDStrategy with one process a replica: batch "
                "statistics are each replica's own"
            )
        if trainer.state.fn == "fit":
            refuse_callbacks(trainer)
            if self.options.plan.layerwise:
                refuse_layerwise_training(trainer, self.module)

    def add_monitor(self, monitor_type: type[Any]) -> None:
        """Adds an ElasticMonitor where there is none: with the strategy's name alone, a run shows its coupling."""
        callbacks = callbacks_of(self.trainer)
        if self.trainer.loggers and not any(isinstance(callback, monitor_type) for callback in callbacks):
            monitor = monitor_type(self.report_every or 1)
            callbacks.insert(0, monitor)  # ModelCheckpoint stays last
            monitor.setup(self.trainer, self.module, stage="fit")

    def open_company(self, configure_ddp: Callable[[], None]) -> None:
        """Brings the ranks together, with equal modules. Collective and blocking.

        Args:
            configure_ddp: DDPStrategy's own.
        """
        strategy, rendezvous = self.strategy, self.launch.rendezvous
        assert rendezvous is not None
        company = Company(rendezvous, strategy.layout, device=strategy.root_device, timeout=self.timeout)
        self._company = company
        self.cleanup.callback(company.close)
        begin_equal(self.module, company, self.options.plan.buffers)
        ddp.wrap(self, configure_ddp)
        say_layout(company)
        self.dynamic_data = set_up_sampling(self)
        if self.dynamic_data is not None:
            self.cleanup.callback(self.dynamic_data.close)
            if self.checkpoints.resumption.shared_epoch is not None:
                self.dynamic_data.load_state_dict(self.checkpoints.resumption.shared_epoch, of_all=True)

    def couple(self) -> None:
        """Ties the optimizers to their centers, and goes into the Trainer's loops. Collective and blocking."""
        strategy = self.strategy
        self.elastic = Elastic(
            self.module,
            strategy.optimizers,
            plan=self.options.plan,
            company=self.company,
            wrappers=strategy._lightning_optimizers,
            reestimate=None if self.options.center_buffers == "mean" else self._reestimate,
            serve=self.checkpoints.serve,
        )
        self.cleanup.callback(self.elastic.close)
        self.elastic.report(self.report_every)
        self._steps = Steps(
            self.module,
            strategy.optimizers,
            is_automatic=bool(self.module.automatic_optimization),
            take=self.loops.take_step,
            add_force=self.loops.add_force,
            is_training=lambda: self._trainer is not None and bool(self._trainer.training),
        )
        self._steps.open()
        self.cleanup.callback(self._steps.close)
        self.stopping.take_over()
        self.checkpoints.take_over()
        self.loops.take_over()
        callbacks, hooks = callbacks_of(self.trainer), self.strategy.hooks_type(self)
        callbacks.insert(0, hooks)
        self.cleanup.callback(_discard, callbacks, hooks)
        if self.dynamic_data is not None:
            self.dynamic_data.start()

    @property
    def timeout(self) -> timedelta:
        """The longest wait of any communication."""
        timeout: timedelta | None = self.strategy._timeout
        return timedelta(minutes=30) if timeout is None else timeout

    def report(self, every: int) -> None:
        """Makes every coupling report each ``every``-th exchange (0: never), from the moment on when there are any."""
        self.report_every = every
        if self.elastic is not None:
            self.elastic.report(every)

    def raise_if_failed(self) -> None:
        """Raises ``RuntimeError`` if another process failed. Local."""
        if self.launch.rendezvous is not None:
            self.launch.rendezvous.raise_if_failed()

    def _reestimate(self, buffers: CenterBuffers) -> None:
        """Estimates batch-norm statistics anew on as many training batches as the user has asked for."""
        num_batches = self.options.center_buffers
        combined = self.trainer.fit_loop._combined_loader
        if combined is None or num_batches == "mean":
            return  # before the first epoch the statistics are as the module made them
        loader = copy.copy(combined.flattened[0])
        if getattr(loader, "persistent_workers", False):
            loader._iterator = None  # the original's own belongs to the epoch that is going on
        before = rng_state()
        apart = nullcontext() if self.dynamic_data is None else self.dynamic_data.apart()
        with self.strategy.precision_plugin.forward_context(), apart:
            batches = itertools.islice(loader, num_batches)
            buffers.reestimate(self.strategy.batch_to_device(batch) for batch in batches)
        set_rng_state(before)

    # --- end --------------------------------------------------------------------------------------------------------

    def fail(self, exception: BaseException) -> None:
        """Tells the others that an error ends the run here, and the user if it was another process's first.

        Args:
            exception: Lightning's own after a signal is not an error.
        """
        rendezvous = self.launch.rendezvous
        if rendezvous is None:
            return
        if isinstance(exception, self.strategy.sigterm_exception):
            try:
                if self.elastic is not None:
                    self.elastic.formation.leave()  # replica 0 may have saved a checkpoint
            except RuntimeError as error:  # of a peer that is gone; Lightning still has to tear this process down
                log.warning("rank %d leaves without the others: %s", rendezvous.rank, error)
            return
        own = f"{type(exception).__name__}: {exception}"
        first = rendezvous.report_failure(own)
        if first is not None and first not in own and own not in first:  # not if all fail by the same
            # This process only lost its peer; the user wants to know why.
            exception.args = (f"{exception}\nAnother process failed first: {first}",)

    def close(self) -> None:
        """Gives back all that was opened, and puts Lightning's own methods back. Idempotent."""
        with ExitStack() as stack:  # whatever one of them raises, the others are done
            stack.callback(self.launch.close)
            stack.callback(self.cleanup.close)
            stack.callback(self.patches.close)
        self.elastic = self.dynamic_data = self._company = self._steps = None


def _discard(callbacks: list[Any], hooks: Any) -> None:
    if hooks in callbacks:  # a callback may have taken it away
        callbacks.remove(hooks)

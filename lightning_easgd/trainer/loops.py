"""The Trainer's loops, where they meet the replicas: steps, evaluations, the ends of epochs and of training."""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lightning_easgd.core.formation import Agreement, Occasion
from lightning_easgd.trainer import ddp
from lightning_easgd.trainer.unchanged import UnchangedCenter

if TYPE_CHECKING:
    from lightning_easgd.trainer.run import Run

__all__ = ["Loops"]

log = logging.getLogger(__name__)


class Loops:
    """This package's places in the Trainer's loops, for which a Strategy has no hook.

    Args:
        run: whose loops they are.
    """

    def __init__(self, run: "Run") -> None:
        self._run = run
        self._unchanged = UnchangedCenter(run)

    def take_over(self) -> None:
        """Puts this object into its places."""
        fit_loop, patch = self._run.trainer.fit_loop, self._run.patches
        epoch_loop = fit_loop.epoch_loop
        # Around the whole of an evaluation, so that callbacks' hooks see its weights too, and an error puts them back.
        patch(epoch_loop.val_loop, "run", partial(self._evaluate, epoch_loop.val_loop.run))
        patch(fit_loop, "on_advance_end", partial(self._end_epoch, fit_loop.on_advance_end))
        patch(epoch_loop, "on_run_start", partial(self._start_epoch, epoch_loop.on_run_start))
        patch(fit_loop, "run", partial(self._train, fit_loop.run))

    # --- steps ------------------------------------------------------------------------------------------------------

    def take_step(self, optimizer: Optimizer, update: Callable[[], Any]) -> Any:
        """Makes one step of an optimizer's replica, exchange included, and attends to what others ask for.

        Args:
            optimizer: one of those that configure_optimizers returned.
            update: its own step; with layers their forward and backward pass alone.

        Returns:
            What ``update`` returned.
        """
        run, epoch_loop = self._run, self._run.trainer.fit_loop.epoch_loop
        run.replica.couplings_of(optimizer)  # first of all: it must be one of them
        run.stopping.raise_if_leaving()  # in a step with several optimizers
        with run.stopping.following(), run.steps.counted(optimizer):
            return run.replica.step(
                optimizer,
                update,
                at=epoch_loop._batches_that_stepped,  # the step of Lightning's own log entries
                wants_end=lambda: bool(run.trainer.should_stop),
            )

    def add_force(self, optimizer: Optimizer) -> None:
        """Adds what the algorithm adds to an optimizer's gradients; see ``Elastic.add_force``."""
        self._run.replica.add_force(optimizer, getattr(self._run.strategy.precision_plugin, "scaler", None))

    # --- epochs and evaluations -------------------------------------------------------------------------------------

    def couple_anew(self) -> None:
        """Couples what is trained by now; see ``Elastic.recouple``. All ranks call it at the same point."""
        with self._run.stopping.following():
            has_changed = self._run.replica.recouple()
        if has_changed:
            ddp.wrap_anew(self._run)

    def _start_epoch(self, on_run_start: Callable[[Any], None], data_fetcher: Any) -> None:
        trainer, replica = self._run.trainer, self._run.replica
        self.couple_anew()
        batches = trainer.num_training_batches
        # What is accumulated into one optimizer step is one mini-batch.
        known = batches != float("inf")
        replica.tell_epoch_length(math.ceil(batches / trainer.accumulate_grad_batches) if known else None)
        on_run_start(data_fetcher)
        self._unchanged.look_at_start()
        replica.formation.begin_epoch()

    def _evaluate(self, run: Callable[[], Any]) -> Any:
        stopping, replica, evaluated = self._run.stopping, self._run.replica, self._run.options.evaluate
        if stopping.is_leaving:
            return []
        if not stopping.meet(Occasion.EVALUATION, gather=evaluated == "center"):
            log.warning(
                "replica %d leaves an evaluation out: others have ended their epoch already", self._run.company.replica
            )
            return []
        self._unchanged.look_at_evaluation()
        with replica.weights.holding(evaluated):
            result = run()
        with stopping.following():
            replica.formation.after_evaluation(end=bool(self._run.trainer.should_stop))
        self._run.checkpoints.part()
        return result

    def _end_epoch(self, on_advance_end: Callable[[], None]) -> None:
        stopping, trainer = self._run.stopping, self._run.trainer
        formation = self._run.replica.formation
        stopping.raise_if_leaving()  # Lightning leaves it to the epoch's end after the last batch
        has_used_up = 0 <= trainer.max_steps <= trainer.global_step
        if trainer.should_stop or (has_used_up and self._run.options.data == "dynamic"):
            formation.call_off()  # or the others would do what is left of a shared epoch
        # What comes is collective, so that no rank may go on alone: one that has made all its steps ends it for all.
        if not stopping.meet(Occasion.END_OF_EPOCH, gather=False, last=has_used_up):
            log.warning("replica %d goes on while others have ended training", self._run.company.replica)
            on_advance_end()
            return
        on_advance_end()
        end = bool(trainer.should_stop)
        may_end = (end or formation.end is not Agreement.OPEN) and trainer.fit_loop._can_stop_early
        with stopping.following():
            ends_now = formation.after_epoch(end=end, at_once=may_end, last=has_used_up)
        if ends_now:
            stopping.end_before_minimum()
        self._run.checkpoints.part()

    # --- the end ----------------------------------------------------------------------------------------------------

    def _train(self, run: Callable[[], None]) -> None:
        """Lightning's own, which calls no hook of its end where nothing is left to do."""
        run()
        if not self._run.replica.weights.holds_center:
            self.end_training()
            self.after_training()

    def end_training(self) -> None:
        """Meets all replicas for the last time, and puts the center into the module. Collective and blocking."""
        self._run.stopping.meet(Occasion.END_OF_TRAINING)
        self._unchanged.look_at_end()
        self._run.replica.weights.hold("center")

    def after_training(self) -> None:
        """Parts from the other replicas, when the callbacks and the module have seen the end. Collective, blocking."""
        replica, checkpoints = self._run.replica, self._run.checkpoints
        if replica.formation.after_training():
            self._run.stopping.set_received_sigterm()
        checkpoints.part()
        if replica.formation.leader_decides:
            checkpoints.share()
            self._run.strategy.barrier()

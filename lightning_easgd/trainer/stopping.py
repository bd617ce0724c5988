"""What the replicas agree on about stopping and ending, in Lightning's terms.

::

    Lightning                                       the replicas (``core.formation``)
    SIGTERM arrives                           ->    watch.request_stop; each rank looks at it after its next step
    received_sigterm, SIGTERMException        <-    ``stop`` is AGREED
    should_stop on one rank, a time limit     ->    ask_to_end: ``end`` is ASKED
    should_stop on all ranks                  <-    ``end`` is AGREED
    interrupted, on_exception                 ->    watch.report_failure

A request to stop ends the run where it is: Lightning raises at the end of the batch. Callbacks that save on an
exception save then. A request to end lets the epoch's end, the checkpoints and the callbacks come as ever.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_easgd.core.formation import Agreement, Occasion, Phase, Stopped
from lightning_easgd.trainer.seams import callbacks_of, is_a

if TYPE_CHECKING:
    from lightning_easgd.trainer.run import Run

__all__ = ["Stopping"]

log = logging.getLogger(__name__)


class Stopping:
    """Takes Lightning's ways to stop to the replicas, and what they agree on to Lightning.

    Args:
        run: whose this is.
    """

    def __init__(self, run: "Run") -> None:
        self._run, self._strategy = run, run.strategy

    def take_over_signals(self) -> None:
        """Puts this object in the place of Lightning's handler of SIGTERM."""
        run = self._run
        run.patches(run.trainer._signal_connector, "_sigterm_notifier_fn", self._on_sigterm)

    def take_over(self) -> None:
        """Puts this object into its places in the Trainer's loops."""
        trainer, patch = self._run.trainer, self._run.patches
        epoch_loop = trainer.fit_loop.epoch_loop
        self.take_over_signals()
        patch(epoch_loop, "_broadcast_sigterm_tensor", lambda: None)  # over all ranks, at every batch
        patch(epoch_loop, "on_advance_end", partial(self._end_batch, epoch_loop.on_advance_end))
        for callback in callbacks_of(trainer):
            # A time limit broadcasts at every batch, where replicas with more batches than rank 0 would wait for good.
            if is_a(callback, "callbacks.Timer"):
                patch(callback, "on_train_batch_end", partial(self._check_time, callback))

    # --- from the replicas to Lightning -----------------------------------------------------------------------------

    @contextmanager
    def following(self) -> Iterator[None]:
        """Surrounds what may find that the replicas have agreed on something: Lightning is told of it.

        Raises:
            SIGTERMException: Lightning's own, where all have met since one was asked to stop.
        """
        try:
            yield
        except Stopped:
            self.follow()
            raise self._strategy.sigterm_exception() from None
        self.follow()

    def follow(self) -> None:
        """Tells Lightning what the replicas have agreed on."""
        formation = self._run.replica.formation
        if formation.end is Agreement.AGREED:
            self._run.trainer.should_stop = True
        if formation.stop is Agreement.AGREED:
            self.set_received_sigterm()

    def set_received_sigterm(self) -> None:
        """Has Lightning raise its SIGTERMException at the end of the batch."""
        self._run.trainer._signal_connector.received_sigterm = True

    @property
    def is_leaving(self) -> bool:
        """Whether all have met to stop, each at another point of its epoch."""
        return self._run.phase is not None and self._run.replica.formation.is_scattered

    def raise_if_leaving(self) -> None:
        """Raises Lightning's SIGTERMException where all have met to stop, each at another point of its epoch.

        Lightning raises it at the end of the batch. Until then this replica must not start anything collective (an
        exchange, the end of an epoch): the others will not take part.
        """
        if self.is_leaving:
            raise self._strategy.sigterm_exception()

    def meet(self, occasion: Occasion, *, gather: bool = True, last: bool = False) -> bool:
        """Meets the other replicas; see ``Formation.meet``. Raises Lightning's SIGTERMException for ``Stopped``."""
        with self.following():
            end = bool(self._run.trainer.should_stop)
            return self._run.replica.formation.meet(occasion, end=end, last=last, gather=gather)

    def end_before_minimum(self) -> None:
        """Lets a request to end take effect here although ``min_epochs`` or ``min_steps`` is not reached.

        With streams of different length another rank has reached it, or its last step: it ends, and is not there any
        more for what all do together.
        """
        fit_loop, patch = self._run.trainer.fit_loop, self._run.patches
        patch(fit_loop, "min_epochs", None)
        patch(fit_loop.epoch_loop, "min_steps", None)

    # --- from Lightning to the replicas -----------------------------------------------------------------------------

    def _on_sigterm(self, signum: int, _: object) -> None:
        """Replaces Lightning's handler, which broadcasts over all ranks wherever the process happens to be."""
        run, strategy = self._run, self._strategy
        log.info("rank %d received signal %d", strategy.global_rank, signum)
        if run.elastic is None or run.phase is Phase.ALONE:
            if run.elastic is not None:
                run.elastic.formation.stop = Agreement.AGREED
            self.set_received_sigterm()
        else:
            run.company.watch.request_stop()

    def _check_time(self, timer: Any, *_: Any) -> None:
        """Rank 0 decides. The others learn of it from an exchange or from the watch, at the latest at a meeting."""
        run, strategy = self._run, self._strategy
        counts = strategy.is_global_zero and timer._interval == "step" and timer._duration is not None
        if counts and timer.time_elapsed() >= timer._duration:
            run.replica.formation.ask_to_end()
            self.follow()

    def _end_batch(self, on_advance_end: Callable[[Any], None], data_fetcher: Any) -> None:
        """Lightning's own, which leaves the epoch where this rank is to end training: not before all others know it."""
        trainer = self._run.trainer
        trainer.should_stop = self._run.replica.formation.may_leave_epoch(bool(trainer.should_stop))
        on_advance_end(data_fetcher)

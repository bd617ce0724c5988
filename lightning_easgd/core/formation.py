"""How the replicas of a job meet: one interface, whose phase says what may be waited for.

::

                begin_epoch              meet                meet(STOP)            leave
    TOGETHER ----------------> APART -----------> MET      APART --------> LEAVING ------> GONE
       ^                                           |
       +-------------------------------------------+
         after_evaluation, after_epoch, after_training

Replicas of a synchronous center are always TOGETHER (``LockStep``): their exchanges keep them at the same step.
Replicas of an asynchronous center are APART within an epoch (``FreeRunning``). An evaluation within an epoch takes them
through MET and TOGETHER back to APART. A process that is the whole job is always ALONE (``Solo``).

Two requests travel between the replicas, each with an ``Agreement``. *Stop* means: leave at once, wherever you are. A
process was told to go. *End* means: finish the epoch in good order. One replica has seen enough. A third word,
*failed*, belongs to the watch (``Company.watch.failure``): after a failure there is no agreement to wait for.

::

              this process asks, or hears of it            all know
    OPEN ----------------------------------------> ASKED -----------> AGREED
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import Enum
from typing import ClassVar

from lightning_easgd.communication import TransportError
from lightning_easgd.communication._line import Line
from lightning_easgd.core.company import Company
from lightning_easgd.core.coupling import Coupling
from lightning_easgd.core.plan import Plan

__all__ = ["Agreement", "Formation", "Occasion", "Phase", "Stopped"]

log = logging.getLogger(__name__)

# How long a request to stop, or to end, waits for an exchange to carry it before it goes without one.
PATIENCE_S = 10.0


class Phase(Enum):
    """Where a replica is in relation to the others."""

    ALONE = "alone"  # this process is the whole job
    TOGETHER = "together"  # all are at the same point of the program: what is collective works
    APART = "apart"  # each is at its own step: nothing may wait for another replica
    MET = "met"  # all have come here and not parted yet: the center is the same for all, and at rest
    LEAVING = "leaving"  # all have met to stop, each at another point of its epoch: nothing collective comes any more
    GONE = "gone"  # all have parted for good

    @property
    def is_at_rest(self) -> bool:
        """Whether the center is the same for all and does not move, until all part."""
        return self in (Phase.MET, Phase.LEAVING)


class Occasion(Enum):
    """What replicas meet for."""

    EVALUATION = "an evaluation"
    END_OF_EPOCH = "the end of an epoch"
    END_OF_TRAINING = "the end of training"
    STOP = "a request to stop"
    RECOUPLING = "the start of an epoch"
    LOOK = "a look at the center"


class Agreement(Enum):
    """How far a request has come."""

    OPEN = 0
    ASKED = 1
    AGREED = 2


class Stopped(Exception):
    """The replicas have met because one of them was asked to stop. Nothing is outstanding."""


class Formation(ABC):
    """One replica's side of how the replicas of a job meet.

    Args:
        company: the processes of the job, open.
        couplings: of this replica; the list may grow later.
        line: what the couplings' centers share on CUDA devices.
        gather: gathers what belongs to the center beside its weights. Collective: called where all have met.
        forget: says that what was gathered is out of date.
        serve: does what replica 0 asks of this one while it waits to part.

    Attributes:
        phase: where this replica is.
        stop: how far a request to stop has come.
        end: how far a request to end has come.
        is_scattered: whether the replicas have agreed to stop at different points of their epochs, so that the rest of
            this batch must start nothing collective.
        leader_decides: whether replica 0 alone decides what is saved and when. The replicas count different numbers of
            steps, so their own decisions would differ.
    """

    leader_decides: ClassVar[bool] = False

    def __init__(
        self,
        company: Company,
        couplings: Sequence[Coupling],
        *,
        line: Line | None = None,
        gather: Callable[[], None] = lambda: None,
        forget: Callable[[], None] = lambda: None,
        serve: Callable[[], None] = lambda: None,
    ) -> None:
        self.phase = Phase.TOGETHER
        self.stop = self.end = Agreement.OPEN
        self.is_scattered = False
        self._company, self._couplings, self._line = company, couplings, line
        self._gather, self._forget, self._serve = gather, forget, serve

    @classmethod
    @abstractmethod
    def fits(cls, plan: Plan, company: Company) -> bool:
        """Returns whether this formation can serve a run with this plan. ``Elastic`` takes the first that can."""

    # --- in an epoch ------------------------------------------------------------------------------------------------

    def begin_epoch(self) -> None:  # noqa: B027  (most have nothing to do here)
        """Says that training steps follow. Does not wait."""

    @abstractmethod
    def after_step(self, couplings: Sequence[Coupling], *, end: bool) -> None:
        """Attends to what the replicas ask of each other; called after every step of an optimizer.

        Does not wait for others, unless all are to stop. ``stop`` and ``end`` say what has come of it.

        Args:
            couplings: of that optimizer.
            end: whether this rank is to end training.

        Raises:
            RuntimeError: another process has failed.
        """

    @abstractmethod
    def ask_to_end(self) -> None:
        """Has all replicas end training in good order. Does not wait: they learn of it at one of their next steps."""

    def call_off(self) -> None:  # noqa: B027  (nothing to say to replicas that are at the same step)
        """Asks the replicas that still train to end their epoch, as this one has. Does not wait."""

    def may_leave_epoch(self, wants: bool) -> bool:
        """Returns whether this replica may leave its epoch before its last batch. Does not wait.

        Args:
            wants: whether it is to.
        """
        return wants

    # --- where all meet ---------------------------------------------------------------------------------------------

    @abstractmethod
    def meet(self, occasion: Occasion, *, end: bool = False, last: bool = False, gather: bool = True) -> bool:
        """Waits for all replicas, and completes what is outstanding: the center is at rest. Collective and blocking.

        Args:
            occasion: what comes next.
            end: whether this rank is to end training.
            last: whether this rank has made its last step, and ends training for all.
            gather: whether what belongs to the center beside its weights is wanted too. Replicas that run freely
                gather it at every meeting.

        Returns:
            Whether all met for this occasion. If not, some are further on, and this replica goes on without.

        Raises:
            Stopped: some replica was asked to stop; this one was not.
            RuntimeError: the occasions do not fit together.
            TransportError: somebody did not come.
        """

    @abstractmethod
    def after_evaluation(self, *, end: bool) -> None:
        """Parts from the others after an evaluation for which all have met. Collective and blocking.

        Args:
            end: whether this rank is to end training.
        """

    @abstractmethod
    def after_epoch(self, *, end: bool, at_once: bool, last: bool) -> bool:
        """Parts from the others after an epoch at whose end all have met. Collective and blocking.

        Args:
            end: whether this rank is to end training.
            at_once: whether it does so now.
            last: whether it has made its last step.

        Returns:
            Whether some rank ends training now, so that this one has to.
        """

    def after_training(self) -> bool:
        """Parts from the others for good. Collective and blocking. Returns whether some process was asked to stop."""
        return False

    def leave(self) -> None:  # noqa: B027  (most have nothing to do here)
        """Parts from the others where all have met to stop. Collective and blocking; elsewhere without effect."""

    @abstractmethod
    def catch_up(self) -> None:
        """Brings this replica's view of the center up to date, as far as this formation allows.

        In lock-step it is collective and blocking; replicas that run freely wait for nobody.
        """

    def rescue(self, timeout: timedelta) -> None:
        """Completes what is outstanding after a failure, without the others' help. Blocks, at most ``timeout`` each."""
        for coupling in self._couplings:
            try:
                self._rescue(coupling, timeout)
            except TransportError as error:
                log.warning("saving the center as it was before the last exchange: %s", error)

    def _rescue(self, coupling: Coupling, timeout: timedelta) -> None:
        coupling.drain(timeout)

    # --- for the formations -----------------------------------------------------------------------------------------

    def _wants_end(self, end: bool) -> bool:
        return end or self.end is not Agreement.OPEN or self._company.watch.end_requested

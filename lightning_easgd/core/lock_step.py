"""Replicas that are at the same step all the time: those of a synchronous center, and one that is alone."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from typing_extensions import override

from lightning_easgd.communication._line import Line
from lightning_easgd.core.company import Company
from lightning_easgd.core.coupling import Coupling, settle_in_line
from lightning_easgd.core.formation import PATIENCE_S, Agreement, Formation, Occasion, Phase, Stopped
from lightning_easgd.core.plan import Plan

__all__ = ["LockStep", "Solo", "meets", "settle"]


def settle(couplings: Sequence[Coupling], line: Line | None) -> None:
    """Completes all couplings' exchanges until all replicas have come here. Blocks for them.

    A replica that is here while others still train takes its turn in their exchanges without adding anything; the
    exchange in which all say that they are here is the last. All centers are then equal and at rest.

    Args:
        couplings: of a synchronous transport.
        line: what they share on CUDA devices.
    """
    if len(couplings) == 1:
        couplings[0].settle()
    elif line is not None:
        settle_in_line(couplings, line)
    elif couplings:  # another replica may need an answer from any of them first
        with ThreadPoolExecutor(len(couplings)) as pool:
            list(pool.map(Coupling.settle, couplings))


class LockStep(Formation):
    """Replicas whose exchanges keep them at the same step.

    Their exchanges keep them together, but not their loops: with streams of different length one comes to an
    evaluation when another has ended its epoch. Both say that they are done with exchanging, so that the occasions
    must be compared too.

    Args:
        company: see ``Formation``.
        couplings: see ``Formation``.
        others: see ``Formation``.
    """

    def __init__(self, company: Company, couplings: Sequence[Coupling], **others: Any) -> None:
        super().__init__(company, couplings, **others)
        self._stop_asked_at: float | None = None
        self._end_asked_at: float | None = None

    @override
    @classmethod
    def fits(cls, plan: Plan, company: Company) -> bool:
        return plan.is_synchronous

    @override
    def after_step(self, couplings: Sequence[Coupling], *, end: bool) -> None:
        watch = self._company.watch
        self._hear_of_end(couplings)
        # What this rank knows by itself, and what all ranks of its replica act upon.
        stop, overdue, ends = self._company.members.agree(watch.stop_requested, self._is_overdue, self._wants_end(end))
        watch.raise_if_failed()
        for each in self._couplings if ends else ():
            each.slots.end = True
        has_votes = any(coupling.slots.stop_votes for coupling in couplings)
        if has_votes or stop or self._stop_asked_at is not None:
            self._carry_stop(has_votes=has_votes, overdue=overdue)

    def _hear_of_end(self, couplings: Sequence[Coupling]) -> None:
        if any(coupling.slots.ended for coupling in couplings):
            self.end = Agreement.AGREED

    @property
    def _is_overdue(self) -> bool:
        """Whether a request to stop has waited long enough for an exchange to carry it."""
        return self._stop_asked_at is not None and time.monotonic() - self._stop_asked_at > PATIENCE_S

    def _carry_stop(self, *, has_votes: bool, overdue: bool) -> None:
        """Has the exchanges carry the request until all have read it, and stops all together.

        A vote that all have read stops all at the same exchange. Where none comes for long, a meeting does it.
        """
        if self._stop_asked_at is None:
            self.stop, self._stop_asked_at = Agreement.ASKED, time.monotonic()
            for each in self._couplings:
                each.slots.stop = True
        if self.stop is not Agreement.AGREED and (has_votes or overdue):
            self.is_scattered = not has_votes
            self.meet(Occasion.STOP, gather=False)
            self.stop = Agreement.AGREED

    @override
    def ask_to_end(self) -> None:
        if self.end is Agreement.OPEN:
            self.end = Agreement.ASKED
        if self._company.layout.replica_size == 1:  # else the ranks of a replica first agree on it, in their next step
            for coupling in self._couplings:
                coupling.slots.end = True

    @override
    def may_leave_epoch(self, wants: bool) -> bool:
        """Keeps a rank that alone is to end from leaving its epoch before all others know it."""
        if self.end is Agreement.AGREED:
            return wants
        if wants:
            self.ask_to_end()
            self._end_asked_at = self._end_asked_at or time.monotonic()
        # No exchange has told the others for long: it leaves by itself, and tells them where they exchange or meet.
        waited = self._end_asked_at is not None and time.monotonic() - self._end_asked_at >= PATIENCE_S
        if waited and self._company.layout.replica_size == 1:
            self.end = Agreement.AGREED
            return True
        return False

    @override
    def meet(self, occasion: Occasion, *, end: bool = False, last: bool = False, gather: bool = True) -> bool:
        while True:
            settle(self._couplings, self._line)
            try:
                together = meets(self._company.gather("meet", occasion.value), occasion.value)
            except Stopped:
                self.stop, self.is_scattered = Agreement.AGREED, True
                raise
            if together is not None:
                break
        if not together:
            return False
        self._hear_of_end(self._couplings)
        if gather:
            self._gather()
        return True

    @override
    def after_evaluation(self, *, end: bool) -> None:
        # A signal may have reached some ranks only. So all ranks compare what they have heard.
        stop, ends = self._company.agree(self._company.watch.stop_requested, end)
        if stop:
            self.stop = Agreement.AGREED
        if ends:
            self.end = Agreement.AGREED

    @override
    def after_epoch(self, *, end: bool, at_once: bool, last: bool) -> bool:
        # A rank that has made all its steps, or was told to end, ends training for all.
        wants = end or self.end is not Agreement.OPEN
        ends, now = self._company.agree(wants or last, at_once or last)
        if ends and not last:
            self.end = Agreement.AGREED
        return now

    @override
    def catch_up(self) -> None:
        self.meet(Occasion.LOOK)


class Solo(Formation):
    """A process that is the whole job: whatever it asks for is agreed on at once.

    Args:
        company: see ``Formation``.
        couplings: see ``Formation``.
        others: see ``Formation``.
    """

    def __init__(self, company: Company, couplings: Sequence[Coupling], **others: Any) -> None:
        super().__init__(company, couplings, **others)
        self.phase = Phase.ALONE

    @override
    @classmethod
    def fits(cls, plan: Plan, company: Company) -> bool:
        return company.layout.world_size == 1

    @override
    def after_step(self, couplings: Sequence[Coupling], *, end: bool) -> None:
        if end:
            self.ask_to_end()
        if self._company.watch.stop_requested:
            self.stop = Agreement.AGREED

    @override
    def ask_to_end(self) -> None:
        self.end = Agreement.AGREED

    @override
    def meet(self, occasion: Occasion, *, end: bool = False, last: bool = False, gather: bool = True) -> bool:
        if all(coupling.center.synchronous for coupling in self._couplings):
            settle(self._couplings, self._line)
        else:
            for coupling in self._couplings:
                coupling.refresh()
        if gather:
            self._gather()
        return True

    @override
    def after_evaluation(self, *, end: bool) -> None:
        if end:
            self.ask_to_end()

    @override
    def after_epoch(self, *, end: bool, at_once: bool, last: bool) -> bool:
        if end and not last:
            self.ask_to_end()
        return at_once or last

    @override
    def catch_up(self) -> None:
        self.meet(Occasion.LOOK)


def meets(reasons: Sequence[str], own: str) -> bool | None:
    """Returns whether all have met for this replica's reason; None if it must meet the others once more.

    An evaluation that not all reach is left out. A replica that has ended its epoch waits for the others.

    Args:
        reasons: values of ``Occasion``, of all ranks.
        own: this one's.

    Raises:
        Stopped: some replica was asked to stop; this one was not.
        RuntimeError: the reasons do not fit together.
    """
    if all(reason == own for reason in reasons):
        return True
    stop, evaluation = Occasion.STOP.value, Occasion.EVALUATION.value
    if stop in reasons:
        if own == stop:
            return True
        raise Stopped
    for end in (Occasion.END_OF_EPOCH.value, Occasion.END_OF_TRAINING.value):
        if set(reasons) == {evaluation, end}:
            return None if own == end else False
    raise RuntimeError(
        f"the replicas wait for each other at different points: {dict(enumerate(reasons))}; what meets "
        "(trainer.strategy.weights_of, a checkpoint) must be called by all at the same point"
    )

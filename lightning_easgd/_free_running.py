"""Training epochs in which no replica waits for another, and the points between them at which all meet.

Over an asynchronous center replicas make different numbers of steps. Inside an epoch each answers Lightning's questions
to all ranks by itself; what one decides travels through the rendezvous and reaches the others at their next step. An
evaluation and the end of an epoch are meetings, where all have the same center.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from lightning_easgd._coupling import Coupling
from lightning_easgd.communication._c10d import PrefixStore
from lightning_easgd.communication._meetings import Meetings
from lightning_easgd.communication._rendezvous import Rendezvous

__all__ = ["END_OF_EPOCH", "END_OF_TRAINING", "EVALUATION", "STOP", "FreeRunning", "StoppedByAnother"]

EVALUATION, END_OF_EPOCH, END_OF_TRAINING = "an evaluation", "the end of an epoch", "the end of training"
STOP = "a request to stop"
# Who is ahead waits until the others are there too; who is behind leaves its evaluation out.
_AHEAD = {END_OF_EPOCH: 1, END_OF_TRAINING: 2}


class StoppedByAnother(Exception):
    """The replicas met because one of them was asked to stop. Nothing is outstanding."""


class FreeRunning:
    """One replica's side of an asynchronous run.

    Args:
        couplings: of this replica; the list may grow later.
        rendezvous: of the job.
        replica: index of this replica.
        num_replicas: how many replicas meet.
        timeout: how long to wait at a meeting while nothing moves anywhere.

    Attributes:
        is_free: whether this replica is inside a training epoch, where nothing may wait for another.
        ending: whether some replica said at a meeting that it is to end training.
    """

    def __init__(
        self,
        couplings: Sequence[Coupling],
        rendezvous: Rendezvous,
        *,
        replica: int,
        num_replicas: int,
        timeout: timedelta,
    ) -> None:
        self.is_free = self.ending = False
        self._couplings, self._rendezvous = couplings, rendezvous
        self._meetings = Meetings(
            PrefixStore("meetings", rendezvous.store),
            replica=replica,
            num_replicas=num_replicas,
            timeout=timeout,
            progress=rendezvous.progress_of_all,
            check=rendezvous.raise_if_failed,
        )

    @contextmanager
    def at_meeting(self) -> Iterator[None]:
        """Keeps what happens in it, between meetings, from counting as inside an epoch."""
        was_free, self.is_free = self.is_free, False
        try:
            yield
        finally:
            self.is_free = was_free

    def meet(self, reason: str, *, ending: bool = False) -> bool:
        """Waits for all replicas; all of them then have the same center, and nothing is outstanding. Collective.

        Args:
            reason: what this replica would do next. Where the others' differ, it waits for those who are behind it
                (at an evaluation, say, while this one has ended its epoch).
            ending: whether this replica is to end training; see ``ending``.

        Returns:
            Whether all met for this reason. If not, some are ahead and this replica must go on without.

        Raises:
            RuntimeError: the replicas' reasons do not fit together.
            StoppedByAnother: some replica was asked to stop; this one was not.
        """
        for coupling in self._couplings:
            coupling.drain()
        own = _AHEAD.get(reason, 0)
        while True:
            for coupling in self._couplings:
                if coupling.turnstile is not None:
                    coupling.turnstile.leave()
            reasons, said = zip(*map(_parse, self._meetings.meet(_format(reason, ending))), strict=True)
            self.ending = self.ending or any(said)
            if STOP in reasons or all(other == reason for other in reasons):
                break
            self._begin_round()
            places = [_AHEAD.get(other, 0) for other in reasons]
            if own < max(places):
                return False
            if own == min(places):
                raise RuntimeError(
                    f"the replicas wait for each other at different points: {dict(enumerate(reasons))}; what meets "
                    "(trainer.strategy.weights_of, a checkpoint) must be called by all or inside the training epoch"
                )
        for coupling in self._couplings:
            coupling.refresh()
        self._meetings.meet("reading the center")  # nobody adds before all have read
        if STOP in reasons and reason != STOP:
            raise StoppedByAnother
        self._begin_round()
        return True

    def _begin_round(self) -> None:
        for coupling in self._couplings:
            if coupling.turnstile is not None:
                coupling.turnstile.begin_round(self._meetings.number)


def _format(reason: str, ending: bool) -> str:
    return f"{reason}\n{int(ending)}"


def _parse(message: str) -> tuple[str, bool]:
    reason, ending = message.split("\n")
    return reason, ending == "1"

"""Training epochs in which no replica waits for another, and the points between them at which all meet.

Over an asynchronous center replicas make different numbers of steps. Inside an epoch each answers Lightning's questions
to all ranks by itself; what one decides travels through the rendezvous and reaches the others at their next step. An
evaluation and the end of an epoch are meetings: all have the same center until they part again, and who waits to part
writes its file of a checkpoint when replica 0 saves one. What is saved, and when, replica 0 alone decides: a decision
by the number of steps differs between replicas.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from lightning_easgd._coupling import Coupling
from lightning_easgd.communication._c10d import PrefixStore
from lightning_easgd.communication._meetings import Meetings
from lightning_easgd.communication._rendezvous import Rendezvous
from lightning_easgd.communication._transport import TransportError

__all__ = ["END_OF_EPOCH", "END_OF_TRAINING", "EVALUATION", "STOP", "FreeRunning", "StoppedByAnother"]

EVALUATION, END_OF_EPOCH, END_OF_TRAINING = "an evaluation", "the end of an epoch", "the end of training"
STOP = "a request to stop"
# Who is ahead waits until the others are there too; who is behind leaves its evaluation out.
_AHEAD = {END_OF_EPOCH: 1, END_OF_TRAINING: 2}
_LOOK_S = 0.01  # between two looks at the store


class StoppedByAnother(Exception):
    """The replicas met because one of them was asked to stop. Nothing is outstanding."""


class FreeRunning:
    """One replica's side of an asynchronous run.

    Args:
        couplings: of this replica; the list may grow later.
        rendezvous: of the job.
        rank: this process.
        world_size: how many meet; a replica of several ranks comes with all of them.
        timeout: how long to wait at a meeting while nothing moves anywhere.

    Attributes:
        is_free: whether this replica is inside a training epoch, where nothing may wait for another.
        at_rest: whether all replicas have met and not parted yet: the center is the same for all, and does not move.
        ending: whether some replica said at a meeting that it is to end training.
    """

    def __init__(
        self,
        couplings: Sequence[Coupling],
        rendezvous: Rendezvous,
        *,
        rank: int,
        world_size: int,
        timeout: timedelta,
    ) -> None:
        self.is_free = self.at_rest = self.ending = False
        self._rank, self._world_size = rank, world_size
        self._num_saves, self._timeout = 0, timeout
        self._couplings, self._rendezvous = couplings, rendezvous
        self._store = PrefixStore("meetings", rendezvous.store)
        self._meetings = Meetings(
            self._store,
            replica=rank,
            num_replicas=world_size,
            timeout=timeout,
            progress=rendezvous.progress_of_all,
            check=rendezvous.raise_if_failed,
        )

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
        self.at_rest = True
        if STOP in reasons and reason != STOP:
            raise StoppedByAnother
        self._begin_round()
        return True

    def part(self, write: Callable[..., None], *, stop: bool = False) -> bool:
        """Waits until all replicas have done what they met for. Collective and blocking.

        Args:
            write: writes this replica's file of a checkpoint; called when replica 0 saves one, with what replica 0 has
                given to ``request_files``.
            stop: whether this process was asked to stop.

        Returns:
            Whether some replica was asked to stop.
        """
        self.is_free = False
        said = self._meetings.meet(STOP if stop else "parting", idle=lambda: self.serve(write))
        self.at_rest = False
        return STOP in said

    def serve(self, write: Callable[..., None], *, wait: bool = False) -> None:
        """Writes this replica's file if replica 0 is saving a checkpoint; with ``wait``, when it does."""
        if self._rank == 0:
            return
        key = f"saves/{self._num_saves + 1}"
        if wait:
            self._await({0: key}, "replica 0 saves a checkpoint")
        elif not self._store.check([key]):
            return
        self._num_saves += 1
        write(*json.loads(self._store.get(key)))
        self._store.set(f"{key}/{self._rank}", "")

    def request_files(self, *request: Any) -> None:
        """In replica 0: has all others write their file of a checkpoint, and waits for that. They are, or come, here.

        Raises:
            RuntimeError: another process failed meanwhile.
            TransportError: for the whole timeout none came and none moved; names who is missing.
        """
        self._num_saves += 1
        key = f"saves/{self._num_saves}"
        self._store.set(key, json.dumps(request))
        self._await({rank: f"{key}/{rank}" for rank in range(1, self._world_size)}, "all have written their files")

    def _await(self, keys: Mapping[int, str], until: str) -> None:
        """Waits for what each of some ranks sets in the store, as long as they come or move."""
        moved, seen = time.monotonic(), None
        while not self._store.check(list(keys.values())):
            self._rendezvous.raise_if_failed()
            now = (
                [rank for rank, key in keys.items() if not self._store.check([key])],
                self._rendezvous.progress_of_all(),
            )
            if now != seen:
                seen, moved = now, time.monotonic()
            elif now[0] and time.monotonic() - moved > self._timeout.total_seconds():
                raise TransportError(
                    f"rank {self._rank} waits until {until}, but {now[0]} did not move for "
                    f"{self._timeout.total_seconds():.0f} s; a checkpoint must be saved by all or inside the training "
                    "epoch"
                )
            time.sleep(_LOOK_S)

    def _begin_round(self) -> None:
        for coupling in self._couplings:
            if coupling.turnstile is not None:
                coupling.turnstile.begin_round(self._meetings.number)


def _format(reason: str, ending: bool) -> str:
    return f"{reason}\n{int(ending)}"


def _parse(message: str) -> tuple[str, bool]:
    reason, ending = message.split("\n")
    return reason, ending == "1"

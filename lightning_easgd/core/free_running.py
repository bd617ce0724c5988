"""Replicas of an asynchronous center: within an epoch each goes on by itself, and between epochs all meet.

They make different numbers of steps. What one decides within an epoch travels through the rendezvous and reaches the
others at their next step. An evaluation and the end of an epoch are meetings: all have the same center until they part
again, and a replica that waits to part writes its file of a checkpoint when replica 0 saves one.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

from typing_extensions import override

from lightning_easgd.communication import TransportError
from lightning_easgd.communication._meetings import Meetings
from lightning_easgd.communication._roll_call import await_all
from lightning_easgd.core.company import Company
from lightning_easgd.core.coupling import Coupling
from lightning_easgd.core.formation import Agreement, Formation, Occasion, Phase, Stopped
from lightning_easgd.core.plan import Plan

__all__ = ["FreeRunning", "Requests"]

# A replica that is further on waits until the others are there too; one that is behind leaves its evaluation out.
_AHEAD = {Occasion.END_OF_EPOCH: 1, Occasion.END_OF_TRAINING: 2}


class FreeRunning(Formation):
    """Replicas that exchange one by one, each at its own step.

    Args:
        company: see ``Formation``.
        couplings: see ``Formation``.
        others: see ``Formation``.
    """

    leader_decides: ClassVar[bool] = True

    def __init__(self, company: Company, couplings: Sequence[Coupling], **others: Any) -> None:
        super().__init__(company, couplings, **others)
        self._goes_on = False  # with the epoch, once the evaluation is over
        self._meetings = Meetings(
            company.store("meetings"),
            replica=company.rank,
            num_replicas=company.layout.world_size,
            timeout=company.timeout,
            progress=company.watch.progress_of_all,
            check=company.watch.raise_if_failed,
        )

    @override
    @classmethod
    def fits(cls, plan: Plan, company: Company) -> bool:
        return not plan.is_synchronous

    @override
    def begin_epoch(self) -> None:
        self._forget()  # nobody gathers it meanwhile
        self.phase = Phase.APART

    @override
    def after_step(self, couplings: Sequence[Coupling], *, end: bool) -> None:
        watch = self._company.watch
        del couplings  # no votes in these exchanges: the watch has told all of it
        # What this rank knows by itself, and what all ranks of its replica act upon.
        stop, ends = self._company.members.agree(watch.stop_requested, self._wants_end(end))
        watch.raise_if_failed()
        if ends and self.phase is Phase.APART:
            watch.request_end()
            self.end = Agreement.AGREED
        if stop:
            self.meet(Occasion.STOP)

    @override
    def ask_to_end(self) -> None:
        self._company.watch.request_end()
        if self.end is Agreement.OPEN:
            self.end = Agreement.ASKED

    @override
    def call_off(self) -> None:
        self._company.watch.request_end()

    @override
    def meet(self, occasion: Occasion, *, end: bool = False, last: bool = False, gather: bool = True) -> bool:
        for coupling in self._couplings:
            coupling.drain()
        ends = last or self._wants_end(end)
        while True:
            for coupling in self._couplings:
                if coupling.turnstile is not None:
                    coupling.turnstile.leave()
            came = [_parse(message) for message in self._meetings.meet(_format(occasion, ends))]
            occasions = [other for other, _ in came]
            if any(other_ends for _, other_ends in came):
                self.end = Agreement.AGREED
            if Occasion.STOP in occasions or all(other is occasion for other in occasions):
                break
            self._begin_round()
            if not self._waits_for(occasion, occasions):
                return False
        for coupling in self._couplings:
            coupling.refresh()
        self._meetings.meet("reading the center")  # nobody adds before all have read
        self._goes_on = self.phase is Phase.APART
        self.phase = Phase.MET
        self._gather_all()
        if Occasion.STOP in occasions:
            self.stop, self.phase, self.is_scattered = Agreement.AGREED, Phase.LEAVING, True
            if occasion is not Occasion.STOP:
                raise Stopped
            return True
        self._begin_round()
        return True

    @staticmethod
    def _waits_for(own: Occasion, occasions: Sequence[Occasion]) -> bool:
        """Returns whether this replica waits for others that are behind it; else it goes on without those ahead."""
        places = [_AHEAD.get(other, 0) for other in occasions]
        mine = _AHEAD.get(own, 0)
        if mine < max(places):
            return False
        if mine == min(places):
            named = {rank: other.value for rank, other in enumerate(occasions)}
            raise RuntimeError(
                f"the replicas wait for each other at different points: {named}; what meets "
                "(trainer.strategy.weights_of, a checkpoint) must be called by all or inside the training epoch"
            )
        return True

    def _gather_all(self) -> None:
        group = self._company.group
        for coupling in self._couplings if group is not None else ():
            if group is not None and coupling.average is not None:  # each replica saw the center at other times
                group.broadcast(coupling.average.value, 0).wait()
        self._gather()

    @override
    def after_evaluation(self, *, end: bool) -> None:
        self._part()
        if self._goes_on:
            self.begin_epoch()

    @override
    def after_epoch(self, *, end: bool, at_once: bool, last: bool) -> bool:
        self._part()
        return False

    @override
    def after_training(self) -> bool:
        return self._part()

    @override
    def leave(self) -> None:
        if self.phase is Phase.LEAVING:
            self._part()

    def _part(self) -> bool:
        """Waits until all replicas have done what they met for, and returns whether some was asked to stop."""
        watch = self._company.watch
        stop = Occasion.STOP.value
        said = self._meetings.meet(stop if watch.stop_requested else "parting", idle=self._serve)
        self.phase = Phase.GONE if self.phase is Phase.LEAVING else Phase.TOGETHER
        if stop in said:
            # Every replica knows it now, and meets to stop in its next step. Nobody may leave earlier: the store ends
            # with rank 0's process.
            watch.request_stop()
        return stop in said

    @override
    def catch_up(self) -> None:
        if not self.phase.is_at_rest:
            for coupling in self._couplings:
                coupling.refresh()

    @override
    def _rescue(self, coupling: Coupling, timeout: timedelta) -> None:
        coupling.drain(timeout)
        coupling.refresh()

    def _begin_round(self) -> None:
        for coupling in self._couplings:
            if coupling.turnstile is not None:
                coupling.turnstile.begin_round(self._meetings.number)


class Requests:
    """What replica 0 has all others do, while they wait for it. Every rank has one over the same store.

    Args:
        company: the processes of the job.
    """

    def __init__(self, company: Company) -> None:
        self._company, self._number = company, 0
        self._store = company.store("requests")

    def serve(self, act: Callable[..., None], *, wait: bool = False) -> None:
        """Does what rank 0 asks for, if it asks now; with ``wait``, when it does.

        Args:
            act: called with what rank 0 has given to ``ask``.
            wait: blocks until rank 0 asks.
        """
        rank = self._company.rank
        if rank == 0:
            return
        key = f"{self._number + 1}"
        if wait:
            self._await({0: key}, "replica 0 saves a checkpoint")
        elif not self._store.check([key]):
            return
        self._number += 1
        act(*json.loads(self._store.get(key)))
        self._store.set(f"{key}/{rank}", "")

    def ask(self, *request: object) -> None:
        """In rank 0: has all others act, and waits until they have. They wait to part, or come to ``serve``.

        Args:
            request: what can be written as JSON.

        Raises:
            RuntimeError: another process failed meanwhile.
            TransportError: for the whole timeout none came and none moved; names who is missing.
        """
        self._number += 1
        key = f"{self._number}"
        self._store.set(key, json.dumps(request))
        others = range(1, self._company.layout.world_size)
        self._await({rank: f"{key}/{rank}" for rank in others}, "all have written their files")

    def _await(self, keys: Mapping[int, str], until: str) -> None:
        """Waits for what each of some ranks sets in the store, as long as they come or move."""
        watch, timeout = self._company.watch, self._company.timeout
        ranks = list(keys)
        missing = await_all(
            self._store, list(keys.values()), timeout, check=watch.raise_if_failed, progress=watch.progress_of_all
        )
        if missing:
            raise TransportError(
                f"rank {self._company.rank} waits until {until}, but {[ranks[place] for place in missing]} did not "
                f"move for {timeout.total_seconds():.0f} s; a checkpoint must be saved by all or inside the training "
                "epoch"
            )


def _format(occasion: Occasion, ends: bool) -> str:
    return f"{occasion.value}\n{int(ends)}"


def _parse(message: str) -> tuple[Occasion, bool]:
    occasion, ends = message.split("\n")
    return Occasion(occasion), ends == "1"

"""How the ranks of a job find each other when it starts: before torch's default group is made, if they can."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_easgd.communication._notice import Notice
from lightning_easgd.communication._rendezvous import MAX_SILENCE, Rendezvous
from lightning_easgd.core.company import Company

if TYPE_CHECKING:
    from lightning_easgd.trainer.run import Run

__all__ = ["Launch", "say_layout"]


class Launch:
    """The start of one run, up to the rendezvous.

    Args:
        run: whose this is.

    Attributes:
        rendezvous: of all ranks, once they have found each other.
    """

    def __init__(self, run: "Run") -> None:
        self._run, self._strategy = run, run.strategy
        self.rendezvous: Rendezvous | None = None

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Surrounds the making of torch's default group, in which all ranks come together. Blocks for them.

        From the rendezvous on nobody waits for a process that is gone, be it in the making of the default group.
        """
        strategy, own = self._strategy, self._strategy._timeout
        arrival = min(self._run.timeout, self._run.options.max_silence or MAX_SILENCE)  # until all have come
        notice = self._put_up_notice(arrival)
        if notice is not None:
            self._open(notice, arrival).roll_call.gather("start together", "")
        strategy._timeout = arrival
        try:
            yield
            del notice  # torch's store has taken its server over
        finally:
            strategy._timeout = own

    def complete(self) -> None:
        """Opens the rendezvous where a default group was there before, or there is but one rank. Collective."""
        if self.rendezvous is None:
            # A default group that was there before says nothing of when its ranks come: they may be minutes apart, in
            # a script between two of its calls. Only from here on are all expected within half a minute.
            self._strategy.barrier()
            self._open(None, None)

    def close(self) -> None:
        """Leaves in good order. Idempotent; see ``Rendezvous.close``."""
        rendezvous, self.rendezvous = self.rendezvous, None
        if rendezvous is not None:
            rendezvous.close()

    def _put_up_notice(self, timeout: timedelta) -> Notice | None:
        """Returns where the ranks find each other before there is a default group; None where they need not."""
        strategy = self._strategy
        if strategy.layout.world_size == 1 or torch.distributed.is_initialized():
            return None
        assert strategy.cluster_environment is not None
        strategy.set_world_ranks()
        host, port = strategy.cluster_environment.main_address, strategy.cluster_environment.main_port
        return Notice(host, port, rank=strategy.global_rank, timeout=timeout)

    def _open(self, notice: Notice | None, arrival: timedelta | None) -> Rendezvous:
        run, strategy = self._run, self._strategy
        assert strategy.cluster_environment is not None
        connect = partial(
            Rendezvous,
            strategy.cluster_environment.main_address,
            rank=strategy.global_rank,
            world_size=strategy.layout.world_size,
            timeout=run.timeout,
            poll=timedelta(seconds=1 if run.options.plan.is_synchronous else 0.2),
            max_silence=run.options.max_silence,
            arrival=arrival,
        )
        if strategy.is_global_zero:
            self.rendezvous = connect(None)
            (strategy.broadcast if notice is None else notice.post)(self.rendezvous.port)
        else:
            self.rendezvous = connect(strategy.broadcast(None) if notice is None else notice.read())
        return self.rendezvous


def say_layout(company: Company) -> None:
    """Says which ranks form which replica, and on which hosts they are. Collective."""
    hosts = company.gather("say which hosts they are on", platform.node())
    if company.layout.world_size > 1:
        rank_zero_info(company.layout.describe(hosts))

"""What the replicas of a synchronous center do where they have met for different reasons.

Their exchanges keep them in step, but not their loops: with streams of different length one comes to an evaluation
when another has ended its epoch. Both say that they are done with exchanging, so that reasons must be compared too.
"""

from collections.abc import Sequence

from lightning_easgd._free_running import END_OF_EPOCH, END_OF_TRAINING, EVALUATION, STOP, StoppedByAnother

__all__ = ["meets"]


def meets(reasons: Sequence[str], own: str) -> bool | None:
    """Returns whether all have met for this replica's reason; None if it must meet the others once more.

    An evaluation that not all reach is left out; who has ended its epoch waits for the others.

    Args:
        reasons: of all replicas.
        own: this one's.

    Raises:
        StoppedByAnother: some replica was asked to stop; this one was not.
        RuntimeError: the reasons do not fit together.
    """
    if all(reason == own for reason in reasons):
        return True
    if STOP in reasons:
        if own == STOP:
            return True
        raise StoppedByAnother
    for end in (END_OF_EPOCH, END_OF_TRAINING):
        if set(reasons) == {EVALUATION, end}:
            return None if own == end else False
    raise RuntimeError(
        f"the replicas wait for each other at different points: {dict(enumerate(reasons))}; what meets "
        "(trainer.strategy.weights_of, a checkpoint) must be called by all at the same point"
    )

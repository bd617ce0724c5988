"""The interface of an algorithm, which sees one replica, one center and one local update.

The center is a vector with a clock, and all that a replica may do is read it, add to it, or both as one. An algorithm
owns the *order* of these, of the local update and of the replica's own move, and nothing else:

* EASGD:        exchange (pull and push as one), local update, subtract the force that the center received;
* DOWNPOUR:     pull, replace the replica, local updates, push what they have accumulated;
* local SGD:    the same, with what was accumulated over the number of replicas.

The transport knows which other replicas there are, and what "add" means: one all-reduce, a lock in shared memory, or a
server.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.gates import Gate
from lightning_easgd.interfaces import Center, ProximalTerm, Replica
from lightning_easgd.rules import Addition, CenterRule

__all__ = ["Algorithm"]


class Algorithm(ABC):
    """The loop of one replica. Abstract or final: a concrete algorithm is never subclassed.

    One object belongs to one optimizer's parameters (a *coupling*); it is copied for each, so that clocks never mix.

    Attributes:
        period: communication period tau, in optimizer steps, >= 1.
        clock: optimizer steps that this replica has begun with this coupling, counted from ``initial_clock``.
        initial_clock: what a run sets the clock to before its first step; 1 where an exchange in that step, at which
            all replicas are still at the center, would be of nothing. An evaluation after whole periods then sees a
            center that lacks one step, not a period.
        batches_per_epoch: mini-batches in an epoch of one replica, each of them an optimizer step; the same number on
            all. Set before the first step where ``needs_batches_per_epoch``; None where the training data have no
            length.
        needs_batches_per_epoch: whether some hyper-parameter follows it.
        synchronous_only: whether it has a meaning only where all replicas' n-th exchanges are one operation.
        asynchronous_only: whether it has a meaning only where each replica's exchange is a separate operation.
        num_told: how many numbers each replica tells all others with an exchange; see ``Center.tell``.
        needs_loss: whether ``observe_loss`` wants to be called.
        single_replica: whether it is a method of one replica, which then is all ranks together.
        reads_late: whether a step that is due reads the center after its local update, not before.
        separable: whether the parameters may be split into parts that exchange at different steps. Each part has its
            own algorithm object, and all parts share one local update. A part whose step is neither due nor ending runs
            before that update.
    """

    period: int
    clock: int = 0
    initial_clock: int = 0
    batches_per_epoch: int | None = None
    needs_batches_per_epoch: bool = False
    synchronous_only: ClassVar[bool] = False
    asynchronous_only: bool = False
    num_told: ClassVar[int] = 0
    needs_loss: ClassVar[bool] = False
    single_replica: ClassVar[bool] = False
    reads_late: bool = False
    separable: bool = False

    @property
    def is_due(self) -> bool:
        """Whether the next ``step`` begins an exchange: it reads the center, and a gate is passed before it."""
        return self.clock % self.period == 0

    @property
    def is_ending(self) -> bool:
        """Whether the next ``step`` ends an exchange: it adds to the center, and the gate's clock ticks after it."""
        return self.is_due

    def rule(self, num_replicas: int) -> CenterRule:
        """Returns what the center does with this algorithm's deltas. A new object for each center."""
        del num_replicas
        return Addition()

    def gate(self, num_replicas: int) -> Gate | None:
        """Returns the gate of an asynchronous center: which replica may exchange now; None where no replica waits."""
        del num_replicas
        return None

    def bind(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Shows the optimizer that ``local_update`` steps. Called before ``start``; local and cheap.

        Args:
            optimizer: torch's own, not a wrapper.
            parameters: the coupled tensors, in the flat vector's order.

        Raises:
            ValueError: the algorithm is not defined for this optimizer.
        """
        del optimizer, parameters

    def proximal_term(self) -> ProximalTerm | None:
        """Returns what is added to the loss of the local update that is going on; None for most.

        Its force ``stiffness (x - anchor)`` joins the gradient after the backward pass, and after a GradScaler's
        unscaling, but before clipping and before the optimizer, which decays weights by itself.
        """
        return None

    def observe_loss(self, loss: Tensor) -> None:
        """Hears of a mini-batch's training loss, a number, before or within the local update, where ``needs_loss``."""
        del loss

    def check(self, num_replicas: int) -> None:
        """Raises ``ValueError`` if the hyper-parameters cannot work with so many replicas; warns where they may not.

        By default any number will do. Local and cheap: it is called before any process is started, where the number of
        replicas is known by then.
        """
        del num_replicas

    def start(self, replica: Replica, center: Center) -> None:
        """Prepares for the first step. The replica holds the center's value; all replicas call it."""
        self.check(center.num_replicas)
        del replica

    def begin(self, replica: Replica, center: Center) -> None:  # noqa: B027  (most have nothing to do here)
        """Does what the next step begins with, before its forward pass; by default nothing.

        Nobody has to call it, since ``step`` does what was not done. Once called it has no effect until that step.

        Args:
            replica: the parameters, modified in place.
            center: the center; touched only where the step is due. Blocks for it, not for other replicas.
        """

    @abstractmethod
    def step(self, replica: Replica, center: Center, local_update: Callable[[], None]) -> None:
        """Performs one iteration in place and calls ``local_update`` exactly once, where the paper puts it.

        Args:
            replica: the parameters, modified in place.
            center: the center; touched only in a step that is due or ending.
            local_update: one step of the module's own optimizer, gradient included. Opaque.
        """

    def hyperparameters(self, num_replicas: int) -> dict[str, Any]:
        """Returns the plain values in force with so many replicas, for loggers."""
        del num_replicas
        return {"algorithm": type(self).__name__, "period": self.period}

    def state_dict(self) -> dict[str, Any]:
        """Returns what must survive a restart: the clock, and whatever tensors the algorithm keeps."""
        return {"clock": self.clock}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self.clock = int(state["clock"])

"""What an algorithm sees: one replica, one center, one local update.

The center is a vector with a clock, and all that a replica may do is read it, add to it, or both as one. An algorithm
owns the *order* of these, of the local update and of the replica's own move, and nothing else:

* EASGD:        exchange (pull and push as one), local update, subtract the force that the center received;
* DOWNPOUR:     pull, replace the replica, local updates, push what they have accumulated;
* local SGD:    the same, with what was accumulated over the number of replicas.

Who else is there, and what "add" means (one all-reduce, a lock in shared memory, a server) is the transport's business.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.gates import Gate
from lightning_easgd.rules import Addition, CenterRule

__all__ = ["Algorithm", "Center", "Exchange", "ProximalTerm", "Replica", "Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """The center as it was read.

    Attributes:
        value: (d,) the center's accumulation dtype, d = number of coupled parameters. Borrowed: read it, do not write
            it, and do not keep it beyond the next ``push`` or ``pull``.
        clock: the number of additions that ``value`` contains.
    """

    value: Tensor
    clock: int


class Exchange(Protocol):
    """An exchange that may still be going on."""

    def wait(self) -> Tensor:
        """Returns the delta, (d,), in the tensor that was exchanged. Blocks until it is computed; call it once."""
        ...

    def done(self) -> None:
        """Gives a borrowed vector back: after it the delta must not be read. The center's next operation implies it."""
        ...


class Center(Protocol):
    """The center variable as one replica reaches it.

    Attributes:
        num_replicas: how many replicas share it.
        replica: index of this one.
    """

    num_replicas: int
    replica: int

    def tell(self, numbers: Sequence[float] | Tensor) -> None:
        """Sets what this replica tells all others with each exchange from the next one on: ``num_told`` numbers.

        A tensor on the center's device is not read by the host, which need not wait for it.
        """
        ...

    def told(self) -> Tensor:
        """Returns (num_replicas, num_told), on the CPU: what each replica told with its last completed exchange.

        The same on all replicas of a synchronous center; zeros before the first exchange.
        """
        ...

    def pull(self) -> Snapshot:
        """Returns the center. May block: completes whatever this replica's last ``push`` left outstanding."""
        ...

    def push(self, delta: Tensor, *, read_at: int) -> None:
        """Adds ``delta`` to the center. Does not block; may return before delivery.

        Args:
            delta: (d,) in the center's dtype and on its device. The caller's again on return.
            read_at: the clock of the snapshot that ``delta`` was computed from.
        """
        ...

    def borrow(self) -> Tensor:
        """Completes what is outstanding and lends (d,) memory, its content undefined, for the x of an ``exchange``.

        A center that has to have such memory anyway lends its own; any other tensor will do as well.
        """
        ...

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        """Reads the center and adds to it as one: ``x <- delta(x, c)``, ``c <- c + scale x``.

        It may go on beside whatever the caller does until ``wait``; ``x`` is the center's until then. A center that
        others move meanwhile does it chunk by chunk, each under a lock, so that ``delta`` must be elementwise.

        Args:
            x: (d,) in the center's dtype and on its device. Overwritten.
            delta: called as ``delta(x_chunk, c_chunk)``, maybe in another thread, to overwrite its first argument;
                the second is only lent.
            scale: factor of what the center receives.
        """
        ...


class Replica(Protocol):
    """The parameters of one replica, seen as one flat vector of length d in the center's dtype."""

    def read(self, out: Tensor | None = None) -> Tensor:
        """Copies the parameters into ``out`` ((d,), allocated when None) and returns it."""
        ...

    def add_(self, update: Tensor, *, alpha: float = 1.0) -> None:
        """Adds ``alpha * update``, ``update`` (d,), to the parameters in place."""
        ...

    def write_(self, value: Tensor) -> None:
        """Replaces the parameters by ``value`` (d,), rounded to their own dtype."""
        ...


@dataclass(frozen=True)
class ProximalTerm:
    """``stiffness / 2 ||x - anchor||^2``, added to the loss that a local update descends.

    Attributes:
        stiffness: >= 0, in the loss's units over those of a parameter squared.
        anchor: (d,) the center's dtype. Borrowed: it stands until the local update has ended.
    """

    stiffness: float
    anchor: Tensor


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
        asynchronous_only: whether it has a meaning only where each replica's exchange is an operation of its own.
        num_told: how many numbers each replica tells all others with an exchange; see ``Center.tell``.
        needs_loss: whether ``observe_loss`` wants to be called.
        single_replica: whether it is a method of one replica, which then is all ranks together.
        reads_late: whether a step that is due reads the center after its local update, not before.
        separable: whether parts of the parameters may exchange at steps of their own, each part by an object of its
            own around the same local update. What a step does that is neither due nor ending it then does before it.
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
        """Returns who may exchange, over an asynchronous center; None where nobody waits for another."""
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

    @abstractmethod
    def check(self, num_replicas: int) -> None:
        """Raises ``ValueError`` if the hyper-parameters cannot work with so many replicas; warns where they may not.

        Local and cheap: it is called before any process is started, where the number of replicas is known by then.
        """

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

"""The interfaces between an algorithm and a center: a replica to read and move, a center to read and add to.

The center is a vector with a clock, and a replica can only read it, add to it, or do both as one operation. An
algorithm knows these interfaces and no transport; a transport implements them and knows no algorithm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Center", "Exchange", "ProximalTerm", "Replica", "Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """The center as it was read.

    Attributes:
        value: (d,) the center's accumulation dtype, d = number of coupled parameters. Borrowed: read it, do not write
            it, and do not keep it beyond the next ``push``, ``pull`` or ``exchange``.
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
        """Gives a borrowed vector back: do not read the delta afterwards. The center's next operation implies it."""
        ...


class Center(Protocol):
    """The center variable as one replica reaches it."""

    @property
    def num_replicas(self) -> int:
        """How many replicas share it now. Read it with each exchange; do not keep it."""
        ...

    @property
    def replica(self) -> int:
        """Index of this replica."""
        ...

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
        """Returns the center. May block: first completes the last ``push`` of this replica."""
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

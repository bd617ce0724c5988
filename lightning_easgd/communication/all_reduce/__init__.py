"""A center that every replica holds, kept equal by one all-reduce per exchange.

The elastic force of synchronous EASGD needs only the replica's parameters and the center that it already holds; the
*sum* over replicas is not needed before the next exchange. So ``push`` starts the all-reduce and returns, and the next
``pull`` completes it: communication hides behind a whole period of compute, with the arithmetic unchanged.

The center has a thread that sums chunk by chunk, and writes the new center beside the old one, into the memory of the
delta that it has sent; when all is there, the two change places. So the old center is whole until the new one is, and
two vectors are enough, if the algorithm writes what it exchanges into the one that the center lends (``borrow``).

On a CUDA device all of this is asynchronous by itself. The caller's thread enqueues it, and there is no other thread.

An exchange begins with a header: how many deltas there are, and the slots. Where all replicas only say that they are
there, nothing follows it. A replica that abstains waits for the header. A replica that adds something knows that deltas
follow, and does not wait for the header.

Replicas that are all on one host keep these two vectors in memory that they share. Their all-reduces carry no vector
then: the first says that all deltas are there, the second that all parts of the new center are, the third that they
have been read.
"""

from datetime import timedelta
from typing import get_args

from torch import Tensor

from lightning_easgd.communication._c10d import Store
from lightning_easgd.communication._line import Place
from lightning_easgd.communication._transport import OpenCenter, Transport, check_open
from lightning_easgd.communication._wire import Wire
from lightning_easgd.communication.all_reduce._device_center import DeviceCenter
from lightning_easgd.communication.all_reduce._replicated_center import ReplicatedCenter
from lightning_easgd.rules import CenterRule

__all__ = ["AllReduce"]


class AllReduce(Transport):
    """Synchronous transport: the center replicated in every replica, one all-reduce (sum) per exchange.

    The replicas' n-th pushes and abstentions belong together. The sum is applied to the center as one delta and counts
    as ``num_replicas`` additions. All copies stay bit-identical, since a sum is computed once and then distributed, or
    by the same operations everywhere.

    Memory: the center, a second vector of its size, messages (on the CPU 4 MiB, on a device 64 MiB, and up to 200 MB
    with a wire other than float32), and what the rule remembers; with a wire other than float32 also the rounding
    errors, ``1 + 1/num_replicas`` vectors (with two replicas one). A look at the center between an exchange's begin and
    its end costs a vector more. Where memory is shared, the first two are counted as such by the system (``top``'s
    SHR).

    On a device a delta that is not finite is found there, and is taken for zeros: it never enters the center. Its
    replica's next operation raises ``NonFiniteDeltaError``; on the CPU the exchange itself does.

    Args:
        wire: what numbers travel as: ``"float32"`` (the center's own dtype), ``"bfloat16"``, half as many bytes, or
            ``"int8"``, a quarter: multiples of one float32 for every 256 numbers. The slots travel as they are. What
            rounding takes from a delta is added to this replica's next one, and is part of the center's state: in the
            end the center receives everything. With more than two replicas the sums are rounded once more, likewise.
        shared_memory: whether replicas that are all on one host sum through memory that they share, not through
            sockets: at less than half of the processor's time, and with some bytes sent in all. For
            ``wire="float32"`` on the CPU, on Linux; elsewhere, and where processes do not see each other, as in
            containers of their own, it is sockets as with False. Default True.

    Raises:
        ValueError: ``wire`` or ``shared_memory`` is another.
    """

    synchronous = True

    def __init__(self, *, wire: Wire = "float32", shared_memory: bool = True) -> None:
        if wire not in get_args(Wire):
            raise ValueError(f"AllReduce(wire={wire!r}): must be one of {', '.join(map(repr, get_args(Wire)))}")
        if not isinstance(shared_memory, bool):
            raise ValueError(f"AllReduce(shared_memory={shared_memory!r}): must be True or False")
        self.wire = wire
        self.shared_memory = shared_memory

    def open(
        self,
        initial: Tensor,
        *,
        replica: int,
        num_replicas: int,
        rule: CenterRule,
        store: Store,
        timeout: timedelta,
        num_slots: int = 0,
        place: Place | None = None,
    ) -> OpenCenter:
        """Opens the center; see ``Transport.open``.

        Args:
            initial: see there, like all others.
            replica: see there.
            num_replicas: see there.
            rule: see there.
            store: see there.
            timeout: see there.
            num_slots: see there.
            place: on a CUDA device, where several centers share a communicator: this one's place among them, the same
                on all replicas. Default: a new communicator.
        """
        check_open(self, initial, replica, num_replicas, rule)
        kind = DeviceCenter if initial.is_cuda else ReplicatedCenter
        return kind(
            initial, replica, num_replicas, rule, store, timeout, num_slots, self.wire, self.shared_memory, place
        )

    def __repr__(self) -> str:
        """Returns the constructor call."""
        wire = [] if self.wire == "float32" else [f"wire={self.wire!r}"]
        return f"AllReduce({', '.join([*wire, *([] if self.shared_memory else ['shared_memory=False'])])})"

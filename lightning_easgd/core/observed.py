"""The center as an algorithm sees it: each operation carries this replica's votes and figures, and hears others'."""

from collections.abc import Callable, Sequence
from datetime import timedelta

from torch import Tensor

from lightning_easgd.averages import CenterAverage
from lightning_easgd.communication import OpenCenter
from lightning_easgd.core.report import Meter
from lightning_easgd.core.slots import Slots
from lightning_easgd.flatten import ParameterVector
from lightning_easgd.interfaces import Exchange, Snapshot

__all__ = ["ObservedCenter"]


class ObservedCenter:
    """A center for one algorithm; see ``interfaces.Center``. What it hears goes to the slots, the meter, the average.

    Args:
        center: open.
        vector: the replica's parameters.
        num_told: see ``Slots``.
        average: of the center over time; None for none.

    Attributes:
        center: as given.
        slots: its slots.
        meter: what measures its exchanges.
    """

    def __init__(
        self, center: OpenCenter, vector: ParameterVector, *, num_told: int, average: CenterAverage | None
    ) -> None:
        self.center = center
        self.slots = Slots(center, num_told)
        self.meter = Meter(vector, center, self.slots)
        self._average = average
        self._snapshot: Snapshot | None = None  # what the algorithm pulled last, maybe some steps ago

    @property
    def num_replicas(self) -> int:
        """See ``Center``."""
        return self.center.num_replicas

    @property
    def replica(self) -> int:
        """See ``Center``."""
        return self.center.replica

    def attach(self, center: OpenCenter, vector: ParameterVector) -> None:
        """Goes on with another center, of other parameters. Nothing may be outstanding."""
        self.center = center
        self.slots.attach(center)
        self.meter.attach(vector, center)

    # --- for the algorithm ------------------------------------------------------------------------------------------

    def tell(self, numbers: Sequence[float] | Tensor) -> None:
        """See ``Center.tell``."""
        self.slots.tell(numbers)

    def told(self) -> Tensor:
        """See ``Center.told``."""
        return self.slots.told()

    def pull(self) -> Snapshot:
        """See ``Center.pull``."""
        self._snapshot = self.center.pull()
        self.hear()
        return self._snapshot

    def push(self, delta: Tensor, *, read_at: int) -> None:
        """See ``Center.push``."""
        is_measured = self.meter.is_wanted and self._snapshot is not None
        if is_measured and self._snapshot is not None:
            self.meter.of_push(delta, self._snapshot.value)
        self.center.measures_drift = is_measured
        self._announce()
        self.center.push(delta, read_at=read_at)

    def borrow(self) -> Tensor:
        """See ``Center.borrow``."""
        self._complete()
        return self.center.borrow()

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Exchange:
        """See ``Center.exchange``."""
        self._complete()
        self.center.measures_drift = self.meter.is_wanted
        if not self.meter.is_wanted:
            self._announce()
            return self.center.exchange(x, delta, scale=scale)
        measured, over = self.meter.of_exchange(delta, scale)
        self._announce()
        return _Measured(self.center.exchange(x, measured, scale=scale), over)

    # --- for the coupling -------------------------------------------------------------------------------------------

    def abstain(self) -> None:
        """Sends the slots without adding anything, saying that this replica is done. See ``OpenCenter.abstain``."""
        self._announce(done=True)
        self.center.abstain()

    def drain(self, timeout: timedelta | None = None) -> None:
        """Completes an outstanding exchange. Blocks, but asks nothing of the others that they have not done already."""
        self.center.drain(timeout)
        self.hear()

    def refresh(self) -> None:
        """Reads the center anew, after what is outstanding. Blocks for it; over an asynchronous one not for peers."""
        self.center.pull()
        self.hear()

    def follow(self) -> None:
        """Shows the center, as it is now, to the average."""
        if self._average is not None:
            self._average.update(self.center.value, self.center.additions)

    def hear(self) -> None:
        """Takes in what the exchange that was just completed has brought."""
        self.follow()
        self.slots.hear()
        self.meter.hear()

    def _complete(self) -> None:
        if self.center.synchronous:
            self.center.drain()
        self.hear()

    def _announce(self, *, done: bool = False) -> None:
        self.slots.announce(done=done, figures=self.meter.take())


class _Measured:
    """An exchange whose figures are complete with it."""

    def __init__(self, pending: Exchange, over: Callable[[], None]) -> None:
        self._pending, self._over = pending, over

    def wait(self) -> Tensor:
        delta = self._pending.wait()
        self._over()
        return delta

    def done(self) -> None:
        self._pending.done()

"""Whose weights a module holds: its replica's, which train, or the center's, which are evaluated and saved."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from lightning_easgd.core.buffers import CenterBuffers
from lightning_easgd.core.coupling import Coupling
from lightning_easgd.core.modes import OptimizerModes

__all__ = ["Weights"]

Whose = Literal["center", "replica"]


class Weights:
    """Puts the center into a module, with all that belongs to it, and the replica back, bit for bit.

    Args:
        couplings: of the module; their averages stand for their centers.
        buffers: what belongs to the center beside them.
        reestimate: ``reestimate(buffers)`` estimates batch-norm statistics anew with the weights that the module holds;
            None where the center has the replicas' mean.

    Attributes:
        holds_center: whether the module holds the center now.
        buffers: as given.
    """

    def __init__(
        self,
        couplings: Sequence[Coupling],
        buffers: CenterBuffers,
        reestimate: Callable[[CenterBuffers], None] | None = None,
    ) -> None:
        self.holds_center = False
        self.buffers = buffers
        self._couplings, self._reestimate = couplings, reestimate
        self._modes: OptimizerModes | None = None
        self._is_new = False  # the center's buffers, since they were gathered

    def settle_modes(self, modes: OptimizerModes | None) -> None:
        """Lets modes that were asked for meanwhile take effect when the replica's weights are back; None ends that."""
        self._modes = modes

    def gather(self) -> None:
        """Gathers what belongs to the center beside the couplings. Collective and blocking."""
        self.buffers.gather()
        self._is_new = True

    def forget(self) -> None:
        """Says that what was gathered is out of date: the replica's own stands for it until it is gathered anew."""
        self.buffers.forget()
        self._is_new = False

    @property
    def whose(self) -> Whose:
        """Whose weights the module holds now."""
        return "center" if self.holds_center else "replica"

    def hold(self, whose: Whose) -> None:
        """Makes the module hold the center or the replica. Without effect where it does.

        Local, except where batch-norm statistics are estimated anew. Nothing may be outstanding.
        """
        if whose == self.whose:
            return
        for coupling in self._couplings:
            coupling.swap()
        self.holds_center = whose == "center"
        if self.holds_center:
            self.buffers.swap_in()
            if self._is_new and self._reestimate is not None:
                try:
                    self._reestimate(self.buffers)
                except BaseException:  # the user's module runs in there
                    self.hold("replica")
                    raise
            self._is_new = False
        else:
            self.buffers.swap_out()
        if self._modes is not None and not self.holds_center:
            self._modes.settle()

    @contextmanager
    def holding(self, whose: Whose) -> Iterator[None]:
        """Makes the module hold the center or the replica within, and then what it held before."""
        before = self.whose
        self.hold(whose)
        try:
            yield
        finally:
            self.hold(before)

"""The ways to meet that there are. A new one is a line here, before those that it takes the place of."""

from lightning_easgd.core.formation import Formation
from lightning_easgd.core.free_running import FreeRunning
from lightning_easgd.core.lock_step import LockStep, Solo

__all__ = ["FORMATIONS"]

FORMATIONS: list[type[Formation]] = [Solo, LockStep, FreeRunning]

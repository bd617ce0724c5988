"""Callbacks that keep what a rank trained on and what it has in the end, for either namespace of Lightning."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch
import pytorch_lightning
import torch
from lightning_utilities.core.apply_func import apply_to_collection

from tests.modules import flat


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns copies of all parameters and buffers."""
    return {name: value.clone() for name, value in module.state_dict().items()}


class _Ends:
    """Keeps center and replica as they are when training ends, the number of steps, and each coupling's exchanges.

    Args:
        of: what is kept of the module; by default its parameters, in one vector.

    Attributes:
        center, replica: that of either; under another strategy than ours both are the module's.
        steps: the optimizer steps of this rank.
        names: the names of the parameters of each coupling.
        exchanges: how often each coupling has exchanged.
    """

    def __init__(self, of: Callable[[Any], Any] = flat) -> None:
        super().__init__()
        self._of = of

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.steps = trainer.global_step
        self.center = self.replica = self._of(pl_module)
        couplings = getattr(trainer.strategy, "couplings", [])
        self.names = [coupling.names for coupling in couplings]
        self.exchanges = [coupling.center.traffic.exchanges for coupling in couplings]
        if couplings:
            before = flat(pl_module)
            with trainer.strategy.weights_of("replica"):
                self.replica = self._of(pl_module)
            assert torch.equal(flat(pl_module), before), "looking at the replica has changed the module"

    def kept(self) -> dict[str, Any]:
        """Returns all that was kept, by the attributes' names; what Lightning has put here is not."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in ("log", "log_dict")}


class _Recorder(_Ends):
    """Keeps every batch of training, too.

    Attributes:
        batches: the batches, in their order.
    """

    def __init__(self, of: Callable[[Any], Any] = flat) -> None:
        super().__init__(of)
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(apply_to_collection(batch, torch.Tensor, torch.clone))


class Ends(_Ends, pytorch_lightning.Callback):
    __doc__ = _Ends.__doc__


class EndsOfTheOther(_Ends, lightning.pytorch.Callback):
    __doc__ = _Ends.__doc__


class Recorder(_Recorder, pytorch_lightning.Callback):
    __doc__ = _Recorder.__doc__


class Everything(Recorder):
    """Keeps every batch, and in the end all that this rank must go on from: what a resumed run is compared by."""

    def __init__(self) -> None:
        super().__init__(state)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        self.optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
        self.schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        self.clocks = [coupling.algorithm.clock for coupling in trainer.strategy.couplings]
        self.rng = torch.get_rng_state()


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Returns where in two nested collections of the same form something differs, to the last bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [d for k in a for d in differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, list):
        assert len(a) == len(b), path
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [path]

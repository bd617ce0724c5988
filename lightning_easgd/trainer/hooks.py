"""The strategy's own callback: hooks that Lightning offers to callbacks, and not to strategies."""

from typing import TYPE_CHECKING, Any

from typing_extensions import override

if TYPE_CHECKING:
    from pytorch_lightning import Callback as _Callback

    from lightning_easgd.trainer.run import Run
else:
    _Callback = object

__all__ = ["ElasticHooks"]


class ElasticHooks(_Callback):
    """Stands first among a Trainer's callbacks while it fits, so that it comes before all others. Has no state.

    Args:
        run: whose hooks they are.
    """

    def __init__(self, run: "Run") -> None:
        super().__init__()
        self._run = run

    @override
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Adds the algorithm's force: gradients are unscaled here, and not clipped yet."""
        self._run.loops.add_force(optimizer)

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Puts the center into the module: what an averaging callback puts there in its own hook stays."""
        self._run.loops.end_training()

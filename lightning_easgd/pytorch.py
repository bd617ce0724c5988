"""The Lightning classes for Trainers of ``lightning.pytorch``.

``from lightning_easgd import EASGDStrategy`` is for Trainers of ``pytorch_lightning``; the
registered names work in both.
"""

from typing import TYPE_CHECKING

from lightning_easgd._lightning import bind

if TYPE_CHECKING:
    from lightning_easgd.trainer.monitor import ElasticMonitor
    from lightning_easgd.trainer.strategy import ElasticStrategy as EASGDStrategy
else:
    EASGDStrategy, ElasticMonitor = bind("lightning.pytorch")

__all__ = ["EASGDStrategy", "ElasticMonitor"]

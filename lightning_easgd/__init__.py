"""Elastic averaging for PyTorch Lightning.

Importing this package registers the strategy names with every Lightning namespace that a script uses, so that
``Trainer(strategy="easgd")`` trains any LightningModule unchanged; before or after it imports that namespace. The
classes here are for Trainers of ``pytorch_lightning``; ``lightning_easgd.pytorch`` has them for ``lightning.pytorch``.

``EASGDStrategy``, ``ElasticMonitor`` and the metrics are imported when they are first asked for: what needs neither
Lightning nor torchmetrics, such as a server that holds a center, does not load them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_easgd.__about__ import __version__
from lightning_easgd._lightning import bind, expect
from lightning_easgd.algorithms import (
    ADAG,
    ADMM,
    AGN,
    EAMSGD,
    EASGD,
    LSGD,
    Algorithm,
    Downpour,
    DynSGD,
    ElasticSGD,
    EntropySGD,
    LocalSGD,
    MDownpour,
    OverlapLocalSGD,
    Parle,
    StreamingDiLoCo,
)
from lightning_easgd.averages import MovingAverage, PolyakAverage, TailAverage
from lightning_easgd.communication import (
    AllReduce,
    Asynchronous,
    NonFiniteDeltaError,
    ParameterServer,
    SharedMemory,
    Transport,
    TransportError,
)

if TYPE_CHECKING:
    from lightning_easgd.metrics import ConsensusDistance, TemporalEfficiency, temporal_efficiency
    from lightning_easgd.trainer.monitor import ElasticMonitor
    from lightning_easgd.trainer.strategy import ElasticStrategy as EASGDStrategy

__all__ = [
    "ADAG",
    "ADMM",
    "AGN",
    "EAMSGD",
    "EASGD",
    "LSGD",
    "Algorithm",
    "AllReduce",
    "Asynchronous",
    "ConsensusDistance",
    "Downpour",
    "DynSGD",
    "EASGDStrategy",
    "ElasticMonitor",
    "ElasticSGD",
    "EntropySGD",
    "LocalSGD",
    "MDownpour",
    "MovingAverage",
    "NonFiniteDeltaError",
    "OverlapLocalSGD",
    "ParameterServer",
    "Parle",
    "PolyakAverage",
    "SharedMemory",
    "StreamingDiLoCo",
    "TailAverage",
    "TemporalEfficiency",
    "Transport",
    "TransportError",
    "__version__",
    "temporal_efficiency",
]

_BOUND = ("EASGDStrategy", "ElasticMonitor")
_METRICS = ("ConsensusDistance", "TemporalEfficiency", "temporal_efficiency")


def __getattr__(name: str) -> Any:
    if name in _BOUND:
        globals().update(zip(_BOUND, bind("pytorch_lightning"), strict=True))
    elif name in _METRICS:
        metrics = import_module("lightning_easgd.metrics")
        globals().update({each: getattr(metrics, each) for each in _METRICS})
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


expect()

"""The one place that knows of the two Lightning namespaces.

``pytorch_lightning`` and ``lightning.pytorch`` are the same code under two names, with different classes and different
strategy registries. What this package adds to Lightning is written once, as classes without a base, and bound here.
"""

import importlib
import importlib.util
from typing import Any

from lightning_easgd.callbacks import ElasticMonitor
from lightning_easgd.strategy import ElasticStrategy

__all__ = ["bind", "installed"]

# Which module of this package holds the classes bound to a namespace.
HOMES = {"pytorch_lightning": "lightning_easgd", "lightning.pytorch": "lightning_easgd.pytorch"}


def installed() -> list[str]:
    """Returns the namespaces that can be imported here."""
    return [name for name in HOMES if importlib.util.find_spec(name.partition(".")[0]) is not None]


def bind(namespace: str) -> tuple[Any, Any]:
    """Returns ``EASGDStrategy`` and ``ElasticMonitor`` for one namespace's Trainer and registers the strategy's names.

    Args:
        namespace: ``"pytorch_lightning"`` or ``"lightning.pytorch"``; importable.
    """
    strategies = importlib.import_module(f"{namespace}.strategies")
    callbacks = importlib.import_module(f"{namespace}.callbacks")
    home = HOMES[namespace]
    [other] = HOMES.keys() - {namespace}
    monitor = type(
        "ElasticMonitor", (ElasticMonitor, callbacks.Callback), {"__module__": home, "__doc__": ElasticMonitor.__doc__}
    )
    strategy: Any = type(
        "EASGDStrategy",
        (ElasticStrategy, strategies.DDPStrategy),
        {
            "__module__": home,
            "__doc__": ElasticStrategy.__doc__,
            "_monitor_type": monitor,
            "_lightning_version": f"{namespace} {importlib.import_module(namespace.partition('.')[0]).__version__}",
            "_sigterm_exception": importlib.import_module(f"{namespace}.utilities.exceptions").SIGTERMException,
            "_bound_to": f"{namespace}; for a Trainer of {other}: `from {HOMES[other]} import EASGDStrategy`",
        },
    )
    strategy.register_strategies(strategies.StrategyRegistry)
    return strategy, monitor

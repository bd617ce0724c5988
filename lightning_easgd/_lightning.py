"""The one place that knows of the two Lightning namespaces, and when this package's classes are made for them.

``pytorch_lightning`` and ``lightning.pytorch`` are the same code under two names, with different classes and different
strategy registries. This package's additions to Lightning are written once, as classes without a base, and bound here.

A namespace is bound when it is there: at once if it has been imported before this package, else as soon as it is, or
when a class that is bound to it is asked for. So importing this package registers the strategy names in whatever
Lightning a script uses, and costs nothing where it uses none, as in a server that holds a center.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["bind", "expect"]

# Which module of this package holds the classes bound to a namespace.
HOMES = {"pytorch_lightning": "lightning_easgd", "lightning.pytorch": "lightning_easgd.pytorch"}

_bound: dict[str, tuple[Any, Any]] = {}


def expect() -> None:
    """Binds each namespace that has been imported, and has the others bound when they are."""
    sys.meta_path.insert(0, _Finder())
    for namespace in HOMES:
        module = sys.modules.get(namespace)
        # One that is being imported at this moment, by whom this package is, is not whole yet.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            bind(namespace)


def bind(namespace: str) -> tuple[Any, Any]:
    """Returns ``EASGDStrategy`` and ``ElasticMonitor`` for one namespace's Trainer; the first call registers the names.

    Args:
        namespace: ``"pytorch_lightning"`` or ``"lightning.pytorch"``; importable.
    """
    strategies = importlib.import_module(f"{namespace}.strategies")  # which may bind it
    if namespace not in _bound:
        _bound[namespace] = _bind(namespace, strategies)
        importlib.import_module(HOMES[namespace])  # so that it is an attribute of this package
    return _bound[namespace]


def _bind(namespace: str, strategies: Any) -> tuple[Any, Any]:
    from lightning_easgd.trainer.hooks import ElasticHooks
    from lightning_easgd.trainer.monitor import ElasticMonitor
    from lightning_easgd.trainer.strategy import ElasticStrategy

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
            "hooks_type": type("ElasticHooks", (ElasticHooks, callbacks.Callback), {"__module__": home}),
            "_lightning_version": f"{namespace} {importlib.import_module(namespace.partition('.')[0]).__version__}",
            "sigterm_exception": importlib.import_module(f"{namespace}.utilities.exceptions").SIGTERMException,
            "_bound_to": f"{namespace}; for a Trainer of {other}: `from {HOMES[other]} import EASGDStrategy`",
        },
    )
    strategy.register_strategies(strategies.StrategyRegistry)
    return strategy, monitor


class _Finder(MetaPathFinder):
    """Finds the namespaces as the finders behind it do, and has them bound when they have been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in HOMES:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _ThenBind(spec.loader)
                return spec
        return None


class _ThenBind(Loader):
    """A loader that puts back the one that it stands for, and binds the module when that has been executed."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        bind(module.__name__)

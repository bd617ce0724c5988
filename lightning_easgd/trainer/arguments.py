"""Keywords that the strategy does not know: where they belong."""

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from lightning_easgd import algorithms, averages, communication

__all__ = ["for_ddp", "refuse_unknown"]


def refuse_unknown(keywords: Mapping[str, Any], strategy: type) -> None:
    """Raises ``TypeError`` for keywords that neither ``DDPStrategy`` nor ``DistributedDataParallel`` has.

    Args:
        keywords: what was given beyond the strategy's own arguments. LightningCLI gives all that there are.
        strategy: its class, a ``DDPStrategy``.
    """
    known = {name for kind in strategy.__mro__ for name in _parameters(kind)}
    known |= set(_parameters(DistributedDataParallel)) - {"module", "process_group"}
    for name, value in keywords.items():
        if name in known or (name == "process_group" and value is None):
            continue
        homes = [kind.__name__ for kind in _parts() if name in _parameters(kind)]
        if homes:
            advice = f"it belongs to {' or '.join(f'{home}({name}={value!r})' for home in homes[:3])}"
            advice += f", as in EASGDStrategy({homes[0]}({name}={value!r}))" if hasattr(algorithms, homes[0]) else ""
        else:
            close = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {close[0]!r}?" if close else "see help(EASGDStrategy)"
        raise TypeError(f"EASGDStrategy({name}={value!r}): there is no such argument; {advice}")


def for_ddp(keywords: Mapping[str, Any]) -> list[str]:
    """Returns the names of those keywords that ask ``DistributedDataParallel`` for something else than its default."""
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    return sorted(n for n, value in keywords.items() if n in parameters and value != parameters[n].default)


def _parts() -> Iterator[type]:
    """Yields the classes whose objects the strategy takes, those that most people use first."""
    for module in (algorithms, communication, averages):
        names: Iterable[str] = sorted(module.__all__, key=lambda name: (name != "EASGD", name))
        yield from (kind for kind in (getattr(module, name) for name in names) if inspect.isclass(kind))


def _parameters(kind: type) -> list[str]:
    """Returns the names that a constructor takes as keywords."""
    if "__init__" not in vars(kind):
        return []
    parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]

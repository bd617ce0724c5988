"""Makes all replicas begin equal: with the same parameters by name and shape, and with the values of rank 0."""

import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lightning_easgd.communication._c10d import Group
from lightning_easgd.communication._roll_call import RollCall
from lightning_easgd.core.buffers import BufferRules
from lightning_easgd.core.company import Company
from lightning_easgd.core.members import Layout
from lightning_easgd.core.tensors import broadcast, copy_of, in_common, is_dense, write

__all__ = ["begin_equal", "check_same_couplings", "check_same_parameters", "start_from_rank_0"]


def begin_equal(module: nn.Module, company: Company, rules: BufferRules) -> None:
    """Opens a company whose ranks have the same module, and gives all ranks the values of rank 0. Collective, blocking.

    Args:
        module: of this rank.
        company: not open yet.
        rules: says which parts of the module stay each rank's own.

    Raises:
        ValueError: a rank's parameters are not rank 0's; names it.
    """
    left_out = rules.not_shared(module)
    check_same_parameters(module, company.watch.roll_call, company.layout, left_out)
    company.open()
    if company.group is not None:
        size, device = company.layout.world_size, company.device
        start_from_rank_0(module, company.group, rank=company.rank, size=size, device=device, left_out=left_out)
    company.members.confine_batch_norm(module)


def check_same_parameters(
    module: nn.Module, roll_call: RollCall, layout: Layout, left_out: Collection[str] = ()
) -> None:
    """Raises on every rank if one's parameters are not rank 0's, or have no shape yet. Collective, blocking.

    Args:
        module: of this rank.
        roll_call: of all ranks.
        layout: which ranks form which replica.
        left_out: names of the parameters that stay each rank's own.

    Raises:
        ValueError: a replica differs, or a parameter has no shape yet; names each such replica with its first
            difference, or the parameters.
    """
    parameters = [(n, p) for n, p in module.named_parameters() if n not in left_out]
    own = [(n, str(p.dtype), [] if is_lazy(p) else list(p.shape), p.requires_grad) for n, p in parameters]
    own_text = json.dumps(own)
    purpose = "compare their parameters"
    # Ranks send the full list only where something differs: with many ranks and parameters it is long.
    if len(set(roll_call.gather(purpose, hashlib.sha256(own_text.encode()).hexdigest()))) > 1:
        first, *others = map(json.loads, roll_call.gather(purpose, own_text))
        differences = (_difference(r // layout.replica_size, first, other) for r, other in enumerate(others, 1))
        verdict = "; ".join(filter(None, differences))
        raise ValueError(f"EASGDStrategy: all replicas must have the same parameters, but {verdict}")
    lazy = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if is_lazy(t)]
    if lazy:
        kinds = sorted({type(m).__name__ for m in module.modules() if isinstance(m, LazyModuleMixin)})
        raise ValueError(
            f"EASGDStrategy: {', '.join(map(repr, lazy[:4]))}{', ...' if len(lazy) > 4 else ''} have no shape yet, and "
            f"replicas must begin equal ({', '.join(kinds) or 'lazy modules'}): pass one batch through the module in "
            "setup or configure_model, such as `with torch.no_grad(): self(example)`"
        )


def check_same_couplings(trained: Sequence[tuple[str, Collection[str]]], company: Company) -> None:
    """Raises on every rank if one's optimizers train other parameters than rank 0's. Collective, blocking.

    Args:
        trained: for each coupling the name of its optimizer's class, and those of its parameters.
        company: the processes of the job.

    Raises:
        ValueError: names each replica that differs, and where it does first.
    """
    own_text = json.dumps([(kind, list(names)) for kind, names in trained])
    purpose = "compare what their optimizers train"
    if len(set(company.gather(purpose, hashlib.sha256(own_text.encode()).hexdigest()))) == 1:
        return
    first, *others = map(json.loads, company.gather(purpose, own_text))
    differing = {rank // company.layout.replica_size: other for rank, other in enumerate(others, 1) if other != first}
    verdict = "; ".join(f"replica {replica} has {_trained(other, first)}" for replica, other in differing.items())
    raise ValueError(
        f"EASGDStrategy: configure_optimizers must return the same on all replicas, but {verdict}, where replica 0 has "
        f"{_trained(first, next(iter(differing.values())))}"
    )


def _trained(mine: Sequence[Any], other: Sequence[Any]) -> str:
    """Describes the first of the couplings that is not the other replica's; else how many there are."""
    for index, (kind, names) in enumerate(mine):
        theirs = other[index] if index < len(other) else None
        if theirs is not None and theirs != [kind, names]:
            if kind == "_MockOptimizer":  # Lightning's, where configure_optimizers returned None
                return "none"
            own = [name for name in names if name not in theirs[1]]
            return f"{kind} for {len(names)} parameters" + (f", {own[0]!r} among them" if own else "")
    return f"{len(mine)} optimizer{'' if len(mine) == 1 else 's'}"


@torch.no_grad()
def start_from_rank_0(
    module: nn.Module,
    group: Group,
    *,
    rank: int,
    size: int,
    device: torch.device,
    left_out: Collection[str] = (),
) -> None:
    """Gives every rank of ``group`` the parameters and buffers of rank 0. Collective, blocking.

    Args:
        module: of this rank.
        group: over all ranks.
        rank: this one.
        size: of the group.
        device: on which it sends.
        left_out: names of what is each rank's own; so are buffers of another shape or dtype than rank 0's.
    """
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    named = {n: t for n, t in named.items() if n not in left_out}
    common, _ = in_common(group, size, device, named)
    tensors = [named[n].detach() if is_dense(named[n]) else named[n] for n in named if n in common]
    values = [t if is_dense(t) and t.is_contiguous() else copy_of(t) for t in tensors]
    for tensor, value in zip(tensors, broadcast(group, values, rank, device), strict=True):
        if value is not tensor:
            write(tensor, value)


def _difference(replica: int, first: list[Any], other: list[Any]) -> str:
    """Returns in words where a replica's list of parameters leaves that of replica 0; empty where they agree."""
    for ours, theirs in zip(first, other, strict=False):
        if ours != theirs:
            return f"replica {replica} has {_describe(theirs)} where replica 0 has {_describe(ours)}"
    if len(first) != len(other):
        longer, whose = (first, 0) if len(first) > len(other) else (other, replica)
        return f"replica {replica} has {len(other)} and replica 0 {len(first)}; only replica {whose} has " + _describe(
            longer[min(len(first), len(other))]
        )
    return ""


def _describe(entry: list[Any]) -> str:
    name, dtype, shape, requires_grad = entry
    return f"{name!r} ({dtype}, shape {shape}, {'trainable' if requires_grad else 'not trainable'})"

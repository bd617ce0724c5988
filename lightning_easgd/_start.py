"""That all replicas begin equal: the same parameters by name and shape, and the values of rank 0."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from lightning_easgd._members import Layout
from lightning_easgd.communication._c10d import Group, broadcast_bytes
from lightning_easgd.communication._roll_call import RollCall

__all__ = ["check_same_parameters", "start_from_rank_0"]


def check_same_parameters(module: nn.Module, roll_call: RollCall, layout: Layout) -> None:
    """Raises on every rank if one's parameters or buffers are not rank 0's. Collective, blocking.

    Args:
        module: of this rank.
        roll_call: of all ranks.
        layout: which ranks form which replica.

    Raises:
        ValueError: names each replica that differs, and where it does first.
    """
    own = [(n, str(p.dtype), list(p.shape), p.requires_grad) for n, p in module.named_parameters()]
    own += [(n, str(b.dtype), list(b.shape), False) for n, b in module.named_buffers()]
    own_text = json.dumps(own)
    purpose = "compare their parameters"
    # All of it is said only where something differs: with many ranks and parameters that is much.
    if len(set(roll_call.gather(purpose, hashlib.sha256(own_text.encode()).hexdigest()))) == 1:
        return
    first, *others = map(json.loads, roll_call.gather(purpose, own_text))
    differences = (_difference(r // layout.replica_size, first, other) for r, other in enumerate(others, 1))
    verdict = "; ".join(filter(None, differences))
    raise ValueError(f"EASGDStrategy: all replicas must have the same parameters and buffers, but {verdict}")


@torch.no_grad()
def start_from_rank_0(module: nn.Module, group: Group) -> None:
    """Gives every rank of ``group`` the parameters and buffers of rank 0. Collective, blocking."""
    tensors = [t.detach() for t in (*module.parameters(), *module.buffers())]
    values = [t if t.is_contiguous() else t.clone(memory_format=torch.contiguous_format) for t in tensors]
    broadcast_bytes(group, values)
    for tensor, value in zip(tensors, values, strict=True):
        if value is not tensor:
            tensor.copy_(value)


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

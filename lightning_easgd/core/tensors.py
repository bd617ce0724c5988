"""Tensors of any kind as values that are copied, compared and sent: sparse, quantised and overlapping ones too."""

import io
import json
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_easgd.communication._c10d import AllgatherOptions, Group, broadcast_bytes

__all__ = ["broadcast", "checksums", "copy_of", "form", "gather_numbers", "in_common", "is_dense", "is_equal", "write"]

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_CHUNK = 1 << 20  # numbers per pass over a tensor: keeps the extra memory small


def is_dense(tensor: Tensor) -> bool:
    """Returns whether a tensor is only numbers in memory: not sparse, not quantised, not made of other tensors."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return False
    return not is_traceable_wrapper_subclass(tensor)


def form(tensor: Tensor) -> list[Any]:
    """Returns what two tensors must have in common for one's value to be written into the other."""
    return [str(tensor.dtype), list(tensor.shape), str(tensor.layout), tensor.is_quantized]


def copy_of(tensor: Tensor) -> Tensor:
    """Returns a copy that shares no memory; a dense one is contiguous."""
    value = tensor.detach()
    if not is_dense(tensor):
        return value.clone()
    return value.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def write(tensor: Tensor, value: Tensor) -> None:
    """Gives a tensor, in place, the value of another tensor of the same form. An expanded tensor is written once."""
    if tensor.layout in _COMPRESSED:
        tensor.resize_as_sparse_(value.to(tensor.device))
    if tensor.is_quantized:  # with its scales
        tensor.data = value.detach().clone().to(tensor.device)
        return
    if not is_dense(tensor):
        tensor.copy_(value)
        return
    target = tensor.data  # not ``detach``: a write between forward and backward pass must not upset autograd
    for dim, stride in enumerate(target.stride()):
        if stride == 0 and target.shape[dim] > 1:  # expanded: all elements are one number
            target, value = target.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    target.copy_(value)


def is_equal(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors have the same form and the same bits."""
    if form(one) != form(other):
        return False
    if is_dense(one) and is_dense(other):
        return torch.equal(_bytes(one), _bytes(other.to(one.device)))
    parts, others = _parts(one), _parts(other)
    if not parts or not others:  # a kind of tensor that this module does not know
        return _pickled([one]) == _pickled([other])
    return all(is_equal(part, its) for part, its in zip(parts, others, strict=True))


def _parts(tensor: Tensor) -> list[Tensor]:
    """Returns the dense tensors that a sparse or quantised one is made of; empty if its kind is another."""
    value = tensor.detach()
    if value.layout == torch.sparse_coo:
        return [value._indices(), value._values()]
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [value.crow_indices(), value.col_indices(), value.values()]
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [value.ccol_indices(), value.row_indices(), value.values()]
    if value.is_quantized and value.qscheme() == torch.per_tensor_affine:
        return [value.int_repr(), torch.tensor([value.q_scale(), value.q_zero_point()], dtype=torch.float64)]
    if value.is_quantized:
        return [value.int_repr(), value.q_per_channel_scales(), value.q_per_channel_zero_points()]
    return []


@torch.no_grad()
def broadcast(group: Group, values: Sequence[Tensor], rank: int, device: torch.device) -> list[Tensor]:
    """Returns rank 0's tensors for this rank's ``values``, which may be overwritten. Collective, blocking.

    Args:
        group: over all ranks.
        values: of the same forms on all, contiguous where dense, on any devices; sparse ones may have other entries.
        rank: this one in the group.
        device: on which the group sends.
    """
    dense = {i: v.to(device) for i, v in enumerate(values) if is_dense(v)}
    broadcast_bytes(group, dense.values())
    received = dict(dense)
    others = [i for i in range(len(values)) if i not in dense]
    if others:
        content = _pickled([values[i] for i in others]) if rank == 0 else b""
        size = torch.tensor([len(content)], device=device)
        group.broadcast(size, 0).wait()
        message = torch.zeros(int(size), dtype=torch.uint8)
        if rank == 0:
            message.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        message = message.to(device)
        group.broadcast(message, 0).wait()
        # A rank of this job wrote it.
        loaded = torch.load(io.BytesIO(message.cpu().numpy().tobytes()), map_location="cpu", weights_only=False)
        received.update(zip(others, loaded, strict=True))
    return [received[i].to(v.device) for i, v in enumerate(values)]


def gather_numbers(group: Group, size: int, own: Tensor) -> list[Tensor]:
    """Returns every rank's vector, of the same length on all. Collective, blocking."""
    rows = [torch.empty_like(own) for _ in range(size)]
    group.allgather([rows], [own], AllgatherOptions()).wait()
    return rows


def in_common(
    group: Group, size: int, device: torch.device, tensors: Mapping[str, Tensor]
) -> tuple[Collection[str], Collection[str]]:
    """Returns the names of what has one form on all ranks, and of all else. Collective, blocking.

    One message of two numbers where all agree.
    """
    tables = _gather_tables(group, size, device, [[n, *form(t)] for n, t in tensors.items()])
    if tables is None:
        return tensors.keys(), ()
    forms = [{entry[0]: entry[1:] for entry in table} for table in tables]
    common = {n for n in forms[0] if all(each.get(n) == forms[0][n] for each in forms)}
    return common, {n for each in forms for n in each} - common


def _gather_tables(group: Group, size: int, device: torch.device, own: list[Any]) -> list[list[Any]] | None:
    """Returns every rank's table of what JSON can hold, or None where all are equal."""
    content = json.dumps(own).encode()
    digest = int.from_bytes(blake2b(content, digest_size=8).digest(), "big", signed=True)
    heads = [row.tolist() for row in gather_numbers(group, size, torch.tensor([digest, len(content)], device=device))]
    if all(head == heads[0] for head in heads):
        return None
    message = torch.zeros(max(length for _, length in heads), dtype=torch.uint8)
    message[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    rows = gather_numbers(group, size, message.to(device))
    return [json.loads(row.cpu().numpy().tobytes()[:length]) for row, (_, length) in zip(rows, heads, strict=True)]


@torch.no_grad()
def checksums(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns (n,) int64: for each tensor a number that equal bits have in common and others, but for chance, have not.

    Two passes over the tensors on their own device, and one read of it.
    """
    sums = [_checksum(t).to(device) for t in tensors]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64, device=device)


def _checksum(tensor: Tensor) -> Tensor:
    if not is_dense(tensor):
        digest = blake2b(_pickled([tensor.detach().clone()]), digest_size=8).digest()
        return torch.tensor(int.from_bytes(digest, "big", signed=True))
    content = _bytes(tensor)
    total = torch.zeros((), dtype=torch.int64, device=content.device)
    for number, part in enumerate(torch.split(content, 8 * _CHUNK)):
        if part.numel() % 8 or part.storage_offset() % 8:
            part = torch.cat([part, part.new_zeros(-part.numel() % 8)])
        words = part.view(torch.int64)
        # What differs in the highest bits alone must differ in the lowest, too: products lose what overflows.
        words = words ^ (words >> 31)
        place = torch.arange(1, len(words) + 1, dtype=torch.int64, device=words.device)
        place = (place + number * _CHUNK) * 0x1E3779B97F4A7C15
        place = (place ^ (place >> 29)) * 0x3F58476D1CE4E5B9
        total = total + (words * (place ^ (place >> 32))).sum()
    return total


def _bytes(tensor: Tensor) -> Tensor:
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return dense.view(-1).view(torch.uint8) if dense.numel() else dense.new_empty(0, dtype=torch.uint8)


def _pickled(tensors: Sequence[Tensor]) -> bytes:
    stream = io.BytesIO()
    torch.save([t.detach().cpu() for t in tensors], stream)
    return stream.getvalue()

"""Broadcasts of many tensors: which go together, and that all arrive to the last bit."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lightning_easgd.communication import _c10d
from lightning_easgd.communication._c10d import broadcast_bytes, close_groups, new_group, new_store_server
from tests.helpers import TIMEOUT, run_threads


class _Counting:
    def __init__(self, group: _c10d.Group) -> None:
        self._group, self.sizes = group, []

    def broadcast(self, tensor, root):
        self.sizes.append(tensor.numel())
        return self._group.broadcast(tensor, root)


def tensors(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [
        torch.randn(3, 5, generator=generator),  # 60 bytes
        torch.randint(100, (4,), generator=generator),  # 32
        torch.tensor(rank == 0),  # 1
        torch.empty(0),
        torch.randn(40, generator=generator).to(torch.bfloat16),  # 80
        torch.randn(50, generator=generator),  # 200
        torch.randn((), dtype=torch.float64, generator=generator),  # 8
    ]


@pytest.mark.parametrize(("limit", "sizes"), [(1 << 20, [381]), (100, [200, 173, 8]), (1, [60, 32, 1, 80, 200, 8])])
def test_every_tensor_becomes_that_of_rank_0(monkeypatch, limit, sizes):
    monkeypatch.setattr(_c10d, "_MESSAGE_BYTES", limit)

    def body(rank, store: dist.Store):
        group = _Counting(new_group(store, rank, 2, torch.device("cpu"), TIMEOUT))
        ours = tensors(rank)
        broadcast_bytes(group, ours)
        return ours, group.sizes

    for ours, sent in run_threads(body, 2):
        assert sorted(sent) == sorted(sizes)
        for mine, first in zip(ours, tensors(0), strict=True):
            assert torch.equal(mine, first)
            assert mine.dtype == first.dtype


@pytest.mark.parametrize(("system", "expected"), [("linux", True), ("darwin", True), ("win32", False)])
def test_the_quicker_server_is_asked_for_where_torch_has_it(monkeypatch, system, expected):
    asked = {}
    monkeypatch.setattr(_c10d, "sys", SimpleNamespace(platform=system))
    monkeypatch.setattr(_c10d, "TCPStore", lambda *args, **kwargs: asked.update(kwargs))
    new_store_server("127.0.0.1", TIMEOUT)
    assert asked["use_libuv"] is expected


def test_a_group_that_is_closed_has_no_threads_left_whoever_holds_it():
    def body(rank, store: dist.Store):
        group = new_group(store, rank, 2, torch.device("cpu"), TIMEOUT)
        group.allreduce([torch.ones(1)]).wait()
        return group

    held = run_threads(body, 2)
    assert len(_c10d._open_groups) >= 2
    close_groups()
    assert not _c10d._open_groups
    for group in held:
        with pytest.raises(RuntimeError, match="allreduce of a process group that has been closed"):
            group.allreduce([torch.ones(1)])

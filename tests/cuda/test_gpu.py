"""On real NVIDIA GPUs, wherever there are: ``python -m pytest -m gpu``. What has been run is in docs/hardware.md."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_easgd import EASGDStrategy, Parle
from lightning_easgd.algorithms import EASGD
from lightning_easgd.communication import AllReduce
from lightning_easgd.core.coupling import Coupling
from lightning_easgd.core.slots import num_slots
from lightning_easgd.flatten import ParameterVector
from lightning_easgd.rules import Addition
from tests.helpers import TIMEOUT, free_port, run_replicas
from tests.modules import Regression, flat, loader, trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

LAG_CYCLES = 2_000_000_000  # about a second


def open_alone(initial: Tensor, slots: int = 0) -> Any:
    """One replica: NCCL takes no second one on the same device."""
    return AllReduce().open(
        initial,
        replica=0,
        num_replicas=1,
        rule=Addition(),
        store=dist.HashStore(),
        timeout=TIMEOUT,
        num_slots=slots,
    )


def couple(num: int, *, report_every: int = 0) -> tuple[Coupling, Tensor]:
    parameter = torch.zeros(num, device="cuda")
    center = open_alone(torch.ones(num, device="cuda"), num_slots(1))
    coupling = Coupling(["p"], ParameterVector([parameter]), EASGD(period=2, center_rate=0.5), center)
    coupling.algorithm.clock = 1
    coupling.report_every = report_every
    return coupling, parameter


def test_the_delta_is_whole_until_the_device_has_read_it():
    num = 5 * (16 << 20) // 4
    with open_alone(torch.zeros(num, device="cuda")) as center:
        pending = center.exchange(center.borrow().fill_(1), torch.Tensor.sub_, scale=0.5)
        torch.cuda._sleep(LAG_CYCLES)  # the device lags behind its host
        kept = pending.wait().clone()  # queued behind the sleep
        pending.done()
        center.drain()
        assert torch.equal(kept, torch.ones(num, device="cuda"))
        assert torch.equal(center.value, torch.full((num,), 0.5, device="cuda"))


class Fused(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)


def _fit(replica: int, folder: str, kind: str) -> Any:
    del replica
    on_gpu = {"accelerator": "gpu", "devices": 1}
    if kind == "fused":
        try:
            trainer(strategy=EASGDStrategy(Parle(period=4)), precision="16-mixed", max_steps=2, **on_gpu).fit(
                Fused(), loader()
            )
        except ValueError as error:
            return str(error)
        return ""
    torch.manual_seed(0)
    whole, stopped, resumed = Regression(), Regression(), Regression()
    for module in (stopped, resumed):
        module.load_state_dict(whole.state_dict())

    def strategy() -> EASGDStrategy:
        return EASGDStrategy(Parle(period=3) if kind == "parle" else EASGD(period=3))

    trainer(strategy=strategy(), max_steps=11, max_epochs=-1, **on_gpu).fit(whole, loader(shuffle=False))
    first = trainer(strategy=strategy(), max_steps=5, max_epochs=-1, **on_gpu)
    first.fit(stopped, loader(shuffle=False))
    path = str(Path(folder, "stopped.ckpt"))
    first.save_checkpoint(path)
    trainer(strategy=strategy(), max_steps=11, max_epochs=-1, **on_gpu).fit(
        resumed, loader(shuffle=False), ckpt_path=path
    )
    return flat(whole).cpu(), flat(resumed).cpu()


def test_a_force_on_gradients_that_a_fused_optimizer_unscales_is_refused(tmp_path):
    [message] = run_replicas(_fit, 1, str(tmp_path), "fused")
    assert "use fused=False, or precision='bf16-mixed'" in message


@pytest.mark.parametrize("kind", ["easgd", "parle"])
def test_a_whole_run_and_a_resumed_one_end_alike(kind, tmp_path):
    [(whole, resumed)] = run_replicas(_fit, 1, str(tmp_path), kind)
    assert torch.isfinite(whole).all()
    torch.testing.assert_close(resumed, whole, rtol=1e-5, atol=1e-6)


@contextmanager
def no_host_waits() -> Iterator[None]:
    """An operation that waits for the device raises ``RuntimeError``; events and streams may still be waited for."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("report_every", [0, 1])
def test_no_step_copies_or_reads_a_number_of_the_device_at_once(report_every):
    coupling, parameter = couple(1000, report_every=report_every)
    with coupling.center:
        for step in range(12):
            if step < 4:  # allocations and the communicator
                coupling.step(lambda: parameter.mul_(0.9), recover=None, at=step)
                continue
            with no_host_waits():
                coupling.step(lambda: parameter.mul_(0.9), recover=None, at=step)
        coupling.drain()


@pytest.mark.parametrize("report_every", [0, 1])
def test_an_exchange_takes_little_memory_beyond_the_two_vectors(report_every):
    num = 64 << 20  # 256 MiB a vector
    coupling, parameter = couple(num, report_every=report_every)
    with coupling.center:
        for step in range(4):
            coupling.step(lambda: parameter.mul_(0.9), recover=None, at=step)
        coupling.drain()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for step in range(4, 8):
            if report_every:  # the update's norm needs the parameters from before it: a vector, which is documented
                before = max(before, torch.cuda.memory_allocated())
            coupling.step(lambda: parameter.mul_(0.9), recover=None, at=step)
        coupling.drain()
        extra = torch.cuda.max_memory_allocated() - before
        vectors = 1.5 if report_every else 0.5
        assert extra < vectors * 4 * num, f"{extra / (4 * num):.2f} vectors more"
        state = coupling.state_dict()
        assert torch.cuda.max_memory_allocated() - before < vectors * 4 * num, "a checkpoint was made on the device"
        del state


def _train_on_own_gpu(replica: int, port: int) -> Any:
    os.environ.update(
        {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "RANK": str(replica),
            "LOCAL_RANK": str(replica),
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "gpu",
        }
    )
    torch.manual_seed(0)
    module = Regression()
    fit = trainer(accelerator="gpu", devices=2, strategy=EASGDStrategy(EASGD(period=2)), max_steps=9, max_epochs=-1)
    fit.fit(module, loader())
    return flat(module).cpu(), bool(torch._C._cuda_hasPrimaryContext(0))


@two_gpus
def test_two_replicas_on_two_gpus_end_with_one_center():
    results = run_replicas(_train_on_own_gpu, 2, free_port())
    assert torch.equal(results[0][0], results[1][0])  # after fit the module holds the center
    assert [has_context for _, has_context in results] == [True, False]

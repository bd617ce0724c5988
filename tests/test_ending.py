"""However a job ends - a signal, an exception or a silent death, on one process or on all - all processes end soon.

The replicas here are processes of a launcher that kills nobody, so that each must notice by itself.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_easgd import EASGD, EASGDStrategy, SharedMemory, Transport
from lightning_easgd.communication import _rendezvous
from tests import modules
from tests.helpers import TIMEOUT, Replicas
from tests.modules import Regression, loader, trainer

PROMISED_S = 60.0  # to a user, for a job's end
STANDSTILL_S = 60.0  # of a busy machine; more than that would be a wait that never ends by itself
SILENCE_S = 10.0  # in place of the package's, where a test waits for it
LONG = 10**9


def _train(replica: int, port: int, folder: str, period: int, misbehave: str, culprit: int, transport: Any) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint

    if misbehave == "die" and transport is not None:
        _rendezvous._SILENCE_S = SILENCE_S
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)

    class Progress(modules.pytorch_lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 30:
                store.set(f"running/{replica}", str(os.getpid()))
            if trainer.global_step == 35 and replica == culprit:
                if misbehave == "raise":
                    raise KeyError("the original error")
                if misbehave == "die":
                    os._exit(9)

    checkpoint = ModelCheckpoint(folder, save_last=True, every_n_train_steps=10, save_on_exception=True)
    trainer(
        strategy=EASGDStrategy(EASGD(period=period), transport),
        max_epochs=-1,
        callbacks=[Progress(), checkpoint],
        enable_checkpointing=True,
    ).fit(Regression(), loader())


def _run(
    folder: Path, period: int = 5, misbehave: str = "", culprit: int = -1, transport: Transport | None = None
) -> tuple[Replicas, list[int], float]:
    """Starts two replicas and returns once both train: (replicas, their pids, the time)."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=2 * TIMEOUT, wait_for_workers=False)
    replicas = Replicas(_train, 2, store.port, str(folder), period, misbehave, culprit, transport)
    pids = [int(store.get(f"running/{r}")) for r in range(2)]
    return replicas, pids, time.monotonic()


def _check(folder: Path, replicas: Replicas, began: float, spared_s: float = 0.0) -> list[int | None]:
    codes = replicas.join()
    assert time.monotonic() - began + spared_s < PROMISED_S + STANDSTILL_S
    state = torch.load(folder / "last.ckpt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())
    assert state["global_step"] >= 30
    return codes


@pytest.mark.parametrize("period", [5, LONG], ids=["soon", "no exchange in sight"])
@pytest.mark.parametrize("targets", [(0,), (1,), (0, 1)], ids=str)
def test_sigterm_to_some_ends_all_at_the_same_step(tmp_path, targets, period):
    replicas, pids, began = _run(tmp_path, period=period)
    for target in targets:
        os.kill(pids[target], signal.SIGTERM)
    codes = _check(tmp_path, replicas, began)
    errors = [replicas.error(r) for r in range(2)]
    assert all("SIGTERMException" in error for error in errors), errors
    assert codes == [0, 0]  # SIGTERMException is a SystemExit


@pytest.mark.parametrize("targets", [(0,), (1,), (0, 1)], ids=str)
def test_ctrl_c_on_some_ends_all(tmp_path, targets):
    replicas, pids, began = _run(tmp_path)
    for target in targets:
        os.kill(pids[target], signal.SIGINT)
    assert _check(tmp_path, replicas, began) == [1, 1]


@pytest.mark.parametrize("period", [5, LONG], ids=["soon", "no exchange in sight"])
@pytest.mark.parametrize("culprit", [0, 1])
def test_an_exception_on_one_ends_all_and_is_shown(tmp_path, culprit, period):
    replicas, _, began = _run(tmp_path, period, "raise", culprit)
    assert _check(tmp_path, replicas, began) == [1, 1]
    assert "KeyError: 'the original error'" in replicas.error(culprit)
    other = replicas.error(1 - culprit)
    assert f"rank {culprit}: KeyError: 'the original error'" in other


@pytest.mark.parametrize("period", [5, LONG], ids=["soon", "no exchange in sight"])
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_silent_death_ends_all(tmp_path, culprit, period):
    replicas, _, began = _run(tmp_path, period, "die", culprit)
    codes = _check(tmp_path, replicas, began)
    assert codes[culprit] == 9
    assert codes[1 - culprit] == 1


@pytest.mark.parametrize("targets", [(1,), (0, 1)], ids=str)
def test_sigterm_over_an_asynchronous_center(tmp_path, targets):
    replicas, pids, began = _run(tmp_path, transport=SharedMemory())
    for target in targets:
        os.kill(pids[target], signal.SIGTERM)
    assert _check(tmp_path, replicas, began) == [0, 0]
    assert all("SIGTERMException" in replicas.error(r) for r in range(2))


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_exception_over_an_asynchronous_center(tmp_path, culprit):
    replicas, _, began = _run(tmp_path, misbehave="raise", culprit=culprit, transport=SharedMemory())
    assert _check(tmp_path, replicas, began) == [1, 1]
    assert f"rank {culprit}: KeyError: 'the original error'" in replicas.error(1 - culprit)


def test_a_silent_death_over_an_asynchronous_center(tmp_path):
    replicas, _, began = _run(tmp_path, misbehave="die", culprit=1, transport=SharedMemory())
    codes = _check(tmp_path, replicas, began, spared_s=_rendezvous._SILENCE_S - SILENCE_S)
    assert codes == [1, 9]
    assert "no sign of life for 10 s" in replicas.error(0)


class Reporting(Regression):
    """Asks all ranks for a number at the end of an epoch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss


class TwoOptimizers(Regression):
    """Steps its layers one after the other, and asks all ranks for a number after that."""

    def __init__(self, replica):
        super().__init__()
        self.automatic_optimization = False
        self.replica = replica

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.manual_backward(loss)
        first, second = self.optimizers()
        if self.trainer.global_step == 6 and self.replica == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        first.step()
        deadline = time.monotonic() + TIMEOUT.total_seconds()
        while self.replica == 0 and not self.trainer.strategy._is_asked_to_stop:  # it meets in the second one's step
            assert time.monotonic() < deadline
            time.sleep(0.01)
        second.step()
        self.zero_grad()
        self.log("step_loss", loss, on_step=True, sync_dist=True)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[k].parameters(), lr=0.05) for k in (0, 2)]


def _train_and_signal(replica: int, folder: str, transport: Any, where: str) -> None:
    """Sends SIGTERM to one process: replica 0's while it evaluates, or while replica 1 waits for it to evaluate;
    replica 1's where both have ended an epoch, or evaluated in the middle of one; in the step before replica 1 would
    evaluate or end its epoch, while replica 0 is elsewhere; and between two optimizers' steps."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    class Signal(modules.pytorch_lightning.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if where == "evaluating" and replica == 0 and trainer.current_epoch == 1 and batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_train_epoch_end(self, trainer, pl_module):
            if where == "between epochs" and replica == 1 and trainer.current_epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_validation_end(self, trainer, pl_module):
            if where == "in mid-epoch" and replica == 1 and trainer.current_epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if where == "others evaluate" and replica == 0 and trainer.global_step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if where in ("others evaluate", "before an evaluation", "before the end of an epoch") and replica == 0:
                time.sleep(0.1)  # computes slowly
            last = {"before an evaluation": 3, "before the end of an epoch": 7}.get(where)
            if batch_idx == last and replica == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    checkpoint = ModelCheckpoint(folder, filename="last", save_on_exception=True, every_n_epochs=10**6)
    trainer(
        strategy=EASGDStrategy(EASGD(period=2), transport),
        max_epochs=10**6,
        callbacks=[Signal(), checkpoint],
        enable_checkpointing=True,
        val_check_interval=4 if where in ("in mid-epoch", "before an evaluation") else 1.0,
        accumulate_grad_batches=2 if where == "in mid-epoch" else 1,
        check_val_every_n_epoch=5 if where == "before the end of an epoch" else 1,
    ).fit(TwoOptimizers(replica) if where == "between optimizers" else Reporting(), loader(), loader(64))


@pytest.mark.parametrize(
    ("transport", "where"),
    [
        (None, "evaluating"),
        (SharedMemory(), "evaluating"),
        (SharedMemory(), "others evaluate"),
        (SharedMemory(), "between epochs"),
        (SharedMemory(), "in mid-epoch"),
        (SharedMemory(), "before an evaluation"),
        (SharedMemory(), "before the end of an epoch"),
        (SharedMemory(), "between optimizers"),
    ],
    ids=str,
)
def test_sigterm_at_an_evaluation_ends_all_and_saves(tmp_path, transport, where):
    replicas = Replicas(_train_and_signal, 2, str(tmp_path), transport, where)
    assert replicas.join() == [0, 0], replicas.error(0) + replicas.error(1)
    assert all("SIGTERMException" in replicas.error(r) for r in range(2))
    saved = list(tmp_path.glob("*.ckpt"))
    assert saved
    state = torch.load(saved[0], weights_only=False)
    assert len(list(tmp_path.glob(f"*.{state['lightning_easgd']['save']}.replica-*"))) == 2

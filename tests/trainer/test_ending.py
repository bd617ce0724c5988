"""However a job ends - a signal, an exception or a silent death, on one process or on all - all processes end soon.

The replicas here are processes of a launcher that kills nobody, so that each must notice by itself.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_easgd import EASGD, EASGDStrategy, SharedMemory, Transport
from lightning_easgd.communication import _c10d
from lightning_easgd.communication._rendezvous import Rendezvous
from lightning_easgd.core.ending import end_groups
from lightning_easgd.core.lock_step import meets
from tests import modules
from tests.helpers import TIMEOUT, Replicas, run_replicas
from tests.modules import Regression, Stream, flat, loader, trainer

PROMISED_S = 60.0  # to a user, for a job's end
STANDSTILL_S = 60.0  # of a busy machine; more than that would be a wait that never ends by itself
LONG = 10**9


def _train(replica: int, port: int, folder: str, period: int, misbehave: str, culprit: int, transport: Any) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint

    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)

    class Progress(modules.pytorch_lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            # Not where a checkpoint is saved: fsspec's ``exists`` takes a Ctrl-C that comes within it for an answer.
            if trainer.global_step == 33:
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


def _check(folder: Path, replicas: Replicas, began: float) -> list[int | None]:
    codes = replicas.join()
    assert time.monotonic() - began < PROMISED_S + STANDSTILL_S
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
    assert _check(tmp_path, replicas, began) == [1, 9]
    assert "rank 1: its process is gone" in replicas.error(0)


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
        watch = self.trainer.strategy.run.company.watch
        while self.replica == 0 and not watch.stop_requested:  # it meets in the second one's step
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


def _signalled_alone(replica: int, folder: str) -> None:
    """One process that is told to go: what it saves then has its replica, as a stop of several has."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    class Signal(modules.pytorch_lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    checkpoint = ModelCheckpoint(folder, filename="last", save_on_exception=True, every_n_epochs=10**6)
    trainer(devices=1, max_epochs=10**6, callbacks=[Signal(), checkpoint], enable_checkpointing=True).fit(
        Regression(), loader()
    )


def test_a_signal_to_a_single_process_saves_its_replica(tmp_path):
    replicas = Replicas(_signalled_alone, 1, str(tmp_path))
    assert replicas.join() == [0], replicas.error(0)
    assert "SIGTERMException" in replicas.error(0)
    [saved] = tmp_path.glob("*.ckpt")
    save = torch.load(saved, weights_only=False)["lightning_easgd"]["save"]
    assert len(list(tmp_path.glob(f"*.{save}.replica-*"))) == 1


def _misbehave_rarely(replica: int, how: str, said: Path) -> None:
    """Rank 1 is stopped for good, or dies when training has ended while the other waits for it.

    Rank 0 may be ended by its watcher, in a collective that nobody ends: what it says then goes to ``said``.
    """
    if replica == 0:
        with said.open("w") as file:
            os.dup2(file.fileno(), sys.stderr.fileno())

    class Misbehave(modules.pytorch_lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if how == "stopped" and replica == 1 and trainer.global_step == 5:
                os.kill(os.getpid(), signal.SIGSTOP)

        def on_train_end(self, trainer, pl_module):
            if how == "dead in the end" and replica == 1:
                os._exit(9)
            trainer.strategy.barrier()

    trainer(
        strategy=EASGDStrategy(EASGD(period=5), max_silence=timedelta(seconds=3)),
        max_epochs=-1 if how == "stopped" else 1,
        callbacks=[Misbehave()],
    ).fit(Regression(), loader())


@pytest.mark.parametrize(
    ("how", "why"), [("stopped", "rank 1: no sign of life for 3 s"), ("dead in the end", "rank 1: its process is gone")]
)
def test_who_stands_still_or_dies_in_the_end_is_named(tmp_path, how, why):
    said = tmp_path / "said"
    replicas = Replicas(_misbehave_rarely, 2, how, said, timeout=PROMISED_S + STANDSTILL_S)
    first, second = replicas.processes
    first.join(PROMISED_S + STANDSTILL_S)
    second.kill()
    assert replicas.join()[0] == 1
    assert why in replicas.error(0) + said.read_text()


def _never_comes(replica: int) -> None:
    if replica == 1:
        os._exit(9)
    trainer(strategy=EASGDStrategy(max_silence=timedelta(seconds=3))).fit(Regression(), loader())


def test_a_rank_that_dies_before_all_have_met_is_not_waited_for_long():
    replicas = Replicas(_never_comes, 2, timeout=PROMISED_S + STANDSTILL_S)
    assert replicas.join() == [1, 9]
    assert "rank 1: it did not come within 3 s" in replicas.error(0)


@pytest.mark.parametrize("value", [0, timedelta(0), "5 minutes"])
def test_a_limit_must_be_a_time(value):
    with pytest.raises(ValueError, match=r"EASGDStrategy\(max_silence=.*must be a timedelta above 0"):
        EASGDStrategy(max_silence=value)


def _comes_late(replica: int) -> list[bool]:
    """Begins to train later than the other, as a script may whose process group stands; returns who had come."""
    os.environ["RANK"] = str(replica)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    store: Any = dist.distributed_c10d._get_default_store()
    had_come: list[bool] = []
    opened = Rendezvous.__init__

    def look(self: Rendezvous, *args: Any, **kwargs: Any) -> None:
        had_come.append(store.check(["late"]))
        opened(self, *args, **kwargs)

    with mock.patch.object(Rendezvous, "__init__", look):
        if replica == 1:
            time.sleep(2)  # this is how late it is
            store.set("late", "")
        trainer().fit(Regression(), loader())
    return had_come


def test_who_comes_late_to_a_group_that_stands_is_waited_for():
    """As long as the group's timeout says: half a minute is for the line to rank 0 alone, once all have come."""
    assert run_replicas(_comes_late, 2) == [[True], [True]]


def _groups(replica: int, own: bool) -> tuple[bool, float, int, bool]:
    """Trains and validates, uses ``torch.distributed`` as a user's script may afterwards, and ends what is to end."""
    if own:
        os.environ["RANK"] = str(replica)
        dist.init_process_group("gloo", timeout=TIMEOUT)
    module = Regression()
    for _ in range(2):
        trainer().fit(module, loader())
    trainer().validate(module, loader(), verbose=False)
    held = len(_c10d._open_groups)
    number = torch.ones(1)
    dist.all_reduce(number)
    end_groups()
    return dist.is_initialized(), float(number), held, any(not p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("own", [False, True], ids=["Lightning's", "the user's"])
def test_a_default_group_is_ended_by_whom_it_was_made_for(own):
    for is_initialized, total, held, _ in run_replicas(_groups, 2, own):
        assert is_initialized == own
        assert total == 2
        assert held == 0  # the strategy's own have ended with it


class Constant(Regression):
    """Logs what must be the same number however many ranks and batches there are."""

    def training_step(self, batch, batch_idx):
        self.log("hundred", 100.0, on_step=False, on_epoch=True, sync_dist=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("one", 1.0, sync_dist=True)


def _streams(replica: int, lengths: list[int], interval: int) -> list[Any]:
    seen: list[Any] = []

    class Look(modules.pytorch_lightning.Callback):
        def on_validation_end(self, trainer, pl_module):
            metrics = trainer.callback_metrics
            seen.append((trainer.global_step, float(metrics["one"]), float(metrics["val_loss"])))

        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics["hundred"]))

    module = Constant()
    trainer(strategy=EASGDStrategy(EASGD(period=3)), max_epochs=2, val_check_interval=interval, callbacks=[Look()]).fit(
        module, DataLoader(Stream(*(4 * n for n in lengths)), batch_size=4), loader(16)
    )
    return [*seen, flat(module)]


@pytest.mark.parametrize("lengths", [[6, 11], [11, 6], [9, 8]], ids=str)
def test_streams_of_different_length_with_evaluations_inside_the_epoch(lengths):
    """An evaluation that not all reach is left out; what is logged is what it is."""
    one, two = run_replicas(_streams, 2, lengths, 4)
    assert torch.equal(one.pop(), two.pop())
    for seen, length in ((one, lengths[0]), (two, lengths[1])):
        steps = [entry[0] for entry in seen if isinstance(entry, tuple)]
        every = [4 * n for n in range(1, min(lengths) // 4 + 1)]
        assert steps == every + [length + step for step in every]
        assert all(entry[1] == 1 for entry in seen if isinstance(entry, tuple))
        assert [entry for entry in seen if isinstance(entry, float)] == [100.0, 100.0]
    losses = [[entry[2] for entry in seen if isinstance(entry, tuple)] for seen in (one, two)]
    assert losses[0] == losses[1]


def _shortest(replica: int, lengths: list[int], limits: dict[str, int], stops_at: int | None) -> Any:
    at_start = []

    class Stop(modules.pytorch_lightning.Callback):
        def on_train_start(self, trainer, *_):
            at_start.append((trainer.fit_loop.min_epochs, trainer.fit_loop.min_steps))

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == stops_at:
                trainer.should_stop = True

    module = Regression()
    t = trainer(strategy=EASGDStrategy(EASGD(period=2)), callbacks=[Stop()], **{"max_epochs": 8, **limits})
    t.fit(module, DataLoader(Stream(*(4 * n for n in lengths)), batch_size=4))
    is_kept = [(t.fit_loop.min_epochs, t.fit_loop.min_steps)] == at_start
    return t.current_epoch, t.global_step, is_kept, flat(module)


@pytest.mark.parametrize(
    ("limits", "stops_at", "steps"),
    [
        ({"max_steps": 10, "min_epochs": 3}, None, [10, 5]),
        ({"min_steps": 13}, 3, [13, 10]),  # the replica with more steps reaches the minimum
        ({"min_epochs": 2}, 3, [22, 10]),
        ({"min_epochs": 2, "max_steps": 30}, 3, [22, 10]),
    ],
    ids=str,
)
def test_what_ends_training_on_one_rank_ends_it_on_all_whatever_the_minimum(limits, stops_at, steps):
    results = run_replicas(_shortest, 2, [11, 5], limits, stops_at)
    assert [result[1] for result in results] == steps
    assert results[0][0] == results[1][0]
    for _, _, is_kept, center in results:
        assert is_kept  # the Trainer's own minimum
        assert torch.equal(center, results[0][3])


def test_reasons_that_do_not_fit_together_are_named():
    assert meets(["an evaluation"] * 2, "an evaluation") is True
    assert meets(["an evaluation", "the end of an epoch"], "an evaluation") is False
    assert meets(["an evaluation", "the end of an epoch"], "the end of an epoch") is None
    with pytest.raises(RuntimeError, match=r"at different points: \{0: '', 1: 'the end of an epoch'\}"):
        meets(["", "the end of an epoch"], "")


def _told_to_stop(replica: int, culprit: int) -> list[tuple[int, int, torch.Tensor]]:
    """One rank alone sets ``trainer.should_stop``, at each of the places where a callback may, in its second epoch."""
    ended = []
    for where in ("batch", "epoch", "validation"):

        class Tell(modules.pytorch_lightning.Callback):
            def __init__(self, where: str) -> None:
                self.where = where

            def tell(self, trainer, where):
                if where == self.where and replica == culprit and trainer.current_epoch == 1:
                    trainer.should_stop = True

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if batch_idx == 2:
                    self.tell(trainer, "batch")

            def on_train_epoch_end(self, trainer, pl_module):
                self.tell(trainer, "epoch")

            def on_validation_end(self, trainer, pl_module):
                self.tell(trainer, "validation")

        module = Regression()
        t = trainer(strategy=EASGDStrategy(EASGD(period=2)), max_epochs=6, callbacks=[Tell(where)])
        t.fit(module, loader(), loader(16))
        ended.append((t.current_epoch, t.global_step, flat(module)))
    return ended


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_alone_is_told_to_stop_ends_all_at_the_same_step(culprit):
    """Eight batches an epoch: inside one at the next exchange but one, elsewhere where it was told."""
    one, two = run_replicas(_told_to_stop, 2, culprit)
    for (_, steps, center), (_, other_steps, other_center) in zip(one, two, strict=True):
        assert steps == other_steps
        assert torch.equal(center, other_center)
    assert [steps for _, steps, _ in one] == [14, 16, 16]

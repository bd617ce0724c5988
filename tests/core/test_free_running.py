"""Training over an asynchronous center: inside an epoch no replica waits, whatever callbacks and logs ask of all."""

import csv
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from torch.utils.data import DataLoader

from lightning_easgd import EASGD, EASGDStrategy, SharedMemory, TransportError
from lightning_easgd.core import Company, Layout
from lightning_easgd.core.free_running import Requests
from lightning_easgd.trainer.checkpoint import ReplicaFile
from tests import modules
from tests.callbacks import Ends
from tests.helpers import TIMEOUT, run_replicas
from tests.modules import BatchNormRegression, Regression, Stream, flat, loader, trainer


def strategy(period: int = 2, **kwargs: Any) -> EASGDStrategy:
    return EASGDStrategy(EASGD(period=period), SharedMemory(), **kwargs)


class Slow(modules.pytorch_lightning.Callback):
    """Makes one replica's batches take time, as computing would."""

    def __init__(self, replica: int, seconds: float) -> None:
        self.replica, self.seconds = replica, seconds

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.replica:
            time.sleep(self.seconds)


class Recorder(Ends):
    """Keeps what the module held in each evaluation, too, and in the end the reports and the center's clock."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluated: list[torch.Tensor] = []
        self.buffers: list[torch.Tensor] = []

    def on_validation_start(self, trainer, pl_module):
        self.evaluated.append(flat(pl_module))
        self.buffers.append(torch.cat([b.double().flatten() for b in pl_module.buffers()] or [torch.empty(0)]))

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        self.reports = list(trainer.strategy.couplings[0].reports)
        self.clock = trainer.strategy.couplings[0].center.clock


def _validate(replica: int, kwargs: dict[str, Any], module: Any = Regression) -> dict[str, Any]:
    recorder = Recorder()
    t = trainer(strategy=strategy(), callbacks=[Slow(1, 0.005), recorder], max_epochs=2, **kwargs)
    t.fit(module(), loader(), loader(32))
    return recorder.kept()


@pytest.mark.parametrize(
    ("kwargs", "times"), [({}, 2), ({"val_check_interval": 4}, 4), ({"num_sanity_val_steps": 1}, 3)], ids=str
)
def test_all_evaluate_the_same_center(kwargs, times):
    """Two epochs of eight batches each."""
    one, two = run_replicas(_validate, 2, kwargs, BatchNormRegression)
    assert len(one["evaluated"]) == len(two["evaluated"]) == times
    for mine, other in zip(one["evaluated"] + one["buffers"], two["evaluated"] + two["buffers"], strict=True):
        assert torch.equal(mine, other)
    assert one["buffers"][0].isinf().any()  # the mask's; the others' are finite and move
    assert not torch.equal(one["buffers"][-2], one["buffers"][-1])
    assert torch.equal(one["center"], two["center"])
    assert not torch.equal(one["replica"], two["replica"])
    assert one["clock"] == two["clock"] == 2 * 8


class EverySort(Regression):
    """Logs in every way, some of which are collectives elsewhere."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("on_step", loss, sync_dist=True, on_step=True, on_epoch=True, prog_bar=True)
        self.log("summed", loss, sync_dist=True, on_step=True, reduce_fx="sum")
        self.log("on_epoch", loss, sync_dist=True, on_step=False, on_epoch=True)
        gathered = self.all_gather(loss)
        assert gathered.shape == (2,)
        assert not gathered.requires_grad
        gathered.zero_()  # nobody else's memory, and each row its own
        assert self.all_gather(loss, sync_grads=True).requires_grad
        return loss


def _unequal(replica: int, folder: str, logger: str) -> dict[str, Any]:
    from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
    from pytorch_lightning.loggers import CSVLogger, WandbLogger

    recorder = Recorder()
    checkpoints = [
        ModelCheckpoint(folder, filename="steps-{step}", every_n_train_steps=3, save_top_k=2, monitor="train_loss"),
        ModelCheckpoint(folder, filename="last", every_n_train_steps=5, save_last=True),
        ModelCheckpoint(folder, filename="epoch-{epoch}", monitor="on_epoch", save_on_train_epoch_end=True),
    ]
    t = trainer(
        strategy=strategy(),
        callbacks=[
            Slow(1, 0.01),
            recorder,
            EarlyStopping("on_epoch", patience=50, check_on_train_epoch_end=True),
            Timer(duration="00:01:00:00"),
            LearningRateMonitor(),
            *checkpoints,
        ],
        max_epochs=3,
        enable_checkpointing=True,
        enable_progress_bar=True,
        log_every_n_steps=1,
        logger=CSVLogger(folder) if logger == "csv" else WandbLogger(save_dir=folder, offline=True, log_model=False),
    )
    t.fit(EverySort(), DataLoader(Stream(41 * 4, 13 * 4), batch_size=4), loader(32))
    return {**recorder.kept(), "path": checkpoints[2].best_model_path}


@pytest.mark.parametrize("logger", ["csv", "wandb"])
def test_callbacks_and_logs_that_are_collectives_elsewhere_never_wait(tmp_path, logger):
    """Replicas of 41 and 13 batches an epoch, the second one slow."""
    one, two = run_replicas(_unequal, 2, str(tmp_path), logger)
    assert (one["steps"], two["steps"]) == (3 * 41, 3 * 13)
    assert torch.equal(one["center"], two["center"])
    assert one["clock"] == 3 * 41 // 2 + 3 * 13 // 2
    in_epoch = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert in_epoch["global_step"] % 5 == 0
    assert in_epoch["lightning_easgd"]["save"] is None
    assert all(torch.isfinite(value).all() for value in in_epoch["state_dict"].values())
    assert list(tmp_path.glob("steps-*.ckpt"))
    at_end = torch.load(one["path"], weights_only=False)
    assert at_end["lightning_easgd"]["num_replicas"] == 2
    # Replica 1 has made other steps, but its file belongs to replica 0's checkpoint.
    save = at_end["lightning_easgd"]["save"]
    assert ReplicaFile(one["path"], save, "1").read()["lightning"]["global_step"] % 13 == 0
    if logger == "csv":
        [log] = tmp_path.rglob("metrics.csv")
        rows = list(csv.DictReader(log.read_text().splitlines()))
        for key in ("staleness", "drift", "additions_per_s", "wait_s", "gate_s"):
            values = [float(row[f"easgd/{key}"]) for row in rows if row.get(f"easgd/{key}")]
            assert len(values) > 41
            assert min(values) >= 0
            assert max(values) < float("inf")
        assert max(float(row["easgd/additions_per_s"] or 0) for row in rows) > 0
    # Best of three: the other checkpoints' files are gone with them.
    assert len(list(tmp_path.glob("epoch*.replica-*"))) == 2


class _StopAt(modules.pytorch_lightning.Callback):
    def __init__(self, replica: int, step: int) -> None:
        self.replica, self.step = replica, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == self.replica and trainer.global_step == self.step:
            trainer.should_stop = True


def _decide(replica: int, decider: int, how: str) -> dict[str, Any]:
    from pytorch_lightning.callbacks import Timer

    recorder = Recorder()
    decide = _StopAt(decider, 5) if how == "should_stop" else Timer(duration={"seconds": 1})
    t = trainer(strategy=strategy(), callbacks=[recorder, decide, Slow(1 - decider, 0.01)], max_epochs=10**6)
    data = DataLoader(Stream(10**9), batch_size=4)
    t.fit(Regression(), data)
    return {**recorder.kept(), "epochs": t.current_epoch}


@pytest.mark.parametrize(("decider", "how"), [(0, "should_stop"), (1, "should_stop"), (0, "timer")])
def test_what_one_replica_decides_the_others_learn(decider, how):
    """The epochs have no end of their own. A time limit is replica 0's."""
    results = run_replicas(_decide, 2, decider, how)
    assert torch.equal(results[0]["center"], results[1]["center"])
    assert [r["epochs"] for r in results] == [1, 1]
    if how == "should_stop":
        assert results[decider]["steps"] == 5


def _uneven_validation(replica: int) -> dict[str, Any]:
    recorder = Recorder()
    t = trainer(strategy=strategy(), callbacks=[recorder, Slow(0, 0.01)], max_epochs=2, val_check_interval=5)
    t.fit(Regression(), DataLoader(Stream(18 * 4, 7 * 4), batch_size=4), loader(32))
    return recorder.kept()


def test_an_evaluation_that_not_all_reach_is_left_out():
    one, two = run_replicas(_uneven_validation, 2)
    assert (one["steps"], two["steps"]) == (36, 14)
    assert len(one["evaluated"]) == len(two["evaluated"]) == 2  # at batch 5 of each epoch
    for mine, other in zip(one["evaluated"], two["evaluated"], strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(one["center"], two["center"])


def _gated(replica: int, slack: int | None) -> dict[str, Any]:
    recorder = Recorder()
    t = trainer(strategy=strategy(1, slack=slack), callbacks=[recorder, Slow(1, 0.02)], logger=True, max_epochs=1)
    t.strategy.request_reports(1)
    t.fit(Regression(), loader())
    return recorder.kept()


@pytest.mark.parametrize("slack", [None, 0, 2])
def test_the_gate_makes_the_fast_replica_wait_and_the_monitor_shows_it(tmp_path, monkeypatch, slack):
    monkeypatch.chdir(tmp_path)
    one, two = run_replicas(_gated, 2, slack)
    assert one["steps"] == two["steps"] == 8
    waited = one["reports"][-1].gate_s[0]  # replica 1 may not have announced anything yet
    assert (waited > 0) == (slack is not None)


def test_a_slack_needs_a_center_that_is_asynchronous():
    with pytest.raises(ValueError, match=r"slack=2.*all replicas exchange at once"):
        EASGDStrategy(slack=2)
    with pytest.raises(ValueError, match=r"StaleSynchronous\(slack=-1\)"):
        EASGDStrategy(transport=SharedMemory(), slack=-1)


def _count(replica: int) -> Any:
    counts: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}  # by whether it was inside an epoch
    inside = [False]

    def counting(name: str, function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts[inside[0]][name] += 1
            return function(*args, **kwargs)

        return wrapped

    for name in ("all_reduce", "broadcast", "barrier", "all_gather", "broadcast_object_list", "all_gather_object"):
        for owner in (dist, dist.distributed_c10d):
            setattr(owner, name, counting(name, getattr(owner, name)))
    for kind in (dist.ProcessGroupGloo, dist.ProcessGroup):
        for name in ("allreduce", "broadcast", "allgather", "barrier", "send", "recv"):
            setattr(kind, name, counting(f"{kind.__name__}.{name}", getattr(kind, name)))

    class Epoch(modules.pytorch_lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            inside[0] = True

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            inside[0] = batch_idx < 7

    t = trainer(strategy=strategy(1), callbacks=[Epoch()], enable_progress_bar=True, max_epochs=2)
    t.fit(EverySort(), loader())
    return counts, t.global_step


def test_no_collective_inside_an_epoch():
    for counts, steps in run_replicas(_count, 2):
        assert steps == 16
        assert not counts[True]
        for name in ("barrier", "all_reduce", "broadcast", "ProcessGroup.allreduce", "ProcessGroupGloo.broadcast"):
            assert counts[False][name] > 0  # outside an epoch there are some, and they are seen


def _save(replica: int, folder: str) -> dict[str, Any]:
    from pytorch_lightning.callbacks import ModelCheckpoint

    recorder = Recorder()
    t = trainer(
        strategy=strategy(),
        callbacks=[Slow(1, 0.01), recorder, ModelCheckpoint(folder, filename="end", save_on_train_epoch_end=True)],
        enable_checkpointing=True,
        max_epochs=2,
    )
    t.fit(Regression(), loader())
    return recorder.kept()


def _resume(replica: int, path: str, max_epochs: int) -> dict[str, Any]:
    recorder = Recorder()

    class Start(modules.pytorch_lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            self.replica = flat(pl_module)
            self.center = trainer.strategy.couplings[0].center.value.clone()
            self.clock = trainer.strategy.couplings[0].center.clock

    start = Start()
    t = trainer(strategy=strategy(), callbacks=[start, recorder], max_epochs=max_epochs)
    t.fit(Regression(), loader(), ckpt_path=path)
    return {**recorder.kept(), "start": vars(start)}


def test_every_replica_goes_on_from_its_own_state(tmp_path):
    saved = run_replicas(_save, 2, str(tmp_path))
    resumed = run_replicas(_resume, 2, str(tmp_path / "end.ckpt"), 4)
    for before, after in zip(saved, resumed, strict=True):
        assert torch.equal(after["start"]["replica"], before["replica"])
        assert torch.equal(after["start"]["center"], before["center"])
        assert after["start"]["clock"] == before["clock"] == 2 * 8
        assert after["steps"] == 2 * before["steps"] == 32
        assert after["clock"] == 32
    assert torch.equal(resumed[0]["center"], resumed[1]["center"])
    assert not torch.equal(resumed[0]["center"], saved[0]["center"])


def _diverge(replica: int, reaction: str) -> dict[str, Any]:
    class Diverges(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_rank == 1 and batch_idx == 5:
                with torch.no_grad():
                    self.net[0].weight[0, 0] = float("nan")

    recorder = Recorder()
    t = trainer(strategy=strategy(1, on_nonfinite=reaction), callbacks=[recorder])
    t.fit(Diverges(), loader())
    return recorder.kept()


def test_a_delta_that_is_not_finite_stays_out_and_its_replica_starts_again():
    one, two = run_replicas(_diverge, 2, "reset")
    assert one["steps"] == two["steps"] == 8
    for tensor in (one["center"], one["replica"], two["replica"]):
        assert torch.isfinite(tensor).all()
    assert torch.equal(one["center"], two["center"])
    assert one["clock"] == 15


def test_or_ends_the_job_and_is_named():
    with pytest.raises(AssertionError, match="NonFiniteDeltaError: replica 1: 1 of 49 numbers in its delta"):
        run_replicas(_diverge, 2, "raise")


def _in_callback(replica: int) -> Any:
    class Look(modules.pytorch_lightning.Callback):
        seen = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx % (2 + trainer.global_rank) == 0:  # not together
                before = flat(pl_module)
                with trainer.strategy.weights_of("center"):
                    assert not torch.equal(flat(pl_module), before) or trainer.global_step == 0
                    self.seen += 1
                assert torch.equal(flat(pl_module), before)

    look = Look()
    trainer(strategy=strategy(1), callbacks=[look]).fit(Regression(), loader())
    return look.seen


def test_a_callback_may_look_at_the_center_whenever_it_likes():
    assert run_replicas(_in_callback, 2) == [4, 3]


def _checkpointed(replica: int, folder: str, kwargs: dict[str, Any], batches: tuple[int, int]) -> dict[str, Any]:
    from pytorch_lightning.callbacks import ModelCheckpoint

    recorder, checkpoint = Recorder(), ModelCheckpoint(folder, **kwargs)
    t = trainer(strategy=strategy(), callbacks=[recorder, checkpoint], enable_checkpointing=True, max_epochs=2)
    t.fit(Regression(), DataLoader(Stream(*batches), batch_size=1), loader(32))
    t.test(Regression(), loader(32), ckpt_path="best" if checkpoint.best_model_path else None)
    return {"center": recorder.center, "best": checkpoint.best_model_path, "metrics": t.callback_metrics}


@pytest.mark.parametrize(
    ("kwargs", "batches"),
    [
        ({"monitor": "val_loss", "save_top_k": 2}, (20, 13)),
        ({"every_n_train_steps": 5, "save_last": "link"}, (20, 13)),
        ({"every_n_train_steps": 5, "monitor": "val_loss", "save_on_train_epoch_end": False}, (5, 3)),
        ({"every_n_train_steps": 15, "save_last": True}, (20, 6)),
    ],
    ids=str,
)
def test_replica_0_alone_decides_what_is_saved(tmp_path, kwargs, batches):
    """Whatever a callback makes of a number of steps that only replica 0 has; afterwards all know the best one."""
    one, two = run_replicas(_checkpointed, 2, str(tmp_path), kwargs, batches)
    assert one["best"] == two["best"]
    assert Path(one["best"]).exists()
    assert torch.equal(one["center"], two["center"])
    assert torch.equal(one["metrics"]["test_loss"], two["metrics"]["test_loss"])


class Numbered(Regression):
    """Logs which replica it is, for all of an epoch; the mean over all is the same as a tensor and as a metric."""

    def __init__(self, replica: int) -> None:
        super().__init__()
        self.replica = replica
        self.mean = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        self.log("number", float(self.replica), on_step=False, on_epoch=True, sync_dist=True)
        self.mean(float(self.replica))
        self.log("metric", self.mean, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def _monitored(replica: int, folder: str) -> tuple[Any, ...]:
    from pytorch_lightning.callbacks import ModelCheckpoint

    checkpoint = ModelCheckpoint(folder, filename="{number}-{metric}", monitor="number", save_on_train_epoch_end=True)
    t = trainer(strategy=strategy(), max_epochs=2, callbacks=[Slow(1, 0.01), checkpoint], enable_checkpointing=True)
    t.fit(Numbered(replica), loader())
    return checkpoint.best_model_path, float(t.callback_metrics["number"]), float(t.callback_metrics["metric"])


def test_what_is_monitored_at_the_end_of_an_epoch_is_of_all_replicas(tmp_path):
    """By the callback of replica 0, which alone asks for it."""
    for path, number, metric in run_replicas(_monitored, 2, str(tmp_path)):
        assert Path(path).name == "number=0.5-metric=0.5.ckpt"
        assert (number, metric) == (0.5, 0.5)


def _alone(replica: int, folder: str) -> Any:
    from pytorch_lightning.callbacks import ModelCheckpoint

    recorder = Recorder()
    t = trainer(
        strategy="easgd_async",
        devices=1,
        callbacks=[recorder, ModelCheckpoint(folder, every_n_train_steps=3, filename="{step}", save_top_k=-1)],
        enable_checkpointing=True,
        max_epochs=2,
    )
    t.fit(Regression(), loader(), loader(32))
    again = Recorder()
    t = trainer(strategy="easgd_async", devices=1, callbacks=[again], max_epochs=2)
    t.fit(Regression(), loader(), loader(32), ckpt_path=f"{folder}/step=21.ckpt")
    return recorder.center, again.center


def test_one_replica_trains_saves_and_resumes_to_the_last_bit(tmp_path):
    [(center, again)] = run_replicas(_alone, 1, str(tmp_path))
    assert torch.equal(center, again)


def _end_apart(replica: int) -> Any:
    from torchmetrics import MeanMetric

    class Measured(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.mean = MeanMetric()

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.mean(loss)
            self.log("mean", self.mean, on_epoch=True)
            return loss

    t = trainer(strategy=strategy(), max_epochs=-1, max_steps=20)
    t.fit(Measured(), DataLoader(Stream(20, 5), batch_size=1))
    return t.global_step, t.callback_metrics["mean"]


def test_the_first_to_have_made_all_its_steps_ends_training_for_all():
    (steps, mean), (other_steps, other_mean) = run_replicas(_end_apart, 2)
    assert (steps, other_steps) == (20, 5)
    assert torch.equal(mean, other_mean)


class _FourBeforeTheSave(modules.pytorch_lightning.Callback):
    """Replica 1 has done four batches before replica 0 begins its sixth; it begins its fifth after replica 0's save."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer, pl_module):
        self.store = dist.FileStore(self.path, 2)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 0 and batch_idx == 5:
            self.store.wait(["four"], TIMEOUT)
        elif trainer.global_rank == 1 and batch_idx == 4:
            self.store.set("four", "")
            self.store.wait(["saved"], TIMEOUT)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if trainer.global_rank == 0:
            self.store.set("saved", "")


def _save_in_epoch(replica: int, folder: str, path: str | None) -> Any:
    from pytorch_lightning.callbacks import ModelCheckpoint

    class Seen(Regression):
        seen = 0

        def training_step(self, batch, batch_idx):
            self.seen += 1
            return super().training_step(batch, batch_idx)

    module = Seen()
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=14, filename="{step}", save_top_k=-1)
    t = trainer(
        strategy=strategy(data="dynamic"),
        callbacks=[checkpoint] if path else [_FourBeforeTheSave(f"{folder}/turns"), checkpoint],
        enable_checkpointing=True,
    )
    t.fit(module, loader(160), ckpt_path=path)
    return module.seen


def test_a_shared_epoch_goes_on_after_as_many_batches_as_all_had_done(tmp_path):
    """Of 40 batches, when the fast replica has done 14 and the slow one 4."""
    whole = run_replicas(_save_in_epoch, 2, str(tmp_path), None)
    assert sum(whole) == 40
    rest = run_replicas(_save_in_epoch, 2, str(tmp_path / "again"), str(tmp_path / "step=14.ckpt"))
    assert sum(rest) == 40 - (14 + 4)
    assert min(whole) > 4


class _Still:
    """A rendezvous in which nobody fails and nobody moves."""

    def __init__(self, rank: int) -> None:
        self.rank, self.store = rank, dist.HashStore()

    def progress_of_all(self) -> list[int]:
        return [3, 3]

    def raise_if_failed(self) -> None:
        pass


def test_a_checkpoint_that_the_others_do_not_come_to_is_an_error_that_names_them():
    def one(rank: int) -> Requests:
        cpu, timeout = torch.device("cpu"), timedelta(seconds=0.3)
        return Requests(Company(_Still(rank), Layout(2, 1), device=cpu, timeout=timeout))

    with pytest.raises(
        TransportError, match=r"rank 0 waits until all have written their files, but \[1\] did not move"
    ):
        one(0).ask("a.ckpt", "save", [])
    with pytest.raises(
        TransportError, match=r"rank 1 waits until replica 0 saves a checkpoint, but \[0\] did not move"
    ):
        one(1).serve(lambda *_: None, wait=True)

"""The strategy under a real Trainer, two processes: the arithmetic, whose weights are where, and the rendezvous."""

import json
import os
import re
import subprocess
import sys
import threading
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lightning_easgd
from lightning_easgd import EASGD, EASGDStrategy, ElasticMonitor
from tests import modules
from tests.callbacks import Ends, Recorder
from tests.helpers import COMMAND_S, run_replicas
from tests.modules import NAMESPACES, REGRESSIONS, BatchNormRegression, Regression, flat, linear_data, loader, trainer

namespaces = pytest.mark.parametrize("namespace", list(NAMESPACES))

PERIOD, RATE, STEPS, BATCH = 3, 0.3, 32, 4


def _fit_recorded(replica: int) -> dict[str, Any]:
    module, recorder = Regression(), Recorder()
    if replica:  # another initialisation, which replica 0's must replace
        torch.nn.init.normal_(module.net[0].weight)
    strategy = EASGDStrategy(EASGD(period=PERIOD, moving_rate=RATE))
    t = trainer(strategy=strategy, callbacks=[recorder], max_epochs=4)
    t.fit(module, loader())
    return {
        "batches": recorder.batches,
        "center": recorder.center,
        "replica": recorder.replica,
        "after": flat(module),
        "steps": t.global_step,
    }


def test_two_processes_equal_the_dense_recurrence():
    """The same equations on the same batches in one process, written out; centers equal to the last bit."""
    results = run_replicas(_fit_recorded, 2)
    replicas = [Regression() for _ in results]
    optimizers = [torch.optim.SGD(r.parameters(), lr=r.lr, momentum=r.momentum) for r in replicas]
    center = flat(replicas[0])
    assert [r["steps"] for r in results] == [STEPS, STEPS]
    for step in range(STEPS):
        forces = [RATE * (flat(r) - center) for r in replicas]
        for r, optimizer, result in zip(replicas, optimizers, results, strict=True):
            optimizer.zero_grad()
            r.loss(result["batches"][step]).backward()
            optimizer.step()
        if step % PERIOD == PERIOD - 1:
            for r, force in zip(replicas, forces, strict=True):
                torch.nn.utils.vector_to_parameters(flat(r) - force, r.parameters())
            center = center + sum(forces)
    assert torch.equal(results[0]["center"], results[1]["center"])
    torch.testing.assert_close(results[0]["center"], center, atol=1e-5, rtol=0)
    for result, r in zip(results, replicas, strict=True):
        torch.testing.assert_close(result["replica"], flat(r), atol=1e-5, rtol=0)
        assert torch.equal(result["after"], result["center"])  # after fit the module holds the center
    assert not torch.equal(results[0]["replica"], results[1]["replica"])
    # Each replica saw its own shard.
    assert not torch.equal(results[0]["batches"][0][0], results[1]["batches"][0][0])


def _fit_once(replica: int, namespace: str, strategy: str) -> Any:
    module = REGRESSIONS[namespace]()
    t = trainer(namespace, strategy=strategy, devices=1)
    t.fit(module, loader())
    return type(t.strategy).__module__, flat(module)


@namespaces
def test_one_replica_runs_in_both_namespaces(namespace):
    [(home, weights)] = run_replicas(_fit_once, 1, namespace, "easgd")
    assert home == {"pytorch_lightning": "lightning_easgd", "lightning.pytorch": "lightning_easgd.pytorch"}[namespace]
    assert torch.isfinite(weights).all()


def _fit_alone(replica: int, coupled: bool) -> Any:
    module = Regression()
    strategy = EASGDStrategy(EASGD(period=1, moving_rate=0.0)) if coupled else "auto"
    recorder = Recorder() if coupled else None
    # Lightning's own sampler shuffles whatever the loader says.
    callbacks = [recorder] if recorder else []
    t = trainer(strategy=strategy, devices=1, max_epochs=2, callbacks=callbacks, use_distributed_sampler=False)
    t.fit(module, loader(shuffle=False))
    return recorder.replica if recorder else flat(module)


def test_one_replica_without_elastic_force_is_the_optimizer_alone_to_the_last_bit():
    [coupled] = run_replicas(_fit_alone, 1, True)
    [alone] = run_replicas(_fit_alone, 1, False)
    assert torch.equal(coupled, alone)


class _WeightsSeen(modules.pytorch_lightning.Callback):
    """Notes which weights the hooks around an evaluation see."""

    def __init__(self) -> None:
        self.seen: dict[str, list[torch.Tensor]] = {}

    def _note(self, name, pl_module):
        self.seen.setdefault(name, []).append(flat(pl_module))

    def on_validation_start(self, trainer, pl_module):
        self._note("start", pl_module)

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self._note("batch", pl_module)

    def on_validation_end(self, trainer, pl_module):
        self._note("end", pl_module)

    def on_train_batch_start(self, trainer, pl_module, *_):
        self._note("train", pl_module)


def _evaluate(replica: int, evaluate: str) -> Any:
    module, seen = Regression(), _WeightsSeen()
    t = trainer(
        strategy=EASGDStrategy(EASGD(period=2), evaluate=evaluate), callbacks=[seen], val_check_interval=3, max_epochs=1
    )
    t.fit(module, loader(), loader(shuffle=False))
    fitted = flat(module)
    during_fit = {hook: list(weights) for hook, weights in seen.seen.items()}
    validated = t.validate(module, loader(shuffle=False), verbose=False)
    tested = t.test(module, loader(shuffle=False), verbose=False)
    predicted = torch.cat(t.predict(module, loader(shuffle=False)))
    return during_fit, fitted, flat(module), validated, tested, predicted


@pytest.mark.parametrize("evaluate", ["center", "replica"])
def test_whose_weights_are_evaluated(evaluate):
    results = run_replicas(_evaluate, 2, evaluate)
    (seen0, fitted0, after0, validated0, tested0, predicted0), (seen1, fitted1, *_) = results
    for hook in ("start", "batch", "end"):
        for a, b in zip(seen0[hook], seen1[hook], strict=True):
            assert torch.equal(a, b) == (evaluate == "center")
    assert len(seen0["start"]) == 2
    # Steps 0 to 2 come before the first evaluation; training goes on from the replica as it was.
    assert not torch.equal(seen0["train"][3], seen0["start"][0]) or evaluate == "replica"
    assert torch.equal(fitted0, fitted1)
    assert torch.equal(fitted0, after0)
    assert validated0[0]["val_loss"] == pytest.approx(tested0[0]["test_loss"], rel=1e-6)
    assert predicted0.shape == (32, 1)


class _BuffersSeen(modules.pytorch_lightning.Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        self.own = {k: v.clone() for k, v in pl_module.named_buffers()}

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.center = {k: v.clone() for k, v in pl_module.named_buffers()}

    def on_validation_end(self, trainer, pl_module):
        # Only after the strategy's own part of the evaluation is the replica back.
        self.saved = {k: v.clone() for k, v in trainer.strategy.lightning_module_state_dict().items()}


def _buffers(replica: int) -> Any:
    module, seen = BatchNormRegression(), _BuffersSeen()
    t = trainer(callbacks=[seen], val_check_interval=7, limit_train_batches=7 + replica)
    t.fit(module, loader(), loader())
    return seen.own, seen.center, seen.saved, dict(module.named_buffers())


def test_the_center_has_the_mean_of_the_replicas_buffers():
    (own0, center0, saved0, after0), (own1, center1, _, after1) = run_replicas(_buffers, 2)
    assert not torch.equal(own0["net.1.running_mean"], own1["net.1.running_mean"])
    for name in ("net.1.running_mean", "net.1.running_var"):
        assert torch.equal(center0[name], center1[name])
        assert torch.equal(center0[name], saved0[name])
        assert torch.equal(after0[name], after1[name])
        torch.testing.assert_close(after0[name], (own0[name] + own1[name]) / 2)
    assert after1["net.1.num_batches_tracked"] == own0["net.1.num_batches_tracked"] == 7
    assert own1["net.1.num_batches_tracked"] == 8  # uneven work, too
    assert torch.equal(after0["mask"], own0["mask"])


def _evaluation_raises(replica: int) -> Any:
    class Raising(modules.pytorch_lightning.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            self.center = flat(pl_module)
            raise KeyError("in validation")

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.replica = flat(pl_module)

        def on_exception(self, trainer, pl_module, exception):
            self.at_exception = flat(pl_module)

    raising, module = Raising(), Regression()
    with pytest.raises(KeyError, match="in validation"):
        trainer(callbacks=[raising]).fit(module, loader(), loader())
    return raising.replica, raising.center, raising.at_exception, flat(module)


def test_an_evaluation_that_raises_puts_the_replica_back():
    for replica, center, at_exception, after in run_replicas(_evaluation_raises, 2):
        assert not torch.equal(replica, center)
        assert torch.equal(at_exception, replica)
        assert torch.equal(after, replica)


def _save_and_resume(replica: int, folder: str) -> Any:
    from pytorch_lightning.callbacks import ModelCheckpoint

    module = Regression()
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=7, save_top_k=-1, save_last=True)
    t = trainer(callbacks=[checkpoint, Recorder()], enable_checkpointing=True, max_epochs=2)
    t.fit(module, loader(), loader(shuffle=False))
    logged, center = float(t.callback_metrics["val_loss"]), flat(module)
    mid = torch.load(Path(folder, "step=7.ckpt"), weights_only=True)["state_dict"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = Regression()
        start = Recorder()
        t = trainer(callbacks=[start], max_epochs=3)
        t.fit(resumed, loader(), ckpt_path=str(Path(folder, "last.ckpt")))
    return logged, center, mid, [str(w.message) for w in caught], t.global_step


_VALIDATE = """
import json, sys
import torch
import pytorch_lightning as pl
from torch.utils.data import DataLoader, TensorDataset

class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

data = torch.load(sys.argv[2])
trainer = pl.Trainer(strategy="auto", accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
loader = DataLoader(TensorDataset(*data), batch_size=4)
found = trainer.validate(Plain(), loader, ckpt_path=sys.argv[1], verbose=False)
assert not any(name.startswith("lightning_easgd") for name in sys.modules)
print(json.dumps(found))
"""


def test_a_checkpoint_is_an_ordinary_one_of_the_center(tmp_path):
    results = run_replicas(_save_and_resume, 2, str(tmp_path))
    logged, center, mid, warned, steps = results[0]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(torch.cat([v.flatten() for v in saved.values()]), center)
    # A tensor's file holds the tensor, not the vector that it may be a view of.
    assert all(v.untyped_storage().nbytes() == v.numel() * v.element_size() for v in saved.values())
    assert not torch.equal(torch.cat([v.flatten() for v in mid.values()]), center)
    assert not any("from the center" in text for text in warned), warned
    assert steps == 24
    torch.save(linear_data().tensors, tmp_path / "data.pt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", _VALIDATE, str(tmp_path / "last.ckpt"), str(tmp_path / "data.pt")],
        capture_output=True, text=True, env=environment, check=True, cwd=tmp_path, timeout=COMMAND_S,
    )  # fmt: skip
    assert json.loads(found.stdout.splitlines()[-1])[0]["val_loss"] == pytest.approx(logged, rel=1e-6)


def _count_calls(replica: int, folder: str) -> Any:
    """Counts every call into torch.distributed, and into the strategy's own groups, by training step.

    What an exchange's thread calls counts for the step that started it.
    """
    calls: Counter[int] = Counter()
    names: Counter[str] = Counter()
    step = [-1]

    def counting(name: str, function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            thread = threading.current_thread()
            at = step[0] if thread is threading.main_thread() else getattr(thread, "started_in", -1)
            if at >= 0 and thread.name != "lightning_easgd-watcher":
                calls[at] += 1
                names[f"{thread.name}: {name}"] += 1
            return function(*args, **kwargs)

        return wrapped

    def start(thread: Any) -> None:
        thread.started_in = step[0]
        start_thread(thread)

    start_thread, threading.Thread.start = threading.Thread.start, start
    c10d = dist.distributed_c10d
    for name in dir(dist):
        function = getattr(dist, name)
        if callable(function) and not isinstance(function, type) and not name.startswith("is_") and name[0] != "_":
            wrapped = counting(name, function)
            for owner in (dist, c10d):
                if getattr(owner, name, None) is function:
                    setattr(owner, name, wrapped)
    for kind in (dist.ProcessGroupGloo, dist.ProcessGroup, dist.TCPStore, dist.PrefixStore):
        for name in ("allreduce", "broadcast", "allgather", "barrier", "send", "recv", "get", "set", "add", "wait"):
            if hasattr(kind, name):
                setattr(kind, name, counting(f"{kind.__name__}.{name}", getattr(kind, name)))

    class Steps(modules.pytorch_lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            # The next batch begins here: its fetch and Lightning's per-batch broadcast belong to it.
            step[0] = -1 if batch_idx == trainer.num_training_batches - 1 else batch_idx + 1

        def on_train_epoch_start(self, trainer, pl_module):
            step[0] = 0

        def on_train_epoch_end(self, trainer, pl_module):
            step[0] = -1

    import pytorch_lightning.loggers

    t = trainer(
        strategy=EASGDStrategy(EASGD(period=3)),
        callbacks=[Steps()],
        accumulate_grad_batches=2,
        enable_progress_bar=True,
        logger=pytorch_lightning.loggers.CSVLogger(folder),
        log_every_n_steps=1,
        limit_train_batches=24,
    )
    t.fit(Regression(), loader(256))
    return dict(calls), dict(names), t.global_step


def test_between_two_exchanges_nothing_is_communicated(tmp_path):
    """With accumulation over 2 batches and period 3, the exchanges lie in batches 5, 11, 17, 23, and nowhere else."""
    for calls, names, steps in run_replicas(_count_calls, 2, str(tmp_path)):
        assert steps == 12
        assert set(calls) == {5, 11, 17, 23}, names
        assert names == {"all-reduce: ProcessGroupGloo.allreduce": 3 * 4}  # three of a number or two; see AllReduce


def _thaw(replica: int) -> Any:
    """The first layer is frozen in epoch 0, joins in epoch 1; the last leaves in epoch 3."""

    class Thaw(Ends):
        def on_fit_start(self, trainer, pl_module):
            self.frozen = pl_module.net[0].weight.detach().clone()

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.stayed = torch.equal(self.frozen, pl_module.net[0].weight)
                pl_module.net[0].requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.net[0].parameters()), "lr": 0.02})
            if trainer.current_epoch == 3:
                pl_module.net[2].requires_grad_(False)

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                self.left = pl_module.net[2].weight.detach().clone()

        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            algorithm = trainer.strategy.couplings[0].algorithm
            self.clock = algorithm.clock - algorithm.initial_clock

    class Module(Regression):
        def configure_optimizers(self):
            self.net[0].requires_grad_(False)
            return torch.optim.SGD(self.net[2].parameters(), lr=0.05)

    thaw, module = Thaw(), Module()
    trainer(strategy=EASGDStrategy(EASGD(period=2)), callbacks=[thaw], max_epochs=5).fit(module, loader())
    return thaw.stayed, thaw.names[0], thaw.clock, flat(module), thaw.left, thaw.replica, thaw.frozen


def test_parameters_that_are_thawed_join_and_frozen_ones_leave():
    (stayed, names, clock, center0, left0, replica0, frozen), (*_, center1, left1, replica1, _) = run_replicas(_thaw, 2)
    assert stayed
    assert names == ["net.0.weight", "net.0.bias"]
    assert clock == 5 * 8
    assert torch.equal(center0, center1)
    assert torch.equal(left0, left1)  # a parameter that leaves is its center's value on all replicas
    assert not torch.equal(center0[:32], frozen.flatten())
    # The first layer's replicas differ, and are tied to their center.
    distance = (replica0 - replica1)[:32].norm()
    assert 0 < distance < (center0[:32] - frozen.flatten()).norm()


def _different_parameters(replica: int, change: str) -> Any:
    module = Regression()
    if replica == 1:
        if change == "shape":
            module.net[2] = torch.nn.Linear(8, 3)
        elif change == "frozen":
            module.net[0].weight.requires_grad_(False)
        elif change == "more":
            module.extra = torch.nn.Parameter(torch.zeros(2))
    try:
        trainer().fit(module, loader())
    except ValueError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("shape", "replica 1 has 'net.2.weight' (torch.float32, shape [3, 8], trainable) where replica 0 has "
                  "'net.2.weight' (torch.float32, shape [1, 8], trainable)"),
        ("frozen", "replica 1 has 'net.0.weight' (torch.float32, shape [8, 4], not trainable) where replica 0 has"),
        ("more", "replica 1 has 'extra' (torch.float32, shape [2], trainable) where replica 0 has 'net.0.weight'"),
    ],
)  # fmt: skip
def test_replicas_that_differ_are_named(change, text):
    for message in run_replicas(_different_parameters, 2, change):
        assert message.startswith("EASGDStrategy: all replicas must have the same parameters, but ")
        assert text in message


class _Optimizers(Regression):
    """Replica 1 returns something else from configure_optimizers."""

    def __init__(self, replica: int, change: str) -> None:
        super().__init__()
        self.replica, self.change = replica, change

    def configure_optimizers(self) -> Any:
        if self.replica == 0:
            return super().configure_optimizers()
        if self.change == "part":
            return torch.optim.SGD(self.net[0].parameters(), lr=0.1)
        return {"none": None, "kind": torch.optim.Adam(self.parameters())}[self.change]


def _different_optimizers(replica: int, change: str, strategy: str) -> Any:
    try:
        trainer(strategy=strategy).fit(_Optimizers(replica, change), loader())
    except ValueError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("strategy", ["easgd", "easgd_async"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("none", "replica 1 has none, where replica 0 has SGD for 4 parameters, 'net.0.weight' among them"),
        ("part", "replica 1 has SGD for 2 parameters, where replica 0 has SGD for 4 parameters, 'net.2.weight' among "
                 "them"),
        ("kind", "replica 1 has Adam for 4 parameters, where replica 0 has SGD for 4 parameters"),
    ],
)  # fmt: skip
def test_replicas_whose_optimizers_differ_are_named(change, text, strategy):
    expected = f"EASGDStrategy: configure_optimizers must return the same on all replicas, but {text}"
    assert run_replicas(_different_optimizers, 2, change, strategy) == [expected] * 2


def _sync_batchnorm(replica: int) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = BatchNormRegression()
        trainer(sync_batchnorm=True).fit(module, loader())
    return [str(w.message) for w in caught if "sync_batchnorm" in str(w.message)], type(module.net[1]).__name__


def test_sync_batchnorm_says_that_it_has_no_effect():
    (warned, kind), (_, other) = run_replicas(_sync_batchnorm, 2)
    assert any("sync_batchnorm=True) has no effect on EASGDStrategy with one process a replica" in w for w in warned)
    assert kind == other == "BatchNorm1d"


def _nonfinite(replica: int, on_nonfinite: str) -> Any:
    class Poison(modules.pytorch_lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if replica == 1 and batch_idx == 2:
                with torch.no_grad():
                    pl_module.net[0].weight[0, 0] = float("nan")

    module = Regression()
    strategy = EASGDStrategy(EASGD(period=2), on_nonfinite=on_nonfinite)
    try:
        trainer(strategy=strategy, callbacks=[Poison()]).fit(module, loader())
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return flat(module)


def test_a_delta_that_is_not_finite_ends_the_job_and_names_the_replica():
    first, second = run_replicas(_nonfinite, 2, "raise")
    assert re.match(r"NonFiniteDeltaError: replica 1: \d+ of 49 numbers in its delta are not finite", second)
    assert "replica 1" in first or "replica 0 of 2: the all-reduce" in first


def test_a_replica_whose_delta_is_not_finite_starts_again_from_the_center():
    first, second = run_replicas(_nonfinite, 2, "reset")
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


# --- bad input, before any process is started ---


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"algorithm": "easgd"}, r"EASGDStrategy\(algorithm='easgd'\): must be a lightning_easgd Algorithm or None"),
        ({"transport": 3}, r"EASGDStrategy\(transport=3\): must be a lightning_easgd Transport or None"),
        ({"evaluate": "mean"}, r"EASGDStrategy\(evaluate='mean'\): must be one of 'center', 'replica'"),
        ({"on_nonfinite": "ignore"}, r"EASGDStrategy\(on_nonfinite='ignore'\): must be one of 'raise', 'reset'"),
    ],
)
def test_bad_arguments_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        EASGDStrategy(**arguments)


def test_an_unstable_rate_is_refused_by_the_trainers_constructor():
    with pytest.raises(ValueError, match=r"with 4 replicas: no step size is stable with a moving rate of 0.5"):
        trainer(strategy=EASGDStrategy(EASGD(moving_rate=0.5)), devices=4)


def test_a_center_rate_beyond_the_papers_is_warned_of():
    with pytest.warns(UserWarning, match="a center rate of 1.2 is beyond the paper's range"):
        trainer(strategy=EASGDStrategy(EASGD(moving_rate=0.3)), devices=4)


def test_devices_without_collectives_are_refused():
    with pytest.raises(ValueError, match=r"EASGDStrategy does not run on 'mps' devices.*accelerator='cpu'"):
        trainer(strategy=EASGDStrategy(parallel_devices=[torch.device("mps")]), accelerator="auto")


def test_precision_plugins_of_other_strategies_are_refused():
    from pytorch_lightning.plugins import FSDPPrecision

    with pytest.raises(ValueError, match="<FSDPPrecision>.*needs the strategy of its name"):
        trainer(strategy=EASGDStrategy(), plugins=[FSDPPrecision("bf16-true")])


def _lr_finder_callback(replica: int) -> str:
    from pytorch_lightning.callbacks import LearningRateFinder

    try:
        trainer(devices=1, callbacks=[LearningRateFinder()]).fit(Regression(), loader())
    except ValueError as error:
        return str(error)
    return "trained"


def test_a_training_inside_of_fit_is_refused():
    [message] = run_replicas(_lr_finder_callback, 1)
    assert "call Tuner(trainer).lr_find(module) before fit" in message


def _estimated_alone(replica: int) -> Any:
    seen = _BuffersSeen()
    module = BatchNormRegression()
    module.forward = module.net.forward
    t = trainer(strategy=EASGDStrategy(center_buffers=3), devices=1, callbacks=[seen], val_check_interval=5)
    t.fit(module, loader(), loader())
    return seen.own["net.1.num_batches_tracked"], seen.center["net.1.num_batches_tracked"]


def test_one_replica_keeps_its_statistics_while_the_centers_are_estimated():
    [(own, center)] = run_replicas(_estimated_alone, 1)
    assert own == 16
    assert center == 3


def _replaced(replica: int) -> str:
    class Replace(modules.pytorch_lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.strategy.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=0.1)]

    try:
        trainer(devices=1, callbacks=[Replace()]).fit(Regression(), loader())
    except RuntimeError as error:
        return str(error)
    return "trained"


def test_an_optimizer_that_is_replaced_is_refused():
    [message] = run_replicas(_replaced, 1)
    assert message.startswith("EASGDStrategy: this SGD is none of the optimizers that configure_optimizers returned")


def _zero(replica: int) -> str:
    class Module(Regression):
        def configure_optimizers(self):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from torch.distributed.optim import ZeroRedundancyOptimizer

                return ZeroRedundancyOptimizer(self.parameters(), torch.optim.SGD, lr=0.1)

    try:
        trainer(devices=1).fit(Module(), loader())
    except ValueError as error:
        return str(error)
    return "trained"


def test_sharded_optimizers_are_refused():
    [message] = run_replicas(_zero, 1)
    assert message.startswith("EASGDStrategy: ZeroRedundancyOptimizer synchronises the replicas at every step; return")


def test_a_strategy_of_the_other_namespace_names_the_import():
    import lightning.pytorch
    import pytorch_lightning

    with pytest.raises(ValueError, match=r"lightning.pytorch: `from lightning_easgd.pytorch import EASGDStrategy`"):
        lightning.pytorch.Trainer(strategy=EASGDStrategy())
    with pytest.raises(ValueError, match="pytorch_lightning: `from lightning_easgd import EASGDStrategy`"):
        pytorch_lightning.Trainer(strategy=lightning_easgd.pytorch.EASGDStrategy())


@namespaces
def test_the_names_are_registered(namespace):
    registry = NAMESPACES[namespace].strategies.StrategyRegistry
    for name, start_method in (
        ("easgd", "popen"), ("easgd_spawn", "spawn"), ("easgd_fork", "fork"), ("easgd_notebook", "fork")
    ):  # fmt: skip
        strategy = registry.get(name)
        assert type(strategy).__name__ == "EASGDStrategy"
        assert strategy._start_method == start_method
        assert isinstance(strategy, NAMESPACES[namespace].strategies.DDPStrategy)


def test_slurms_environment_is_read_as_by_ddp(monkeypatch):
    for key, value in {
        "SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "job", "SLURM_NODELIST": "a[1-3]",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    strategy = trainer(devices=2, num_nodes=3).strategy
    assert (strategy.num_replicas, strategy.replica, strategy.local_rank) == (3, 1, 1)  # a node is a replica
    assert strategy.cluster_environment.main_address == "a1"
    assert strategy.cluster_environment.creates_processes_externally


def test_weights_of_asks_for_one_of_two():
    with pytest.raises(ValueError, match=r"weights_of\('mean'\): must be 'center' or 'replica'"), EASGDStrategy(
    ).weights_of("mean"):  # fmt: skip
        pass


# --- monitor ---


def _monitor(replica: int, folder: str) -> Any:
    from pytorch_lightning.loggers import CSVLogger

    strategy = EASGDStrategy(EASGD(period=4, center_rate=0.9))
    t = trainer(strategy=strategy, logger=CSVLogger(folder, version=0), max_epochs=2)
    t.fit(Regression(), loader())
    monitors = [c for c in t.callbacks if isinstance(c, ElasticMonitor)]
    return len(monitors), {k: float(v) for k, v in t.callback_metrics.items()}


KEYS = ("consensus_distance", "consensus_distance_max", "consensus_distance_relative", "force_norm", "update_norm",
        "force_to_update", "equilibrium", "exchanges", "bytes_sent", "exposed_s", "hidden_s")  # fmt: skip


def test_the_monitor_comes_by_itself_and_logs(tmp_path):
    import csv

    for count, metrics in run_replicas(_monitor, 2, str(tmp_path)):
        assert count == 1
        assert {f"easgd/{key}" for key in KEYS} <= set(metrics)
        # With one rate the force is the moving rate times the distance.
        assert metrics["easgd/force_norm"] == pytest.approx(0.45 * metrics["easgd/consensus_distance"], rel=1e-5)
        assert metrics["easgd/consensus_distance"] <= metrics["easgd/consensus_distance_max"]
        assert metrics["easgd/update_norm"] > 0
    folder = tmp_path / "lightning_logs" / "version_0"
    with open(folder / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["easgd/exchanges"]]
    assert [float(row["easgd/exchanges"]) for row in rows] == [1, 2, 3, 4]
    assert [int(row["step"]) for row in rows] == [3, 7, 11, 15]
    assert float(rows[0]["easgd/consensus_distance"]) > 0  # the exchange in step 0 would be of nothing
    hyperparameters = (folder / "hparams.yaml").read_text()
    for line in ("name: EASGDStrategy", "algorithm: EASGD", "period: 4", "moving_rate: 0.45", "num_replicas: 2"):
        assert f"strategy/{line}" in hyperparameters


def test_the_monitors_interval_is_checked():
    with pytest.raises(ValueError, match=r"ElasticMonitor\(every_n_exchanges=0\): must be an integer >= 1"):
        ElasticMonitor(every_n_exchanges=0)

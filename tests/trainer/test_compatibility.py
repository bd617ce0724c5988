"""What a LightningModule and a Trainer may do, each under ``easgd`` in two processes.

A case is a function that every rank runs and a test that looks at what the ranks returned. The cases of a group share
one pair of processes: starting them costs more than most cases do. After a case that fails the others have a new pair.
"""

import csv
import functools
import math
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    StochasticWeightAveraging,
    Timer,
)
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_easgd import EASGD, EASGDStrategy
from tests.callbacks import Ends
from tests.helpers import PROCESSES_S, Replicas, run_replicas
from tests.modules import Regression, Stream, flat, linear_data, loader, trainer

# --- running the cases -----------------------------------------------------------------------------------------------

MOST_PAIRS = 4  # of processes, for the cases of one group; each may take all its time if a case hangs
pytestmark = pytest.mark.timeout((MOST_PAIRS + 1) * PROCESSES_S)

GROUPS: dict[str, dict[str, Callable[[int, Path], Any]]] = {}


def case(group: str) -> Callable[[Callable[[int, Path], Any]], Callable[[int, Path], Any]]:
    """Adds ``function(replica, folder)`` to a group; all ranks have the same folder."""

    def add(function):
        GROUPS.setdefault(group, {})[function.__name__] = function
        return function

    return add


def _run_cases(replica: int, group: str, names: list[str], folder: str) -> None:
    """Runs cases until one fails, and leaves what each returned, or its traceback, in its folder."""
    for name in names:
        torch.manual_seed(100 + replica)
        own = Path(folder, name)
        own.mkdir(exist_ok=True)
        os.chdir(own)
        try:
            result = GROUPS[group][name](replica, own)
        except BaseException:
            result = traceback.format_exc()
        torch.save(result, own / f"result-{replica}.pt")
        if isinstance(result, str):
            break  # the ranks may be at different places from here on
    os.chdir("/")


@functools.cache
def _results(group: str) -> dict[str, list[Any]]:
    """Returns what both ranks had of each case, a string where it failed; those after a failure get new processes."""
    results: dict[str, list[Any]] = {}
    names = list(GROUPS[group])
    for _ in range(MOST_PAIRS):
        if not names:
            break
        with tempfile.TemporaryDirectory() as folder:
            replicas = Replicas(_run_cases, 2, group, names, folder)
            codes = replicas.join()
            reached = len(names)
            for position, name in enumerate(names):
                files = [Path(folder, name, f"result-{replica}.pt") for replica in range(2)]
                results[name] = [
                    torch.load(file, weights_only=False)
                    if file.exists()
                    else f"no result; exit codes {codes} {replicas.error(replica)}"
                    for replica, file in enumerate(files)
                ]
                if any(isinstance(result, str) for result in results[name]):
                    reached = position + 1
                    break
        names = names[reached:]
    return results | {name: [f"not reached: {MOST_PAIRS} other cases failed"] * 2 for name in names}


def xdist_group_of(item: pytest.Item) -> str:
    """Returns which group's results a test needs: its tests run one after another where there are several workers."""
    function = item.function
    needed = {*function.__code__.co_names, *(getattr(v, "__name__", "") for v in _params(item).values())}
    return next((group for group, functions in GROUPS.items() if needed & functions.keys()), item.name)


def _params(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def results_of(function: Callable[[int, Path], Any]) -> tuple[Any, Any]:
    """Returns what both ranks returned, after checking that both trained to one center, if they returned a fit."""
    [group] = [g for g, functions in GROUPS.items() if function.__name__ in functions]
    first, second = _results(group)[function.__name__]
    failed = [f"replica {replica}: {result}" for replica, result in enumerate((first, second)) if type(result) is str]
    assert not failed, "\n".join(failed)
    if isinstance(first, dict) and "center" in first:
        assert torch.equal(first["center"], second["center"])
        assert torch.isfinite(first["center"]).all()
        assert first["moved"] > 0
        for result in (first, second):
            assert result["losses"], "nothing was trained"
    return first, second


def parts(module: LightningModule) -> dict[str, torch.Tensor]:
    return {name: flat(part) for name, part in module.named_children()}


class Probe(Ends):
    """Counts the exchanges of every coupling, and keeps the losses and, part by part too, the replica at the end."""

    def __init__(self) -> None:
        super().__init__(lambda module: (flat(module), parts(module)))
        self.losses: list[float] = []
        self.pushes: list[int] = []

    def on_train_start(self, trainer, pl_module):
        self.initial, self.initial_parts = flat(pl_module), parts(pl_module)
        for index, coupling in enumerate(trainer.strategy.couplings):
            self.pushes.append(0)

            def push(*args, _index=index, _push=coupling.center.push, **kwargs):
                self.pushes[_index] += 1
                return _push(*args, **kwargs)

            def exchange(*args, _index=index, _exchange=coupling.center.exchange, **kwargs):
                self.pushes[_index] += 1
                return _exchange(*args, **kwargs)

            coupling.center.push, coupling.center.exchange = push, exchange

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        has_loss = isinstance(outputs, dict) and "loss" in outputs
        self.losses.append(float(outputs["loss"]) if has_loss else math.nan)

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        self.center, _ = self.center
        self.replica, self.parts = self.replica
        couplings = trainer.strategy.couplings
        self.center_dtypes = [c.center.value.dtype for c in couplings]
        self.clocks = [c.algorithm.clock - c.algorithm.initial_clock for c in couplings]
        self.moved = float((self.center.double() - self.initial.double()).norm())


def fit(
    module: LightningModule, data: Any = None, val: Any = None, *, period: int = 3, rate: float | None = None, **kwargs
) -> dict[str, Any]:
    """Fits and returns what ``Probe`` saw, with the weights that the module has afterwards and the metrics."""
    probe = Probe()
    callbacks = [probe, *kwargs.pop("callbacks", [])]
    strategy = kwargs.pop("strategy", None) or EASGDStrategy(EASGD(period=period, moving_rate=rate))
    t = trainer(strategy=strategy, callbacks=callbacks, **kwargs)
    t.fit(module, loader() if data is None else data, val)
    assert t.state.finished
    metrics = {k: float(v) for k, v in t.callback_metrics.items()}
    return {**probe.kept(), "after": flat(module), "metrics": metrics, "epochs": t.current_epoch}


def exchanges(steps: int, period: int = 3) -> int:
    return steps // period


# --- several optimizers ----------------------------------------------------------------------------------------------


class GAN(LightningModule):
    """The GAN of Lightning's documentation, on vectors: manual optimization, two Adams that are toggled."""

    def __init__(self, n_critic: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.n_critic = n_critic
        torch.manual_seed(3)
        self.generator = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.LeakyReLU(0.2), torch.nn.Linear(16, 8))
        self.discriminator = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.LeakyReLU(0.2), torch.nn.Linear(16, 1)
        )

    def adversarial_loss(self, samples: torch.Tensor, real: float) -> torch.Tensor:
        y_hat = self.discriminator(samples)
        return functional.binary_cross_entropy_with_logits(y_hat, torch.full_like(y_hat, real))

    def training_step(self, batch, batch_idx):
        (real,) = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(real.shape[0], 4)

        self.toggle_optimizer(optimizer_g)
        g_loss = self.adversarial_loss(self.generator(z), 1.0)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        for _ in range(self.n_critic):
            self.toggle_optimizer(optimizer_d)
            real_loss = self.adversarial_loss(real, 1.0)
            fake_loss = self.adversarial_loss(self.generator(torch.randn_like(z)).detach(), 0.0)
            d_loss = (real_loss + fake_loss) / 2
            self.log("d_loss", d_loss, prog_bar=True)
            self.manual_backward(d_loss)
            optimizer_d.step()
            optimizer_d.zero_grad()
            self.untoggle_optimizer(optimizer_d)

    def configure_optimizers(self):
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999))
        return [opt_g, opt_d], []


def gan_data(num_samples: int = 400) -> DataLoader:
    generator = torch.Generator().manual_seed(11)
    samples = torch.randn(num_samples, 8, generator=generator) * 0.5 + torch.linspace(-1, 1, 8)
    return DataLoader(TensorDataset(samples), batch_size=8, shuffle=True)


@case("optimizers")
def gan(replica, folder):
    return fit(GAN(), gan_data(), period=5, max_epochs=4)


@case("optimizers")
def gan_without_exchange(replica, folder):
    return fit(GAN(), gan_data(), period=5, rate=0.0, max_epochs=4)["parts"]


def test_both_networks_of_a_gan_stay_coupled():
    coupled, free = results_of(gan), results_of(gan_without_exchange)
    initial = coupled[0]["initial_parts"]

    def spread(parts: list[dict[str, torch.Tensor]], name: str) -> float:
        moved = sum(float((p[name] - initial[name]).norm()) for p in parts) / 2
        return float((parts[0][name] - parts[1][name]).norm()) / moved

    for name in ("generator", "discriminator"):
        with_exchange = spread([r["parts"] for r in coupled], name)
        without = spread(list(free), name)
        assert 0 < with_exchange < 0.5 * without, (name, with_exchange, without)
    for result in coupled:
        assert result["clocks"] == [100, 100]
        assert result["pushes"] == [exchanges(100, 5)] * 2


@case("optimizers")
def critic(replica, folder):
    return fit(GAN(n_critic=3), gan_data(), period=4)


def test_an_optimizer_that_steps_more_often_has_a_clock_of_its_own():
    for result in results_of(critic):
        assert result["clocks"] == [25, 75]
        assert result["pushes"] == [exchanges(25, 4), exchanges(75, 4)]


class LBFGSRegression(Regression):
    closures = 0

    def training_step(self, batch, batch_idx):
        self.closures += 1
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


@case("optimizers")
def lbfgs(replica, folder):
    module = LBFGSRegression()
    return {**fit(module, loader(batch_size=8)), "closures": module.closures}


def test_lbfgs_counts_once_a_step():
    for result in results_of(lbfgs):
        assert result["closures"] > 4
        assert result["clocks"] == [4]
        assert result["pushes"] == [1]


@case("optimizers")
def accumulation(replica, folder):
    return fit(Regression(), loader(), period=2, accumulate_grad_batches=3, max_epochs=2)


def test_accumulation_counts_steps_and_the_short_last_window():
    for result in results_of(accumulation):
        assert len(result["losses"]) == 16
        assert result["steps"] == 6  # 8 batches an epoch: windows of 3, 3 and 2
        assert result["clocks"] == [6]
        assert result["pushes"] == [3]


# --- precision and clipping ------------------------------------------------------------------------------------------

PRECISIONS = {
    "64-true": (torch.float64, torch.float64),
    "32-true": (torch.float32, torch.float32),
    "bf16-true": (torch.bfloat16, torch.float32),
    "bf16-mixed": (torch.float32, torch.float32),
    "16-mixed": (torch.float32, torch.float32),
}


@case("precision")
def precisions(replica, folder):
    return {
        precision: fit(Regression(), loader(), loader(), precision=precision, max_epochs=4, period=2)
        for precision in PRECISIONS
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision(precision):
    first, second = (result[precision] for result in results_of(precisions))
    parameters, center = PRECISIONS[precision]
    assert torch.equal(first["center"], second["center"])
    for result in (first, second):
        assert result["center"].dtype == parameters
        assert result["center_dtypes"] == [center]
        assert result["clocks"] == [32]
        assert result["moved"] > 0.1
        assert sum(result["losses"][-4:]) < 0.5 * sum(result["losses"][:4])
        assert not torch.equal(result["replica"], result["center"])


class ClippedRegression(Regression):
    """Momentum zero and lr 1, so that a step's move is the gradient; notes the largest."""

    def __init__(self) -> None:
        super().__init__(lr=1.0, momentum=0.0)
        self.norms: list[float] = []
        self.values: list[float] = []

    def on_before_zero_grad(self, optimizer):
        gradients = [p.grad.flatten() for p in self.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(float(torch.cat(gradients).norm()))
            self.values.append(float(torch.cat(gradients).abs().max()))


@case("precision")
def clipping(replica, folder):
    results = {}
    for how in ("norm", "value"):
        module = ClippedRegression()
        result = fit(module, loader(), gradient_clip_val=0.01, gradient_clip_algorithm=how, period=1)
        results[how] = {**result, "norms": module.norms, "values": module.values}
    return results


@pytest.mark.parametrize("how", ["norm", "value"])
def test_gradient_clipping_is_of_the_local_gradient(how):
    first, second = (result[how] for result in results_of(clipping))
    assert torch.equal(first["center"], second["center"])
    assert first["norms"] != second["norms"] or first["values"] != second["values"]
    for result in (first, second):
        clipped = result["norms" if how == "norm" else "values"]
        assert clipped
        assert max(clipped) == pytest.approx(0.01, rel=1e-3)
        # The elastic move comes on top of it and is not clipped away: replicas stay together all the same.
        assert 0 < result["moved"] <= 0.01 * 8 * (1 if how == "norm" else math.sqrt(49)) * 1.001


# --- uneven work -----------------------------------------------------------------------------------------------------


class LoggedRegression(Regression):
    """Logs over all ranks at the end of the epoch."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("mean_loss", loss, sync_dist=True, on_epoch=True, on_step=False)
        self.log("ones", 1.0, sync_dist=True, on_epoch=True, on_step=False, reduce_fx="sum")
        return loss


@case("uneven")
def streams(replica, folder):
    return fit(LoggedRegression(), DataLoader(Stream(21, 40), batch_size=4), loader(), max_epochs=2)


def test_streams_of_different_lengths():
    first, second = results_of(streams)
    assert [len(first["losses"]), len(second["losses"])] == [12, 20]
    assert [first["clocks"], second["clocks"]] == [[12], [20]]
    assert first["metrics"]["mean_loss"] == second["metrics"]["mean_loss"]
    assert first["metrics"]["ones"] == second["metrics"]["ones"] == 6 + 10
    low, high = (sum(r["losses"][len(r["losses"]) // 2 :]) / (len(r["losses"]) / 2) for r in (first, second))
    assert min(low, high) < first["metrics"]["mean_loss"] < max(low, high)


@case("uneven")
def limits(replica, folder):
    return fit(LoggedRegression(), loader(), limit_train_batches=8 if replica else 3, max_epochs=2, period=2)


def test_limits_that_differ():
    first, second = results_of(limits)
    assert [first["steps"], second["steps"]] == [6, 16]
    assert first["metrics"]["mean_loss"] == second["metrics"]["mean_loss"]
    assert first["metrics"]["ones"] == second["metrics"]["ones"] == 3 + 8


@case("uneven")
def one_more_sample(replica, folder):
    data = DataLoader(linear_data(33 if replica else 32), batch_size=4, shuffle=True, drop_last=False)
    return fit(LoggedRegression(), data, loader(), use_distributed_sampler=False, max_epochs=3, period=2)


def test_one_sample_more_on_one_rank():
    first, second = results_of(one_more_sample)
    assert [first["steps"], second["steps"]] == [24, 27]
    assert first["metrics"]["val_loss"] == second["metrics"]["val_loss"]


class PartlyUsed(Regression):
    def __init__(self, used: bool) -> None:
        super().__init__()
        self.used = used
        self.extra = torch.nn.Linear(4, 1)

    def loss(self, batch):
        x, y = batch
        return functional.mse_loss(self.net(x) + (self.extra(x) if self.used else 0), y)


@case("uneven")
def unused(replica, folder):
    return fit(PartlyUsed(used=replica == 0), period=2, max_epochs=2)


def test_a_parameter_that_one_rank_leaves_out_of_its_loss():
    first, second = results_of(unused)
    moves = [r["parts"]["extra"] - r["initial_parts"]["extra"] for r in (first, second)]
    assert moves[0].norm() > 0
    assert moves[1].norm() > 0  # by the center alone: it has no gradient there
    assert torch.dot(moves[0], moves[1]) > 0


# --- data that differ ------------------------------------------------------------------------------------------------


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), sync_dist=True, batch_size=len(x))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@case("uneven")
def other_classes(replica, folder):
    from sklearn.datasets import load_digits

    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16
    own = (y[:1200] >= 5) == bool(replica)
    train = DataLoader(TensorDataset(x[:1200][own], y[:1200][own]), batch_size=16, shuffle=True)
    val = DataLoader(TensorDataset(x[1200:], y[1200:]), batch_size=len(x) - 1200)
    results = {}
    for name, rate in (("coupled", None), ("alone", 0.0)):
        strategy = EASGDStrategy(
            EASGD(period=4, moving_rate=rate), evaluate="center" if name == "coupled" else "replica"
        )
        results[name] = fit(Digits(), train, val, strategy=strategy, max_epochs=12, use_distributed_sampler=False)
    return results


def test_the_center_of_replicas_that_see_other_classes_knows_all():
    first, second = results_of(other_classes)
    assert torch.equal(first["coupled"]["center"], second["coupled"]["center"])
    alone = first["alone"]["metrics"]["accuracy"]
    assert alone < 0.55
    assert first["coupled"]["metrics"]["accuracy"] == second["coupled"]["metrics"]["accuracy"]
    assert first["coupled"]["metrics"]["accuracy"] > 0.8


# --- callbacks -------------------------------------------------------------------------------------------------------


@case("callbacks")
def early_stopping(replica, folder):
    stopping = EarlyStopping("val_loss", patience=1, min_delta=100.0)
    return fit(Regression(), loader(), loader(), max_epochs=10, callbacks=[stopping])


def test_early_stopping_on_the_centers_metric():
    first, second = results_of(early_stopping)
    assert [first["epochs"], second["epochs"]] == [2, 2]
    assert [first["steps"], second["steps"]] == [16, 16]
    assert first["metrics"]["val_loss"] == second["metrics"]["val_loss"]


@case("callbacks")
def timer(replica, folder):
    return fit(Regression(), loader(), max_epochs=-1, callbacks=[Timer({"seconds": 1})])


@case("callbacks")
def max_time(replica, folder):
    return fit(Regression(), loader(), max_epochs=-1, max_time={"seconds": 1})


@pytest.mark.parametrize("function", [timer, max_time])
def test_time_limits_end_all_at_the_same_step(function):
    first, second = results_of(function)
    assert first["steps"] == second["steps"] > 2


class Scheduled(Regression):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}]


@case("callbacks")
def learning_rates(replica, folder):
    result = fit(
        Scheduled(),
        logger=CSVLogger(str(folder), version=0),
        log_every_n_steps=1,
        callbacks=[LearningRateMonitor("step")],
    )
    if replica == 0:
        with open(folder / "lightning_logs" / "version_0" / "metrics.csv") as file:
            result["rates"] = [float(row["lr-SGD"]) for row in csv.DictReader(file) if row["lr-SGD"]]
    return result


def test_learning_rates_are_monitored():
    first, _ = results_of(learning_rates)
    assert first["rates"] == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125]
    assert first["pushes"] == [2]


@case("callbacks")
def swa(replica, folder):
    callback = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1)
    result = fit(Regression(), rate=0.3, max_epochs=5, callbacks=[callback])
    return {**result, "average": flat(callback._average_model)}


@case("callbacks")
def ema(replica, folder):
    callback = EMAWeightAveraging(decay=0.8)
    result = fit(Regression(), loader(), loader(), max_epochs=3, callbacks=[callback])
    return {**result, "average": flat(callback._average_model.module) if callback._average_model else None}


@pytest.mark.parametrize("function", [swa, ema])
def test_what_an_averaging_callback_puts_into_the_module_stays(function):
    for result in results_of(function):
        assert not torch.equal(result["after"], result["center"])
        assert torch.equal(result["after"], result["average"])
        # It averages this rank's replica, on the way to the center.
        assert (result["after"] - result["center"]).norm() < 0.5 * result["moved"]


class Writer(BasePredictionWriter):
    def __init__(self, folder: Path) -> None:
        super().__init__("epoch")
        self.folder = folder

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        torch.save((torch.cat(predictions), batch_indices), self.folder / f"{trainer.global_rank}.pt")


@case("callbacks")
def prediction_writer(replica, folder):
    module = Regression()
    result = fit(module)
    trainer(callbacks=[Writer(folder)]).predict(module, loader(shuffle=False), return_predictions=False)
    predictions, indices = torch.load(folder / f"{replica}.pt")
    own = [i for batches in indices for batch in batches for i in batch]
    x = linear_data()[own][0]
    return {**result, "predictions": predictions, "expected": module.net(x).detach(), "indices": own}


def test_predictions_are_written_with_the_centers_weights():
    first, second = results_of(prediction_writer)
    assert sorted(first["indices"] + second["indices"]) == list(range(64))
    for result in (first, second):
        torch.testing.assert_close(result["predictions"], result["expected"])


# --- the Trainer's features ------------------------------------------------------------------------------------------


@case("trainer")
def lr_finder(replica, folder):
    module = Regression()
    t = trainer(strategy=EASGDStrategy(EASGD(period=3)), max_epochs=1)
    before = flat(module)
    finder = Tuner(t).lr_find(module, loader(256), num_training=20, update_attr=True)
    after_finder = flat(module)
    found, tried = module.lr, len(finder.results["lr"])
    result = fit(module)
    return {**result, "found": found, "tried": tried, "before": before, "after_finder": after_finder}


def test_lr_finder():
    first, second = results_of(lr_finder)
    assert first["found"] == second["found"] > 0
    assert first["tried"] >= 19
    for result in (first, second):
        assert torch.equal(result["before"], result["after_finder"])


class OwnLoader(Regression):
    batch_size = 2

    def train_dataloader(self):
        return loader(batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(batch_size=self.batch_size)


@case("trainer")
def batch_sizes(replica, folder):
    module, refusals = OwnLoader(), []
    for use in (
        lambda: Tuner(trainer()).scale_batch_size(module),
        lambda: trainer(callbacks=[BatchSizeFinder()]).fit(module),
    ):
        try:
            use()
        except (ValueError, MisconfigurationException) as error:
            refusals.append(str(error))
    # What works instead: find it with one device, and train with what was found.
    alone = trainer(strategy="auto", devices=1)
    found = Tuner(alone).scale_batch_size(module, mode="power", steps_per_trial=2, max_trials=2, init_val=2)
    probe = Probe()
    trainer(strategy=EASGDStrategy(EASGD(period=1)), callbacks=[probe]).fit(module)
    return {**probe.kept(), "refusals": refusals, "found": found}


def test_batch_size_finder_is_refused_by_lightning_and_works_on_one_device():
    for result in results_of(batch_sizes):
        assert len(result["refusals"]) == 2
        assert all("not supported with distributed strategies" in text for text in result["refusals"])
        assert result["found"] > 2
        assert result["steps"] == math.ceil(32 / result["found"])


@case("trainer")
def overfit(replica, folder):
    return fit(Regression(), loader(), loader(), overfit_batches=2, max_epochs=10)


def test_overfit_batches():
    for result in results_of(overfit):
        assert result["steps"] == 20
        assert result["losses"][-1] < 0.5 * result["losses"][0]


@case("trainer")
def fast(replica, folder):
    return fit(Regression(), loader(), loader(), fast_dev_run=2, period=1)


def test_fast_dev_run():
    for result in results_of(fast):
        assert result["steps"] == 2
        assert result["pushes"] == [2]


class SeveralLoaders(Regression):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.loss(batch), sync_dist=True)


@case("trainer")
def several_loaders(replica, folder):
    return fit(SeveralLoaders(), loader(), [loader(), loader(16, shuffle=False)], val_check_interval=3)


def test_several_validation_loaders():
    first, second = results_of(several_loaders)
    for name in ("val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"):
        assert first["metrics"][name] == second["metrics"][name]
    assert first["metrics"]["val_loss/dataloader_idx_0"] != first["metrics"]["val_loss/dataloader_idx_1"]


class Configured(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = torch.nn.Linear(4, 1)


@case("trainer")
def configure_model(replica, folder):
    return fit(Configured(), period=2, max_epochs=2)


def test_configure_model():
    first, second = results_of(configure_model)
    assert torch.equal(first["initial"], second["initial"])  # though each rank made its own at random
    assert first["clocks"] == [16]


class Tied(Regression):
    def __init__(self) -> None:
        super().__init__()
        a, b = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
        b.weight = a.weight
        self.net = torch.nn.Sequential(a, torch.nn.Tanh(), b, torch.nn.Linear(4, 1))


@case("trainer")
def tied(replica, folder):
    module = Tied()
    result = fit(module, period=2, max_epochs=2)
    return {**result, "tied": module.net[0].weight is module.net[2].weight}


def test_tied_weights_are_coupled_once():
    for result in results_of(tied):
        assert result["tied"]
        assert len(result["center"]) == 16 + 5
        assert torch.equal(result["after"], result["center"])


class Sparse(LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = optimizer
        self.embedding = torch.nn.Embedding(20, 3, sparse=True)

    def training_step(self, batch, batch_idx):
        (index,) = batch
        return (self.embedding(index).sum(-1) - index.sum(-1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return getattr(torch.optim, self.kind)(self.parameters(), lr=0.05)


@case("trainer")
def sparse(replica, folder):
    results = {}
    for kind in ("SparseAdam", "SGD"):
        data = TensorDataset(torch.arange(64).remainder(10)[:, None])  # rows 10 to 19 have no gradient
        results[kind] = fit(Sparse(kind), DataLoader(data, batch_size=4, shuffle=True), max_epochs=3)
    return results


@pytest.mark.parametrize("kind", ["SparseAdam", "SGD"])
def test_sparse_gradients(kind):
    first, second = (result[kind] for result in results_of(sparse))
    assert torch.equal(first["center"], second["center"])
    assert sum(first["losses"][-8:]) < sum(first["losses"][:8])
    moved = (first["center"] - first["initial"]).view(20, 3).norm(dim=1)
    assert (moved[:10] > 0).all()
    assert (moved[10:] < 1e-6).all()
    assert not torch.equal(first["replica"], second["replica"])


class Conv(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 16, 1)
        ).to(memory_format=torch.channels_last)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.mse_loss(self.net(x.contiguous(memory_format=torch.channels_last)), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@case("trainer")
def channels_last(replica, folder):
    module = Conv()
    if replica:
        torch.nn.init.normal_(module.net[0].weight)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 3, 6, 6, generator=generator)
    data = DataLoader(TensorDataset(x, x.mean(dim=(1, 2, 3))[:, None]), batch_size=4, shuffle=True)
    result = fit(module, data, max_epochs=3)
    return {**result, "kept": module.net[0].weight.is_contiguous(memory_format=torch.channels_last)}


def test_channels_last_weights_keep_their_layout():
    first, second = results_of(channels_last)
    assert torch.equal(first["initial"], second["initial"])
    for result in (first, second):
        assert result["kept"]
        assert torch.equal(result["after"], result["center"])
        assert 0 < (result["replica"] - result["center"]).norm() < result["moved"]


class Shapes(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.nothing = torch.nn.Parameter(torch.empty(0, 3))

    def loss(self, batch):
        x, y = batch
        return functional.mse_loss(self.scale * self.net(x), y) + self.nothing.sum()


@case("trainer")
def shapes(replica, folder):
    module = Shapes()
    return {**fit(module, period=2), "scale": module.scale.detach().clone()}


def test_scalar_and_empty_parameters():
    first, second = results_of(shapes)
    assert first["scale"].shape == ()
    assert first["scale"] == second["scale"] != 1.0


@case("trainer")
def fit_twice(replica, folder):
    return fit(Regression()), fit(Regression())


def test_two_trainers_one_after_the_other():
    for runs in zip(*results_of(fit_twice), strict=True):
        assert torch.equal(runs[0]["center"], runs[1]["center"])
        assert runs[0]["clocks"] == [8]
        assert runs[0]["pushes"] == [2]


@case("trainer")
def same_trainer_twice(replica, folder):
    module, probe = Regression(), Probe()
    t = trainer(strategy=EASGDStrategy(EASGD(period=3)), callbacks=[probe])
    t.fit(module, loader())
    first = probe.kept()
    probe.pushes = []
    t.fit_loop.max_epochs = 3
    t.fit(module, loader())
    return {**probe.kept(), "first": first}


def test_one_trainer_twice():
    for result in results_of(same_trainer_twice):
        assert torch.equal(result["initial"], result["first"]["center"])  # it goes on from what it ended with
        assert result["steps"] == 24
        assert result["clocks"] == [16]
        assert result["pushes"] == [exchanges(16)]


class Compiled(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="aot_eager")


@case("trainer")
def compiled(replica, folder):
    return fit(Compiled(), period=2)


def test_compiled_submodule():
    for result in results_of(compiled):
        assert result["clocks"] == [8]
        assert torch.equal(result["after"], result["center"])


def _uneven_time_limit(replica: int) -> Any:
    module = Regression()
    t = trainer(
        strategy=EASGDStrategy(EASGD(period=2)),
        callbacks=[Timer({"seconds": 1})],
        max_epochs=-1,
        limit_train_batches=3 if replica == 0 else 8,
    )
    t.fit(module, loader())
    return t.current_epoch, t.global_step, flat(module)


def test_a_time_limit_ends_replicas_with_unequal_work():
    (epoch0, step0, center0), (epoch1, step1, center1) = run_replicas(_uneven_time_limit, 2)
    assert epoch0 == epoch1
    assert 0 < step0 < step1
    assert torch.equal(center0, center1)


def _finetune(replica: int) -> Any:
    class Finetuned(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torch.nn.Linear(4, 4)
            self.net = torch.nn.Linear(4, 1)

        def loss(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.mse_loss(self.net(torch.tanh(self.backbone(batch[0]))), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.05)

    module = Finetuned()
    before = module.backbone.weight.detach().clone()
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0, verbose=False)
    t = trainer(strategy=EASGDStrategy(EASGD(period=2)), callbacks=[thaw], max_epochs=4)
    t.fit(module, loader())
    return before, flat(module), module.backbone.weight.detach().clone()


def test_a_backbone_that_is_thawed_joins_the_exchange():
    (before, center0, backbone0), (_, center1, backbone1) = run_replicas(_finetune, 2)
    assert torch.equal(center0, center1)
    assert torch.equal(backbone0, backbone1)
    assert not torch.equal(before, backbone0)


def _skipped_amp_step(replica: int) -> Any:
    class Overflow(Regression):
        def loss(self, batch: Any) -> torch.Tensor:
            loss = super().loss(batch)
            # One replica's third step overflows, so that its scaler skips the optimizer's.
            return loss * float("inf") if replica == 1 and self.global_step == 2 and self.training else loss

    applied = []

    class Applied(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.optimizers[0].register_step_post_hook(lambda *_: applied.append(trainer.global_step))

        def on_train_end(self, trainer, pl_module):
            coupling = trainer.strategy.couplings[0]
            self.clock = coupling.algorithm.clock - coupling.algorithm.initial_clock
            self.exchanges = coupling.center.traffic.exchanges

    module, counts = Overflow(), Applied()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    t = trainer(strategy=EASGDStrategy(EASGD(period=2)), plugins=[plugin], callbacks=[counts])
    t.fit(module, loader())
    return counts.clock, counts.exchanges, len(applied), plugin.scaler.get_scale(), flat(module)


def test_a_step_that_the_scaler_skips_counts():
    (*first, center0), (*second, center1) = run_replicas(_skipped_amp_step, 2)
    assert first == [8, 4, 8, 8.0]
    assert second == [8, 4, 7, 4.0]
    assert torch.equal(center0, center1)
    assert torch.isfinite(center0).all()

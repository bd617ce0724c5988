"""Layerwise SSP: each layer has a center and a clock, is added in the backward pass and read in the forward pass."""

from functools import partial
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_easgd import AGN, EASGD, Asynchronous, Downpour, EASGDStrategy
from lightning_easgd.core.layerwise import by_layer, narrowed, parts_of
from tests import modules
from tests.callbacks import Ends
from tests.helpers import TIMEOUT, run_replicas
from tests.modules import Regression, flat, loader, trainer


def strategy(**kwargs: Any) -> EASGDStrategy:
    return EASGDStrategy(Downpour(), Asynchronous(), **{"layerwise": True, **kwargs})


class Borrower(nn.Module):
    """Uses the parameters of a layer that is never called, as attention does, and a weight that a hook computes."""

    def __init__(self) -> None:
        super().__init__()
        self.lender = nn.Linear(8, 8)
        self.normed = nn.utils.spectral_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(nn.functional.linear(x, self.lender.weight, self.lender.bias))


class Deep(Regression):
    """Layers of every kind, a parameter of the module's own, two groups and a schedule."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Borrower(), nn.LayerNorm(8), nn.Linear(8, 1))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self(self.scale * batch[0]), batch[1])  # used before the module is called

    def configure_optimizers(self) -> Any:
        biases = [p for name, p in self.named_parameters() if name.endswith("bias")]
        weights = [p for name, p in self.named_parameters() if not name.endswith("bias")]
        kind, options = (torch.optim.SGD, {"momentum": 0.9}) if self.optimizer == "SGD" else (torch.optim.AdamW, {})
        optimizer = kind(
            [{"params": weights, "weight_decay": 0.01}, {"params": biases, "lr": 0.02}], lr=0.01, **options
        )
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


class Tied(Deep):
    """A weight that two modules own, a module that is called twice, and one that is recomputed in the backward pass."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        self.first, self.square, self.other, self.last = (
            nn.Linear(4, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 1),
        )
        self.other.weight = self.square.weight
        self.net = nn.Sequential(self.first)

    def loss(self, batch: Any) -> Tensor:
        x = self.square(self.other(self.square(self.first(batch[0]))).tanh())
        return nn.functional.mse_loss(self.scale * checkpoint(self.last, x, use_reentrant=False), batch[1])


class Behind(modules.pytorch_lightning.Callback):
    """Makes one of two replicas begin a step only when the other has read as far ahead as the slack allows."""

    def __init__(self, replica: int, slack: int, path: str) -> None:
        self.replica, self.slack, self.path = replica, slack, path

    def on_train_start(self, trainer, pl_module):
        self.store = torch.distributed.FileStore(self.path, 2)
        self.last = trainer.max_epochs * trainer.num_training_batches - 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.replica:
            self.store.wait([f"read/{min(trainer.global_step + self.slack, self.last)}"], TIMEOUT)

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_rank != self.replica:
            self.store.set(f"read/{trainer.global_step}", "")


def _fit(replica: int, strategy: Any, module: Any = Deep, num_replicas: int = 2, **kwargs: Any) -> dict[str, Any]:
    ends, fitted = Ends(), module()
    callbacks = [ends, *kwargs.pop("callbacks", [])]
    path = kwargs.pop("ckpt_path", None)
    t = trainer(strategy=strategy, devices=num_replicas, callbacks=callbacks, **{"max_epochs": 2, **kwargs})
    t.fit(fitted, loader(shuffle=False), loader(16), ckpt_path=path)
    exchanges = {names[0]: number for names, number in zip(ends.names, ends.exchanges, strict=True) if names}
    return {**ends.kept(), "exchanges": exchanges, "module": flat(fitted)}


# --- the parts ------------------------------------------------------------------------------------------------------


def test_a_layer_is_a_module_that_owns_parameters():
    module = Tied()
    assert [list(layer) for layer in by_layer(module, dict(module.named_parameters()))] == [
        ["scale"],
        ["net.0.weight", "net.0.bias"],
        ["square.weight", "square.bias"],
        ["other.bias"],
        ["last.weight", "last.bias"],
    ]
    assert [list(layer) for layer in by_layer(module, {"other.bias": module.other.bias})] == [[]] * 3 + [
        ["other.bias"],
        [],
    ]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_steps_with_some_parameters_at_a_time_are_one_step_with_all(optimizer):
    whole, parted = Deep(optimizer), Deep(optimizer)
    x, y = torch.randn(3, 4), torch.randn(3, 1)
    [[one], _], [[other], _] = whole.configure_optimizers(), parted.configure_optimizers()
    for _ in range(3):
        for module, o in ((whole, one), (parted, other)):
            o.zero_grad()
            module.loss((x, y)).backward()
        one.step()
        for layer in reversed(by_layer(parted, dict(parted.named_parameters()))):
            with narrowed(other, parts_of(other, list(layer.values()))):
                other.step()
    assert torch.equal(flat(whole), flat(parted))
    assert not torch.equal(flat(whole), flat(Deep(optimizer)))


def test_an_optimizer_has_all_its_parameters_again_after_an_error():
    [[optimizer], _] = Deep().configure_optimizers()
    before = [list(map(id, group["params"])) for group in optimizer.param_groups]
    groups = list(map(id, optimizer.param_groups))
    bias = optimizer.param_groups[1]["params"][:1]

    def fail() -> None:
        with narrowed(optimizer, parts_of(optimizer, bias)):
            assert [group["params"] for group in optimizer.param_groups] == [bias]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == before
    assert list(map(id, optimizer.param_groups)) == groups


# --- one replica ----------------------------------------------------------------------------------------------------


def _fit_thrice(replica: int, module: Any) -> Any:
    options = {"module": module, "num_replicas": 1, "use_distributed_sampler": False}  # which shuffles
    layerwise = _fit(replica, strategy(slack=3), **options)
    together = _fit(replica, strategy(layerwise=False), **options)
    plain = module()
    trainer(strategy="auto", devices=1, max_epochs=2).fit(plain, loader(shuffle=False))
    return layerwise, together["center"], flat(plain)


@pytest.mark.parametrize("module", [Deep, Tied, partial(Deep, "AdamW")], ids=["Deep", "Tied", "AdamW"])
def test_one_replica_is_the_whole_module_at_once(module):
    """Bitwise what the same algorithm does on all parameters together; up to its rounding, the optimizer alone."""
    [(layerwise, together, plain)] = run_replicas(_fit_thrice, 1, module)
    assert torch.equal(layerwise["center"], together)
    torch.testing.assert_close(layerwise["center"], plain, rtol=0, atol=2e-6)
    assert set(layerwise["exchanges"].values()) == {32}
    assert layerwise["steps"] == 32


class Observed(Deep):
    """Writes down when a layer's forward pass ends and when its gradients come."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, str]] = []
        for index in (0, 3, 4):
            hook = partial(self._note, "used", f"net.{index}.weight")
            self.net[index].register_forward_hook(hook)
        for name, parameter in self.named_parameters():
            parameter.register_hook(partial(self._note, "gradient", name))

    def _note(self, what: str, name: str, *_: Any) -> None:
        self.events.append((what, name))

    def on_train_start(self) -> None:
        for coupling in self.trainer.strategy.couplings:
            for what, verb in (("read", "pull"), ("add", "push")):
                inner = getattr(coupling.center, verb)

                def noted(
                    *args: Any, inner: Any = inner, what: str = what, name: str = coupling.names[0], **kwargs: Any
                ):
                    self._note(what, name)
                    return inner(*args, **kwargs)

                setattr(coupling.center, verb, noted)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.events.append(("step", str(batch_idx)))


def _observe(replica: int) -> list[tuple[str, str]]:
    module = Observed()
    trainer(strategy=strategy(), devices=1).fit(module, loader())
    return module.events


def test_a_layer_is_added_before_the_gradient_below_it_and_read_after_the_use_of_that_before_it():
    [events] = run_replicas(_observe, 1)
    first = events.index(("step", "1"))  # a layer shows in the first step when it is used
    second = events[first : events.index(("step", "2"))]
    order = [second.index(event) for event in second]
    assert order == sorted(set(order)), "something happened twice"
    called, early = ["net.0.weight", "net.3.weight", "net.4.weight"], ["scale", "net.2.lender.weight"]
    for name in early:
        assert second.index(("read", name)) < second.index(("read", called[0]))
    for before, after in zip(called, called[1:], strict=False):
        assert second.index(("used", before)) < second.index(("read", after)) < second.index(("used", after))
    downwards = ["net.4.weight", "net.3.weight", "net.2.lender.weight", "net.0.weight", "scale"]
    for above, below in zip(downwards, downwards[1:], strict=False):
        assert second.index(("gradient", above)) < second.index(("add", above)) < second.index(("gradient", below))


def _num_hooks(module: nn.Module) -> int:
    hooks = [m._forward_pre_hooks for m in module.modules()]
    hooks += [p._post_accumulate_grad_hooks for p in module.parameters()]
    return sum(len(each or ()) for each in hooks)


def _evaluated(replica: int) -> Any:
    module = Observed()
    before = _num_hooks(module)
    t = trainer(strategy=strategy(), devices=1, limit_train_batches=4, val_check_interval=2)
    t.fit(module, loader(), loader(16))
    return sum(what == "read" for what, _ in module.events), before, _num_hooks(module)


def test_an_evaluation_reads_no_layer_and_no_hook_stays():
    [(reads, before, after)] = run_replicas(_evaluated, 1)
    # Six layers: in each of four steps, and as all replicas do when they meet: two evaluations, two ends.
    assert reads == 6 * (4 + 4)
    assert before == after


def _run(replica: int, module: Any) -> None:
    trainer(strategy=strategy(), devices=1).fit(module(), loader())


class Reentrant(Tied):
    def loss(self, batch: Any) -> Tensor:
        x = self.first(batch[0])
        for _ in range(2):
            x = checkpoint(self.square, x, use_reentrant=True)
        return nn.functional.mse_loss(self.last(x), batch[1])


def test_a_gradient_that_comes_in_two_parts_is_an_error():
    with pytest.raises(AssertionError, match=r"RuntimeError.*\['square.weight', 'square.bias'\] came in two parts"):
        run_replicas(_run, 1, Reentrant)


# --- two replicas ---------------------------------------------------------------------------------------------------


class Tally(nn.Module):
    """A number to which replica 0 adds 1 with a step and replica 1 adds 1000: it says whose steps it contains."""

    def __init__(self) -> None:
        super().__init__()
        self.total = nn.Parameter(torch.zeros(1))
        self.seen: list[float] = []

    def forward(self, x: Tensor, increment: float) -> Tensor:
        self.seen.append(float(self.total))
        return x - increment * self.total


class Tallies(Regression):
    def __init__(self) -> None:
        super().__init__(lr=1.0, momentum=0.0)
        self.net = nn.ModuleList(Tally() for _ in range(3))

    def loss(self, batch: Any) -> Tensor:
        x = torch.zeros(1)
        for layer in self.net:
            x = layer(x, 1.0 if self.global_rank == 0 else 1000.0)
        return x.sum()


def _tally(replica: int, slack: int, path: str) -> list[list[float]]:
    module = Tallies()
    t = trainer(strategy=strategy(slack=slack), callbacks=[Behind(1, slack, path)])
    t.fit(module, loader(128))
    return [layer.seen for layer in module.net]


@pytest.mark.parametrize("slack", [0, 2])
def test_what_a_replica_reads_of_each_layer(tmp_path, slack):
    """Bounded staleness, its own additions, and none from beyond the slack."""
    results = run_replicas(_tally, 2, slack, str(tmp_path / "store"))
    leads = []
    for replica, layers in enumerate(results):
        for seen in layers:
            assert len(seen) == 16
            for clock, total in enumerate(seen):
                contained = (total % 1000, total // 1000)
                assert contained[replica] == clock
                assert -slack <= contained[1 - replica] - clock <= slack
                leads.append(clock - contained[1 - replica])
    assert max(leads) == slack
    assert min(leads) == -slack


@pytest.mark.parametrize(("whole", "period"), [(False, 1), (True, 1), (True, 3)])
def test_without_slack_it_is_synchronous_descent_on_summed_updates(tmp_path, whole, period):
    """Layer by layer and all at once, with one replica slow; over 2 epochs that are no multiple of the period."""
    without = EASGDStrategy(Downpour(period), Asynchronous(), slack=0, layerwise=not whole)
    behind = Behind(0, 0, str(tmp_path / "store"))
    layerwise = run_replicas(partial(_fit, callbacks=[behind]), 2, without)
    summed = run_replicas(_fit, 2, EASGDStrategy(Downpour(period)))
    assert torch.equal(layerwise[0]["center"], layerwise[1]["center"])
    assert torch.equal(layerwise[0]["center"], layerwise[0]["module"])
    torch.testing.assert_close(layerwise[0]["center"], summed[0]["center"], rtol=0, atol=1e-6)
    assert float((layerwise[0]["center"] - flat(Deep())).norm()) > 0.1


class Choosy(Tallies):
    """Each replica leaves a layer out that the other uses in the same step, and both one always."""

    def __init__(self) -> None:
        super().__init__()
        self.never = Tally()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        increment = 1.0 if self.global_rank == 0 else 1000.0
        left_out = (batch_idx + self.global_rank) % 2
        x = torch.zeros(1)
        for layer in self.net[:left_out] + self.net[left_out + 1 :]:
            x = layer(x, increment)
        return x.sum()


def test_who_leaves_a_layer_out_keeps_nobody_waiting():
    one, two = run_replicas(_fit, 2, strategy(slack=0), Choosy)
    assert set(one["exchanges"].values()) == set(two["exchanges"].values()) == {16}
    assert torch.equal(one["center"], two["center"])
    assert one["center"].tolist() == [8008, 8008, 16016, 0]


class Broken(Tallies):
    """One gradient of one layer in one replica is infinite once."""

    def on_train_start(self) -> None:
        if self.global_rank == 1:
            self.net[1].total.register_hook(self._break)

    def _break(self, gradient: Tensor) -> Tensor:
        return gradient * float("inf") if self.global_step == 3 else gradient


def test_a_layer_starts_again_from_its_center():
    one, two = run_replicas(_fit, 2, strategy(slack=0, on_nonfinite="reset"), Broken)
    assert torch.equal(one["center"], two["center"])
    assert one["center"].tolist() == [16016, 15016, 16016]


class Thaw(modules.pytorch_lightning.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.net[0].requires_grad_(trainer.current_epoch > 0)

    def setup(self, trainer, pl_module, stage):
        pl_module.net[0].requires_grad_(False)


def test_a_layer_that_is_thawed_joins_with_a_center_of_its_own():
    one, two = run_replicas(partial(_fit, callbacks=[Thaw()]), 2, strategy(slack=0), Tallies)
    assert one["center"].tolist() == two["center"].tolist() == [8008, 16016, 16016]


def _resume(replica: int, folder: str, path: str | None, num_replicas: int = 2) -> dict[str, Any]:
    saving = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    options = {"callbacks": [saving], "enable_checkpointing": True, "max_epochs": 3}
    return _fit(replica, strategy(slack=0), num_replicas=num_replicas, ckpt_path=path, **options)


def test_a_run_resumes_at_the_end_of_an_epoch(tmp_path):
    whole = run_replicas(_resume, 2, str(tmp_path), None)
    path = str(tmp_path / "epoch=0.ckpt")
    resumed = run_replicas(_resume, 2, str(tmp_path / "again"), path)
    assert resumed[0]["steps"] == whole[0]["steps"] == 24
    torch.testing.assert_close(resumed[0]["center"], whole[0]["center"], rtol=0, atol=1e-6)
    assert torch.equal(resumed[0]["center"], resumed[1]["center"])


def _change(replica: int, folder: str) -> None:
    _resume(replica, folder, None, num_replicas=1)
    with pytest.warns(UserWarning, match=r"from the center of .*\(it has .*, layer by layer\)"):
        _fit(replica, strategy(layerwise=False), ckpt_path=f"{folder}/epoch=0.ckpt", num_replicas=1)


def test_without_layers_it_resumes_from_the_center(tmp_path):
    run_replicas(_change, 1, str(tmp_path))


# --- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EASGDStrategy(Downpour(), layerwise=True), r"Downpour\(period=1\).*asynchronous transport"),
        (
            lambda: EASGDStrategy(EASGD(period=1), Asynchronous(), layerwise=True),
            r"EASGD\(.*does not begin with the center",
        ),
        (lambda: EASGDStrategy(AGN(period=5), Asynchronous(), layerwise=True), r"AGN\(period=5\).*use period=1"),
        (lambda: strategy(replica_size=2), "replica_size=2.*DistributedDataParallel"),
    ],
    ids=["synchronous", "algorithm", "period", "replica_size"],
)
def test_what_cannot_be_layerwise_is_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Manual(Regression):
    automatic_optimization = False


class OwnClipping(Regression):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 1.0, "norm")


class QuasiNewton(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Compiled(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.net.compile()


# What makes the module, the Trainer's arguments, and what the error names.
REFUSED: dict[str, tuple[type, dict[str, Any], str]] = {
    "manual": (Manual, {}, "manual optimization"),
    "clipping": (Regression, {"gradient_clip_val": 1.0}, "gradient_clip_val=1.0"),
    "own_clipping": (OwnClipping, {}, "configure_gradient_clipping"),
    "accumulation": (Regression, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
    "schedule": (Regression, {"callbacks": [GradientAccumulationScheduler({1: 2})]}, "GradientAccumulationScheduler"),
    "scaler": (Regression, {"plugins": [MixedPrecision("16-mixed", "cpu")]}, "GradScaler"),
    "lbfgs": (QuasiNewton, {}, "LBFGS"),
    "compiled": (Compiled, {}, "compiled module"),
}


def _refuse(replica: int) -> dict[str, str]:
    texts = {}
    for name, (module, kwargs, _) in REFUSED.items():
        with pytest.raises(ValueError, match=r"EASGDStrategy\(layerwise=True\)") as raised:
            trainer(strategy=strategy(), devices=1, **kwargs).fit(module(), loader())
        texts[name] = str(raised.value)
    return texts


@pytest.fixture(scope="module")
def refusals() -> dict[str, str]:
    """What each case is refused with; one process for all."""
    [texts] = run_replicas(_refuse, 1)
    return texts


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_all_gradients_is_refused_before_training(refusals, name):
    assert REFUSED[name][2] in refusals[name]


def test_a_mixed_precision_without_scaler_trains():
    [result] = run_replicas(partial(_fit, precision="bf16-mixed"), 1, strategy(), Deep, 1)
    assert result["steps"] == 32
    assert not torch.equal(result["center"], flat(Deep()))

"""Manual optimization that steps torch's optimizers without Lightning: it exchanges like any other, or is refused."""

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_easgd import EASGD, EASGDStrategy, LocalSGD, Parle
from lightning_easgd.core.steps import Steps
from tests import modules
from tests.helpers import run_replicas
from tests.modules import Regression, flat, loader, trainer


class Sam(torch.optim.Optimizer):
    """Climbs to a worse point and steps an optimizer of its own with the gradient from there."""

    def __init__(self, parameters: Any, **arguments: Any) -> None:
        super().__init__(parameters, arguments)
        self.base_optimizer = torch.optim.SGD(self.param_groups, **arguments)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["before"] = p.clone()
                p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["before"])
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        return self.second_step()


class Manual(Regression):
    """Makes the same steps in whatever way it is asked to."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.how = how

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=self.how.startswith("lightning"))

        def closure() -> Any:
            self.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        if self.how in ("closure", "lightning closure", "lightning sam"):
            optimizer.step(closure)
        elif self.how == "sam":
            closure()
            optimizer.first_step()
            closure()
            optimizer.second_step()
        elif self.how == "none":
            closure()
        elif self.how in ("by hand", "by hand, through data"):
            closure()
            with torch.no_grad():
                for p in self.parameters():
                    (p if self.how == "by hand" else p.data).sub_(p.grad, alpha=0.05)
        else:
            closure()
            (self.own if self.how == "own" else optimizer).step()

    def configure_optimizers(self):
        if self.how == "own":
            self.own = torch.optim.Adam(self.parameters(), lr=0.01)
            return None
        if "sam" in self.how:
            return Sam(self.parameters(), lr=0.05)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        if self.how == "by hand":
            return None
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 5)]


class InAHook(Manual):
    """Changes its parameters where no batch is looked at."""

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p.sub_(0.01)


class Overrides(Regression):
    """Makes Lightning's step by hand."""

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        closure()
        with torch.no_grad():
            for p in self.parameters():
                p.data.sub_(p.grad, alpha=0.05)


class Half(Manual):
    """Steps one of its layers with an optimizer and the other by hand, or through its optimizer's class."""

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers(use_pl_optimizer=False)
        self.zero_grad()
        self.manual_backward(self.loss(batch))
        first.step()
        if self.how == "class":
            torch.optim.SGD.step(second)
        elif batch_idx > 0:
            with torch.no_grad():
                self.net[2].weight.sub_(0.01)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.05) for i in (0, 2)]


def _train(how: str, algorithm: Any) -> tuple[torch.Tensor, int, bool | None]:
    module, strategy = Manual(how), EASGDStrategy(algorithm)
    clocks = []

    class Clocks(modules.pytorch_lightning.Callback):
        def on_train_end(self, trainer, pl_module):
            clocks.append(strategy.couplings[0].center.traffic.exchanges)

    t = trainer(strategy=strategy, callbacks=[Clocks()])
    t.fit(module, loader(shuffle=False))
    # A scheduler leaves a wrapper of its own, which knows no strategy.
    step = vars(t.optimizers[0]).get("step")
    return flat(module), clocks[0], None if step is None else "_steps" not in step.__code__.co_filename


def _manual(replica: int) -> Any:
    algorithms = {"EASGD": EASGD(period=3), "LocalSGD": LocalSGD(period=3), "Parle": Parle(period=2)}
    found = {}
    for name, algorithm in algorithms.items():
        for how in ("lightning", "raw", "lightning closure", "closure", "lightning sam", "sam"):
            found[name, how] = _train(how, algorithm)
    refused = {}
    for how in ("own", "by hand", "by hand, through data"):
        module, before = Manual(how), flat(Manual(how))
        try:
            trainer(strategy=EASGDStrategy(EASGD(period=3))).fit(module, loader(shuffle=False))
        except RuntimeError as error:
            refused[how] = str(error), torch.equal(before, flat(module))
    for how, module in (("override", Overrides()), ("half", Half("hand")), ("class", Half("class"))):
        try:
            trainer(strategy=EASGDStrategy(EASGD(period=3)), accumulate_grad_batches=1).fit(module, loader())
        except RuntimeError as error:
            refused[how] = str(error), False
    trainer(strategy="easgd", accumulate_grad_batches=3).fit(Regression(), loader())
    said = []
    for module in (Manual("none"), InAHook("none")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(strategy="easgd").fit(module, loader(shuffle=False))
        said.append([str(w.message) for w in caught if "EASGDStrategy" in str(w.message)])
    return found, refused, said


def test_steps_without_lightning_exchange_as_those_with_it_or_are_refused():
    results = run_replicas(_manual, 2)
    for name in ("EASGD", "LocalSGD", "Parle"):
        (center, exchanges, _), (other, *_) = (found[name, "lightning"] for found, *_ in results)
        assert torch.equal(center, other)
        assert exchanges > 0
        for how, reference in (("raw", "lightning"), ("closure", "lightning closure"), ("sam", "lightning sam")):
            for found, *_ in results:
                # Others read the center, or add their force, between the two gradients that SAM takes by itself.
                is_same = torch.equal(found[name, how][0], found[name, reference][0])
                assert is_same or (how == "sam" and name != "EASGD"), (name, how)
                assert found[name, how][1] == exchanges
                assert found[name, how][2] is (None if "sam" in how else True)
    for _, refused, _ in results:
        assert refused.keys() == {"own", "by hand", "by hand, through data", "override", "half", "class"}
        text, is_untouched = refused["own"]
        assert is_untouched
        assert re.search(r"Manual steps a Adam that configure_optimizers did not return.*'net.0.weight'", text)
        for how in ("by hand", "by hand, through data"):
            assert "training_step changed parameters without a step of an optimizer" in refused[how][0]
        assert "Overrides.optimizer_step or a hook changed parameters without a step" in refused["override"][0]
        assert "Half.training_step changed parameters without a step of an optimizer" in refused["half"][0]
        assert "a step of SGD went round optimizer.step" in refused["class"][0]

    # Replica 0 says of a whole training what no batch showed: one module changed nothing, the other behind its back.
    nothing, [text] = results[0][2]
    assert nothing == []
    assert "training ended after 8 batches without a step of an optimizer" in text


def _steps(module: nn.Module, *optimizers: Any, is_training: bool = True) -> tuple[Steps, list[Any]]:
    taken: list[Any] = []

    def take(optimizer: Any, update: Any) -> None:
        taken.append(optimizer)
        with steps.counted(optimizer):
            update()

    steps = Steps(
        module,
        optimizers,
        is_automatic=True,
        take=take,
        add_force=lambda optimizer: None,
        is_training=lambda: is_training,
    )
    steps.open()
    return steps, taken


def test_nested_steps_are_one_and_the_methods_come_back():
    module = nn.Linear(2, 2)
    inner = torch.optim.SGD(module.parameters(), lr=0.1)

    class Outer(torch.optim.SGD):
        def step(self, closure=None):
            self.parts["inner"].step()

    outer = Outer(module.parameters(), lr=0.1)
    outer.parts = {"inner": inner}
    steps, taken = _steps(module, outer)
    module(torch.ones(2)).sum().backward()
    before = module.weight.detach().clone()
    outer.step()
    assert not torch.equal(before, module.weight)
    assert taken == [outer]
    inner.step()  # it steps for the one that holds it
    assert taken == [outer, outer]
    assert steps.count == 2
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1)  # it wraps what it finds
    steps.close()
    inner.step()
    scheduler.step()  # warns where its wrapper is gone
    assert "step" not in vars(outer)
    assert taken == [outer, outer]
    torch.optim.Adam(module.parameters()).step()  # nobody looks any more


def test_what_is_not_training_is_not_counted():
    module = nn.Linear(2, 2)
    known = torch.optim.SGD(module.parameters(), lr=0.1)
    steps, taken = _steps(module, known, is_training=False)
    try:
        module(torch.ones(2)).sum().backward()
        known.step()
        torch.optim.Adam(module.parameters()).step()
        assert not taken
    finally:
        steps.close()


def test_an_optimizer_of_other_parameters_is_the_modules_own_matter():
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    steps, taken = _steps(module, torch.optim.SGD(module.parameters(), lr=0.1))
    try:
        other(torch.ones(2)).sum().backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        assert not taken
        with pytest.raises(RuntimeError, match="holds 1 of the module's parameters"):
            torch.optim.SGD([other.weight, module.bias], lr=0.1).step()
    finally:
        steps.close()

"""The three examples in CONTRIBUTING.md run as they stand there: a method, a transport, and a way to meet."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_easgd import EASGDStrategy
from lightning_easgd.communication import NonFiniteDeltaError
from lightning_easgd.core import FORMATIONS
from lightning_easgd.core.slots import num_slots
from lightning_easgd.flatten import ParameterVector
from lightning_easgd.rules import Addition
from tests import modules
from tests.helpers import TIMEOUT, run_replicas, run_threads
from tests.modules import Regression, flat, loader, trainer

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"


def example(file: str) -> dict[str, Any]:
    """Returns what one of the examples defines."""
    [code] = re.findall(rf"```python\n# {file}\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": file.removesuffix(".py")}
    exec(compile(code, file, "exec"), names)
    return names


def test_the_method_over_the_transport_reaches_the_mean_of_replicas_and_center():
    """Without local updates an exchange conserves the sum of replicas and center: (1 + 2 + 4 + 1) / 4."""
    algorithm, transport = example("halfway.py")["Halfway"], example("threads.py")["Threads"]()

    def run(replica: int, store: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
        parameter = torch.nn.Parameter(torch.full((5,), 2.0**replica, dtype=torch.float64))
        vector, own = ParameterVector([parameter]), algorithm(period=2, rate=0.25)
        own.check(3)
        with transport.open(
            torch.ones(5, dtype=torch.float64),
            replica=replica,
            num_replicas=3,
            rule=Addition(),
            store=store,
            timeout=TIMEOUT,
            num_slots=num_slots(3),
        ) as center:
            for _ in range(2000):
                own.step(vector, center, lambda: None)
            store.set(f"done/{replica}", "")
            store.wait([f"done/{r}" for r in range(3)], TIMEOUT)
            for _ in range(200):  # nobody is ahead any more
                own.step(vector, center, lambda: None)
            store.set(f"over/{replica}", "")
            store.wait([f"over/{r}" for r in range(3)], TIMEOUT)
            return parameter.detach().clone(), center.pull().value.clone(), center.clock

    for parameter, value, clock in run_threads(run, 3):
        assert torch.allclose(value, torch.full_like(value, 2.0), atol=1e-9)
        assert torch.allclose(parameter, value, atol=1e-9)
        assert clock == 3 * 1100


def test_the_transport_keeps_a_bad_delta_out():
    def run(replica: int, store: Any) -> None:
        with example("threads.py")["Threads"]().open(
            torch.zeros(2), replica=0, num_replicas=1, rule=Addition(), store=store, timeout=timedelta(seconds=5)
        ) as center:
            with pytest.raises(NonFiniteDeltaError):
                center.push(torch.tensor([1.0, float("nan")]), read_at=0)
            assert torch.equal(center.pull().value, torch.zeros(2))

    run_threads(run, 1)


def _train(replica: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """By the method with EASGDStrategy; then, over an asynchronous transport, with the way to meet."""
    halfway, unmet = example("halfway.py")["Halfway"], example("unmet.py")["Unmet"]
    seen: list[torch.Tensor] = []

    class Look(modules.pytorch_lightning.Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                seen.append(flat(pl_module))
                formed.add(type(trainer.strategy.run.replica.formation).__name__)

    formed: set[str] = set()
    by_method = Regression()
    trainer(strategy=EASGDStrategy(halfway(period=2))).fit(by_method, loader(), loader(32))
    FORMATIONS.insert(FORMATIONS.index(unmet.__mro__[1]), unmet)
    trainer(strategy="easgd_async", callbacks=[Look()], max_epochs=2, val_check_interval=3).fit(
        Regression(), loader(), loader(32)
    )
    assert formed == {"Unmet"}
    return seen, flat(by_method)


def test_the_method_and_the_way_to_meet_train():
    (seen, center), (seen_by_other, center_of_other) = run_replicas(_train, 2)
    assert torch.equal(center, center_of_other)
    assert len(seen) == len(seen_by_other) == 4
    assert not torch.equal(seen[0], seen[-1])


@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_the_method_refuses_a_rate_that_cannot_be(rate):
    with pytest.raises(ValueError, match=r"Halfway\(rate=.*must be above 0 and at most 0.5"):
        example("halfway.py")["Halfway"](rate=rate).check(2)

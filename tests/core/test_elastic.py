"""``core.Elastic`` in a loop of one's own: what the strategy does with a module, without a Trainer."""

import os
import re
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_easgd import EAMSGD, EASGD, LSGD, Downpour, Parle, SharedMemory
from lightning_easgd.core import Agreement, Company, Elastic, Phase, Plan
from lightning_easgd.trainer.options import Options
from tests.helpers import COMMAND_S, ROOT, free_port, run_replicas
from tests.modules import BatchNormRegression, Regression, flat, linear_data, loader, trainer

PLANS = {
    "EASGD": partial(Plan, EASGD(period=3)),
    "EAMSGD": partial(Plan, EAMSGD(period=2)),
    "fragments": partial(Plan, EASGD(period=4), fragments=2),
    "Parle": partial(Plan, Parle(period=2)),  # with a force
}


class Nesterov(Regression):
    """With the momentum that EAMSGD is defined for."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def options(plan: Plan) -> dict[str, Any]:
    return {"algorithm": plan.algorithm, "transport": plan.transport, "fragments": plan.fragments}


def _both(replica: int, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same run with a Trainer and in a loop; returns the center of each, and the loop's replica."""
    from lightning_easgd import EASGDStrategy

    module = Nesterov()
    trainer(strategy=EASGDStrategy(**options(PLANS[name]())), use_distributed_sampler=False, max_epochs=2).fit(
        module, loader(shuffle=False)
    )
    in_loop = Nesterov()
    optimizer = in_loop.configure_optimizers()
    with Elastic(in_loop, [optimizer], plan=PLANS[name]()) as elastic:
        elastic.tell_epoch_length(16)  # Parle asks for it
        for _ in range(2):
            for batch in loader(shuffle=False):
                optimizer.zero_grad()
                in_loop.loss(batch).backward()
                elastic.step(optimizer)
            with elastic.center():  # where the Trainer's epoch ends, too
                center = flat(in_loop)
        return flat(module), center, flat(in_loop)


@pytest.mark.parametrize("name", PLANS)
def test_a_loop_gives_what_the_strategy_gives_to_the_last_bit(name):
    one, two = run_replicas(_both, 2, name)
    for by_trainer, in_loop, _ in (one, two):
        assert torch.equal(by_trainer, in_loop)
    assert torch.equal(one[1], two[1])


def _asynchronous(replica: int) -> tuple[torch.Tensor, Any, Any, torch.Tensor]:
    with pytest.raises(RuntimeError, match="WORLD_SIZE is 2, but there is no RANK"):
        Company.from_environment()
    os.environ["RANK"] = str(replica)
    module = Regression()
    optimizer = module.configure_optimizers()
    company = Company.from_environment()
    plan = Plan(Downpour(period=2), SharedMemory())
    with Elastic(module, [optimizer], plan=plan, company=company) as elastic:
        assert elastic.formation.phase is Phase.TOGETHER
        elastic.report(1)
        for batch in loader(16 * (replica + 1), shuffle=False):  # one has twice the work
            optimizer.zero_grad()
            module.loss(batch).backward()
            elastic.step(optimizer)
        with elastic.weights_of("center"):  # waits for nobody
            early = flat(module)
        with elastic.center():
            center, clock = flat(module), elastic.couplings[0].center.clock
        state = elastic.state_dict()
        before = flat(module)
        with torch.no_grad():
            for p in module.parameters():
                p.zero_()
        elastic.load_state_dict(state)
        assert torch.equal(flat(module), before)
        assert len(elastic.couplings[0].reports) > 0
        if replica == 0:
            elastic.formation.ask_to_end()
        with elastic.center():
            pass
    assert not company.is_open
    return center, clock, elastic.formation.end, early


def test_replicas_of_an_asynchronous_center_meet_where_all_are_asked_to():
    (center, clock, end, _), (other, clock_of_other, end_of_other, _) = run_replicas(_asynchronous, 2)
    assert torch.equal(center, other)
    assert clock == clock_of_other == 2 + 4
    assert end is end_of_other is Agreement.AGREED


def _alone(replica: int) -> None:
    module = Regression()
    before = flat(module)
    optimizer = module.configure_optimizers()
    with Elastic(module, [optimizer]) as elastic:
        assert elastic.formation.phase is Phase.ALONE
        for batch in loader():
            optimizer.zero_grad()
            module.loss(batch).backward()
            elastic.step(optimizer)
        with elastic.center():
            center = flat(module)
        assert not torch.equal(center, before)
        assert not torch.equal(center, flat(module))
        with pytest.raises(RuntimeError, match="Elastic: this SGD is none of the optimizers"):
            elastic.step(torch.optim.SGD(module.parameters(), lr=0.1))
    elastic.close()
    with pytest.raises(ValueError, match=r"Company.from_environment\(replica_size=2\): must divide"):
        Company.from_environment(replica_size=2)


def test_one_process_trains_alone():
    run_replicas(_alone, 1)


def _told(replica: int) -> str:
    """Rank 1 fails; rank 0, which goes on, hears of it. The ranks are those of torch's default group."""
    os.environ["RANK"] = str(replica)
    dist.init_process_group("gloo")
    module = Regression()
    optimizer = module.configure_optimizers()
    try:
        with Elastic(module, [optimizer], plan=Plan(EASGD(period=10**6))) as elastic:
            for number in range(10**9):
                if replica == 1 and number == 3:
                    raise KeyError("the loop's own")
                optimizer.zero_grad()
                module.loss(linear_data().tensors).backward()
                elastic.step(optimizer)
    except (KeyError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_failure_in_one_loop_ends_the_others():
    one, two = run_replicas(_told, 2)
    assert two == 'KeyError: "the loop\'s own"' or "the loop's own" in two
    assert re.search(r"RuntimeError: training ends on rank 0 because another process failed: .*the loop's own", one)


def test_what_does_not_go_together_is_refused_by_the_name_of_the_call():
    with pytest.raises(ValueError, match=r"^Elastic\(slack=2\): over AllReduce\(\) all replicas exchange at once"):
        Plan(slack=2)
    with pytest.raises(ValueError, match=r"^Elastic\(on_nonfinite='ignore'\): must be one of 'raise', 'reset'"):
        Plan(on_nonfinite="ignore")
    with pytest.raises(ValueError, match=r"^Elastic\(LSGD.*it needs a synchronous transport"):
        Plan(LSGD(), SharedMemory())
    with pytest.raises(ValueError, match=r"^EASGDStrategy\(slack=2\)"):
        Options.of(
            None, None, average=None, on_nonfinite="raise", buffers=None, fragments=1, slack=2, layerwise=False,
            replica_size=None, evaluate="center", center_buffers="mean", data="shard", resume="replicas",
            resume_optimizer="fresh", max_silence=None,
        )  # fmt: skip


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]


@pytest.mark.parametrize("example", ["plain_loop.py", "fabric.py"])
def test_the_examples_reach_the_accuracy_of_the_trainers(example, tmp_path):
    launcher = [*TORCHRUN, f"--master-port={free_port()}"] if example == "plain_loop.py" else []
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / example)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
    )
    assert done.returncode == 0, done.stderr
    accuracies = [float(figure) for figure in re.findall(r"center (\d+\.\d+) %", done.stdout)]
    assert len(accuracies) == 10
    assert accuracies[-1] > 97
    assert len((ROOT / "examples" / example).read_text().splitlines()) < 60


def _fails_alone(replica: int) -> str:
    """Rank 1's optimizer cannot be tied; rank 0 would wait for it."""
    os.environ["RANK"] = str(replica)
    module = Regression()
    optimizer = module.configure_optimizers()
    if replica == 1:
        optimizer.__class__ = type("PostLocalSGDOptimizer", (torch.optim.SGD,), {})
    try:
        Elastic(module, [optimizer])
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_an_error_while_one_rank_opens_is_told_to_the_others():
    one, two = run_replicas(_fails_alone, 2)
    assert two.startswith("ValueError: Elastic: PostLocalSGDOptimizer synchronises the replicas at every step")
    assert "another process failed: rank 1: ValueError" in one


def _twice(replica: int) -> None:
    module = Regression()
    optimizer = module.configure_optimizers()
    company = Company.from_environment()
    first = Elastic(module, [optimizer], company=company)
    with pytest.raises(ValueError, match="this company is another Elastic's"):
        Elastic(module, [optimizer], company=company)
    assert company.is_open  # the first one's
    first.close()
    with pytest.raises(RuntimeError, match="Elastic: it is closed"):
        first.step(optimizer)
    with pytest.raises(ValueError, match="it is closed; find the ranks anew"):
        Elastic(module, [optimizer], company=company)


def test_a_company_is_one_elastics_and_ends_with_it():
    run_replicas(_twice, 1)


def test_a_reestimation_that_raises_leaves_the_replica_in_the_module():
    run_replicas(_reestimates, 1)


def _reestimates(replica: int) -> None:
    module = BatchNormRegression()
    optimizer = module.configure_optimizers()

    def reestimate(_: Any) -> None:
        raise KeyError("not a batch")

    with Elastic(module, [optimizer], reestimate=reestimate) as elastic:
        for batch in loader():
            optimizer.zero_grad()
            module.loss(batch).backward()
            elastic.step(optimizer)
        replica_before = flat(module)
        with pytest.raises(KeyError), elastic.center():
            pass
        assert torch.equal(flat(module), replica_before)
        assert not elastic.weights.holds_center
        elastic.weights.forget()  # what was gathered is out of date: nothing to estimate for
        with elastic.weights.holding("center"):
            assert not torch.equal(flat(module), replica_before)
        assert torch.equal(flat(module), replica_before)

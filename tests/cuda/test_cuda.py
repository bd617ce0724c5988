"""The package on pretended CUDA devices: every transport, method and combination, against the CPU's numbers.

Each scenario is run once on the CPU and then on pretended devices, whose work is executed at once, or as late as the
order allows on the caller's stream, or on all others (``tests/pretend_cuda.py``). Always: no race, no context on
another rank's device, no memory given back too early, one order of the communicators' launches on all ranks, and the
CPU's numbers to the last bit (but for the order of sums of three). Replicas that push to an asynchronous center take
turns, so that there is one right result.
"""

import inspect
import io
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_easgd.algorithms import (
    ADAG,
    ADMM,
    AGN,
    EAMSGD,
    EASGD,
    LSGD,
    Algorithm,
    Downpour,
    DynSGD,
    ElasticSGD,
    EntropySGD,
    LocalSGD,
    MDownpour,
    OverlapLocalSGD,
    Parle,
    StreamingDiLoCo,
)
from lightning_easgd.averages import CenterAverage, MovingAverage
from lightning_easgd.communication import AllReduce, SharedMemory, Transport, TransportError
from lightning_easgd.communication._c10d import broadcast_bytes, new_group
from lightning_easgd.communication._line import Line
from lightning_easgd.communication._slices import open_sliced
from lightning_easgd.communication.all_reduce import _replicated_center
from lightning_easgd.core.coupling import Coupling
from lightning_easgd.core.fragments import by_fragment, first_clock, step_fragments
from lightning_easgd.core.slots import num_slots
from lightning_easgd.flatten import ParameterVector
from lightning_easgd.rules import Addition
from tests.centers import Apart, meet
from tests.pretend_cuda import Findings, Lag, PretendTensor, pretend_cuda, run_ranks

T = timedelta(seconds=30)
LAGS: tuple[Lag, ...] = ("none", "caller", "streams")
CHUNK_BYTES = 64 * 4  # so that some hundred parameters are many chunks


@pytest.fixture(autouse=True)
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_chunks" not in request.keywords:
        for device in ("cpu", "cuda"):
            monkeypatch.setitem(_replicated_center._CHUNK_BYTES, device, CHUNK_BYTES)


# ------------------------------------------------------------------------------------------------------- scenarios


@dataclass(frozen=True)
class Scenario:
    """What replicas do.

    Attributes:
        algorithm: makes each coupling's.
        transport: of all couplings.
        replicas: how many.
        members: ranks of a replica, each with a slice of the center.
        shapes: of the parameters of each coupling.
        steps: optimizer steps.
        dtype: of the parameters.
        average: makes the center's average.
        report_every: exchanges from one report to the next; 0 for none.
        late: whether the last replica begins a step only when the others have launched that step's exchange.
        resume_at: after this step all is saved, read on the CPU, and goes on in new couplings.
        swap_at: after this step the replicas meet, and show the center for a moment.
        events: what else happens before a step: step -> replica -> "abstain" or "nan".
        momentum: of the optimizer.
        fragments: into how many the parameters of one coupling are cut; each has a center of its own.
    """

    algorithm: Callable[[], Algorithm] = partial(EASGD, period=1, center_rate=0.5)
    transport: Transport = field(default_factory=AllReduce)
    replicas: int = 2
    members: int = 1
    shapes: tuple[tuple[tuple[int, ...], ...], ...] = (((20, 20), (53,)),)
    steps: int = 4
    dtype: torch.dtype = torch.float32
    average: Callable[[], CenterAverage] | None = None
    report_every: int = 0
    late: bool = False
    resume_at: int | None = None
    swap_at: int | None = None
    events: tuple[tuple[int, int, str], ...] = ()
    momentum: float = 0.0
    fragments: int = 1

    @property
    def ranks(self) -> int:
        return self.replicas * self.members


@dataclass
class Outcome:
    """What one rank ends with, all on the CPU.

    Attributes:
        parameters: of all couplings.
        centers: of all couplings.
        seen: the parameters as an evaluation saw them.
        figures: distance, force, update and center norm of each report.
        waits: for each step, the host waits of the thread in it, and whether it launched or completed an exchange.
        resets: how often the replica was put on the center.
    """

    parameters: list[Tensor] = field(default_factory=list)
    centers: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    figures: list[Tensor] = field(default_factory=list)
    waits: list[tuple[int, bool]] = field(default_factory=list)
    resets: int = 0


class Rank:
    """One rank of a scenario: parameters, optimizer, couplings."""

    def __init__(self, scenario: Scenario, rank: int, store: dist.Store, device: torch.device) -> None:
        self.scenario, self.store, self.device = scenario, store, device
        self.replica, self.member = divmod(rank, scenario.members)
        self.outcome = Outcome()
        self.generation = 0
        self.resources = ExitStack()
        # Replicas begin apart: the center is that of replica 0.
        self.parameters = [
            [self._on_device(self._start(i, j, shape)) for j, shape in enumerate(shapes)]
            for i, shapes in enumerate(scenario.shapes)
        ]
        self.open()

    def _on_device(self, value: Tensor) -> Tensor:
        return value.to(self.device)

    def _start(self, *index_and_shape: Any) -> Tensor:
        *index, shape = index_and_shape
        generator = torch.Generator().manual_seed(sum(10**k * i for k, i in enumerate(index)) + 1000 * self.replica)
        return torch.randn(shape, generator=generator).to(self.scenario.dtype)

    def open(self) -> None:
        """Opens the couplings, as the strategy does."""
        scenario = self.scenario
        self.optimizers, self.couplings, self.groups = [], [], []
        self.places: list[str] = []
        self.line: Line | None = None
        if self.device.type == "cuda" and isinstance(scenario.transport, AllReduce):
            place = dist.PrefixStore(f"line/{self.generation}/{self.member}", self.store)
            group = new_group(place, self.replica, scenario.replicas, self.device, T)
            self.line = Line(group, len(self.parameters) * scenario.fragments, self.device, T)
        for index, parameters in enumerate(self.parameters):
            optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=scenario.momentum, nesterov=scenario.momentum > 0)
            self.optimizers.append(optimizer)
            named = {f"p{j}": p for j, p in enumerate(parameters)}
            parts = [named] if scenario.fragments == 1 else self._cut(named)
            self.groups.append(
                [self._couple(f"{self.generation}/{index}/{k}", k, part, optimizer) for k, part in enumerate(parts)]
            )
            self.couplings += self.groups[-1]

    def _cut(self, named: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        module = torch.nn.Module()
        for name, p in named.items():
            module.register_parameter(name, torch.nn.Parameter(torch.empty(p.shape)))
        parts = by_fragment(module, dict(module.named_parameters()), self.scenario.fragments)
        return [{name: named[name] for name in part} for part in parts]

    def _couple(self, name: str, k: int, part: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Coupling:
        scenario = self.scenario
        algorithm = scenario.algorithm()
        algorithm.batches_per_epoch = 10
        algorithm.check(scenario.replicas)
        self.places.append(name)
        vector = ParameterVector(list(part.values()))
        center = self._center(name, vector.read(), algorithm)
        algorithm.bind(optimizer, list(part.values()))
        algorithm.clock = first_clock(k, scenario.fragments, algorithm)
        coupling = Coupling(list(part), vector, algorithm, center, scenario.average() if scenario.average else None)
        coupling.report_every = scenario.report_every
        self.resources.callback(center.close)
        return coupling

    def _center(self, name: str, initial: Tensor, algorithm: Algorithm) -> Any:
        scenario = self.scenario

        def open_slice(initial: Tensor) -> Any:
            transport: Any = scenario.transport  # the argument ``place`` is AllReduce's own
            return transport.open(
                initial,
                replica=self.replica,
                num_replicas=scenario.replicas,
                rule=algorithm.rule(scenario.replicas),
                store=dist.PrefixStore(f"center/{name}/{self.member}", self.store),
                timeout=T,
                num_slots=num_slots(scenario.replicas, algorithm.num_told),
                **({} if self.line is None else {"place": self.line.place(len(self.places) - 1)}),
            )

        if scenario.members == 1:
            return open_slice(initial)
        place = dist.PrefixStore(f"members/{name}/{self.replica}", self.store)
        group = new_group(place, self.member, scenario.members, initial.device, T)
        return open_sliced(initial, open_slice, group, member=self.member, replica_size=scenario.members, timeout=T)

    # --- steps

    def update(self, index: int) -> None:
        """The optimizer's step on a loss of this replica's own."""
        self.optimizers[index].step()

    def backward(self, index: int, step: int) -> None:
        for j, p in enumerate(self.parameters[index]):
            p.grad = p.detach().cos().add_(p.detach(), alpha=0.6).add_(0.1 * self.replica + 0.01 * step + 0.1 * j)
        for coupling in self.groups[index]:
            coupling.add_force()
            if coupling.algorithm.needs_loss:
                coupling.algorithm.observe_loss(self.parameters[index][0].detach().square().sum())

    def reset(self, *_: Any) -> None:
        self.outcome.resets += 1

    def step(self, step: int) -> None:
        happens = [what for at, who, what in self.scenario.events if at == step and who == self.replica]
        if "abstain" in happens:
            for coupling in self.couplings:
                coupling.abstain()
            return
        for index, couplings in enumerate(self.groups):
            self.backward(index, step)
            if "nan" in happens:
                self.parameters[index][0].view(-1)[3] = float("nan")
            step_fragments(couplings, partial(self.update, index), recover=self.reset, at=step)

    def progress(self) -> list[tuple[int, int]]:
        """Returns what differs after a step that has launched or completed an exchange."""
        return [(coupling.center.traffic.exchanges, coupling.center.clock) for coupling in self.couplings]

    def drain(self) -> None:
        for coupling in self.couplings:
            coupling.drain()

    def settle(self) -> None:
        """Completes what is outstanding, and reads the center as it is now."""
        for coupling in self.couplings:
            coupling.drain() if coupling.center.synchronous else coupling.refresh()

    def resume(self) -> None:
        """Saves everything, closes, and goes on in new couplings with what is read to the CPU."""
        self.settle()
        states = [coupling.state_dict() for coupling in self.couplings]
        momenta = [optimizer.state_dict() for optimizer in self.optimizers]
        file = io.BytesIO()
        torch.save(tree_map(lambda x: x.cpu() if isinstance(x, PretendTensor) else x, states), file)
        self.resources.close()
        self.generation += 1
        for parameters in self.parameters:
            for p in parameters:
                p.zero_()
        self.open()
        states = torch.load(io.BytesIO(file.getvalue()), map_location="cpu", weights_only=False)
        for coupling, state in zip(self.couplings, states, strict=True):
            coupling.load_state_dict(state)
        for optimizer, state in zip(self.optimizers, momenta, strict=True):
            optimizer.load_state_dict(state)

    def evaluate(self) -> None:
        self.drain()
        for coupling in self.couplings:
            coupling.swap()
        self.outcome.seen += [p.detach().cpu().clone() for parameters in self.parameters for p in parameters]
        for coupling in self.couplings:
            coupling.swap()

    def finish(self) -> Outcome:
        self.settle()
        outcome = self.outcome
        outcome.parameters = [p.detach().cpu().clone() for parameters in self.parameters for p in parameters]
        outcome.centers = [coupling.center.value.cpu().clone() for coupling in self.couplings]
        if self.scenario.average:
            outcome.centers += [coupling.average.value.cpu().clone() for coupling in self.couplings]
        for report in itertools.chain.from_iterable(coupling.reports for coupling in self.couplings):
            outcome.figures.append(
                torch.cat([report.distance, report.force, report.update, torch.tensor([report.center_norm])])
            )
        self.resources.close()
        return outcome


def run(scenario: Scenario, kind: str, findings: Findings | None) -> list[Outcome]:
    """Runs a scenario in one thread a rank."""
    synchronous = scenario.transport.synchronous

    def body(number: int, store: dist.Store) -> Outcome:
        device = torch.device("cuda", number) if kind == "cuda" else torch.device("cpu")
        rank = Rank(scenario, number, store, device)
        meet(store, "opened", scenario.ranks)  # all have read the center before anybody adds to it
        with rank.resources:
            for step in range(scenario.steps):
                if scenario.late and rank.replica == scenario.replicas - 1 and scenario.replicas > 1:
                    store.wait([f"launched/{step}/{r}" for r in range(scenario.replicas - 1)], T)
                if not synchronous and rank.replica > 0:
                    store.wait([f"turn/{step}/{rank.replica - 1}"], T)
                before = 0 if findings is None else len(findings.own_waits())
                seen = rank.progress()
                rank.step(step)
                after = 0 if findings is None else len(findings.own_waits())
                rank.outcome.waits.append((after - before, seen != rank.progress()))
                store.set(f"launched/{step}/{rank.replica}", "")
                if not synchronous:
                    rank.drain()
                    if rank.member == 0:
                        store.set(f"turn/{step}/{rank.replica}", "")
                    store.wait([f"turn/{step}/{scenario.replicas - 1}"], T)
                if step == scenario.swap_at:
                    rank.evaluate()
                    meet(store, "evaluated", scenario.ranks)
                if step == scenario.resume_at:
                    rank.drain()
                    meet(store, "to resume", scenario.ranks)
                    rank.resume()
                    meet(store, "resumed", scenario.ranks)
            rank.drain()
            meet(store, "over", scenario.ranks)
            return rank.finish()

    return run_ranks(body, scenario.ranks)


_ON_CPU: dict[int, list[Outcome]] = {}


def check(scenario: Scenario, lag: Lag, *, waits_at_most: int | None = None) -> list[Outcome]:
    """Runs it on pretended devices and compares it with the CPU; returns what the pretended devices' ranks end with."""
    if id(scenario) not in _ON_CPU:
        # Memory that processes share sums in another order; and an uninterrupted run is what a resumed one must be.
        transport = scenario.transport
        if isinstance(transport, AllReduce):
            transport = AllReduce(wire=transport.wire, shared_memory=False)
        _ON_CPU[id(scenario)] = run(replace(scenario, transport=transport, resume_at=None), "cpu", None)
    expected = _ON_CPU[id(scenario)]
    with pretend_cuda(lag=lag) as findings:
        outcomes = run(scenario, "cuda", findings)
    problems = "\n".join(findings.problems())
    assert not problems
    for rank, (found, right) in enumerate(zip(outcomes, expected, strict=True)):
        for name in ("parameters", "centers", "seen"):
            for i, (a, b) in enumerate(zip(getattr(found, name), getattr(right, name), strict=True)):
                off = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
                is_right = torch.equal(a, b) if scenario.replicas < 3 else off < 1e-6
                assert is_right, f"rank {rank}: {name}[{i}] is off by {off}"
        assert found.resets == right.resets
        if scenario.resume_at is None:
            assert len(found.figures) == len(right.figures)
        for a, b in zip(found.figures, right.figures, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if waits_at_most is not None:
        for rank, outcome in enumerate(outcomes):
            for step, (waits, exchanged) in enumerate(outcome.waits):
                limit = waits_at_most if exchanged else 0
                if (step, rank // scenario.members, "abstain") in scenario.events:
                    limit *= 2  # the exchange before is completed, and that of the abstention
                assert waits <= limit, (
                    f"rank {rank} waited {waits} times in step {step}, which "
                    f"{'exchanges' if exchanged else 'does not exchange'}; at most {limit}: "
                    f"{sorted({(w.kind, w.where) for w in findings.waits if w.rank == rank})}"
                )
    return outcomes


def parametrize(scenarios: dict[str, Scenario]) -> Any:
    return pytest.mark.parametrize("scenario", scenarios.values(), ids=scenarios)


# ------------------------------------------------------------------------------------------------------ transports

EXACT = Scenario()
OVER_ALL_REDUCE = {
    "in step": EXACT,
    "a late replica": replace(EXACT, late=True),
    "one replica": replace(EXACT, replicas=1),
    "three replicas, the last one late": replace(
        EXACT, replicas=3, late=True, transport=AllReduce(shared_memory=False)
    ),
    "bfloat16": replace(EXACT, transport=AllReduce(wire="bfloat16"), late=True),
    "int8": replace(EXACT, transport=AllReduce(wire="int8"), late=True, shapes=(((30, 40), (53,)),)),
    "a long period": replace(EXACT, algorithm=partial(EASGD, period=3, center_rate=0.5), steps=8, late=True),
    "one number": replace(EXACT, shapes=(((),),)),
    "several couplings": replace(EXACT, shapes=(((100,), (30,)), ((7, 9),), ((200,),)), late=True),
    "fragments": replace(
        EXACT,
        algorithm=partial(LocalSGD.diloco, period=4),
        shapes=(((100,), (30,), (7, 9), (200,)),),
        fragments=4,
        steps=9,
        late=True,
    ),
    "bf16 parameters": replace(EXACT, dtype=torch.bfloat16, late=True),
    "bf16 parameters, diloco": replace(
        EXACT, dtype=torch.bfloat16, algorithm=partial(LocalSGD.diloco, period=2), steps=5
    ),
    "an average": replace(EXACT, average=partial(MovingAverage, 0.2), swap_at=1, resume_at=2),
    "swap and back": replace(EXACT, swap_at=1, late=True),
    "swap and back, bf16": replace(EXACT, swap_at=1, dtype=torch.bfloat16),
    "an abstention": replace(EXACT, events=((1, 1, "abstain"), (3, 0, "abstain")), steps=6),
    "a meeting at the end": replace(
        EXACT, events=((4, 0, "abstain"), (4, 1, "abstain"), (3, 1, "abstain")), steps=5, shapes=(((50,),), ((90,),))
    ),
    "the monitor's figures": replace(EXACT, report_every=1, steps=6),
    "the monitor's figures of local SGD": replace(
        EXACT, report_every=1, algorithm=partial(LocalSGD, period=2), steps=7
    ),
    "no parameters left": replace(EXACT, shapes=(((0,),), ((40,),))),
}


@pytest.mark.parametrize("lag", LAGS)
@parametrize(OVER_ALL_REDUCE)
def test_all_reduce(scenario, lag):
    check(scenario, lag, waits_at_most=1 * len(scenario.shapes))


GROUPS = {
    "2 x 2": Scenario(members=2),
    "2 x 2, the second replica late": Scenario(members=2, late=True, shapes=(((300,), (51,)),)),
    "2 x 2, averages and a swap": Scenario(members=2, average=partial(MovingAverage, 0.2), swap_at=1),
    "2 x 2, two couplings": Scenario(members=2, shapes=(((70,),), ((41, 3),))),
    "2 x 2, resumed": Scenario(members=2, algorithm=partial(LocalSGD.slowmo, period=2), steps=5, resume_at=2),
    "2 x 2, shared memory": Scenario(members=2, transport=SharedMemory()),
    "1 x 3": Scenario(members=3, replicas=1),
}


@pytest.mark.parametrize("lag", LAGS)
@parametrize(GROUPS)
def test_groups_of_ranks(scenario, lag):
    check(scenario, lag, waits_at_most=len(scenario.shapes) if scenario.transport.synchronous else None)


# At most one wait a step for each coupling that begins or completes an exchange, none in the steps between.
SEVERAL = {
    "LSGD": Scenario(algorithm=partial(LSGD, period=2), shapes=(((100,),), ((51,),), ((1,),)), steps=7, late=True),
    "Parle": Scenario(algorithm=partial(Parle, period=2), shapes=(((100,),), ((51,),)), steps=5, late=True),
    "2 x 2, LSGD": Scenario(members=2, algorithm=partial(LSGD, period=2), shapes=(((100,),), ((1,),)), steps=5),
    "2 x 2, int8": Scenario(members=2, transport=AllReduce(wire="int8"), shapes=(((301,), (1,), (0,)),), late=True),
    "2 x 2, the monitor's figures": Scenario(members=2, report_every=1),
}


@parametrize(SEVERAL)
def test_several_couplings_and_groups_wait_once_for_each(scenario):
    check(scenario, "caller", waits_at_most=len(scenario.shapes))


@pytest.mark.parametrize("members", [1, 2])
def test_lsgd_tells_losses_that_are_on_the_device_without_waiting_for_them(members):
    scenario = Scenario(members=members, algorithm=partial(LSGD, period=3), steps=12)
    for outcome in check(scenario, "caller", waits_at_most=1):
        begins = [waits for step, (waits, _) in enumerate(outcome.waits) if step % 3 == 2]
        assert begins == [0] * 4  # the host waits when an exchange is completed, in the step after


ASYNCHRONOUS = {
    f"{name}, {what}": replace(scenario, transport=transport)
    for name, transport in {"shared memory": SharedMemory(), "parameter server": Apart()}.items()
    for what, scenario in {
        "exchange": EXACT,
        "pull and push": replace(EXACT, algorithm=partial(Downpour, period=2), steps=5),
        "momentum on the center": replace(EXACT, algorithm=partial(MDownpour, momentum=0.5)),
        "figures": replace(EXACT, report_every=1),
        "an average": replace(EXACT, average=partial(MovingAverage, 0.2)),
        "several couplings": replace(EXACT, shapes=(((100,),), ((7, 9),))),
        "bf16 parameters": replace(EXACT, dtype=torch.bfloat16),
        "one replica": replace(EXACT, replicas=1),
    }.items()
}


@pytest.mark.parametrize("lag", LAGS)
@parametrize(ASYNCHRONOUS)
def test_asynchronous_centers(scenario, lag):
    check(scenario, lag)


# --------------------------------------------------------------------------------------------------------- methods

# Synchronous where they may be; each is interrupted in the middle of a period.
METHODS: dict[str, Scenario] = {
    "EASGD": Scenario(algorithm=partial(EASGD, period=2, center_rate=0.5)),
    "EAMSGD": Scenario(algorithm=partial(EAMSGD, period=2, center_rate=0.5), momentum=0.9),
    "LocalSGD": Scenario(algorithm=partial(LocalSGD, period=3)),
    "BMUF": Scenario(algorithm=partial(LocalSGD.bmuf, period=3)),
    "SlowMo": Scenario(algorithm=partial(LocalSGD.slowmo, period=3)),
    "DiLoCo": Scenario(algorithm=partial(LocalSGD.diloco, period=3)),
    "StreamingDiLoCo": Scenario(algorithm=partial(StreamingDiLoCo, period=3, delay=1)),
    "OverlapLocalSGD": Scenario(algorithm=partial(OverlapLocalSGD, period=2)),
    "LSGD": Scenario(algorithm=partial(LSGD, period=3)),
    "ADMM": Scenario(algorithm=partial(ADMM, period=2)),
    "Parle": Scenario(algorithm=partial(Parle, period=3)),
    "EntropySGD": Scenario(algorithm=partial(EntropySGD, period=3), replicas=1),
    "ElasticSGD": Scenario(algorithm=partial(ElasticSGD, scoping=0.9)),
    "Gauss-Seidel EASGD": Scenario(
        algorithm=partial(EASGD, period=2, moving_rate=0.1, order="gauss_seidel"), transport=SharedMemory()
    ),
    "early exchange": Scenario(
        algorithm=partial(EASGD, period=3, moving_rate=0.1, early_exchange=True), transport=SharedMemory()
    ),
    "Downpour": Scenario(algorithm=partial(Downpour, period=2), transport=SharedMemory()),
    "MDownpour": Scenario(algorithm=partial(MDownpour, momentum=0.5), transport=SharedMemory()),
    "AGN": Scenario(algorithm=partial(AGN, period=3), transport=SharedMemory()),
    "ADAG": Scenario(algorithm=partial(ADAG, period=3), transport=SharedMemory()),
    "DynSGD": Scenario(algorithm=partial(DynSGD, period=3), transport=SharedMemory()),
}
METHODS = {
    name: replace(s, shapes=(((100,), (51,)),), steps=8, resume_at=3, momentum=s.momentum if s.momentum else 0.0)
    for name, s in METHODS.items()
}


@pytest.mark.parametrize("lag", ["none", "caller"])
@parametrize(METHODS)
def test_every_method_goes_on_with_state_that_was_read_on_the_cpu(scenario, lag):
    check(scenario, lag)


STRAIGHT = {
    name: replace(s, resume_at=None, late=s.replicas > 1 and s.transport.synchronous) for name, s in METHODS.items()
}


@parametrize(STRAIGHT)
def test_every_method_on_a_device_that_lags(scenario):
    check(scenario, "caller", waits_at_most=1 if scenario.transport.synchronous else None)


def test_every_algorithm_is_in_a_scenario():
    used = {type(s.algorithm()) for s in METHODS.values()}
    every = set()
    pending = [Algorithm]
    while pending:
        for kind in pending.pop().__subclasses__():
            pending.append(kind)
            if kind.__module__.startswith("lightning_easgd.algorithms.") and not inspect.isabstract(kind):
                every.add(kind)
    assert every - used == set()


# --------------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("transport", [AllReduce(), SharedMemory(), Apart()], ids=repr)
def test_a_delta_that_is_not_finite_stays_out(transport, lag):
    scenario = Scenario(transport=transport, events=((2, 1, "nan"),), steps=6)
    with pretend_cuda(lag=lag) as findings:
        outcomes = run(scenario, "cuda", findings)
    assert findings.problems() == []
    assert [outcome.resets for outcome in outcomes] == [0, 1]
    for outcome in outcomes:
        assert all(bool(torch.isfinite(value).all()) for value in outcome.parameters + outcome.centers)
    if transport.synchronous:
        assert all(map(torch.equal, outcomes[0].centers, outcomes[1].centers))


@pytest.mark.parametrize("is_lent", [False, True])
@pytest.mark.parametrize("transport", [AllReduce(), AllReduce(wire="int8"), SharedMemory()], ids=repr)
def test_closing_in_an_exchange_frees_nothing_that_the_device_still_uses(transport, is_lent):
    def body(rank: int, store: dist.Store) -> None:
        device = torch.device("cuda", rank)
        initial = torch.zeros(500).to(device)
        center = transport.open(initial, replica=rank, num_replicas=2, rule=Addition(), store=store, timeout=T)
        pending = center.exchange(center.borrow().fill_(1.0), torch.Tensor.sub_, scale=0.5)
        if not is_lent:
            pending.wait()
            pending.done()
        meet(store, "launched", 2)
        del pending
        center.close()

    with pretend_cuda(lag="streams") as findings:
        run_ranks(body, 2)
    assert findings.problems() == []


def test_an_exchange_that_is_given_up_frees_nothing_that_the_device_still_uses():
    def body(rank: int, store: dist.Store) -> None:
        initial = torch.zeros(500).to(torch.device("cuda", rank))
        center = AllReduce().open(initial, replica=rank, num_replicas=2, rule=Addition(), store=store, timeout=T)
        if rank == 0:
            center.push(torch.ones_like(initial), read_at=0)
            with pytest.raises(TransportError, match="was not applied"):
                center.drain(timedelta(seconds=0.1))
            store.set("given up", "")
        store.wait(["given up"], T)
        center.close()

    with pretend_cuda(lag="streams") as findings:
        run_ranks(body, 2)
    assert findings.problems() == []


@pytest.mark.parametrize("begins", [False, True])
def test_a_launch_after_the_communicator_was_aborted_is_a_transport_error(begins):
    """As NCCL's own watch does where a peer is lost: before an exchange begins, or between its two halves."""

    def body(rank: int, store: dist.Store) -> None:
        initial = torch.zeros(1000).to(torch.device("cuda", rank))  # more chunks than lanes
        center = AllReduce().open(initial, replica=rank, num_replicas=2, rule=Addition(), store=store, timeout=T)
        pending = center.exchange(center.borrow().fill_(1.0), torch.Tensor.sub_, scale=0.5)
        pending.wait()
        if begins:
            pending.done()
            center.drain()
        meet(store, "launched", 2)
        if rank == 0:
            store.wait(["aborted"], T)
            with pytest.raises(TransportError, match=r"replica 0 of 2.*aborted"):
                center.push(torch.ones_like(initial), read_at=0) if begins else pending.done()
        else:
            center._group.revoke()
            store.set("aborted", "")
        center.close()

    with pretend_cuda(lag="streams") as findings:
        run_ranks(body, 2)
    assert findings.problems() == []


@pytest.mark.real_chunks
@pytest.mark.parametrize("late", [False, True])
def test_more_than_four_million_parameters(late):
    """The default chunks, with the default wire: the delta must be whole until the device has read it."""
    scenario = Scenario(shapes=(((2_500_000,), (2, 900_000)),), steps=2, late=late)
    check(scenario, "caller")


LAYERWISE = {
    "shared memory": Scenario(
        algorithm=partial(Downpour, period=1), transport=SharedMemory(), shapes=(((40,),), ((30, 2),), ((5,),))
    ),
    "all-reduce": Scenario(algorithm=partial(EASGD, period=1, center_rate=0.5), shapes=(((40,),), ((30, 2),), ((5,),))),
}


@pytest.mark.parametrize("lag", LAGS)
@parametrize(LAYERWISE)
def test_layers_that_exchange_within_a_pass(scenario, lag, monkeypatch):
    """As ``Layerwise`` does: each layer is read before its forward pass, and stepped in the backward pass's order."""

    def step(self: Rank, step: int) -> None:
        for coupling in self.couplings:
            coupling.begin()
        for index in reversed(range(len(self.groups))):
            self.backward(index, step)
            [coupling] = self.groups[index]
            coupling.step(partial(self.update, index), recover=None, at=step)

    monkeypatch.setattr(Rank, "step", step)
    check(scenario, lag)


@pytest.mark.parametrize("lag", LAGS)
def test_buffers_of_any_dtype_are_sent(lag):
    values = [torch.arange(5), torch.tensor(2.5, dtype=torch.float64), torch.tensor([True, False]), torch.ones(3)]

    def body(rank: int, store: dist.Store) -> list[Tensor]:
        own = [(v if rank == 0 else torch.zeros_like(v)).to(f"cuda:{rank}") for v in values]
        group = new_group(store, rank, 2, own[0].device, T)
        broadcast_bytes(group, own)
        return [v.cpu() for v in own]

    with pretend_cuda(lag=lag) as findings:
        results = run_ranks(body, 2)
    assert findings.problems() == []
    for own in results:
        assert all(map(torch.equal, own, values))

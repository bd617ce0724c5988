"""A look at the center in the middle of a step changes no weight: over all methods, transports, wires and moments."""

from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch

from lightning_easgd import EASGDStrategy, MovingAverage, algorithms
from lightning_easgd.algorithms import EASGD, Algorithm, LocalSGD, Parle
from lightning_easgd.communication import AllReduce, OpenCenter, ParameterServer, SharedMemory, Transport
from lightning_easgd.communication._c10d import PrefixStore
from lightning_easgd.communication.all_reduce import _replicated_center
from lightning_easgd.core.coupling import Coupling
from lightning_easgd.core.fragments import step_fragments
from lightning_easgd.core.slots import num_slots
from lightning_easgd.flatten import ParameterVector
from lightning_easgd.rules import Addition
from tests import modules
from tests.helpers import TIMEOUT, run_replicas, run_threads
from tests.modules import flat, loader, trainer

D = 700
STEPS = 9

TRANSPORTS: dict[str, Callable[[], Transport]] = {
    "memory": AllReduce,
    "sockets": lambda: AllReduce(shared_memory=False),
    "bfloat16": lambda: AllReduce(wire="bfloat16"),
    "int8": lambda: AllReduce(wire="int8"),
    "shared": SharedMemory,
    "server": ParameterServer,
}

METHODS: dict[str, Callable[[], Algorithm]] = {
    "easgd": lambda: EASGD(period=2),
    "easgd, every step": lambda: EASGD(period=1),
    "easgd, gauss-seidel": lambda: EASGD(period=3, order="gauss_seidel"),
    "easgd, early": lambda: EASGD(period=3, early_exchange=True, margin=0.1),
    "eamsgd": lambda: algorithms.EAMSGD(period=2),
    "overlap": lambda: algorithms.OverlapLocalSGD(period=2),
    "local sgd": lambda: algorithms.LocalSGD(period=3),
    "diloco": lambda: algorithms.LocalSGD.diloco(period=3),
    "streaming": lambda: algorithms.StreamingDiLoCo(period=3, delay=1),
    "parle": lambda: algorithms.Parle(period=3),
    "parle, averages": lambda: algorithms.Parle(period=3, elastic_target="averages"),
    "entropy": lambda: algorithms.EntropySGD(period=3),
    "elastic": algorithms.ElasticSGD,
    "admm": lambda: algorithms.ADMM(period=2),
    "lsgd": lambda: algorithms.LSGD(period=3),
    "adag": lambda: algorithms.ADAG(period=3),
    "downpour": lambda: algorithms.Downpour(period=3),
    "mdownpour": algorithms.MDownpour,
    "agn": lambda: algorithms.AGN(period=3),
    "dynsgd": lambda: algorithms.DynSGD(period=3),
}


def _look(coupling: Coupling) -> None:
    """What the strategy does when a checkpoint is saved, or ``weights_of("center")`` is entered."""
    if coupling.center.synchronous:
        coupling.abstain()
        while not coupling.slots.all_done:
            coupling.abstain()
    else:
        coupling.refresh()
    coupling.swap()
    coupling.swap()


def _couple(
    name: str, start: torch.Tensor, algorithm: Algorithm, transport: Transport, replica: int, size: int, store: Any
) -> tuple[Coupling, torch.optim.Optimizer]:
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, nesterov=True)
    algorithm.bind(optimizer, [parameter])
    algorithm.batches_per_epoch = 10
    algorithm.clock = algorithm.initial_clock
    vector = ParameterVector([parameter])
    center = transport.open(
        vector.read(),
        replica=replica,
        num_replicas=size,
        rule=algorithm.rule(size),
        store=PrefixStore(name, store),
        timeout=TIMEOUT,
        num_slots=num_slots(size, algorithm.num_told),
    )
    coupling = Coupling(["p"], vector, algorithm, center)
    coupling.report_every = 2
    return coupling, optimizer


def _train(
    replica: int, store: Any, *, method: str, transport: str, moment: str | None, lr: float, size: int
) -> list[torch.Tensor]:
    start = torch.linspace(1, 2, D)
    coupling, optimizer = _couple("c", start, METHODS[method](), TRANSPORTS[transport](), replica, size, store)
    [parameter] = coupling.vector.parameters
    optimizer.param_groups[0]["lr"] = lr
    found = []
    with coupling.center:
        for step in range(STEPS):

            def update(step: int = step) -> None:
                if moment in ("before", "both"):
                    _look(coupling)
                parameter.grad = torch.sin(parameter.detach() * (3 + replica) + step) * (0.0 if lr == 0 else 1.0)
                coupling.algorithm.observe_loss(parameter.detach().sum() + replica)
                coupling.add_force()
                if lr == 0:
                    parameter.grad.zero_()
                if moment in ("between", "both"):
                    _look(coupling)
                optimizer.step()
                if moment in ("after", "both"):
                    _look(coupling)

            coupling.step(update, recover=None)
            found.append(parameter.detach().clone())
        coupling.refresh()
        found.append(coupling.center.value.clone())
    return found


def _pairs() -> list[Any]:
    pairs = []
    for transport, make in TRANSPORTS.items():
        for method, algorithm in METHODS.items():
            a = algorithm()
            if a.synchronous_only and not make().synchronous or a.asynchronous_only and make().synchronous:
                continue
            if a.single_replica and transport not in ("memory", "shared"):
                continue
            if transport in ("bfloat16", "int8", "server") and method not in ("easgd", "easgd, every step", "downpour"):
                continue
            pairs.append(pytest.param(transport, method, id=f"{method} over {transport}"))
    return pairs


@pytest.mark.parametrize(("transport", "method"), _pairs())
def test_a_look_inside_a_step_changes_no_weight(transport, method):
    synchronous = TRANSPORTS[transport]().synchronous
    size = 1 if METHODS[method]().single_replica or not synchronous else 2  # over others' center the order is not fixed
    train = partial(_train, method=method, transport=transport, size=size)
    plain = run_threads(partial(train, moment=None, lr=0.1), size)
    looked = run_threads(partial(train, moment="both", lr=0.1), size)
    for one, other in zip(plain, looked, strict=True):
        assert not torch.equal(one[0], one[-2])
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("moment", ["before", "between", "after"])
@pytest.mark.parametrize("transport", ["memory", "sockets", "int8", "shared", "server"])
def test_without_a_learning_rate_a_look_leaves_all_where_it_was(transport, moment):
    size = 2
    for found in run_threads(
        partial(_train, method="easgd, every step", transport=transport, moment=moment, lr=0.0, size=size), size
    ):
        for vector in found:
            assert torch.equal(vector, torch.linspace(1, 2, D))


def _fragments(replica: int, store: Any, *, transport: str, looks: bool) -> list[torch.Tensor]:
    start = torch.linspace(1, 2, D)
    made = [_couple(str(k), start + k, EASGD(period=2), TRANSPORTS[transport](), replica, 2, store) for k in range(2)]
    couplings = [coupling for coupling, _ in made]
    couplings[1].algorithm.clock = 0  # so that each step exchanges one of them
    for step in range(STEPS):

        def update(step: int = step) -> None:
            for coupling, optimizer in made:
                [parameter] = coupling.vector.parameters
                parameter.grad = torch.cos(parameter.detach() * (2 + replica) + step)
                optimizer.step()
            if looks:
                for coupling in couplings:
                    _look(coupling)

        step_fragments(couplings, update, recover=None)
    for coupling in couplings:
        coupling.refresh()
    found = [v.clone() for c in couplings for v in (c.vector.read(), c.center.value)]
    for coupling in couplings:
        coupling.center.close()
    return found


@pytest.mark.parametrize("transport", ["memory", "sockets"])
def test_a_look_inside_a_step_of_fragments_changes_no_weight(transport):
    plain = run_threads(partial(_fragments, transport=transport, looks=False), 2)
    looked = run_threads(partial(_fragments, transport=transport, looks=True), 2)
    for one, other in zip(plain, looked, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("transport", ["memory", "sockets", "bfloat16"])
@pytest.mark.parametrize("waits_first", [True, False])
def test_a_delta_is_whole_until_it_is_given_back_whatever_happens(monkeypatch, transport, waits_first):
    monkeypatch.setitem(_replicated_center._CHUNK_BYTES, "cpu", 256)

    def body(replica, store):
        with _open(replica, store, transport) as center:
            for _ in range(3):
                before = center.pull().value.clone()
                x = center.borrow().fill_(5.0 + replica)
                pending = center.exchange(x, torch.Tensor.sub_, scale=0.25)
                delta = pending.wait() if waits_first else x
                center.drain()
                center.push(torch.ones(D), read_at=center.clock)
                center.drain()
                assert torch.equal(delta, 5.0 + replica - before)
                assert torch.equal(pending.wait(), 5.0 + replica - before)
                pending.done()
                center.drain()
            return center.value.clone()

    one, two = run_threads(body, 2)
    assert torch.equal(one, two)


def _open(replica: int, store: Any, transport: str, timeout: timedelta = TIMEOUT) -> OpenCenter:
    return TRANSPORTS[transport]().open(
        torch.zeros(D), replica=replica, num_replicas=2, rule=Addition(), store=store, timeout=timeout
    )


@contextmanager
def _counted(center: OpenCenter) -> Any:
    before, sent = center.traffic.bytes_sent, []
    yield sent
    sent.append(center.traffic.bytes_sent - before)


@pytest.mark.parametrize("transport", ["memory", "sockets", "bfloat16", "int8"])
def test_where_all_abstain_only_the_slots_travel(transport):
    def body(replica, store):
        with _open(replica, store, transport) as center:
            center.push(torch.ones(D), read_at=0)
            center.drain()
            with _counted(center) as all_add:
                center.push(torch.ones(D), read_at=0)
                center.drain()
            with _counted(center) as nobody_adds:
                center.abstain()
                center.drain()
            value = center.value.clone()
            with _counted(center) as one_adds:
                if replica == 0:
                    center.push(torch.ones(D), read_at=0)
                else:
                    center.abstain()
                center.drain()
            assert torch.equal(value, torch.full((D,), 4.0))
            assert torch.equal(center.value, torch.full((D,), 5.0))
            assert center.clock == 8
            assert center.additions == 5
            return *all_add, *nobody_adds, *one_adds

    for all_add, nobody_adds, one_adds in run_threads(body, 2):
        assert nobody_adds == 4  # the header, without slots, through a ring of two
        assert all_add == one_adds > nobody_adds


HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
)
STRATEGIES: dict[str, Callable[[], Any]] = {
    "EASGD": lambda: EASGDStrategy(EASGD(period=2)),
    "an average": lambda: EASGDStrategy(EASGD(period=2), average=MovingAverage()),
    "fragments": lambda: EASGDStrategy(EASGD(period=2), fragments=2),
    "Parle": lambda: EASGDStrategy(Parle(period=2)),
    "local SGD": lambda: EASGDStrategy(LocalSGD(period=3)),
}


class _Looks(modules.pytorch_lightning.Callback):
    """Looks at the center in one hook of every batch, by itself or by saving it."""


def _fit_and_look(strategy: Any, hook: str | None, path: str | None) -> list[torch.Tensor]:
    class Looks(_Looks):
        pass

    def look(self: Any, t: Any, *_: Any, **__: Any) -> None:
        if path is not None:
            t.save_checkpoint(path)
        else:
            with t.strategy.weights_of("center"):
                pass

    if hook is not None:
        setattr(Looks, hook, look)
    module = modules.BatchNormRegression()
    trainer(strategy=strategy, callbacks=[Looks()]).fit(module, loader(shuffle=False))
    return [flat(module), *module.buffers()]


def _look_in_hooks(replica: int, folder: str) -> Any:
    found: dict[str, Any] = {}
    for name, make in STRATEGIES.items():
        plain = _fit_and_look(make(), None, None)
        for hook in HOOKS if name == "EASGD" else HOOKS[1:5:2]:
            for path in (None, f"{folder}/look.ckpt") if name == "EASGD" else (None,):
                looked = _fit_and_look(make(), hook, path)
                found[f"{name}, {hook}, {path}"] = all(map(torch.equal, plain, looked))
    return found


def test_a_look_in_any_hook_changes_nothing(tmp_path):
    """Of a module with batch norm, whose statistics a backward pass still needs."""
    for found in run_replicas(_look_in_hooks, 2, str(tmp_path)):
        assert [case for case, is_same in found.items() if not is_same] == []
        assert len(found) == 2 * 6 + 2 * (len(STRATEGIES) - 1)

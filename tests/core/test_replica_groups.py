"""Replicas of several ranks: each a DDP group of its own, its ranks bit-identical, one exchange a replica."""

import os
import signal
from typing import Any

import pytest
import torch

from lightning_easgd import EASGD, AllReduce, Asynchronous, EASGDStrategy
from lightning_easgd.core.members import Layout
from lightning_easgd.core.slots import num_slots
from tests import modules
from tests.callbacks import Ends, Recorder, differences, state
from tests.helpers import run_replicas
from tests.modules import Regression, flat, linear_data, loader, trainer

PERIOD, RATE = 4, 0.3


class Noisy(Regression):
    """Dropout and batch norm, with a generator of each rank's own; stable however long it is trained."""

    def __init__(self) -> None:
        super().__init__(lr=0.01, momentum=0.0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 7), torch.nn.BatchNorm1d(7), torch.nn.Dropout(0.3), torch.nn.Linear(7, 1)
        )

    def on_train_start(self) -> None:
        torch.manual_seed(self.global_rank)


class Keeps(Recorder):
    """Keeps the momenta, what was sent and what is logged, too; center and replica with their buffers."""

    def __init__(self) -> None:
        super().__init__(state)

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        coupling = trainer.strategy.couplings[0]
        self.momenta = [state["momentum_buffer"] for state in trainer.optimizers[0].state_dict()["state"].values()]
        self.traffic = vars(coupling.center.traffic).copy()
        self.numel = coupling.vector.numel
        self.logged = trainer.strategy.hyperparameters()


def _fit(rank: int, module: type, strategy: Any, **options: Any) -> dict[str, Any]:
    keeps = Keeps()
    t = trainer(strategy=strategy, devices=4, callbacks=[keeps], **options)
    data = torch.utils.data.DataLoader(linear_data(80), batch_size=4, shuffle=True)
    t.fit(module(), data, torch.utils.data.DataLoader(linear_data(16), batch_size=4))
    return keeps.kept()


def _equal(a: Any, b: Any) -> bool:
    return not differences(a, b)


def _two_hundred_steps(rank: int) -> Any:
    sockets = AllReduce(shared_memory=False)
    strategy = EASGDStrategy(EASGD(period=PERIOD, center_rate=0.9), sockets, replica_size=2)
    return _fit(rank, Noisy, strategy, max_epochs=40, check_val_every_n_epoch=20)


def test_ranks_of_a_replica_stay_bit_identical_and_an_exchange_moves_each_parameter_once_a_replica():
    ranks = run_replicas(_two_hundred_steps, 4)
    assert [r["steps"] for r in ranks] == [200] * 4
    for first, second in (ranks[:2], ranks[2:]):
        for what in ("replica", "center", "momenta"):
            assert _equal(first[what], second[what]), what
        assert not _equal(first["batches"], second["batches"])
    assert _equal(ranks[0]["center"], ranks[2]["center"])
    assert not torch.equal(ranks[0]["replica"]["net.0.weight"], ranks[2]["replica"]["net.0.weight"])
    # A ring of two sends what it holds once: each member half of the parameters, with a count and the slots.
    exchanges, numel = ranks[0]["traffic"]["exchanges"], ranks[0]["numel"]
    assert exchanges == 50
    sent = ranks[0]["traffic"]["bytes_sent"] + ranks[1]["traffic"]["bytes_sent"]
    # At a meeting nobody adds, and the count and the slots go alone.
    head = 4 * 2 * (1 + num_slots(2))
    meetings, rest = divmod(sent - exchanges * (4 * numel + head), head)
    assert (meetings > 0, rest) == (True, 0)
    assert meetings <= 40 + 2 + 1  # the ends of epochs, the evaluations, the end of training
    assert ranks[0]["logged"]["replicas"] == "replica 0: ranks 0-1; replica 1: ranks 2-3"


def _two_of_two(rank: int) -> Any:
    strategy = EASGDStrategy(EASGD(period=PERIOD, moving_rate=RATE), replica_size=2)
    return _fit(rank, Regression, strategy, max_epochs=2)


def test_two_replicas_of_two_equal_the_dense_recurrence():
    results = run_replicas(_two_of_two, 4)
    replicas = [Regression() for _ in range(2)]
    optimizers = [torch.optim.SGD(r.parameters(), lr=r.lr, momentum=r.momentum) for r in replicas]
    center = flat(replicas[0])
    for step in range(results[0]["steps"]):
        forces = [RATE * (flat(r) - center) for r in replicas]
        for i, (r, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            optimizer.zero_grad()
            for member in (0, 1):
                (r.loss(results[2 * i + member]["batches"][step]) / 2).backward()
            optimizer.step()
        if step % PERIOD == PERIOD - 1:
            for r, force in zip(replicas, forces, strict=True):
                torch.nn.utils.vector_to_parameters(flat(r) - force, r.parameters())
            center = center + sum(forces)
    for rank, result in enumerate(results):
        found = torch.cat([result["replica"][name].flatten() for name, _ in replicas[0].named_parameters()])
        torch.testing.assert_close(found, flat(replicas[rank // 2]), atol=1e-5, rtol=0)


def _asynchronous(rank: int) -> Any:
    strategy = EASGDStrategy(EASGD(period=PERIOD), Asynchronous(), replica_size=2, slack=3)
    return _fit(rank, Noisy, strategy, max_epochs=5)


def test_an_asynchronous_replica_of_two_ranks_exchanges_as_one():
    ranks = run_replicas(_asynchronous, 4)
    for first, second in (ranks[:2], ranks[2:]):
        for what in ("replica", "center", "momenta"):
            assert _equal(first[what], second[what]), what
    assert _equal(ranks[0]["center"], ranks[3]["center"])


class _Thaws(modules.pytorch_lightning.Callback):
    """The first layer is frozen in epoch 0 and joins in epoch 1."""

    def on_fit_start(self, trainer, pl_module):
        pl_module.net[0].requires_grad_(False)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.net[0].requires_grad_(True)


def _thawed(rank: int) -> Any:
    keeps = Keeps()
    strategy = EASGDStrategy(EASGD(period=PERIOD), replica_size=2)
    t = trainer(strategy=strategy, devices=4, callbacks=[_Thaws(), keeps], max_epochs=4)
    module = Regression()
    start = module.net[0].weight.detach().clone()
    t.fit(module, loader())
    return keeps.replica, not torch.equal(start, keeps.replica["net.0.weight"])


def test_a_layer_that_is_thawed_is_averaged_inside_the_replica_too():
    ranks = run_replicas(_thawed, 4)
    assert all(moved for _, moved in ranks)
    assert _equal(ranks[0][0], ranks[1][0])
    assert _equal(ranks[2][0], ranks[3][0])
    assert not _equal(ranks[0][0], ranks[2][0])


class TwoNetworks(Regression):
    """Two optimizers whose parameters are equally many."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        loss = self.loss(batch) + torch.nn.functional.l1_loss(self.other(x), y)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.net, self.other)]


def _two_networks(rank: int) -> Any:
    ends = Ends()
    t = trainer(strategy=EASGDStrategy(EASGD(period=PERIOD), replica_size=2), devices=4, callbacks=[ends], max_epochs=6)
    t.fit(TwoNetworks(), loader(), loader(16))
    return ends.replica, ends.center


def test_two_optimizers_meet_in_either_order():
    ranks = run_replicas(_two_networks, 4)
    for replica, center in ranks:
        assert torch.equal(center, ranks[0][1])
        assert not torch.equal(replica, center)
    assert torch.equal(ranks[0][0], ranks[1][0])
    assert torch.equal(ranks[2][0], ranks[3][0])
    assert not torch.equal(ranks[0][0], ranks[2][0])


class _Sends(modules.pytorch_lightning.Callback):
    """Sends one rank the signal to stop, once, in the middle of an epoch."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        self.step = trainer.global_step


def _signalled(rank: int, which: int, asynchronous: bool) -> Any:
    transport = Asynchronous() if asynchronous else None
    sends = _Sends(which)
    strategy = EASGDStrategy(EASGD(period=PERIOD), transport, replica_size=2)
    t = trainer(strategy=strategy, devices=4, callbacks=[sends], max_epochs=-1)
    try:
        t.fit(Noisy(), loader())
    except BaseException as error:
        return type(error).__name__, sends.step
    return None, sends.step


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("which", [0, 3])
def test_a_signal_to_any_rank_stops_all_and_those_of_a_replica_at_the_same_step(which, asynchronous):
    ends = run_replicas(_signalled, 4, which, asynchronous)
    assert [name for name, _ in ends] == [ends[0][0]] * 4
    assert ends[0][0] in ("SIGTERMException", "SystemExit", "Exit")
    steps = [step for _, step in ends]
    assert steps[0] == steps[1]
    assert steps[2] == steps[3]


def _synchronised(rank: int) -> Any:
    groups = []

    class Looks(modules.pytorch_lightning.Callback):
        def on_fit_start(self, trainer, pl_module):
            layers = [m for m in pl_module.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
            groups.extend(torch.distributed.get_process_group_ranks(layer.process_group) for layer in layers)

    # The layer refuses to run without a GPU, and DDP to wrap it.
    torch.nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None
    strategy = EASGDStrategy(replica_size=2)
    t = trainer(strategy=strategy, devices=4, sync_batchnorm=True, callbacks=[Looks()], limit_train_batches=0)
    t.fit(Noisy(), loader())
    return groups


def test_synchronised_batch_norm_stays_inside_a_replica():
    assert run_replicas(_synchronised, 4) == [[[0, 1]], [[0, 1]], [[2, 3]], [[2, 3]]]


def test_a_layout_says_which_ranks_form_which_replica():
    layout = Layout(world_size=6, replica_size=3)
    assert layout.num_replicas == 2
    assert list(layout.ranks(1)) == [3, 4, 5]
    assert layout.describe() == "replica 0: ranks 0-2; replica 1: ranks 3-5"
    assert layout.describe(["a", "a", "b", "b", "b", "b"]) == "replica 0: ranks 0-2 (a, b); replica 1: ranks 3-5 (b)"
    assert Layout(2, 1).describe() == "replica 0: rank 0; replica 1: rank 1"


@pytest.mark.parametrize(
    ("nodes", "devices", "options", "size"),
    [
        (1, 4, {}, 1),
        (2, 2, {}, 2),
        (2, 1, {}, 1),
        (2, 2, {"replica_size": 1}, 1),
        (1, 4, {"replica_size": 4}, 4),
        (2, 2, {"transport": Asynchronous()}, 2),
        (2, 2, {"transport": Asynchronous(), "data": "dynamic"}, 1),
    ],
)
def test_the_ranks_of_a_node_form_a_replica_where_there_are_several_nodes(nodes, devices, options, size):
    t = trainer(strategy=EASGDStrategy(**options), num_nodes=nodes, devices=devices)
    assert t.strategy.layout == Layout(nodes * devices, size)
    assert t.strategy.num_replicas == nodes * devices // size


def test_a_size_that_does_not_divide_the_ranks_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match=r"replica_size=3\).*number of ranks, which is 4 .*; 1, 2, 4 do"):
        trainer(strategy=EASGDStrategy(replica_size=3), devices=4)
    with pytest.raises(ValueError, match=r"replica_size=0\): must be a number of ranks >= 1"):
        EASGDStrategy(replica_size=0)
    with pytest.raises(ValueError, match=r"data='dynamic', replica_size=2\)"):
        EASGDStrategy(transport=Asynchronous(), data="dynamic", replica_size=2)

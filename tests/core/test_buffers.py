"""What the center has of buffers and of parameters that training moves by hand: every kind, shape and moment."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization.observer import HistogramObserver, MovingAverageMinMaxObserver
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_easgd import EASGD, EASGDStrategy
from lightning_easgd.communication._c10d import new_group
from lightning_easgd.core.buffers import BufferRules, CenterBuffers
from lightning_easgd.core.tensors import checksums, copy_of, is_equal, write
from tests import modules
from tests.helpers import TIMEOUT, run_replicas, run_threads
from tests.modules import Regression, loader, trainer

CPU = torch.device("cpu")


def open_buffers(replica: int, store: Any, module: nn.Module, size: int = 2, **kwargs: Any) -> CenterBuffers:
    group = new_group(store, replica, size, CPU, TIMEOUT)
    return CenterBuffers(module, group, size, rank=replica, **kwargs)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: copy_of(t) for n, t in (*module.named_buffers(), *module.named_parameters())}


def buffers_of(**tensors: torch.Tensor | None) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert is_equal(one[name], other[name]), name


# --- values ---


def every_kind(replica: int) -> nn.Module:
    r = float(replica)
    scales, zeros = torch.tensor([0.5, 0.25 + r]), torch.tensor([0, 1])
    return buffers_of(
        running_cost=torch.tensor([1.0, float("inf"), 3.0 + r]),
        running_bf16=torch.tensor([1.0 + r, 2.0]).bfloat16(),
        running_fp8=torch.tensor([1.0 + r, 2.0]).to(torch.float8_e4m3fn),
        running_complex=torch.tensor([1.0 + r * 1j]),
        running_count=torch.tensor([4 + replica]),
        running_empty=torch.zeros(0, 3),
        running_expanded=torch.tensor([[r], [2.0]]).expand(2, 4),
        mask=torch.tensor([r, 1 - r]),
        flag=torch.tensor([replica == 0]),
        coo=(torch.eye(3) + r).to_sparse(),  # other numbers of entries
        csr=(torch.eye(3) + r).to_sparse_csr(),
        quantised=torch.quantize_per_tensor(torch.tensor([0.5, 1.5 + r]), 0.5 + r, replica, torch.qint8),
        by_channel=torch.quantize_per_channel(torch.eye(2) + r, scales, zeros, 0, torch.qint8),
        expanded=torch.tensor([[r], [2.0]]).expand(2, 4),
        windows=(torch.zeros(5) + r).unfold(0, 3, 1),
        transposed=(torch.arange(6.0).view(2, 3) + r).T,
        conjugated=torch.tensor([1.0 + (1 + r) * 1j]).conj(),
    )


def _every_kind(replica: int, store: Any) -> Any:
    module = every_kind(replica)
    kept = dict(module.named_buffers())
    before = state(module)
    buffers = open_buffers(replica, store, module)
    buffers.gather()
    buffers.swap_in()
    center = state(module)
    buffers.swap_out()
    assert all(module.get_buffer(name) is tensor for name, tensor in kept.items())
    return before, center, state(module)


@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_buffer_is_the_centers_and_goes_back_to_the_last_bit():
    (before0, center, after0), (before1, center1, after1) = run_threads(_every_kind, 2)
    assert_same(center, center1)
    assert_same(before0, after0)
    assert_same(before1, after1)
    assert center["running_cost"].tolist() == [1.0, float("inf"), 3.5]
    assert center["running_bf16"].tolist() == [1.5, 2.0]
    assert center["running_fp8"].tolist() == [1.5, 2.0]
    assert center["running_complex"].tolist() == [1.0 + 0.5j]
    assert center["running_expanded"].tolist() == [[0.5] * 4, [2.0] * 4]
    for name in before0:
        if not name.startswith("running_") or name in ("running_count", "running_empty"):
            assert is_equal(center[name], before0[name]), name
            assert not is_equal(before0[name], before1[name]) or name == "running_empty", name


class Norms(nn.Module):
    """Modules of torch's that have buffers, other ones by replica."""

    def __init__(self, replica: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(replica)  # in threads
        self.batch, self.instance = nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)
        self.ranges, self.histogram = MovingAverageMinMaxObserver(), HistogramObserver()
        self.spectral = spectral_norm(nn.Linear(3, 3))
        self.pruned = prune.custom_from_mask(nn.Linear(3, 3), "weight", torch.eye(3) if replica else 1 - torch.eye(3))
        self.ema = AveragedModel(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), multi_avg_fn=get_ema_multi_avg_fn())
        x = torch.randn(8, 3, generator=generator)
        for module in (self.ema.module, self.batch, self.ranges, self.histogram, self.spectral):
            module(x)
        self.instance(torch.randn(2, 3, 4, generator=generator))


def _norms(replica: int, store: Any) -> Any:
    module = Norms(replica)
    before = state(module)
    coupled = [p for n, p in module.named_parameters() if not n.startswith("ema.")]
    buffers = open_buffers(replica, store, module, held=lambda: coupled)
    buffers.gather()
    buffers.swap_in()
    return before, state(module), {n for n, _ in module.named_buffers()}


def test_statistics_are_averaged_and_all_else_is_replica_0s():
    (before0, center, names), (before1, center1, _) = run_threads(_norms, 2)
    averaged = {
        *(f"{m}.running_{k}" for m in ("batch", "instance", "ema.module.1") for k in ("mean", "var")),
        "ranges.min_val", "ranges.max_val", "ema.module.0.weight", "ema.module.0.bias",
    }  # fmt: skip
    assert averaged <= center.keys()
    for name, value in center.items():
        if name in averaged:
            torch.testing.assert_close(value, (before0[name] + before1[name]) / 2)
            assert not torch.equal(before0[name], before1[name])
            assert is_equal(value, center1[name])
        elif name.startswith("ema.") or name in names:
            assert is_equal(value, before0[name]), name
            assert is_equal(center1[name], before0[name]), name
        else:
            assert is_equal(center1[name], before1[name]), name  # moved by the couplings
    for name in ("pruned.weight_mask", "spectral.parametrizations.weight.0._u", "histogram.histogram"):
        assert not torch.equal(before0[name], before1[name])


class _Table(nn.Module):
    def __init__(self, replica: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.tensor([float(replica)]))


def _chosen(replica: int, store: Any) -> Any:
    module = buffers_of(queue=torch.tensor([float(replica)]), running_max=torch.tensor([float(replica)]))
    module.table, module.other = _Table(replica), _Table(replica)
    module.target = nn.Parameter(torch.tensor([float(replica)]))
    rules = BufferRules({"running_*": "replica0", "other.values": "own", _Table: "mean", "queue": "mean"})
    buffers = open_buffers(replica, store, module, rules=rules)
    buffers.gather()
    buffers.swap_in()
    return {n: float(t) for n, t in state(module).items()}


def test_a_rule_is_chosen_by_name_pattern_or_type():
    shared = {"queue": 0.5, "running_max": 0.0, "table.values": 0.5, "target": 0.5}
    assert run_threads(_chosen, 2) == [{**shared, "other.values": 0.0}, {**shared, "other.values": 1.0}]


@pytest.mark.parametrize(
    ("buffers", "text"),
    [
        ("mean", r"buffers='mean'\): must map names, patterns of names or module types to 'mean', 'replica0' or 'own'"),
        ({"queue": "max"}, r"buffers=\{'queue': 'max'\}\): must be one of 'mean', 'replica0', 'own'"),
        ({3: "mean"}, r"buffers=\{3: ...\}\): must be a name, a pattern of names such as '\*.running_\*', or a type"),
        ({int: "mean"}, "or a type of module"),
        ({"": "mean"}, "must be a name"),
    ],
)
def test_rules_that_are_none_are_refused_before_anything_runs(buffers, text):
    with pytest.raises(ValueError, match=text):
        EASGDStrategy(buffers=buffers)


def test_checksums_tell_apart_what_differs_in_one_or_two_bits():
    value = torch.randn(1001, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = checksums([value], CPU).item()
    assert first == checksums([value.clone()], CPU).item()
    seen = {first}
    for i in range(0, 1000, 7):
        for other in (i, i + 1):  # one sign, and two
            value[other].neg_()
            seen.add(checksums([value], CPU).item())
    assert len(seen) == 1 + 2 * len(range(0, 1000, 7))
    for dtype in (torch.float16, torch.uint8, torch.bool):
        one, two = torch.zeros(13, dtype=dtype), torch.zeros(13, dtype=dtype)
        two[12] = 1
        assert len(set(checksums([one, two, torch.cat([one[:1], two])[1:]], CPU).tolist())) == 2


# --- shapes and moments ---


def _caught(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(w.message) for w in caught if "EASGDStrategy" in str(w.message)]


def _shapes(replica: int, store: Any) -> Any:
    module = buffers_of(
        grown=torch.full((2 + replica,), float(replica)),
        late=torch.zeros(2) if replica == 0 else None,
        running_kind=torch.zeros(2, dtype=torch.float32 if replica == 0 else torch.float64),
        running_mean=torch.tensor([float(replica)]),
    )
    before = state(module)
    buffers = open_buffers(replica, store, module)
    seen = []
    for _ in range(2):
        buffers.gather()
        buffers.swap_in()
        seen.append(state(module))
        buffers.swap_out()
    assert_same(before, state(module))
    return before, seen


def test_what_differs_in_shape_or_kind_by_rank_stays_each_ranks_own():
    results, said = _caught(lambda: run_threads(_shapes, 2))
    for before, seen in results:
        del before["running_mean"]
        for held in seen:
            assert held.pop("running_mean").tolist() == [0.5]
            assert_same(held, before)
    assert set(said) == {
        "EASGDStrategy: the buffers 'grown', 'late', 'running_kind' have not the same shape and dtype on all ranks, so "
        "that nothing is averaged: each rank keeps its own, and a checkpoint has rank 0's"
    }


def _written(replica: int, store: Any) -> Any:
    module = buffers_of(
        cache=torch.full((2,), float(replica)),
        best=torch.tensor(float(replica)),
        running_mean=torch.tensor([float(replica)]),
        gone=torch.zeros(1),
        renewed=torch.tensor(float(replica)),
    )
    module.target = nn.Parameter(torch.tensor([float(replica)]))
    module.kept = nn.Parameter(torch.tensor([float(replica)]))
    buffers = open_buffers(replica, store, module)
    buffers.gather()
    buffers.swap_in()
    with torch.no_grad():
        module.best.fill_(7.0)
        module.running_mean.fill_(7.0)
        module.target.fill_(7.0)
    module.cache = torch.full((5,), 5.0)
    module.gone = None
    module.renewed = module.renewed.clone()  # another object of the same value
    module.register_buffer("new", torch.tensor(3.0))
    own = buffers.state_dict()["values"]
    buffers.swap_out()
    after = state(module)
    assert_same(own, after)
    buffers.swap_in()
    again = state(module)
    return {n: t.tolist() for n, t in after.items()}, {n: t.tolist() for n, t in again.items()}


def test_what_is_written_while_the_center_is_held_stays_and_statistics_go_back():
    results, said = _caught(lambda: run_threads(_written, 2))
    for replica, (after, again) in enumerate(results):
        r = float(replica)
        written = {"cache": [5.0] * 5, "best": 7.0, "target": [7.0], "new": 3.0}
        assert after == {**written, "running_mean": [r], "renewed": r, "kept": [r]}
        assert again == {**written, "running_mean": [0.5], "renewed": 0.0, "kept": [0.5]}
    assert set(said) == {
        "EASGDStrategy: the buffers 'cache', 'gone' have changed in shape while the module held the center: what is "
        "there now stays"
    }


@pytest.mark.filterwarnings("ignore")
def test_state_is_restored_into_buffers_of_another_shape_and_ones_not_there_yet():
    one = buffers_of(
        same=torch.arange(3.0), grown=torch.arange(4.0), none=torch.ones(1), sparse=torch.eye(3).to_sparse()
    )
    one.register_buffer("later", torch.ones(2), persistent=False)
    saved = CenterBuffers(one, None, 1).state_dict()
    two = buffers_of(same=torch.zeros(3), grown=torch.zeros(2), none=None, sparse=torch.zeros(3, 3).to_sparse())
    two.tied = buffers_of(grown=two.grown)
    kept = two.same
    CenterBuffers(two, None, 1).load_state_dict(copy.deepcopy(saved))
    assert two.same is kept
    assert two.tied.grown is two.grown
    assert_same(state(one), state(two))
    assert "later" not in two.state_dict()
    other = nn.Module()
    other.part = one
    saved = CenterBuffers(other, None, 1).state_dict()
    _, said = _caught(lambda: CenterBuffers(nn.Module(), None, 1).load_state_dict(saved))
    assert "'part.grown', 'part.later', " in said[0]
    assert "have no place in this module: what the checkpoint has of them is left out" in said[0]


def test_an_expanded_tensor_is_written_once():
    tensor = torch.zeros(2, 1).expand(2, 3)
    write(tensor, torch.tensor([[1.0] * 3, [2.0] * 3]))
    assert tensor.tolist() == [[1.0] * 3, [2.0] * 3]


class _Counting:
    """A group that notes how many numbers it sums."""

    def __init__(self, group: Any) -> None:
        self._group, self.sizes = group, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def allreduce(self, tensors: list[torch.Tensor]) -> Any:
        self.sizes.append(tensors[0].numel())
        return self._group.allreduce(tensors)


def _by_hand(replica: int, store: Any) -> Any:
    module = nn.Module()
    module.frozen, module.target = nn.Linear(64, 64).requires_grad_(False), nn.Linear(2, 2).requires_grad_(False)
    module.again = module.target
    module.net = nn.Linear(2, 2)
    for parameter in module.parameters():
        parameter.data.fill_(0.1)
    module.target.weight.data += replica  # past torch's own count of changes
    before = state(module)
    counting = _Counting(new_group(store, replica, 2, CPU, TIMEOUT))
    buffers = CenterBuffers(module, counting, 2, rank=replica, held=module.net.parameters)
    buffers.gather()
    buffers.swap_in()
    return before, state(module), counting.sizes, set(buffers.state_dict()["values"])


def test_parameters_moved_by_hand_are_averaged_once_and_frozen_ones_send_nothing():
    for before, center, sizes, kept in run_threads(_by_hand, 2):
        torch.testing.assert_close(center.pop("target.weight"), torch.full((2, 2), 0.6))
        del before["target.weight"]
        assert_same(center, before)
        assert sizes == [4]
        assert kept == {"target.weight"}  # of frozen ones a replica's file has nothing


# --- training ---


class Cache(Regression):
    """Has a table that grows with the longest input, as rotary embeddings and causal masks have it."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.register_buffer("table", None if case == "none" else torch.ones(4), persistent=case == "saved")

    def loss(self, batch: Any) -> torch.Tensor:
        length = {"rank": 6 + 2 * self.global_rank, "val": 4 if self.training else 9}.get(self.case, 5)
        if self.table is None or len(self.table) < length:
            self.register_buffer("table", torch.ones(length), persistent=self.case == "saved")
        return super().loss(batch) * self.table[:4].mean()


class Momentum(Regression):
    """Trains with a copy of the network that follows it by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
        self.validated: list[torch.Tensor] = []

    def on_train_batch_end(self, *_: Any) -> None:
        for slow, fast in zip(self.target.parameters(), self.net.parameters(), strict=True):
            slow.data.mul_(0.9).add_(fast.data, alpha=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch) + (self.net(batch[0]) - self.target(batch[0])).square().mean()

    def on_validation_start(self) -> None:
        self.validated.append(modules.flat(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.02)


class Save(modules.pytorch_lightning.Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0 and self.path:
            trainer.save_checkpoint(self.path)


def _fit(module: Any, path: str = "", ckpt_path: str | None = None) -> Any:
    modules.pytorch_lightning.seed_everything(3)
    t = trainer(strategy=EASGDStrategy(EASGD(period=3)), max_epochs=2, callbacks=[Save(path)])
    t.fit(module, loader(48, 4), loader(16, 4), ckpt_path=ckpt_path)
    return module


def _caches(replica: int, folder: str) -> Any:
    found = {}
    for case in ("val", "rank", "none", "saved"):
        module, said = _caught(lambda case=case: _fit(Cache(case), f"{folder}/{case}.ckpt"))
        resumed = Cache(case)
        if case == "saved":
            resumed.table = torch.ones(5)  # torch itself refuses a state dict of another shape
        _fit(resumed, ckpt_path=f"{folder}/{case}.ckpt")
        same = torch.equal(modules.flat(module), modules.flat(resumed)) and len(module.table) == len(resumed.table)
        found[case] = len(module.table), same, [s for s in said if "table" in s]
    return found


def test_buffers_that_grow_train_evaluate_and_resume(tmp_path):
    one, two = run_replicas(_caches, 2, str(tmp_path))
    assert [found[0] for found in one.values()] == [9, 6, 5, 5]
    assert [found[0] for found in two.values()] == [9, 8, 5, 5]
    assert all(same for found in (one, two) for _, same, _ in found.values())
    assert "changed in shape while the module held the center" in one["val"][2][0]
    assert "'table' have not the same shape and dtype on all ranks" in one["rank"][2][0]
    assert [len(found[2]) for found in one.values()] == [1, 1, 0, 0]


def _momentum(replica: int, path: str) -> Any:
    module = _fit(Momentum(), path)
    frozen = Momentum().frozen.weight.detach()
    resumed = _fit(Momentum(), ckpt_path=path)
    saved = torch.load(path, weights_only=False)["state_dict"]
    vector = torch.cat([saved[n].flatten() for n, _ in module.named_parameters()])
    return module.validated, state(module), state(resumed), vector, frozen


def test_a_momentum_encoder_is_the_same_for_all_who_validate_and_resumes_exactly(tmp_path):
    one, two = run_replicas(_momentum, 2, str(tmp_path / "momentum.ckpt"))
    for validated, after, resumed, saved, frozen in (one, two):
        assert len(validated) == 2
        assert_same(after, resumed)
        assert all(map(torch.equal, validated, one[0]))
        assert torch.equal(saved, validated[0])  # what was validated is what was saved
        assert torch.equal(after["frozen.weight"], frozen)
    assert_same(one[1], two[1])
    assert not torch.equal(one[0][0], one[0][1])


class Lazy(Regression):
    """Its layers take shape in the first batch, which comes where it is told."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.net = torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.LazyBatchNorm1d(), torch.nn.LazyLinear(1))

    def setup(self, stage: str) -> None:
        if self.where == "setup":
            self.net(torch.zeros(2, 4))

    def configure_model(self) -> None:
        if self.where == "configure_model":
            self.net(torch.zeros(2, 4))


class ScheduleFree(torch.optim.Optimizer):
    """SGD whose evaluation mode moves the weights in place to an average of its own, and back."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "train_mode": True, "k": 0})

    def _move(self, weight: float, *, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], weight)
                group["train_mode"] = train

    def train(self) -> None:
        self._move(0.1, train=True)

    def eval(self) -> None:
        self._move(1 - 1 / 0.9, train=False)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                assert group["train_mode"], "step() in evaluation mode"
                group["k"] += 1
                for p in group["params"]:
                    z = self.state[p].setdefault("z", p.clone())
                    p.lerp_(z, 1 / group["k"])
                    p.add_(p.grad, alpha=group["lr"] * (0.9 * (1 - 1 / group["k"]) - 1))
                    z.sub_(p.grad, alpha=group["lr"])
        return loss


class Switching(Regression):
    """Asks its optimizer for the modes around an evaluation, or does not."""

    def __init__(self, switches: bool) -> None:
        super().__init__()
        self.switches = switches
        self.validated: list[torch.Tensor] = []
        self.trained: list[torch.Tensor] = []

    def on_validation_start(self) -> None:
        if self.switches:
            self.optimizers().eval()
        self.validated.append(modules.flat(self))

    def on_validation_end(self) -> None:
        if self.switches:
            self.optimizers().train()

    def on_train_batch_start(self, *_: Any) -> None:
        if self.switches:
            self.optimizers().train()
        self.trained.append(modules.flat(self))

    def configure_optimizers(self) -> Any:
        return ScheduleFree(self.parameters(), lr=0.02)


class Ignoring(Regression):
    """Has a trained parameter, a fixed one of another shape by rank and a buffer that DDP is told to ignore."""

    def __init__(self, replica: int) -> None:
        super().__init__()
        self.own = torch.nn.Parameter(torch.tensor([float(replica + 1)]))
        self.rows = torch.nn.Parameter(torch.zeros(2 + replica), requires_grad=False)
        self.register_buffer("running_own", torch.tensor([float(replica)]))
        self._ddp_params_and_buffers_to_ignore = ["own", "rows", "running_own"]
        self.seen: list[list[float]] = []

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) + (self.own - 3.0 * (self.global_rank + 1)).square().sum()

    def on_validation_start(self) -> None:
        self.seen.append([float(self.own.detach()), float(self.running_own), float(len(self.rows))])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["rows"] = self.rows.detach().clone()  # the checkpoint has replica 0's


def _others(replica: int, folder: str) -> Any:
    found: dict[str, Any] = {"lazy": {}}
    for where in ("nowhere", "setup", "configure_model"):
        try:
            _fit(Lazy(where))
            found["lazy"][where] = "trained"
        except ValueError as error:
            found["lazy"][where] = str(error)
    plain = _fit(Switching(switches=False))
    switching, said = _caught(lambda: _fit(Switching(switches=True)))
    found["modes"] = [(m.validated, m.trained, modules.flat(m)) for m in (plain, switching)], said
    path = f"{folder}/ignoring.ckpt"
    ignoring, resumed = _fit(Ignoring(replica), path), _fit(Ignoring(replica), ckpt_path=path)
    found["ignoring"] = ignoring.seen, [float(m.own.detach()) for m in (ignoring, resumed)]
    found["saved"] = float(torch.load(path, weights_only=False)["state_dict"]["own"])
    found["weights"] = modules.flat(ignoring.net)
    return found


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_replicas(_others, 2, str(tmp_path_factory.mktemp("others")))


def test_lazy_modules_are_refused_until_they_have_a_shape(others):
    for found in others:
        assert found["lazy"]["setup"] == found["lazy"]["configure_model"] == "trained"
        assert found["lazy"]["nowhere"].startswith(
            "EASGDStrategy: 'net.0.weight', 'net.0.bias', 'net.1.weight', 'net.1.bias', ... have no shape yet, and "
            "replicas must begin equal (LazyBatchNorm1d, LazyLinear): pass one batch through the module in setup or "
            "configure_model, such as `with torch.no_grad(): self(example)`"
        )


def test_an_optimizers_mode_never_moves_the_center(others):
    [plain, switching], said = others[0]["modes"]
    for found in others:
        for validated, _, after in found["modes"][0]:
            assert all(map(torch.equal, validated, plain[0]))
            assert torch.equal(after, plain[2])
    assert len(plain[1]) == len(switching[1]) == 12
    assert all(map(torch.equal, plain[1], switching[1]))  # the replica goes on to the last bit
    assert "ScheduleFree.eval() and train() would mix the center" in said[0]


def test_what_ddp_is_told_to_ignore_is_each_ranks_own(others):
    for replica, found in enumerate(others):
        seen, ends = found["ignoring"]
        assert [row[1:] for row in seen] == [[float(replica), 2.0 + replica]] * 2
        assert ends[0] == ends[1]
        assert ends[0] == pytest.approx(3.0 * (replica + 1), abs=1.8)  # each goes where its own loss has it
        assert found["saved"] == others[0]["ignoring"][0][0][0]
    assert torch.equal(others[0]["weights"], others[1]["weights"])


def test_a_file_of_the_first_versions_has_the_buffers_in_the_modules_order():
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(3))
    saved = [torch.full_like(b, 5) for b in module.buffers()]
    CenterBuffers(module, None, 1).load_state_dict(saved)
    assert all(torch.equal(b, value) for b, value in zip(module.buffers(), saved, strict=True))

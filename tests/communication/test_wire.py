"""Rounded all-reduces: fewer bytes, one center, and nothing of a delta lost."""

import math

import pytest
import torch
import torch.distributed as dist

from lightning_easgd.communication import AllReduce, NonFiniteDeltaError, OpenCenter
from lightning_easgd.communication._wire import Layout, codec_of
from lightning_easgd.communication.all_reduce import _replicated_center
from lightning_easgd.rules import Addition, CenterRule, MomentumCenter
from tests import centers
from tests.helpers import TIMEOUT, run_threads

ROUNDING = ["bfloat16", "int8"]
STEP = {"bfloat16": 2**-8, "int8": 0.5 / 127}  # largest error, over the largest number


def open_center(
    replica: int,
    store: dist.Store,
    wire: str,
    *,
    num_replicas: int = 2,
    size: int = 1000,
    dtype: torch.dtype = torch.float32,
    rule: CenterRule | None = None,
) -> OpenCenter:
    initial = torch.linspace(-1, 1, size, dtype=dtype)
    return centers.open_center(AllReduce(wire=wire), replica, store, num_replicas, initial=initial, rule=rule)


def kept(center: OpenCenter) -> dict[str, torch.Tensor]:
    """Returns what rounding has kept from the center so far."""
    return center.state_dict()["rounding"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wire", ROUNDING)
def test_a_code_and_its_error_make_the_number(wire, dtype):
    """Exactly: the difference of two numbers so near is one."""
    values = torch.randn(100 * 1024, generator=torch.Generator().manual_seed(0), dtype=dtype)
    error, decoded = values.clone(), torch.empty_like(values)
    codec = codec_of(wire, values)
    code = torch.full((codec.size(values.numel()),), 255, dtype=torch.uint8)
    codec.encode_(error, code)
    codec.decode(code, decoded)
    assert 0 < float(error.abs().max()) <= 1.001 * STEP[wire] * float(values.abs().max())
    assert torch.equal(decoded.double() + error.double(), values.double())


@pytest.mark.parametrize("wire", ROUNDING)
def test_zero_bytes_are_zeros(wire):
    """An abstention sends them."""
    codec = codec_of(wire, torch.empty(0))
    out = torch.ones(512)
    codec.decode(torch.zeros(codec.size(512), dtype=torch.uint8), out)
    assert not out.any()


def test_a_block_of_zeros_or_of_subnormal_numbers_is_all_error():
    values = torch.cat([torch.zeros(256), torch.full((256,), 1e-38), torch.full((256,), 1e-35)])
    error, decoded = values.clone(), torch.empty_like(values)
    codec = codec_of("int8", values)
    code = torch.empty(codec.size(768), dtype=torch.uint8)
    codec.encode_(error, code)
    codec.decode(code, decoded)
    assert torch.equal(decoded[:512], torch.zeros(512))
    assert torch.equal(error[:512], values[:512])
    torch.testing.assert_close(decoded[512:], values[512:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("numel", [0, 1, 7, 1000, 4096, 5000])
@pytest.mark.parametrize(("size", "align"), [(1, 1), (2, 4), (3, 256)])
def test_chunks_cover_the_vector_once(numel, size, align):
    layout = Layout(numel, size, 1000, align)
    covered = [i for start, stop, _ in layout.chunks for i in range(start, stop)]
    assert covered == list(range(numel))
    assert all(part % align == 0 and stop - start <= size * part for start, stop, part in layout.chunks)
    assert numel <= layout.padded < numel + size * align
    # Chunk by chunk the padded numbers come one after the other, so that what is kept of them can lie in one vector.
    assert all(size * part == stop - start for start, stop, part in layout.chunks[:-1])


@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("size", [5, 3000])
@pytest.mark.parametrize("num_replicas", [2, 3, 4])
@pytest.mark.parametrize("wire", ROUNDING)
def test_the_center_receives_everything_but_the_last_errors(wire, num_replicas, size, lent, monkeypatch):
    """Exchanges and abstentions, in one chunk and in several: in float64 nothing is lost, and all copies are one."""
    monkeypatch.setitem(_replicated_center._CHUNK_BYTES, "cpu", 8192)

    def body(replica, store):
        generator = torch.Generator().manual_seed(replica)
        pushed = torch.zeros(size, dtype=torch.float64)
        with open_center(replica, store, wire, num_replicas=num_replicas, size=size, dtype=torch.float64) as center:
            for turn in range(12):
                if (turn + replica) % 5 == 0:
                    center.abstain()
                    continue
                delta = torch.randn(size, generator=generator, dtype=torch.float64)
                if lent:
                    center.exchange(center.borrow().copy_(delta), lambda x, c: None, scale=0.25).done()
                else:
                    center.push(delta.mul_(0.25), read_at=center.pull().clock)
                pushed += delta if not lent else 0.25 * delta
            return pushed, center.pull().value.clone(), kept(center)

    pushed, values, errors = zip(*run_threads(body, num_replicas), strict=True)
    assert all(torch.equal(value, values[0]) for value in values[1:])
    missing = torch.linspace(-1, 1, size, dtype=torch.float64) + sum(pushed) - values[0]
    assert float(missing.abs().max()) > 1e-4  # or there was no rounding
    own = sum(error["own"][:size] for error in errors)
    codec = codec_of(wire, values[0])
    summed = torch.zeros_like(errors[0]["own"])
    if num_replicas > 2:
        first = 0
        for start, _, part in Layout(size, num_replicas, 8192 // 8, codec.align).chunks:
            for replica in range(num_replicas):
                summed[start + replica * part :][:part] = errors[replica]["summed"][first : first + part]
            first += part
    torch.testing.assert_close(missing, own + summed[:size], rtol=0, atol=1e-13)


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_what_is_too_small_to_travel_arrives_in_the_end(num_replicas):
    """One number sets the unit of its block; of a tenth of a unit nothing would ever come."""

    def body(replica, store):
        delta = torch.full((256,), 1e-3 * (1 + replica) / 3)
        delta[0] = 1.0
        with open_center(replica, store, "int8", num_replicas=num_replicas, size=256) as center:
            for _ in range(100):
                center.push(delta, read_at=center.pull().clock)
            return center.pull().value - torch.linspace(-1, 1, 256)

    total = sum(1 + replica for replica in range(num_replicas)) / 3
    last_errors = 2 * num_replicas * STEP["int8"]  # of each replica's delta, and of a sum that many times as large
    for moved in run_threads(body, num_replicas):
        torch.testing.assert_close(moved[1:], torch.full((255,), 0.1 * total), rtol=0, atol=last_errors)


@pytest.mark.parametrize("num_replicas", [2, 3])
@pytest.mark.parametrize("wire", ROUNDING)
def test_who_abstains_keeps_its_error(wire, num_replicas):
    """And where all abstain, nothing moves at all, the errors of sums neither."""

    def body(replica, store):
        with open_center(replica, store, wire, num_replicas=num_replicas, size=3000) as center:
            center.push(torch.randn(3000, generator=torch.Generator().manual_seed(replica)), read_at=0)
            center.drain()
            first = kept(center)
            if replica == 0:
                center.abstain()
            else:
                center.push(torch.randn(3000), read_at=center.pull().clock)
            center.drain()
            second, value = kept(center), center.value.clone()
            center.abstain()
            center.drain()
            assert torch.equal(center.value, value)
            return first, second, kept(center)

    for replica, (first, second, third) in enumerate(run_threads(body, num_replicas)):
        assert float(first["own"].abs().max()) > 0
        assert torch.equal(first["own"], second["own"]) == (replica == 0)
        assert torch.equal(second["own"], third["own"])
        assert torch.equal(second["summed"], third["summed"])
        if num_replicas == 3:
            assert not torch.equal(first["summed"], second["summed"])


@pytest.mark.parametrize("wire", ROUNDING)
def test_what_is_not_finite_stays_out_of_the_errors(wire):
    def body(replica, store):
        with open_center(replica, store, wire) as center:
            if replica == 1:
                with pytest.raises(NonFiniteDeltaError, match="replica 1: 1000 of 1000"):
                    center.push(torch.full((1000,), math.nan), read_at=0)
                center.abstain()
            else:
                center.push(torch.ones(1000), read_at=0)
            return center.pull().value.clone(), kept(center)["own"]

    for value, own in run_threads(body, 2):
        torch.testing.assert_close(value, torch.linspace(-1, 1, 1000) + 1)
        assert bool(torch.isfinite(own).all())


@pytest.mark.parametrize("num_replicas", [2, 3])
@pytest.mark.parametrize("wire", ROUNDING)
def test_a_restored_center_goes_on_to_the_last_bit(wire, num_replicas):
    def body(replica, store):
        def push(center, seed):
            generator = torch.Generator().manual_seed(10 * seed + replica)
            center.push(torch.randn(1000, generator=generator), read_at=center.pull().clock)
            center.drain()
            return center.value.clone()

        prefixes = [dist.PrefixStore(name, store) for name in "ab"]
        rules = [MomentumCenter(0.5), MomentumCenter(0.5)]
        with open_center(replica, prefixes[0], wire, num_replicas=num_replicas, rule=rules[0]) as center:
            push(center, 1)
            state, value = center.state_dict(), center.value.clone()
            expected = [push(center, 2), push(center, 3)]
        with open_center(replica, prefixes[1], wire, num_replicas=num_replicas, rule=rules[1]) as center:
            center.load_state_dict(state, value)
            return expected, [push(center, 2), push(center, 3)]

    for expected, found in run_threads(body, num_replicas):
        assert torch.equal(torch.stack(found), torch.stack(expected))


@pytest.mark.parametrize(("saved_with", "size"), [("bfloat16", 600), ("float32", 1000)])
def test_errors_of_other_parameters_or_wires_are_dropped(saved_with, size):
    def body(replica, store):
        with open_center(replica, dist.PrefixStore("a", store), saved_with, size=size) as center:
            center.push(torch.full((size,), 0.3), read_at=0)
            center.drain()
            state = center.state_dict()
        with open_center(replica, dist.PrefixStore("b", store), "bfloat16") as center:
            center.push(torch.full((1000,), 0.3), read_at=0)
            center.drain()
            assert kept(center)["own"].any()
            center.load_state_dict(state, torch.zeros(1000))
            return bool(kept(center)["own"].any()), center.clock

    assert run_threads(body, 2) == [(False, 2), (False, 2)]


@pytest.mark.parametrize(
    ("wire", "num_replicas", "payload"),
    [
        ("bfloat16", 1, 0),
        ("bfloat16", 2, 2 * 10_000),
        ("bfloat16", 4, 1.5 * 2 * 10_000),
        ("int8", 2, 10_240 * (1 + 4 / 256)),
        ("int8", 4, 1.5 * 10_240 * (1 + 4 / 256)),
    ],
)
def test_bytes(wire, num_replicas, payload):
    def body(replica, store):
        with open_center(replica, store, wire, num_replicas=num_replicas, size=10_000) as center:
            for _ in range(3):
                center.push(torch.ones(10_000), read_at=center.pull().clock)
            center.drain()
            return center.traffic.bytes_sent

    header = 2 * (num_replicas - 1) / num_replicas * 4 * 3  # how many deltas, and two slots
    assert run_threads(body, num_replicas) == [3 * int(payload + header)] * num_replicas


def test_one_replica_rounds_nothing():
    delta = torch.randn(1000)
    with open_center(0, dist.HashStore(), "int8", num_replicas=1) as center:
        center.push(delta, read_at=0)
        assert torch.equal(center.pull().value, torch.linspace(-1, 1, 1000) + delta)
        assert center.state_dict()["rounding"] is None


@pytest.mark.parametrize("wire", ROUNDING)
def test_slots_travel_as_they_are(wire):
    def body(replica, store):
        with open_center(replica, store, wire) as center:
            center.announcement.copy_(torch.tensor([1 + 2.0**-20, 100.0 * replica]))
            center.push(torch.ones(1000), read_at=0)
            center.drain()
            return center.announced.clone()

    for announced in run_threads(body, 2):
        assert torch.equal(announced, torch.tensor([2 + 2.0**-19, 100.0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_center_on_a_device():
    """With one replica: NCCL takes no second one on the same device."""
    start = torch.arange(1e7, device="cuda")
    center = AllReduce().open(
        start, replica=0, num_replicas=1, rule=Addition(), store=dist.HashStore(), timeout=TIMEOUT, num_slots=2
    )
    with center:
        for turn in range(3):
            pending = center.exchange(center.borrow().copy_(center.value).add_(8), torch.Tensor.sub_, scale=0.5)
            assert torch.equal(pending.wait(), torch.full_like(start, 8))
            pending.done()
            assert torch.equal(center.pull().value, start + 4 * (turn + 1))
        center.push(torch.ones_like(start), read_at=center.clock)
        assert torch.equal(center.pull().value, start + 13)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("wire", ROUNDING)
def test_a_code_is_the_same_on_a_device(wire):
    values = torch.randn(100 * 1024, generator=torch.Generator().manual_seed(0))
    codes = []
    for device in ("cpu", "cuda"):
        error = values.to(device, copy=True)
        codec = codec_of(wire, error)
        codes.append(torch.empty(codec.size(values.numel()), dtype=torch.uint8, device=device))
        codec.encode_(error, codes[-1])
    difference = codes[0].view(torch.int8).int() - codes[1].cpu().view(torch.int8).int()
    assert float((difference != 0).float().mean()) < 1e-3  # a division may round otherwise

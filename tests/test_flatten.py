"""Parameters as one flat vector."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_easgd.flatten import ParameterVector, accumulation_dtype, coupled_parameters

SHAPES = [(2, 3), (), (4,), (0,), (2, 0, 3), (1, 1, 2, 2)]


def make(dtype: torch.dtype = torch.float32, *, kind: Callable[[Tensor], Tensor] = nn.Parameter) -> list[Tensor]:
    """Returns tensors of all shapes that hold 0, 1, 2, ... in order: numbers that every dtype has."""
    tensors, first = [], 0
    for shape in SHAPES:
        size = torch.Size(shape).numel()
        tensors.append(kind(torch.arange(first, first + size, dtype=dtype).view(shape)))
        first += size
    return tensors


NUMEL = 6 + 1 + 4 + 0 + 0 + 4


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float32], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([], torch.float32),
    ],
)
def test_accumulation_dtype(dtypes, expected):
    tensors = [torch.zeros(1, dtype=d) for d in dtypes]
    assert accumulation_dtype(tensors) == expected
    assert ParameterVector(tensors).dtype == expected
    assert ParameterVector(iter(tensors)).read().dtype == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_read_add_and_write(dtype):
    parameters = make(dtype)
    vector = ParameterVector(parameters)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pointers = [p.data_ptr() for p in parameters]
    numbers = torch.arange(NUMEL, dtype=wide)

    assert vector.numel == NUMEL
    value = vector.read()
    assert value.dtype == wide
    assert torch.equal(value, numbers)
    value.fill_(-1)
    assert torch.equal(vector.read(), numbers), "read gives a copy"

    vector.add_(numbers, alpha=2.0)
    assert torch.equal(vector.read(), 3 * numbers)
    vector.add_(numbers)
    assert torch.equal(vector.read(), 4 * numbers)
    vector.write_(numbers.flip(0))
    assert torch.equal(vector.read(), numbers.flip(0))

    assert [p.data_ptr() for p in parameters] == pointers, "the storage is never rebound"
    assert [tuple(p.shape) for p in parameters] == SHAPES
    assert all(p.dtype == dtype and p.requires_grad and p.is_leaf and p.grad is None for p in parameters)


def test_read_reuses_the_buffer():
    vector = ParameterVector(make())
    out = torch.full((NUMEL,), -1.0)
    pointer = out.data_ptr()
    assert vector.read(out) is out
    assert out.data_ptr() == pointer
    assert torch.equal(out, torch.arange(float(NUMEL)))
    assert not out.requires_grad


def test_views_have_the_parameters_shapes_and_share_the_vector():
    vector = ParameterVector(make())
    flat = vector.read()
    views = vector.views(flat)
    assert [tuple(v.shape) for v in views] == SHAPES
    views[1].fill_(100)
    assert flat[6] == 100


@pytest.mark.parametrize("size", [NUMEL - 1, NUMEL + 1])
def test_a_vector_of_another_length_is_refused(size):
    vector = ParameterVector(make())
    for use in (vector.read, vector.add_, vector.write_, vector.distance):
        with pytest.raises(RuntimeError, match="split_sizes"):
            use(torch.zeros(size))
    assert torch.equal(vector.read(), torch.arange(float(NUMEL)))


def test_distance():
    vector = ParameterVector(make())
    value = vector.read()
    assert vector.distance(value) == 0
    value[0] += 3
    value[7] -= 4
    assert vector.distance(value) == pytest.approx(5)
    assert isinstance(vector.distance(value), float)
    assert torch.equal(vector.read(), torch.arange(float(NUMEL)))


def test_distance_of_half_precision_does_not_overflow():
    vector = ParameterVector([torch.full((100,), 3e4, dtype=torch.float16)])
    assert vector.distance(torch.zeros(100)) == pytest.approx(3e5, rel=1e-3)


def test_no_parameters():
    vector = ParameterVector([])
    assert vector.numel == 0
    value = vector.read()
    assert value.shape == (0,)
    vector.add_(value)
    vector.write_(value)
    assert vector.distance(value) == 0


def test_order_of_coordinates_does_not_depend_on_memory_format():
    plain = nn.Conv2d(3, 4, 2)
    strided = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    strides = strided.weight.stride()
    assert strides != plain.weight.stride()
    a, b = ParameterVector(plain.parameters()), ParameterVector(strided.parameters())
    pointer = strided.weight.data_ptr()
    assert torch.equal(a.read(), b.read())
    assert torch.equal(a.read()[:48], plain.weight.detach().flatten())
    update = torch.randn(a.numel, generator=torch.Generator().manual_seed(0))
    for vector in (a, b):
        vector.add_(update, alpha=0.5)
    assert torch.equal(plain.weight, strided.weight)
    for vector in (a, b):
        vector.write_(update)
    assert torch.equal(plain.weight, strided.weight)
    assert torch.equal(b.read(), update)
    assert b.distance(a.read()) == 0
    assert strided.weight.stride() == strides
    assert strided.weight.data_ptr() == pointer


def test_slices_of_a_larger_tensor():
    whole = torch.zeros(4, 4)
    vector = ParameterVector([whole[:, 1], whole[2:, 2:].t()])
    vector.write_(torch.arange(1.0, 9.0))
    assert whole.tolist() == [[0, 1, 0, 0], [0, 2, 0, 0], [0, 3, 5, 7], [0, 4, 6, 8]]
    assert vector.read().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_mixed_dtypes_share_the_widest_vector():
    parameters = [torch.ones(2, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64)]
    vector = ParameterVector(parameters)
    assert vector.read().dtype == torch.float64
    vector.add_(torch.full((6,), 2**-20, dtype=torch.float64))
    assert [float(p[0]) for p in parameters] == [1.0, 1 + 2**-20, 1 + 2**-20]
    vector.write_(torch.full((6,), 1 + 2**-40, dtype=torch.float64))
    assert [float(p[0]) for p in parameters] == [1.0, 1.0, 1 + 2**-40]
    assert [p.dtype for p in parameters] == [torch.bfloat16, torch.float32, torch.float64]


def test_dtype_can_be_chosen():
    vector = ParameterVector(make(), torch.float64)
    assert vector.read().dtype == torch.float64
    vector.write_(vector.read() + 1)
    assert torch.equal(vector.read(), torch.arange(1, NUMEL + 1, dtype=torch.float64))


def test_half_precision_updates_are_scaled_before_they_are_rounded():
    for update, alpha in ((1e6, 1e-6), (1e-6, 1e6)):  # neither is a float16 by itself
        x = torch.ones(1, dtype=torch.float16)
        ParameterVector([x]).add_(torch.full((1,), update), alpha=alpha)
        assert float(x) == 2


def test_autograd_sees_nothing():
    parameter = nn.Parameter(torch.ones(2))
    vector = ParameterVector([parameter])
    vector.add_(torch.ones(2))
    value = vector.read()
    assert not value.requires_grad
    (parameter * 3).sum().backward()
    assert parameter.grad.tolist() == [3, 3]


def test_moves_below_the_resolution_of_half_precision_add_up():
    x = torch.ones(3, dtype=torch.bfloat16)
    vector = ParameterVector([x])
    for _ in range(1024):
        vector.add_(torch.full((3,), 2.0**-12))  # bfloat16 has no number between 1 and 1 + 2^-7
    assert x.tolist() == [1.25] * 3
    assert vector.read().tolist() == [1.25] * 3
    vector.add_(torch.full((3,), 2.0**-12))
    assert x.tolist() == [1.25] * 3
    assert vector.read().tolist() == [1.25 + 2**-12] * 3
    assert vector.distance(torch.full((3,), 1.25)) == pytest.approx(3**0.5 * 2**-12)


def test_what_rounding_took_stays_with_its_parameter():
    parameters = [torch.zeros(2), torch.ones(2, dtype=torch.bfloat16), torch.zeros(()), torch.ones(1).bfloat16()]
    vector = ParameterVector(parameters)
    value = torch.tensor([1.0, 2.0, 1 + 2**-12, 1 - 2**-12, 3.0, 2 + 2**-12])
    vector.write_(value)
    assert torch.equal(vector.read(), value)
    assert vector.distance(value) == 0
    parameters[1] += 1  # an optimizer moves the parameter itself
    assert torch.equal(vector.read(), value + torch.tensor([0, 0, 1.0, 1.0, 0, 0]))


def test_parameters_of_the_vectors_dtype_have_no_remainder():
    vector = ParameterVector(make())
    vector.add_(torch.ones(NUMEL))
    vector.write_(torch.ones(NUMEL))
    assert vector.remainder is None


# --- which parameters -------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def sgd(*parameters: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def names(module: nn.Module, *optimizers: torch.optim.Optimizer) -> list[list[str]]:
    return [list(coupling) for coupling in coupled_parameters(module, optimizers)]


def test_coupled_parameters_by_name():
    module = nn.Linear(2, 2)
    (coupling,) = coupled_parameters(module, [sgd(*module.parameters())])
    assert coupling["weight"] is module.weight
    assert coupling["bias"] is module.bias


def test_tied_parameters_count_once():
    module = Tied()
    assert names(module, sgd(*module.parameters())) == [["embed.weight", "body.weight", "body.bias"]]
    (coupling,) = coupled_parameters(module, [sgd(*module.parameters())])
    vector = ParameterVector(coupling.values())
    before = module.head.weight.detach().clone()
    vector.add_(torch.ones(vector.numel))
    assert torch.equal(module.head.weight, before + 1)
    assert module.head.weight is module.embed.weight


def test_order_is_the_modules_and_not_the_optimizers():
    module = Tied()
    own = list(module.parameters())
    groups = torch.optim.SGD([{"params": [own[2]]}, {"params": [own[1], own[0]], "lr": 0.01}], lr=0.1)
    assert names(module, groups) == [["embed.weight", "body.weight", "body.bias"]]


def test_frozen_parameters_are_excluded():
    module = Tied()
    optimizer = sgd(*module.parameters())
    module.body.weight.requires_grad_(False)
    assert names(module, optimizer) == [["embed.weight", "body.bias"]]
    module.requires_grad_(False)
    assert names(module, optimizer) == [[]]


def test_parameters_without_a_gradient_belong():
    module = Tied()
    module.body(torch.ones(3)).sum().backward()
    assert module.embed.weight.grad is None
    assert names(module, sgd(*module.parameters())) == [["embed.weight", "body.weight", "body.bias"]]


def test_a_parameter_without_an_optimizer_is_in_no_coupling():
    module = Tied()
    assert names(module, sgd(module.body.weight)) == [["body.weight"]]
    assert names(module) == []


def test_a_parameter_of_two_optimizers_belongs_to_the_first():
    module = Tied()
    first, second = sgd(module.body.weight, module.embed.weight), sgd(*module.parameters())
    assert names(module, first, second) == [["embed.weight", "body.weight"], ["body.bias"]]
    assert names(module, second, first) == [["embed.weight", "body.weight", "body.bias"], []]


def test_foreign_parameters_are_refused():
    module = nn.Linear(2, 2)
    foreign = nn.Linear(2, 2)
    optimizers = [sgd(*module.parameters()), torch.optim.Adam([module.bias, *foreign.parameters()])]
    text = (
        "optimizer 1 (Adam) holds 2 parameters that are not the module's; register them as attributes of the module, "
        "or leave them out of the optimizer"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        coupled_parameters(module, optimizers)
    foreign.requires_grad_(False)
    assert names(module, *optimizers) == [["weight", "bias"], []]


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match=r"<with torch.complex64>\): only real floating tensors average"):
        ParameterVector([torch.zeros(2, dtype=torch.complex64)])


def test_moves_below_a_narrow_parameters_resolution_add_up():
    parameter = torch.ones(3, dtype=torch.bfloat16)
    vector = ParameterVector([parameter, torch.ones(2)])
    step = torch.full((5,), 1e-4)  # bfloat16 resolves 8e-3 at 1
    for _ in range(1000):
        vector.add_(step)
    assert torch.equal(parameter, torch.full((3,), 1.1, dtype=torch.bfloat16))
    torch.testing.assert_close(vector.read(), torch.full((5,), 1.1), atol=1e-4, rtol=0)
    assert vector.distance(torch.full((5,), 1.1)) < 1e-4

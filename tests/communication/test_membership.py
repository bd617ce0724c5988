"""Which replicas there are is read at each exchange: a method follows a membership that changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_easgd import EASGD, LocalSGD
from lightning_easgd.algorithms import Algorithm
from lightning_easgd.communication import Completed, Membership
from lightning_easgd.flatten import ParameterVector
from lightning_easgd.interfaces import Snapshot


class Changing:
    """A center at zero that keeps what it is given, and whose membership the test changes."""

    def __init__(self, num_replicas: int) -> None:
        self.membership = Membership.constant(replica=0, num_replicas=num_replicas)
        self.received: list[Tensor] = []
        self.value = torch.zeros(2)

    @property
    def num_replicas(self) -> int:
        return self.membership.size

    @property
    def replica(self) -> int:
        return self.membership.mine

    def tell(self, numbers: Any) -> None: ...

    def pull(self) -> Snapshot:
        return Snapshot(self.value, 0)

    def push(self, delta: Tensor, *, read_at: int) -> None:
        self.received.append(delta.clone())

    def borrow(self) -> Tensor:
        return torch.empty(2)

    def exchange(self, x: Tensor, delta: Callable[[Tensor, Tensor], None], *, scale: float = 1.0) -> Completed:
        delta(x, self.value)
        self.received.append(scale * x)
        return Completed(x)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [(EASGD(period=1, moving_rate=0.1, center_rate=0.6), [0.3, 0.2]), (LocalSGD(period=1), [0.5, 1 / 3])],
    ids=["EASGD: beta / p", "local SGD: 1 / p"],
)
def test_an_exchange_has_the_number_of_replicas_that_there_are(algorithm: Algorithm, expected):
    center = Changing(2)
    sent = []
    for members in (center.membership, center.membership.changed(joined=("new",))):
        center.membership = members
        center.received.clear()
        parameter = torch.nn.Parameter(torch.ones(2))
        vector = ParameterVector([parameter])
        own = LocalSGD(period=1) if isinstance(algorithm, LocalSGD) else algorithm
        own.start(vector, center)

        def update(parameter: torch.nn.Parameter = parameter) -> None:
            with torch.no_grad():
                parameter += 1.0 if isinstance(algorithm, LocalSGD) else 0.0

        own.step(vector, center, update)
        sent.append(float(center.received[-1][0]))
    assert [abs(number) for number in sent] == pytest.approx(expected)


def test_a_membership_changes_by_generations():
    three = Membership.constant(replica=1, num_replicas=3)
    assert (three.size, three.mine, three.generation) == (3, 1, 0)
    fewer = three.changed(left=("0",))
    assert (fewer.replicas, fewer.mine, fewer.generation) == (("1", "2"), 0, 1)
    again = fewer.changed(joined=("spot-7",), left=("2",))
    assert (again.replicas, again.mine, again.generation) == (("1", "spot-7"), 0, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Membership(("a", "a"), 0), "each must have a name of its own"),
        (lambda: Membership(("a",), 1), r"Membership\(mine=1\): must be at least 0 and below 1"),
        (lambda: Membership(("a", "b"), 0).changed(left=("a",)), "this replica, 'a', cannot be without itself"),
        (lambda: Membership(("a", "b"), 0).changed(left=("c",)), "must be among"),
        (lambda: Membership(("a", "b"), 0).changed(joined=("b",)), "each must have a name of its own"),
    ],
    ids=["twice", "out of range", "itself", "unknown", "there already"],
)
def test_what_no_membership_can_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

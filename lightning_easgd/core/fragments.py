"""Fragments: the parameters in several parts with a center each; their exchanges are spread over a period.

The schedule of Streaming DiLoCo (arXiv:2501.18512): with n fragments the k-th is due ``k period / n`` steps after the
first, so that each parameter is exchanged once per period, and the peak of the traffic falls n-fold. The algorithm's
own arithmetic decides what happens in a fragment's exchange.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from lightning_easgd.algorithms import Algorithm
from lightning_easgd.core.coupling import Coupling

__all__ = ["by_fragment", "first_clock", "refuse_fragments", "step_fragments"]


def by_fragment(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], number: int
) -> list[dict[str, nn.Parameter]]:
    """Returns, for each of ``number`` fragments, which of ``parameters`` are in it, by name, in the module's order.

    All of the module's parameters are dealt out, the largest first and each to the fragment that has least, so that a
    parameter's place does not depend on the optimizer that trains it or on when it is thawed. No parameter is cut.

    Raises:
        ValueError: the module has fewer parameters than there are to be fragments.
    """
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    if len(sizes) < number:
        raise ValueError(
            f"EASGDStrategy(fragments={number}): the module has {len(sizes)} parameter tensors, of which none is cut; "
            f"at most fragments={len(sizes)}"
        )
    load = [0] * number
    fragment_of = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        lightest = load.index(min(load))
        fragment_of[name] = lightest
        load[lightest] += max(sizes[name], 1)
    fragments: list[dict[str, nn.Parameter]] = [{} for _ in range(number)]
    for name, parameter in parameters.items():
        fragments[fragment_of[name]][name] = parameter
    return fragments


def first_clock(index: int, number: int, algorithm: Algorithm) -> int:
    """Returns what the clock of a fragment's algorithm begins with, so that its exchanges have their place."""
    return (algorithm.initial_clock - index * algorithm.period // number) % algorithm.period


def step_fragments(
    fragments: Sequence[Coupling],
    local_update: Callable[[], None],
    *,
    recover: Callable[[Sequence[Tensor]], None] | None,
    at: int = 0,
) -> None:
    """Performs one iteration of every fragment, around one local update of them all. Blocks as their exchanges do.

    Args:
        fragments: all of one optimizer.
        local_update: the optimizer's step; called exactly once.
        recover: called with all parameters where one fragment's delta is not finite, after the whole replica was put on
            the center; see ``Coupling.step``.
        at: what the fragments' reports are marked with.
    """

    def recover_all(failed: Coupling) -> None:
        assert recover is not None
        for fragment in fragments:
            if fragment is not failed:
                fragment.reset()
        recover([p for fragment in fragments for p in fragment.vector.parameters])

    def step(fragment: Coupling, update: Callable[[], None]) -> None:
        fragment.step(update, recover=None if recover is None else partial(recover_all, fragment), at=at)

    # Fragments that do not exchange in this step run before the local update. Only those that exchange wrap it.
    update = local_update
    for fragment in fragments:
        if fragment.algorithm.is_due or fragment.algorithm.is_ending:
            update = partial(step, fragment, update)
        else:
            step(fragment, _nothing)
    update()


def _nothing() -> None:
    pass


def refuse_fragments(algorithm: Algorithm, number: object, *, layerwise: bool, slack: int | None) -> None:
    """Raises ``ValueError`` where an exchange cannot be cut into ``number`` fragments. Local and cheap."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"EASGDStrategy(fragments={number!r}): must be a number of fragments >= 1")
    if number == 1:
        return
    if not algorithm.separable:
        raise ValueError(
            f"EASGDStrategy({algorithm!r}, fragments={number}): this algorithm's exchange is one of all parameters; "
            "leave fragments out, or take EASGD(), EAMSGD() or LocalSGD()"
        )
    if layerwise:
        raise ValueError(
            f"EASGDStrategy(layerwise=True, fragments={number}): every layer has an exchange of its own as it is; "
            "leave one of the two out"
        )
    if slack is not None:
        raise ValueError(
            f"EASGDStrategy(slack={slack}, fragments={number}): a gate lets a replica through with all it has; leave "
            "one of the two out"
        )
    if number > algorithm.period:
        raise ValueError(
            f"EASGDStrategy({algorithm!r}, fragments={number}): each has a step of the period to itself; at most "
            f"fragments={algorithm.period}, or a longer period"
        )

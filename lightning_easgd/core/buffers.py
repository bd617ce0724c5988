"""The parts of the center beside the weights that optimizers train: buffers, and parameters moved by hand.

A replica's buffers follow its own data and weights. The center has the mean over replicas of running statistics and of
parameters that no optimizer holds (momentum encoders, target networks). It has replica 0's value of every other buffer.
Batch-norm statistics may instead be estimated anew, with the center's weights, on training data.
"""

import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.optim.swa_utils
from torch import Tensor, nn

from lightning_easgd.communication._c10d import Group
from lightning_easgd.core.tensors import (
    broadcast,
    checksums,
    copy_of,
    form,
    gather_numbers,
    in_common,
    is_dense,
    is_equal,
    write,
)

__all__ = ["BufferRules", "CenterBuffers", "Rule"]

Rule = Literal["mean", "replica0", "own"]

_RULES = ("mean", "replica0", "own")
_MEAN_NUMBERS = 1 << 22  # float64 numbers of parameters that are averaged in one message


class BufferRules:
    """The rule by which the center gets each buffer, and each parameter that no optimizer holds.

    Args:
        choices: the user's rules, by pattern of names or by type of module; the first that fits counts.

    Raises:
        ValueError: a key is not a name, a pattern or a module type, or a rule is not known.
    """

    def __init__(self, choices: Mapping[Any, Rule] | None = None) -> None:
        if choices is not None and not isinstance(choices, Mapping):
            raise ValueError(
                f"EASGDStrategy(buffers={choices!r}): must map names, patterns of names or module types to 'mean', "
                "'replica0' or 'own', such as {'encoder.queue': 'replica0', MyNorm: 'mean'}, or be None"
            )
        self._choices = dict(choices or {})
        for key, rule in self._choices.items():
            if not (isinstance(key, str) and key) and not (isinstance(key, type) and issubclass(key, nn.Module)):
                raise ValueError(
                    f"EASGDStrategy(buffers={{{key!r}: ...}}): must be a name, a pattern of names such as "
                    "'*.running_*', or a type of module"
                )
            if rule not in _RULES:
                raise ValueError(
                    f"EASGDStrategy(buffers={{{key!r}: {rule!r}}}): must be one of {', '.join(map(repr, _RULES))}"
                )

    def of(self, module: nn.Module) -> dict[str, Rule]:
        """Returns the rule of every buffer and parameter of a module; shared ones under each of their names."""
        ignored = self.ignored(module)
        rules: dict[str, Rule] = {}
        for prefix, owner in module.named_modules(remove_duplicate=False):
            for name, tensor in (*owner._buffers.items(), *owner._parameters.items()):
                full = f"{prefix}.{name}" if prefix else name
                if tensor is not None:
                    rules[full] = "own" if full in ignored else self._rule(owner, name, full, tensor)
        return rules

    @staticmethod
    def ignored(module: nn.Module) -> set[str]:
        """Returns the names of what stays each rank's own, even if an optimizer holds it: DDP's way to ask for that."""
        return set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))

    def not_shared(self, module: nn.Module) -> set[str]:
        """Returns the names of what does not begin with rank 0's value: what is ignored, and buffers of rule "own"."""
        rules = self.of(module)
        return self.ignored(module) | {n for n, _ in module.named_buffers() if rules[n] == "own"}

    def unused(self, module: nn.Module) -> list[str]:
        """Returns the patterns that fit no buffer or parameter of the module."""
        names = self.of(module)
        patterns = (key for key in self._choices if isinstance(key, str))
        return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]

    def _rule(self, owner: nn.Module, name: str, full: str, tensor: Tensor) -> Rule:
        rule = self._default(owner, name)
        for key, choice in self._choices.items():
            if fnmatchcase(full, key) if isinstance(key, str) else isinstance(owner, key):
                rule = choice
                break
        can_average = is_dense(tensor) and (tensor.is_floating_point() or tensor.is_complex())
        return "replica0" if rule == "mean" and not can_average else rule

    @staticmethod
    def _default(owner: nn.Module, name: str) -> Rule:
        if name in owner._parameters:
            return "mean"
        if _is(owner, "torchmetrics.metric", "Metric"):  # reduces what it counts by itself
            return "own"
        observes = _is(owner, "torch.ao.quantization.observer", "UniformQuantizationObserverBase")
        if observes and name in ("min_val", "max_val"):
            # A histogram's range belongs to its bins.
            return "replica0" if "histogram" in owner._buffers else "mean"
        return (
            "mean" if isinstance(owner, nn.modules.batchnorm._NormBase) or name.startswith("running_") else "replica0"
        )


class CenterBuffers:
    """Puts the center's buffers, and parameters that no optimizer holds, into a module and the replica's back.

    A buffer whose form (dtype, shape, layout) is not the same on all ranks stays each rank's own. One that is written
    while the center is in the module keeps what was written, as in any training; statistics that are averaged go back.

    Args:
        module: the module that has the buffers; a shared buffer counts once.
        group: a process group over all ranks; None for one.
        num_ranks: its size.
        members: a process group over the ranks of this replica, which all have the buffers of the first rank; None for
            one rank.
        rank: this one in ``group``.
        replica_size: size of ``members``.
        device: on which the groups send.
        rules: what the center has of each.
        held: returns the parameters that couplings move, which are not this object's matter.
    """

    def __init__(
        self,
        module: nn.Module,
        group: Group | None,
        num_ranks: int,
        members: Group | None = None,
        *,
        rank: int = 0,
        replica_size: int = 1,
        device: torch.device | None = None,
        rules: BufferRules | None = None,
        held: Callable[[], Iterable[Tensor]] = tuple,
    ) -> None:
        self._module, self._group, self._num_ranks, self._members = module, group, num_ranks, members
        self._rank, self._replica_size = rank, replica_size
        self._device = torch.device("cpu") if device is None else device
        self._rules = BufferRules() if rules is None else rules
        self._held = held
        self._own: dict[str, Tensor] | None = None
        self._center: dict[str, Tensor] | None = None
        self._differing: set[str] | None = None  # parameters that the last gathering found to be others by rank
        self._named: set[str] = set()  # in warnings

    @torch.no_grad()
    def gather(self) -> None:
        """Computes the center's buffers from the replicas'. Collective and blocking.

        Two messages of the size of the buffers, one of the parameters that no optimizer holds and that differ, and up
        to four small ones.
        """
        rules = self._rules.of(self._module)
        buffers = {n: b for n, b in self._module.named_buffers() if rules[n] != "own"}
        if self._members is not None:  # what DDP does at the next forward
            self._take_from_first(self._members, buffers)
            buffers = {n: b for n, b in self._module.named_buffers() if n in buffers}
        if self._group is None:
            self._center = {n: copy_of(b) for n, b in buffers.items()}
            self._differing = set()
            return
        free = {n: p for n, p in self._free().items() if rules[n] != "own"}
        common = self._in_common(self._group, self._num_ranks, {**buffers, **free}, "on all ranks")
        buffers = {n: b for n, b in buffers.items() if n in common}
        self._center = self._average(self._group, buffers, rules)
        free = self._that_differ(self._group, {n: p for n, p in free.items() if n in common})
        self._differing = set(free)
        for pack in _packs(free):
            self._center.update(self._average(self._group, pack, rules))
        for pattern in self._rules.unused(self._module):
            if pattern not in self._named:
                self._named.add(pattern)
                self._warn(f"EASGDStrategy(buffers={{{pattern!r}: ...}}): fits no buffer or parameter of the module")

    def _free(self) -> dict[str, nn.Parameter]:
        """Returns the parameters that no coupling moves, by name."""
        held = {id(p) for p in self._held()}
        return {n: p for n, p in self._module.named_parameters() if id(p) not in held}

    def _take_from_first(self, members: Group, buffers: Mapping[str, Tensor]) -> None:
        common = self._in_common(members, self._replica_size, buffers, "on all ranks of a replica")
        names = [n for n in buffers if n in common]
        values = [copy_of(buffers[n]) for n in names]
        received = broadcast(members, values, self._rank % self._replica_size, self._device)
        for name, value in zip(names, received, strict=True):
            write(buffers[name], value)

    def _in_common(self, group: Group, size: int, tensors: Mapping[str, Tensor], where: str) -> Collection[str]:
        """Returns the names of what has one form on all ranks; says once what has not."""
        common, others = in_common(group, size, self._device, tensors)
        self._say(
            others,
            f"not the same shape and dtype {where}, so that nothing is averaged: each rank keeps its own, and a "
            "checkpoint has rank 0's",
        )
        return common

    def _say(self, names: Collection[str], what: str) -> None:
        if new := sorted(set(names) - self._named):
            self._named.update(new)
            self._warn(f"EASGDStrategy: the buffers {', '.join(map(repr, new))} have {what}")

    def _warn(self, message: str) -> None:
        if self._rank == 0:
            warnings.warn(message, stacklevel=2)

    def _that_differ(self, group: Group, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Returns the parameters that are not equal on all ranks: a frozen one costs no message of its size."""
        if not parameters:
            return {}
        rows = gather_numbers(group, self._num_ranks, checksums(list(parameters.values()), self._device))
        is_same = torch.stack([row == rows[0] for row in rows]).all(0).tolist()
        return {n: p for (n, p), same in zip(parameters.items(), is_same, strict=True) if not same}

    def _average(self, group: Group, tensors: Mapping[str, Tensor], rules: Mapping[str, Rule]) -> dict[str, Tensor]:
        """Returns replica 0's values, and of those to average the mean."""
        values = broadcast(group, [copy_of(t) for t in tensors.values()], self._rank, self._device)
        center = dict(zip(tensors, values, strict=True))
        averaged = {n: _real(t) for n, t in tensors.items() if rules[n] == "mean" and t.numel()}
        if averaged:
            # As a difference to replica 0, so that constants (also masks with infinities) stay bit-identical.
            parts = []
            for name, tensor in averaged.items():
                own, first = tensor.double(), _real(center[name]).double()
                parts.append(torch.where(own == first, 0.0, own - first).flatten().to(self._device))
            difference = torch.cat(parts)
            group.allreduce([difference]).wait()
            for (name, tensor), part in zip(
                averaged.items(), difference.split_with_sizes([p.numel() for p in parts]), strict=True
            ):
                value = _real(center[name])
                change = part.view_as(value).to(value.device)
                moved = value.double() + change / self._num_ranks
                value.copy_(torch.where(change == 0, value.double(), moved).to(tensor.dtype))
        return center

    def forget(self) -> None:
        """Makes the replica's own buffers serve as the center's until the next ``gather``."""
        self._center = None

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self._module.named_buffers()), **dict(self._module.named_parameters())}

    @torch.no_grad()
    def swap_in(self) -> None:
        """Puts the buffers that ``gather`` found into the module; without them the module stays unchanged."""
        if self._center is None or self._own is not None:
            return
        tensors = self._tensors()
        self._own = {}
        for name, value in list(self._center.items()):
            if name in tensors and form(tensors[name]) == form(value):
                self._own[name] = copy_of(tensors[name])
                write(tensors[name], value)
            else:
                del self._center[name]

    def reestimate(self, inputs: Iterable[Any]) -> None:
        """Estimates batch-norm statistics anew with the weights that the module holds. Collective and blocking.

        Args:
            inputs: this replica's share of training inputs; the replicas' estimates are averaged.
        """
        norms = [m for m in self._module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not norms:
            return
        statistics = {id(b) for m in norms for b in m.buffers(recurse=False)}
        # The passes are for the statistics alone: what else they write is put back.
        others = {n: t for n, t in self._tensors().items() if n in (self._center or {}) and id(t) not in statistics}
        before = {n: copy_of(t) for n, t in others.items()}
        torch.optim.swa_utils.update_bn(inputs, self._module)
        self._write(before)
        rules = self._rules.of(self._module)
        found = {
            n: b
            for n, b in self._module.named_buffers()
            if id(b) in statistics and n in (self._center or {}) and rules[n] != "own"
        }
        with torch.no_grad():
            values = found if self._group is None else self._average(self._group, found, rules)
        if self._center is not None:
            self._center.update({n: copy_of(v) for n, v in values.items()})
            if self._group is not None:
                self._write(values)

    def _write(self, values: Mapping[str, Tensor]) -> None:
        tensors = self._tensors()
        for name, value in values.items():
            if name in tensors and form(tensors[name]) == form(value):
                write(tensors[name], value)

    @torch.no_grad()
    def swap_out(self) -> None:
        """Puts the replica's own buffers back, where the module has not written others meanwhile."""
        own, self._own = self._own, None
        if own is None:
            return
        tensors, rules = self._tensors(), self._rules.of(self._module)
        reshaped = set()
        for name, value in own.items():
            if name not in tensors or form(tensors[name]) != form(value):
                reshaped.add(name)
                if self._center is not None:
                    self._center.pop(name, None)
            elif self._is_written(name, tensors[name], rules[name]):
                assert self._center is not None
                self._center[name] = copy_of(tensors[name])
            else:
                write(tensors[name], value)
        self._say(reshaped, "changed in shape while the module held the center: what is there now stays")

    def _is_written(self, name: str, tensor: Tensor, rule: Rule) -> bool:
        """Returns whether the module has written another value over the center's, which then stays.

        Running statistics that a pass in training mode moved do not: they go on from the replica's own.
        """
        is_statistic = rule == "mean" and not isinstance(tensor, nn.Parameter)
        owner = self._module.get_submodule(name.rpartition(".")[0])
        if is_statistic or isinstance(owner, nn.modules.batchnorm._NormBase) or name not in (self._center or {}):
            return False
        assert self._center is not None
        return not is_equal(tensor, self._center[name])

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of the replica's buffers, wherever they are, and of parameters that are not the center's."""
        rules = self._rules.of(self._module)
        tensors: dict[str, Tensor] = dict(self._module.named_buffers())
        for name, parameter in self._free().items():
            if self._differing is None or name in self._differing or rules[name] == "own":
                tensors[name] = parameter
        values = {}
        for name, tensor in tensors.items():
            own = (self._own or {}).get(name)
            is_back = own is None or form(own) != form(tensor) or self._is_written(name, tensor, rules[name])
            values[name] = copy_of(tensor if own is None or is_back else own).cpu()
        transient = [n for n in values if n.rpartition(".")[2] in _owner(self._module, n)._non_persistent_buffers_set]
        return {"values": values, "transient": transient}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any] | list[Tensor]) -> None:
        """Restores what ``state_dict`` returned, bit for bit, also where a buffer has another shape or is missing."""
        if isinstance(state, list):  # the first versions kept the buffers alone, in the module's order
            names = [name for name, _ in self._module.named_buffers()]
            state = {"values": dict(zip(names, state, strict=True)), "transient": []}
        tensors = self._tensors()
        lost = set()
        for name, value in state["values"].items():
            tensor = tensors.get(name)
            if tensor is not None and list(tensor.shape) == list(value.shape) and is_dense(tensor) == is_dense(value):
                write(tensor, value)
            elif not self._put(name, value, persistent=name not in state["transient"]):
                lost.add(name)
        if lost:
            self._say(lost, "no place in this module: what the checkpoint has of them is left out")

    def _put(self, name: str, value: Tensor, *, persistent: bool) -> bool:
        """Registers a buffer under a name; returns whether the module has a place for it."""
        path, _, last = name.rpartition(".")
        try:
            owner = self._module.get_submodule(path)
        except AttributeError:
            return False
        if last not in owner._buffers and hasattr(owner, last):
            return False
        before = owner._buffers.get(last)
        near = next((t for t in (before, *owner.buffers(), *self._module.parameters()) if t is not None), value)
        value = value.to(near.device)
        owner.register_buffer(last, value, persistent=persistent)
        for module in self._module.modules() if before is not None else ():  # another that shares it
            for other, shared in module._buffers.items():
                if shared is before:
                    module._buffers[other] = value
        return True


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _is(module: nn.Module, where: str, kind: str) -> bool:
    """Returns whether a module is of a class that may not be imported: then nothing is."""
    found = getattr(sys.modules.get(where), kind, None)
    return found is not None and isinstance(module, found)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()


def _packs(tensors: Mapping[str, nn.Parameter]) -> Iterable[dict[str, nn.Parameter]]:
    """Yields the tensors in groups of some megabytes, so that averaging needs little memory beside them."""
    pack: dict[str, nn.Parameter] = {}
    for name, tensor in tensors.items():
        if pack and sum(t.numel() for t in pack.values()) + tensor.numel() > _MEAN_NUMBERS:
            yield pack
            pack = {}
        pack[name] = tensor
    if pack:
        yield pack

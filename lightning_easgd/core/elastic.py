"""One process's replica, tied to the center of each of its optimizers: elastic averaging without a Trainer."""

import copy
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_easgd.algorithms import Algorithm
from lightning_easgd.core.buffers import CenterBuffers
from lightning_easgd.core.company import Company
from lightning_easgd.core.coupling import Coupling
from lightning_easgd.core.formation import Agreement, Formation, Occasion, Phase, Stopped
from lightning_easgd.core.formations import FORMATIONS
from lightning_easgd.core.fragments import first_clock, step_fragments
from lightning_easgd.core.layerwise import Layerwise
from lightning_easgd.core.modes import OptimizerModes
from lightning_easgd.core.opening import Opening, mean_over_ranks
from lightning_easgd.core.plan import Plan
from lightning_easgd.core.start import begin_equal, check_same_couplings
from lightning_easgd.core.weights import Weights
from lightning_easgd.flatten import ParameterVector

__all__ = ["Elastic", "check_whose"]

T = TypeVar("T")
log = logging.getLogger(__name__)

# These synchronise the replicas themselves.
_SYNCHRONISE = ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer")


class Elastic:
    """A module whose optimizers are each tied to a center variable that all replicas share.

    In a loop of one's own, under torchrun::

        with Elastic(model, [optimizer], plan=Plan(EASGD(period=4))) as replica:
            for batch in batches:
                optimizer.zero_grad()
                loss(model, batch).backward()
                replica.step(optimizer)
            with replica.center():
                evaluate(model)

    Creating it is collective and blocking. Where it opens the company, the module starts with rank 0's parameters and
    buffers on all ranks. Closing it leaves whatever the module holds. Where an error leaves the ``with`` block, all
    other ranks hear of it. All ranks end with the same ``center()``: a rank that leaves earlier lets the others wait.

    Args:
        module: this replica's, on the device where it trains.
        optimizers: what trains it; torch's own. Each has its own centers.
        plan: what is exchanged, with what, and when.
        company: the processes of the job. Default: those of the environment that torchrun has made. What is not open
            yet is opened, and closed with this object.
        wrappers: what callers may step in place of an optimizer, and set its mode by.
        reestimate: see ``Weights``.
        serve: see ``Formation``.

    Raises:
        ValueError: the ranks' parameters or optimizers differ, or an optimizer cannot be tied.
        TransportError: not all ranks came in time.

    Attributes:
        couplings: one for each optimizer, in their order; with fragments or layers, one for each of those.
        formation: how the replicas meet.
        weights: whose weights the module holds.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        plan: Plan | None = None,
        company: Company | None = None,
        wrappers: Sequence[Any] = (),
        reestimate: Callable[[CenterBuffers], None] | None = None,
        serve: Callable[[], None] = lambda: None,
    ) -> None:
        self.plan = Plan() if plan is None else plan
        self.couplings: list[Coupling] = []
        self._module, self._optimizers = module, list(optimizers)
        self._by_optimizer: dict[int, list[Coupling]] = {}
        self._cleanup = ExitStack()
        self._layerwise: Layerwise | None = None
        self._generation = 0
        self._company = company = Company.from_environment() if company is None else company
        opens = not company.is_open
        try:
            self._refuse_optimizers()
            if opens:
                self._cleanup.callback(company.close)
                begin_equal(module, company, self.plan.buffers)
            company.take()
            self.weights = Weights(self.couplings, self._buffers(), reestimate)
            self._couple(wrappers)
            self.formation = self._form(serve)
        except BaseException as error:
            if opens:  # else whoever has opened it tells the others
                company.watch.report_failure(f"{type(error).__name__}: {error}")
            self.close()
            raise

    # --- opening ----------------------------------------------------------------------------------------------------

    def _refuse_optimizers(self) -> None:
        for optimizer in self._optimizers:
            if type(optimizer).__name__ in _SYNCHRONISE:
                raise ValueError(
                    f"{self.plan.owner}: {type(optimizer).__name__} synchronises the replicas at every step; return "
                    "the optimizer that it wraps from configure_optimizers"
                )

    def _buffers(self) -> CenterBuffers:
        company, couplings = self._company, self.couplings  # not this object, which would be freed late
        return CenterBuffers(
            self._module,
            company.group,
            company.layout.world_size,
            company.members.group,
            rank=company.rank,
            replica_size=company.layout.replica_size,
            device=company.device,
            rules=self.plan.buffers,
            held=lambda: (p for coupling in couplings for p in coupling.vector.parameters),
        )

    def _couple(self, wrappers: Sequence[Any]) -> None:
        parts = self.plan.parts(self._module, self._optimizers, say=self._company.rank == 0)
        trained = [(type(optimizer).__name__, parameters) for optimizer, parameters in parts]
        check_same_couplings(trained, self._company)
        self._opening = Opening(self.plan, self._company, len(parts), self._cleanup.callback)
        for index, (optimizer, parameters) in enumerate(parts):
            vector = ParameterVector(parameters.values(), device=self._company.device)
            center = self._opening.center(f"coupling/{index}", vector.read(), index)
            algorithm = copy.deepcopy(self.plan.algorithm)
            algorithm.bind(optimizer, list(parameters.values()))
            algorithm.clock = first_clock(index % self.plan.fragments, self.plan.fragments, algorithm)
            coupling = Coupling(list(parameters), vector, algorithm, center, copy.deepcopy(self.plan.average))
            coupling.turnstile = self._opening.turnstile(f"gate/{index}")
            self.couplings.append(coupling)
            self._by_optimizer.setdefault(id(optimizer), []).append(coupling)
        weights = self.weights
        modes = OptimizerModes(self._optimizers, wrappers, lambda: weights.holds_center, rank=self._company.rank)
        self._cleanup.callback(weights.settle_modes, None)
        self.weights.settle_modes(modes)
        self._cleanup.callback(modes.close)
        if self.plan.layerwise:
            self._layerwise = Layerwise(self._module, self._optimizers[0], self.couplings)
            self._cleanup.callback(self._layerwise.close)

    def _form(self, serve: Callable[[], None]) -> Formation:
        form = next(formation for formation in FORMATIONS if formation.fits(self.plan, self._company))
        weights = self.weights
        return form(
            self._company,
            self.couplings,
            line=self._opening.line,
            gather=weights.gather,
            forget=weights.forget,
            serve=serve,
        )

    # --- training ---------------------------------------------------------------------------------------------------

    def couplings_of(self, optimizer: Optimizer) -> list[Coupling]:
        """Returns the couplings of one of the optimizers.

        Raises:
            RuntimeError: it is none of them.
        """
        couplings = self._by_optimizer.get(id(optimizer))
        if not self.couplings:
            raise RuntimeError(f"{self.plan.owner}: it is closed, or has no optimizer; make a new one")
        if couplings is None:
            raise RuntimeError(
                f"{self.plan.owner}: this {type(optimizer).__name__} is none of the optimizers that "
                "configure_optimizers returned when training began; add parameters to those with add_param_group "
                "instead of replacing them"
            )
        return couplings

    def step(
        self,
        optimizer: Optimizer,
        local_update: Callable[[], T] | None = None,
        *,
        at: int = 0,
        wants_end: Callable[[], bool] = lambda: False,
    ) -> T | None:
        """Makes one step of an optimizer, with the exchange where one is due. Blocks as the transport does.

        Args:
            optimizer: one of those that this object was made with.
            local_update: makes the optimizer's own step; with layers the forward and backward pass instead. Default
                ``optimizer.step``, after the force of the algorithm's proximal term was added to the gradients.
            at: what reports of this step are marked with.
            wants_end: returns whether this rank is to end training; asked after the update.

        Returns:
            What ``local_update`` returned. Look at ``is_over`` after it.

        Raises:
            NonFiniteDeltaError: this replica's delta is not finite, and ``on_nonfinite`` is ``"raise"``.
            RuntimeError: another process has failed.
            TransportError: the exchange could not be completed.
            ValueError: layers exchange in the backward pass, and ``local_update`` is None.
        """
        couplings = self.couplings_of(optimizer)
        if self.formation.phase is Phase.TOGETHER:
            self.formation.begin_epoch()
        recover = partial(self._recover, optimizer) if self.plan.on_nonfinite == "reset" else None
        output: T | None = None

        def update() -> None:
            nonlocal output
            if local_update is None:
                self.add_force(optimizer)
                optimizer.step()
            else:
                output = local_update()

        if self._layerwise is not None:
            if local_update is None:
                raise ValueError(
                    f"{self.plan.owner}.step(local_update=None): layers need the forward and backward pass"
                )
            output = self._layerwise.step(local_update, recover=recover, at=at)
        elif self.plan.fragments > 1:
            step_fragments(couplings, update, recover=recover, at=at)
        else:
            [coupling] = couplings
            coupling.step(update, recover=recover, at=at)
        self._company.watch.progress += 1
        self.formation.after_step(couplings, end=wants_end())
        return output

    def add_force(self, optimizer: Optimizer, scaler: object = None) -> None:
        """Adds what the algorithm adds to the gradients, which are unscaled by now. Local.

        Args:
            optimizer: whose gradients they are.
            scaler: a GradScaler that they are scaled by, if any.

        Raises:
            ValueError: the optimizer unscales them by itself, and would scale the force down with them.
        """
        if type(self.plan.algorithm).proximal_term is Algorithm.proximal_term:
            return  # most have none, and with layers there are many couplings
        couplings = self._by_optimizer.get(id(optimizer), [])
        has_force = any(coupling.algorithm.proximal_term() is not None for coupling in couplings)
        if has_force and scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                f"{self.plan.owner}({self.plan.algorithm!r}) with a GradScaler (precision='16-mixed') and "
                f"{type(optimizer).__name__}(fused=True): this algorithm's force joins the gradients before the "
                "optimizer's step, and this optimizer unscales them in it; use fused=False, or precision='bf16-mixed'"
            )
        for coupling in couplings:
            coupling.add_force()

    @property
    def is_over(self) -> bool:
        """Whether all replicas have agreed to stop, or to end: a loop of one's own leaves its epoch then."""
        return Agreement.AGREED in (self.formation.stop, self.formation.end)

    def observe_loss(self, loss: Tensor) -> None:
        """Shows the algorithm a mini-batch's training loss, a number; for one that ``needs_loss``. Local."""
        for coupling in self.couplings:
            coupling.algorithm.observe_loss(loss)

    def tell_epoch_length(self, num_steps: int | None) -> None:
        """Tells algorithms that ask for it how many optimizer steps an epoch has: rank 0's number, on all.

        Collective and blocking where they ask; all ranks call it before the first step.

        Args:
            num_steps: on this rank; None where it is not known.
        """
        asking = [c.algorithm for c in self.couplings if c.algorithm.needs_batches_per_epoch]
        if all(algorithm.batches_per_epoch is not None for algorithm in asking):
            return
        agreed = json.loads(self._company.gather("say how long an epoch is", json.dumps(num_steps))[0])
        for algorithm in asking:
            algorithm.batches_per_epoch = agreed

    def _recover(self, optimizer: Optimizer, parameters: Sequence[Tensor] | None = None) -> None:
        log.warning(
            "replica %d: its delta was not finite; it starts again from the center with a fresh optimizer state",
            self._company.replica,
        )
        for parameter in list(optimizer.state) if parameters is None else parameters:
            optimizer.state.pop(parameter, None)

    # --- thawing and freezing ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def recouple(self) -> bool:
        """Couples the parameters that an optimizer holds and trains by now, where these are others than before.

        One that joins has the replicas' mean as its center; one that leaves is set to its center. All ranks call it at
        the same point; collective where something has changed.

        Returns:
            Whether something has.
        """
        has_changed = False
        for index, (optimizer, parameters) in enumerate(self.plan.parts(self._module, self._optimizers)):
            coupling = self.couplings[index]
            if list(parameters) == coupling.names:
                continue
            has_changed = True
            self.formation.meet(Occasion.RECOUPLING, gather=False)
            center = dict(zip(coupling.names, coupling.vector.views(coupling.center.value), strict=True))
            for name, parameter in zip(coupling.names, coupling.vector.parameters, strict=True):
                if name not in parameters:
                    parameter.copy_(center[name])
            vector = ParameterVector(parameters.values(), coupling.vector.dtype, coupling.vector.device)
            initial = mean_over_ranks(self._company, vector.read())
            for name, view in zip(parameters, vector.views(initial), strict=True):
                if name in center:
                    view.copy_(center[name])
            self._generation += 1
            coupling.algorithm.bind(optimizer, list(parameters.values()))
            opened = self._opening.center(f"coupling/{index}/{self._generation}", initial, index)
            coupling.rebind(list(parameters), vector, opened, initial)
            if self._layerwise is not None:
                self._layerwise.attach()
        return has_changed

    # --- the center -------------------------------------------------------------------------------------------------

    @contextmanager
    def weights_of(self, whose: Literal["center", "replica"]) -> Iterator[None]:
        """Puts the center's or this replica's weights and buffers into the module, and then what was there.

        Over a synchronous transport it is collective: all ranks must enter it at the same point, and it blocks for an
        outstanding exchange. Over an asynchronous one it is each rank's own and waits for nobody: the center as it is
        at the moment, inside an epoch with the replica's own buffers.

        Raises:
            ValueError: ``whose`` is neither.
            Stopped: some replica was asked to stop.
        """
        check_whose(whose)
        if whose == "center" and not self.weights.holds_center:
            self.formation.catch_up()
        with self.weights.holding(whose):
            yield

    @contextmanager
    def center(self) -> Iterator[None]:
        """Puts the center into the module where all replicas have met: all ranks have the same one. Then they part.

        Collective and blocking, over every transport: each rank enters it as often as the others.

        Raises:
            Stopped: some replica was asked to stop.
            TransportError: somebody did not come.
        """
        self.formation.meet(Occasion.EVALUATION)
        with self.weights.holding("center"):
            yield
        self.formation.after_evaluation(end=False)

    def rescue(self, timeout: timedelta) -> None:
        """Completes what is outstanding after a failure, as far as that can be done without the others."""
        if self._company.layout.replica_size > 1 and self._company.device.type == "cuda":
            # One member cannot gather all slices, and a NCCL operation that is not answered ends the process.
            log.warning("saving the center as it was before the last exchange: it is not gathered any more")
            return
        self.formation.rescue(timeout)

    def report(self, every: int) -> None:
        """Makes every coupling report each ``every``-th exchange (0: never). All ranks call it alike."""
        for coupling in self.couplings:
            coupling.report_every = every

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns what is private to this replica, and the centers. Local; nothing may be outstanding."""
        return {
            "couplings": [coupling.state_dict() for coupling in self.couplings],
            "buffers": self.weights.buffers.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned, to the last bit. Collective.

        Raises:
            ValueError: it belongs to other parameters.
        """
        for coupling, own in zip(self.couplings, state["couplings"], strict=True):
            coupling.load_state_dict(own)
        self.weights.buffers.load_state_dict(state["buffers"])

    # --- end --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Gives centers and groups back, without waiting for anybody. Idempotent."""
        self._cleanup.close()
        self.couplings.clear()
        self._by_optimizer.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        has_left_in_order = isinstance(error, Stopped) or (isinstance(error, SystemExit) and not error.code)
        if kind is not None and not has_left_in_order:
            self._company.watch.report_failure(f"{kind.__name__}: {error}")
        self.close()


def check_whose(whose: str) -> None:
    """Raises ``ValueError`` unless it says whose weights are meant."""
    if whose not in ("center", "replica"):
        raise ValueError(f"weights_of({whose!r}): must be 'center' or 'replica'")

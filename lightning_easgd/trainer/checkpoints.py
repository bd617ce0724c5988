"""Checkpoints of a run: what is saved and when, what each replica puts beside it, and how a run goes on from it."""

import uuid
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_easgd.core.free_running import Requests
from lightning_easgd.trainer.checkpoint import (
    KEY,
    ReplicaFile,
    ReplicaFileError,
    Saves,
    local_path,
    private_part,
    rng_state,
    set_apart,
)
from lightning_easgd.trainer.resume import Resumption, differences
from lightning_easgd.trainer.seams import callbacks_of, is_a

if TYPE_CHECKING:
    from lightning_easgd.trainer.run import Run

__all__ = ["Checkpoints"]

_HOOKS = ("on_train_batch_end", "on_train_epoch_end", "on_validation_end", "on_train_end", "on_exception")

Replaced = list[tuple[str, list[str]]]


class Checkpoints:
    """The center in an ordinary Lightning checkpoint, and each replica's own state in a file beside it.

    Where all replicas are at the same step, all save together. Where each is at its own, replica 0 alone decides what
    is saved, and when. While all wait to part it has the others write their files; elsewhere it writes the center
    alone.

    Args:
        run: whose checkpoints they are.

    Attributes:
        is_leading: whether replica 0 does something by itself now that others take part in when they wait.
        resumption: what is put back when a run starts from a checkpoint.
    """

    def __init__(self, run: "Run") -> None:
        self._run, self._strategy = run, run.strategy
        self._reset()

    def _reset(self) -> None:
        self.is_leading = False
        self.resumption = Resumption()
        self._requests: Requests | None = None
        self._dump: dict[str, Any] | None = None  # what this replica would write of the checkpoint that 0 saves
        self._center: dict[str, Any] | None = None  # the center in the checkpoint that is put together
        self._saves = Saves()
        self._replaced: Replaced = []  # what rank 0 has yet to tell the others of ``_saves``

    def close(self) -> None:
        """Removes files that later ones have replaced, now that a CheckpointIO which writes in a thread has written."""
        if self._strategy.is_global_zero:
            self._remove_replaced(writes_later=False)
        self._reset()

    # --- who saves --------------------------------------------------------------------------------------------------

    def take_over(self) -> None:
        """Puts this object into its places in the Trainer."""
        run = self._run
        trainer, patch = run.trainer, run.patches
        if run.replica.formation.leader_decides:
            self._requests = Requests(run.company)
            for callback in callbacks_of(trainer):
                if is_a(callback, "callbacks.Checkpoint"):
                    self._let_0_decide(callback)
        # Around hooks and writing, which get the center from the module, from named_parameters() as from state_dict().
        patch(trainer, "save_checkpoint", partial(self._save_center, trainer.save_checkpoint))
        connector = trainer._checkpoint_connector
        patch(connector, "dump_checkpoint", partial(self._dump_center, connector.dump_checkpoint))
        epoch_loop, fit_loop = trainer.fit_loop.epoch_loop, trainer.fit_loop
        leaves_out = run.dynamic_data is not None
        set_up_data = partial(self.resumption.set_up_data, trainer, fit_loop.setup_data, leaves_out=leaves_out)
        patch(fit_loop, "setup_data", set_up_data)
        patch(epoch_loop, "on_run_start", partial(self.resumption.start_epoch, trainer, epoch_loop.on_run_start))

    def _let_0_decide(self, callback: Any) -> None:
        """Makes a callback that saves checkpoints act in replica 0 alone, without a question to the others."""
        for name in _HOOKS:
            if hasattr(callback, name):
                hook = partial(self._lead, getattr(callback, name)) if self._strategy.is_global_zero else self._follow
                if name == "on_train_epoch_end":
                    hook = partial(self._after_metrics, hook)
                self._run.patches(callback, name, hook)

    def _after_metrics(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Computes the epoch's metrics before the hook runs: that is collective, and only replica 0 runs the hook."""
        _ = self._run.trainer.callback_metrics  # Lightning computes them when they are looked at, and once
        return hook(*args, **kwargs)

    def _lead(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before, self.is_leading = self.is_leading, True
        try:
            return hook(*args, **kwargs)
        finally:
            self.is_leading = before

    def _follow(self, *_: Any, **__: Any) -> None:
        """Keeps what this replica would write if replica 0 saved a checkpoint in the same hook."""
        if self._run.phase is not None and self._run.phase.is_at_rest:
            self._dump = self._dump_own()

    def serve(self) -> None:
        """Writes this replica's file, if replica 0 asks for it now."""
        if self._requests is not None:
            self._requests.serve(self._write_file)

    def part(self) -> None:
        """Forgets what this replica kept for a checkpoint: all have parted."""
        self._dump = None

    def share(self) -> None:
        """Tells all what replica 0's callbacks have saved: ``ckpt_path="best"`` names one file. Collective."""
        run, strategy = self._run, self._strategy
        for callback in callbacks_of(run.trainer):
            if is_a(callback, "callbacks.ModelCheckpoint"):
                state = strategy.broadcast(callback.state_dict())
                if not strategy.is_global_zero:
                    callback.load_state_dict(state)

    def _dump_own(self) -> dict[str, Any]:
        connector = self._run.trainer._checkpoint_connector
        return private_part(connector.dump_checkpoint(weights_only=False), self._center)

    def _write_file(self, path: str, save: str, replaced: Replaced) -> None:
        """As replica 0 asks for it, while this replica waits."""
        dump = self._dump or self._dump_own()
        for written, saves in replaced:  # replica 0 does not see another host's
            ReplicaFile.remove(written, owner=self._owner, but=saves)
        ReplicaFile(path, save, self._owner).write(dump, self._own_state(), self._layout["num_replicas"])

    # --- the center in the module -----------------------------------------------------------------------------------

    def module_state(self, state_dict: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the center's state dict: a copy on global rank zero, which writes it.

        Args:
            state_dict: Lightning's own.
        """
        run, strategy = self._run, self._strategy
        if run.elastic is None or run.elastic.weights.holds_center:
            self._center = state = state_dict()
            return state
        with self._run.weights_of("center"):
            state = state_dict()
            if not strategy.is_global_zero:
                return state  # not written
            # On the CPU: with the replica's state, a device may have no room for a copy.
            return {k: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in state.items()}

    def _save_center(self, save: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """The Trainer's own, while the module holds the center. Collective like ``lightning_module_state_dict``."""
        with self._run.weights_of("center"):
            try:
                save(*args, **kwargs)
            finally:
                self._center = None

    def _dump_center(self, dump: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Lightning's own, which calls the hooks. What they took of the module stays the center's."""
        run, strategy = self._run, self._strategy
        elastic = run.replica
        is_written_now = strategy.is_global_zero or not elastic.formation.leader_decides
        stays = elastic.weights.holds_center and is_written_now
        with self._run.weights_of("center"):
            checkpoint = dump(*args, **kwargs)
            # Another replica's of the weights are not written; what is put beside them is, maybe later.
            unwritten = None if strategy.is_global_zero else self._center
            return checkpoint if stays else set_apart(checkpoint, run.module, but=unwritten)

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(self, write: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any], filepath: Any) -> None:
        """Writes the replica's file, then, on global rank zero, the checkpoint.

        Args:
            write: DDPStrategy's own way to write a checkpoint, on global rank zero.
            checkpoint: Lightning's.
            filepath: of the checkpoint.
        """
        run = self._run
        elastic = run.elastic
        if elastic is None or run.has_failed:
            write(checkpoint)
        elif elastic.formation.leader_decides:
            self._save_from_0(write, checkpoint, filepath, has_all=elastic.formation.phase.is_at_rest)
        else:
            self._save_together(write, checkpoint, self._place_of_files(checkpoint, filepath))

    def _save_together(
        self, write: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any], path: str | None
    ) -> None:
        strategy = self._strategy
        if path is None:
            write(checkpoint)
            return
        save = strategy.broadcast(uuid.uuid4().hex[:8])
        if strategy.is_global_zero:
            self._saves.begin(path, save)
        private = private_part(checkpoint, self._center)
        ReplicaFile(path, save, self._owner).write(private, self._own_state(), self._layout["num_replicas"])
        strategy.barrier()  # the checkpoint refers to all files
        checkpoint[KEY] = {"save": save, **self._layout}
        write(checkpoint)
        settled = self._saves.settle(writes_later=self._writes_later) if strategy.is_global_zero else []
        for written, saves in strategy.broadcast(settled):
            ReplicaFile.remove(written, owner=self._owner, but=saves)

    def _save_from_0(
        self, write: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any], filepath: Any, *, has_all: bool
    ) -> None:
        run, strategy = self._run, self._strategy
        assert self._requests is not None
        path = self._place_of_files(checkpoint, filepath) if has_all else None
        if not strategy.is_global_zero:
            if path is not None:  # all were asked to save, by the user
                self._requests.serve(self._write_file, wait=True)
            return
        saved: dict[str, Any] = {"save": None, **self._layout}
        if path is not None:
            saved["save"] = save = uuid.uuid4().hex[:8]
            self._saves.begin(path, save)
            private = private_part(checkpoint, self._center)
            ReplicaFile(path, save, self._owner).write(private, self._own_state(), self._layout["num_replicas"])
            self._requests.ask(path, save, self._replaced)
            self._replaced = []
        elif run.dynamic_data is not None:
            saved["data"] = run.dynamic_data.state_dict()
        write({**checkpoint, KEY: saved})
        self._remove_replaced(writes_later=self._writes_later)

    def remove(self, filepath: Any) -> None:
        """Removes the replicas' files of a checkpoint that is removed: on global rank zero all, elsewhere its own."""
        path = local_path(filepath)
        if path is not None:
            self._saves.forget(path)
            ReplicaFile.remove(path, owner=None if self._strategy.is_global_zero else self._owner)

    def _place_of_files(self, checkpoint: dict[str, Any], filepath: Any) -> str | None:
        """Returns the local path of a checkpoint that gets replicas' files; None of any other."""
        if "optimizer_states" not in checkpoint:
            return None
        path = local_path(filepath)
        if path is None:
            rank_zero_warn(f"no replicas' files beside {filepath!r}: a run resumed from it starts from the center")
        return path

    def _remove_replaced(self, *, writes_later: bool) -> None:
        """On global rank zero: removes all files that it sees of saves that later ones have replaced by now."""
        for written, saves in (settled := self._saves.settle(writes_later=writes_later)):
            ReplicaFile.remove(written, but=saves)
        self._replaced += settled

    @property
    def _writes_later(self) -> bool:
        """Whether a checkpoint is written in a thread."""
        io: Any = self._strategy.checkpoint_io
        while io is not None:
            if any("Async" in kind.__name__ for kind in type(io).__mro__):
                return True
            io = getattr(io, "checkpoint_io", None)
        return False

    @property
    def _layout(self) -> dict[str, int]:
        """What a checkpoint must have in common with a run whose replicas go on from it."""
        layout, plan = self._strategy.layout, self._run.options.plan
        return {
            "num_replicas": layout.num_replicas,
            "replica_size": layout.replica_size,
            "layerwise": plan.layerwise,
            "fragments": plan.fragments,
        }

    @property
    def _owner(self) -> str:
        """Whose file this rank writes beside a checkpoint: random states and data are each rank's own."""
        size = self._strategy.layout.replica_size
        replica, member = divmod(int(self._strategy.global_rank), size)
        return str(replica) if size == 1 else f"{replica}-{member}"

    def _own_state(self) -> dict[str, Any]:
        data = self._run.dynamic_data
        return {
            **self._run.replica.state_dict(),
            "extra": {k: v for k, v in (self._center or {}).items() if k.endswith("_extra_state")},
            "rng": rng_state(),
            "epoch_rng": self.resumption.epoch_rng,
            "data": None if data is None else data.state_dict(),
        }

    # --- resuming ---------------------------------------------------------------------------------------------------

    def load(self, checkpoint: dict[str, Any], checkpoint_path: Any) -> dict[str, Any]:
        """Returns a checkpoint as this replica goes on from it: with its own part of its file. Collective.

        Raises:
            ReplicaFileError: a replica's file could not be loaded, on all ranks.
        """
        run, strategy, resumption = self._run, self._strategy, self.resumption
        resume, copies = run.options.resume, run.options.resume_optimizer == "copy"
        resumption.own, resumption.fresh_optimizers, resumption.shared_epoch = None, False, None
        if run.module.trainer.state.fn != "fit":
            return checkpoint
        saved = checkpoint.get(KEY)
        resumption.shared_epoch = None if saved is None else saved.get("data")
        path, why = local_path(checkpoint_path), differences(saved, self._layout)
        if path is None and not why:
            why = "its replicas' files cannot be read at a URL"
        if saved is None or path is None or why or resume == "center":
            # Without replicas' files it is any other strategy's checkpoint, whose optimizer states are one for all.
            resumption.fresh_optimizers = saved is not None and not copies
            rank_zero_warn(
                f"EASGDStrategy resumes {strategy.num_replicas} replicas from the center of {str(checkpoint_path)!r} "
                f"({why if resume == 'replicas' else 'as asked'}), each with "
                + ("fresh optimizer states" if resumption.fresh_optimizers else "a copy of its optimizer states")
            )
            return checkpoint
        error, content = None, {}
        try:
            content = ReplicaFile(path, saved["save"], self._owner).read()
        except ReplicaFileError as found:
            error = found
        if not strategy.reduce_boolean_decision(error is None):  # nobody goes on with half of it
            raise error or ReplicaFileError(f"another replica's file of {str(checkpoint_path)!r} could not be loaded")
        resumption.own = content["own"]
        return {**checkpoint, **content["lightning"]}

    def optimizer_states(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Returns a checkpoint with the optimizers' states that this replica goes on with."""
        if not self.resumption.fresh_optimizers:  # the groups' learning rates belong to the schedulers' state
            return checkpoint
        fresh = [{**state, "state": {}} for state in checkpoint["optimizer_states"]]
        return {**checkpoint, "optimizer_states": fresh}

    def restore(self) -> None:
        """Puts back this replica's own state, where there is one. Collective."""
        run, state = self._run, self.resumption.own
        if state is None:
            return
        run.replica.load_state_dict(state)
        if state.get("extra"):  # of set_extra_state, beside the tensors; the first versions did not keep it
            run.module.load_state_dict(state["extra"], strict=False)
        if run.dynamic_data is not None and state["data"] is not None:
            run.dynamic_data.load_state_dict(state["data"])

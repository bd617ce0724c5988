"""Resume: a synchronous run goes on to the last bit as if it had never stopped, on every replica."""

import os
import random
import re
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_easgd import EASGD, EASGDStrategy
from lightning_easgd.trainer.checkpoint import KEY, ReplicaFile
from tests import modules
from tests.callbacks import EndsOfTheOther, Everything, differences
from tests.helpers import Replicas, run_replicas
from tests.modules import Hard, Regression, linear_data, trainer


def _fit(
    folder: str,
    optimizer: str,
    accumulate: int,
    resume: str | None,
    num_replicas: int = 2,
    workers: int = 0,
    **options: Any,
) -> dict[str, Any]:
    from pytorch_lightning.callbacks import ModelCheckpoint

    modules.pytorch_lightning.seed_everything(3)
    state = Everything()
    checkpoints = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    # The second one saves at the end of each epoch, after validation.
    epochs = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    t = trainer(
        strategy=EASGDStrategy(EASGD(period=4)),
        callbacks=[state, checkpoints, epochs],
        devices=num_replicas,
        enable_checkpointing=True,
        accumulate_grad_batches=accumulate,
        max_epochs=3,
        gradient_clip_val=1.0,
    )
    loader = torch.utils.data.DataLoader(
        linear_data(80), batch_size=4, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    validation = torch.utils.data.DataLoader(linear_data(16), batch_size=4)
    t.fit(Hard(optimizer), loader, validation, ckpt_path=resume)
    return state.kept()


def _resume(replica: int, folder: str, optimizer: str, accumulate: int, workers: int, stops: list[str]) -> Any:
    whole = _fit(folder, optimizer, accumulate, None, workers=workers)
    found = []
    for stop in stops:
        again = _fit(f"{folder}/resumed {stop}", optimizer, accumulate, f"{folder}/{stop}.ckpt", workers=workers)
        found.append(again)
    return whole, found


@pytest.mark.parametrize(
    ("optimizer", "accumulate", "workers", "stops"),
    [
        # 10 batches an epoch: in the middle of the second, at its end, in the middle of the last.
        ("momentum", 1, 2, ["step=12", "epoch=1", "step=24"]),
        # 5 steps of 2 batches, or 4 of 3 with a last short window.
        ("adam", 2, 0, ["step=6", "epoch=0", "step=12"]),
        ("adam", 3, 0, ["step=3", "step=9"]),
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped_to_the_last_bit(tmp_path, optimizer, accumulate, workers, stops):
    results = run_replicas(_resume, 2, str(tmp_path), optimizer, accumulate, workers, stops)
    for replica, (whole, found) in enumerate(results):
        for stop, again in zip(stops, found, strict=True):
            expected = whole | {"batches": whole["batches"][-len(again["batches"]) :]}
            assert len(again["batches"]) < len(whole["batches"])
            assert differences(expected, again, f"replica {replica} from {stop}: ") == []


def _other_namespace(replica: int, folder: str) -> Any:
    import lightning.pytorch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    found = []
    for name, resume in (("whole", None), ("again", f"{folder}/step=11.ckpt")):
        lightning.pytorch.seed_everything(5)
        ends = EndsOfTheOther()
        checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=11, save_top_k=-1)
        logger = CSVLogger(folder, name=name, version=0)
        t = trainer(
            "lightning.pytorch", callbacks=[ends, checkpoint], logger=logger, enable_checkpointing=True, max_epochs=2
        )
        t.fit(modules.REGRESSIONS["lightning.pytorch"](), modules.loader(), modules.loader(), ckpt_path=resume)
        assert [type(c).__module__ for c in t.callbacks if type(c).__name__ == "ElasticMonitor"] == [
            "lightning_easgd.pytorch"
        ]
        found.append((ends.center, ends.replica, float(t.callback_metrics["val_loss"])))
    return found


def test_the_other_namespace_trains_logs_saves_and_resumes(tmp_path):
    results = run_replicas(_other_namespace, 2, str(tmp_path))
    for whole, again in results:
        assert differences(list(whole), list(again)) == []
    assert torch.equal(results[0][0][0], results[1][0][0])
    assert not torch.equal(results[0][0][1], results[1][0][1])
    assert "easgd/consensus_distance" in (tmp_path / "whole" / "version_0" / "metrics.csv").read_text()


def _files(folder: Path) -> list[str]:
    return sorted(re.sub(r"ckpt\.[0-9a-f]{8}\.", "ckpt.*.", path.name) for path in folder.iterdir())


def _keep_one(replica: int, folder: str) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint

    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=1, save_last=True)
    t = trainer(callbacks=[checkpoint], enable_checkpointing=True, max_epochs=1)
    t.fit(Regression(), modules.loader())
    weights = ModelCheckpoint(f"{folder}/weights", filename="only", save_weights_only=True)
    t = trainer(callbacks=[weights], enable_checkpointing=True, max_epochs=1)
    t.fit(Regression(), modules.loader())


def test_replicas_files_come_and_go_with_their_checkpoint(tmp_path):
    run_replicas(_keep_one, 2, str(tmp_path))
    names = ["last.ckpt", "last.ckpt.*.replica-0", "last.ckpt.*.replica-1"]
    assert _files(tmp_path) == [*names, *(n.replace("last", "step=8") for n in names), "weights"]
    assert _files(tmp_path / "weights") == ["only.ckpt"]


def test_removal_spares_files_of_other_names(tmp_path):
    names = [
        "model.0123abcd.replica-1", "model.0123abcd.replica-1.part", "model.0123abcd.replica-12",
        "model.ffff0000.replica-1", "model.ckpt.0123abcd.replica-1", "model",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    ReplicaFile.remove(tmp_path / "model", owner="1", but=["ffff0000"])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[2:])
    ReplicaFile.remove(tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.ckpt.0123abcd.replica-1"]


def _resume_damaged(replica: int, folder: str, options: dict[str, Any], num_replicas: int) -> Any:
    start = torch.load(f"{folder}/step=12.ckpt", weights_only=True)["state_dict"]

    class First(modules.pytorch_lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            self.same = all(
                torch.equal(start[k], v) for k, v in pl_module.state_dict().items() if v.is_floating_point()
            )
            self.fresh = not any(o.state for o in trainer.optimizers)
            self.step = trainer.global_step
            trainer.should_stop = True

    first = First()
    t = trainer(
        strategy=EASGDStrategy(EASGD(period=4), **options), callbacks=[first], devices=num_replicas, max_epochs=3
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            t.fit(Hard("momentum"), modules.loader(80), ckpt_path=f"{folder}/step=12.ckpt")
        except ValueError as error:
            return type(error).__name__, str(error)
    told = [str(w.message) for w in caught if "from the center" in str(w.message)]
    return first.same, first.fresh, first.step, told


def _fit_only(replica: int, folder: str) -> None:
    _fit(folder, "momentum", 1, None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    run_replicas(_fit_only, 2, str(folder))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of step 12's files, to damage."""
    for path in saved.glob("step=12.ckpt*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def _of_replica(folder: Path, replica: int) -> Path:
    [path] = folder.glob(f"step=12.ckpt.*.replica-{replica}")
    return path


@pytest.mark.parametrize(("num_replicas", "choice"), [(3, "fresh"), (1, "copy")])
def test_another_number_of_replicas_starts_from_the_center(folder, num_replicas, choice):
    options = {"resume_optimizer": choice}
    for replica, result in enumerate(run_replicas(_resume_damaged, num_replicas, str(folder), options, num_replicas)):
        same, fresh, step, told = result
        assert (same, fresh, step) == (True, choice == "fresh", 12)
        if replica == 0:
            assert f"resumes {num_replicas} replicas from the center of" in told[0]
            assert "(it has 2 replicas)" in told[0]


def test_the_center_may_be_asked_for(folder):
    for same, fresh, step, told in run_replicas(_resume_damaged, 2, str(folder), {"resume": "center"}, 2):
        assert (same, fresh, step) == (True, True, 12)
        assert not told or "as asked" in told[0]


def _missing(path: Path) -> None:
    path.unlink()


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _foreign(path: Path) -> None:
    path.write_bytes(_of_replica(path.parent, 0).read_bytes())


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_missing, "is missing; put it there, or resume with"),
        (_truncated, "cannot be read"),
        (_foreign, "'owner': '0'"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_goes_on(folder, damage, text):
    damage(_of_replica(folder, 1))
    first, second = run_replicas(_resume_damaged, 2, str(folder), {}, 2)
    assert first[0] == second[0] == "ReplicaFileError"
    assert "another replica's file" in first[1]
    assert "replica 1's file" in second[1]
    assert text in second[1]
    assert "resume='center'" in second[1]


def _save_without_end(replica: int, folder: str, port: int) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint

    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)

    class Progress(modules.pytorch_lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:  # last.ckpt has been written once and is now written over
                store.set(f"running/{replica}", str(os.getpid()))

    checkpoint = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=1)
    trainer(callbacks=[checkpoint, Progress()], enable_checkpointing=True, max_epochs=-1).fit(
        Regression(), modules.loader()
    )


@pytest.mark.slow
def test_a_job_killed_while_it_saves_leaves_its_last_checkpoint_complete(tmp_path):
    """Twenty jobs, each killed at a random moment; it saves without a pause, twice a step."""
    moments = random.Random(0)
    for trial in range(20):
        folder = tmp_path / str(trial)
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        replicas = Replicas(_save_without_end, 2, str(folder), store.port)
        pids = [int(store.get(f"running/{r}")) for r in range(2)]
        time.sleep(moments.uniform(0, 0.15))  # the moment, not a wait for something
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert replicas.join() == [-signal.SIGKILL] * 2
        checkpoint = torch.load(folder / "last.ckpt", weights_only=False)
        assert checkpoint["global_step"] >= 2
        for r in range(2):
            content = ReplicaFile(folder / "last.ckpt", checkpoint[KEY]["save"], str(r)).read()
            assert content["lightning"]["global_step"] == checkpoint["global_step"]


def _die_at_file_operation(replica: int, folder: str, number: int) -> bool:
    """Trains and ends itself before the n-th operation on files of a save; returns False if there were fewer."""
    import shutil

    from pytorch_lightning.callbacks import ModelCheckpoint

    armed = [False]
    count = [0]

    def deadly(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            count[0] += armed[0]
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    for owner, name in (
        (os, "replace"),
        (os, "rename"),
        (os, "remove"),
        (os, "fsync"),
        (shutil, "move"),
        (torch, "save"),
    ):
        setattr(owner, name, deadly(getattr(owner, name)))

    class Arm(modules.pytorch_lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            armed[0] = trainer.global_step == 4  # last.ckpt exists and is written over in this step

    checkpoint = ModelCheckpoint(folder, save_last=True, every_n_train_steps=2, save_top_k=1)
    t = trainer(callbacks=[Arm(), checkpoint], enable_checkpointing=True, devices=1, max_steps=6)
    t.fit(Regression(), modules.loader())
    return False


def test_wherever_a_save_is_cut_short_the_last_checkpoint_is_complete(tmp_path):
    number, codes = 0, []
    while not codes or codes == [-signal.SIGKILL]:
        number += 1
        replicas = Replicas(_die_at_file_operation, 1, str(tmp_path / str(number)), number)
        codes = replicas.join()
        last = tmp_path / str(number) / "last.ckpt"
        checkpoint = torch.load(last, weights_only=False)
        ReplicaFile(last, checkpoint[KEY]["save"], "0").read()
        assert checkpoint["global_step"] in (2, 4, 6)
    assert codes == [0], replicas.error(0)
    assert number > 8

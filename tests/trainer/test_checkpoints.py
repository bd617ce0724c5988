"""What a checkpoint has in it, where its files are and when they go, and what else than weights is resumed."""

import errno
import functools
import http.server
import os
import shutil
import signal
import stat
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.plugins import AsyncCheckpointIO, TorchCheckpointIO

from lightning_easgd import EASGD, Asynchronous, EASGDStrategy
from lightning_easgd.trainer.checkpoint import KEY, ReplicaFile, ReplicaFileError, Saves, local_path, set_apart
from tests import modules
from tests.callbacks import Ends
from tests.helpers import Replicas, run_replicas
from tests.modules import BatchNormRegression, Regression, loader, trainer

# --- what hooks see -------------------------------------------------------------------------------------------------


def _own(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class _Filtering(BatchNormRegression):
    """Builds what is saved from its own parameters, as users of adapters do."""

    def on_save_checkpoint(self, checkpoint):
        self.seen.append((_own(self), {k: v.clone() for k, v in checkpoint["state_dict"].items()}))
        checkpoint["state_dict"] = {name: p for name, p in self.named_parameters() if not name.startswith("net.0")}
        checkpoint["adapter"] = self.net[0].state_dict()  # not copied


class _Watch(Callback):
    """A callback with its own look at the module, and a checkpoint that a user asks for in a hook."""

    def __init__(self, folder: str) -> None:
        self.folder, self.seen, self.restored = folder, [], []

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.seen.append((_own(pl_module), {k: v.clone() for k, v in checkpoint["state_dict"].items()}))

    def state_dict(self):
        self.at_state_dict = _own(self.module)
        return {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.module = pl_module
        if trainer.global_step == 5:
            before = {k: v.clone() for k, v in pl_module.state_dict().items()}
            trainer.save_checkpoint(f"{self.folder}/asked.ckpt")
            self.restored.append(all(torch.equal(before[k], v) for k, v in pl_module.state_dict().items()))
            self.seen.append((self.at_state_dict, self.seen[-1][1]))


def _hooks(replica: int, folder: str, strategy: str, evaluate: str) -> Any:
    watch = _Watch(folder)
    module = _Filtering()
    module.seen = []
    checkpoints = [
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1),
        ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
    ]
    t = trainer(
        strategy=EASGDStrategy(
            EASGD(period=4),
            None if strategy == "easgd" else Asynchronous(),
            evaluate=evaluate,
        ),
        callbacks=[watch, *checkpoints],
        enable_checkpointing=True,
        max_epochs=2,
    )
    t.fit(module, loader(), loader(16))
    gaps = [
        max(float((mine[name] - center[name]).abs().max()) for name in mine)
        for mine, center in module.seen + watch.seen
    ]
    return gaps, watch.restored, [center for _, center in module.seen]


@pytest.mark.parametrize(("strategy", "evaluate"), [("easgd", "center"), ("easgd", "replica"), ("async", "center")])
def test_hooks_that_build_a_checkpoint_see_the_center(tmp_path, strategy, evaluate):
    results = run_replicas(_hooks, 2, str(tmp_path), strategy, evaluate)
    for replica, (gaps, restored, _) in enumerate(results):
        assert set(gaps) == {0.0}
        assert len(gaps) >= (10 if replica == 0 or strategy == "easgd" else 3)
        assert restored == [True]
    if strategy == "easgd":
        for ours, theirs in zip(results[0][2], results[1][2], strict=True):
            assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    saved = {path: torch.load(path, weights_only=False) for path in tmp_path.glob("*.ckpt")}
    assert len(saved) >= 5
    assert any(
        float((c["adapter"]["weight"] - a["adapter"]["weight"]).abs().max())
        for c in saved.values()
        for a in saved.values()
    )
    centers = results[0][2]
    for path, checkpoint in saved.items():  # what was not copied in the hook is written as it was seen there
        written = {**checkpoint["state_dict"], **{f"net.0.{k}": v for k, v in checkpoint["adapter"].items()}}
        assert any(all(torch.equal(center[k], v) for k, v in written.items()) for center in centers), path
        if checkpoint[KEY]["save"] is not None:  # by each replica
            theirs = ReplicaFile(path, checkpoint[KEY]["save"], "1").read()["lightning"]["adapter"]
            assert all(torch.equal(theirs[k], v) for k, v in checkpoint["adapter"].items())


def test_what_is_set_apart_follows_the_module_no_more():
    module = torch.nn.Linear(2, 2)
    module.register_buffer("sparse", torch.eye(2).to_sparse())
    free = torch.ones(2)
    checkpoint = {
        "state_dict": module.state_dict(), "nested": [{"row": module.weight[0], "module's": module.bias}], "free": free,
    }  # fmt: skip
    row, bias = module.weight[0].detach().clone(), module.bias.detach().clone()
    apart = set_apart(checkpoint, module, but=checkpoint["state_dict"])
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(9.0)
    assert apart["state_dict"] is checkpoint["state_dict"]
    assert torch.equal(apart["nested"][0]["row"], row)
    assert torch.equal(apart["nested"][0]["module's"], bias)
    assert isinstance(apart["nested"][0]["module's"], torch.nn.Parameter)
    assert apart["free"] is free


# --- a fit with nothing to do ---------------------------------------------------------------------------------------


def _state(module: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def _nothing_left(replica: int, folder: str, strategy: str) -> Any:
    def fit(**options: Any) -> Any:
        path = options.pop("ckpt_path", None)
        module = BatchNormRegression()
        callbacks = [ModelCheckpoint(folder, filename="last", save_top_k=1, enable_version_counter=False)]
        t = trainer(
            **{"strategy": strategy, "max_epochs": 1, "enable_checkpointing": True, "callbacks": callbacks, **options}
        )
        t.fit(module, loader(), ckpt_path=path)
        return t, module

    _, trained = fit()
    again, finished = fit(ckpt_path=f"{folder}/last.ckpt")
    again.save_checkpoint(f"{folder}/again.ckpt")
    _, no_batches = fit(ckpt_path=f"{folder}/last.ckpt", limit_train_batches=0, max_epochs=3)
    _, no_epochs = fit(max_epochs=0)
    _, no_steps = fit(max_steps=0)
    return [_state(m) for m in (trained, finished, no_batches, no_epochs, no_steps)]


@pytest.mark.parametrize("strategy", ["easgd", "easgd_async", "local_sgd", "diloco"])
def test_a_fit_with_nothing_left_to_do_ends_with_the_center(tmp_path, strategy):
    """A requeued job starts its script again."""
    results = run_replicas(_nothing_left, 2, str(tmp_path), strategy)
    start = BatchNormRegression().state_dict()
    last, again = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True)["state_dict"] for n in ("last", "again"))
    for trained, finished, no_batches, no_epochs, no_steps in results:
        for state, expected in (
            (finished, last), (no_batches, last), (again, last), (no_epochs, start), (no_steps, start),
        ):  # fmt: skip
            assert all(torch.equal(state[k], expected[k]) for k in expected)
        assert trained.keys() == last.keys()


# --- paths ----------------------------------------------------------------------------------------------------------


def test_which_paths_are_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (
        "a/b.ckpt",
        Path("a/b.ckpt"),
        "./a/b.ckpt",
        f"file://{tmp_path}/a/b.ckpt",
        "~/a/b.ckpt",
        f"local://{tmp_path}/a/b.ckpt",
        f"file:{tmp_path}/a/b.ckpt",
    ):
        assert os.path.normpath(local_path(path)) == str(tmp_path / "a" / "b.ckpt")
    for path in ("http://host/b.ckpt", "s3://bucket/b.ckpt", "memory://b.ckpt", "simplecache::s3://b.ckpt"):
        assert local_path(path) is None


class _End(Ends):
    def __init__(self, save_at: str | None = None) -> None:
        super().__init__()
        self.save_at = save_at

    def on_train_start(self, trainer, pl_module):
        self.began_at = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.save_at and trainer.global_step == 3:
            trainer.save_checkpoint(self.save_at)


def _urls(replica: int, folder: str, port: int) -> Any:
    os.chdir(folder)
    torch.hub.set_dir(f"{folder}/hub-{replica}")
    ends, told = [], []
    for save_at, resume in (
        (f"file://{folder}/saved.ckpt", None),
        (None, f"file://{folder}/saved.ckpt"),
        (None, f"{folder}/saved.ckpt"),
        ("memory://saved.ckpt", None),
        (None, f"http://127.0.0.1:{port}/saved.ckpt"),
    ):
        modules.pytorch_lightning.seed_everything(1)
        end = _End(save_at)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(callbacks=[end]).fit(Regression(), loader(), ckpt_path=resume)
        ends.append((end.began_at, end.replica))
        told.append([str(w.message) for w in caught if "from the center" in str(w.message)])
    return ends, told


def test_a_file_url_is_a_local_path_and_any_other_has_the_center_alone(tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            results = run_replicas(_urls, 2, str(tmp_path), server.server_port)
        finally:
            server.shutdown()
    save = torch.load(tmp_path / "saved.ckpt", weights_only=False)[KEY]["save"]
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith("hub")} == {
        "saved.ckpt", f"saved.ckpt.{save}.replica-0", f"saved.ckpt.{save}.replica-1",
    }  # fmt: skip
    for replica, (ends, told) in enumerate(results):
        whole, by_url, by_path, _, from_http = ends
        assert [began_at for began_at, _ in ends] == [0, 3, 3, 0, 3]
        assert torch.equal(by_url[1], whole[1])
        assert torch.equal(by_path[1], whole[1])
        assert not torch.equal(from_http[1], whole[1])
        if replica == 0:
            assert told[:3] == [[], [], []]
            assert "no replicas' files beside 'memory://saved.ckpt'" in told[3][0]
            assert "(its replicas' files cannot be read at a URL)" in told[4][0]


def _write(checkpoint: Path, save: str, owner: str = "0") -> Path:
    file = ReplicaFile(checkpoint, save, owner)
    file.write({"epoch": 1}, {}, 1)
    return Path(file.path)


def test_links_renamed_and_old_checkpoints_find_their_files(tmp_path):
    checkpoint = tmp_path / "hpc_ckpt_3.ckpt"
    path = _write(checkpoint, "0123abcd")
    assert path.parent == tmp_path / "replicas"
    checkpoint.touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link.ckpt").symlink_to(checkpoint)
    for name in (checkpoint, tmp_path / "renamed.ckpt", tmp_path / "elsewhere" / "link.ckpt"):
        assert ReplicaFile(name, "0123abcd", "0").read()["lightning"] == {"epoch": 1}
        for save, owner in (("0123abcd", "1"), ("ffffffff", "0")):
            with pytest.raises(ReplicaFileError, match="is missing"):
                ReplicaFile(name, save, owner).read()
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "replicas", moved / "replicas")
    assert ReplicaFile(moved / checkpoint.name, "0123abcd", "0").read()["save"] == "0123abcd"
    os.replace(path, tmp_path / path.name)  # as the first versions wrote it
    assert ReplicaFile(checkpoint, "0123abcd", "0").read()["lightning"] == {"epoch": 1}
    ReplicaFile.remove(checkpoint)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [checkpoint.name]


def test_a_link_that_is_removed_takes_nothing_of_its_target_along(tmp_path):
    path = _write(tmp_path / "target.ckpt", "0123abcd")
    (tmp_path / "target.ckpt").touch()
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "target.ckpt")
    ReplicaFile.remove(tmp_path / "last.ckpt")  # another rank may do it before the link is gone
    assert path.exists()
    assert Path(ReplicaFile(tmp_path / "last.ckpt", "89abcdef", "0").path).name == "last.ckpt.89abcdef.replica-0"


# --- when files go --------------------------------------------------------------------------------------------------


def _refer(checkpoint: Path, save: str) -> None:
    torch.save({"state_dict": {"w": torch.zeros(3)}, KEY: {"save": save}}, checkpoint)


def test_a_save_replaces_the_one_before_when_it_is_written(tmp_path):
    path = tmp_path / "last.ckpt"
    saves = Saves()
    _refer(path, "00000000")  # by an earlier run
    saves.begin(str(path), "11111111")
    assert saves.settle(writes_later=True) == []
    saves.begin(str(path), "22222222")
    _refer(path, "11111111")
    assert saves.settle(writes_later=True) == [(str(path), ["11111111", "22222222"])]
    saves.begin(str(path), "33333333")
    _refer(path, "33333333")
    assert saves.settle(writes_later=True) == [(str(path), ["33333333"])]
    assert saves.settle(writes_later=True) == []
    saves.begin(str(path), "44444444")
    saves.forget(str(path))
    assert saves.settle(writes_later=False) == []


def test_a_format_of_another_kind_counts_as_written_when_asked_for(tmp_path):
    path = tmp_path / "last.ckpt"
    saves = Saves()
    saves.begin(str(path), "11111111")
    assert saves.settle(writes_later=False) == []  # nothing is there
    path.mkdir()
    saves.begin(str(path), "22222222")
    assert saves.settle(writes_later=True) == []
    assert saves.settle(writes_later=False) == [(str(path), ["22222222"])]


def test_what_a_failed_save_left_goes_with_the_next_one_of_any_name(tmp_path):
    for name, save in (
        ("whole", "00000000"),
        ("renamed from", "11111111"),
        ("gone", "22222222"),
        ("twice", "33333333"),
        ("twice", "44444444"),
        ("hpc_ckpt_1", "55555555"),
    ):
        _write(tmp_path / f"{name}.ckpt", save)
    (tmp_path / "half.ckpt.66666666.replica-1.part").touch()
    _refer(tmp_path / "whole.ckpt", "00000000")
    _refer(tmp_path / "renamed to.ckpt", "11111111")
    _refer(tmp_path / "twice.ckpt", "44444444")
    (tmp_path / "user's.replica-1").touch()
    later = time.time() + 60  # of another job, which is saving
    for name, save in (("other", "77777777"), ("mixed", "88888888")):
        os.utime(_write(tmp_path / f"{name}.ckpt", save), (later, later))
    _write(tmp_path / "mixed.ckpt", "88888888", "1")
    (tmp_path / "other.ckpt.99999999.replica-0.part").touch()
    os.utime(tmp_path / "other.ckpt.99999999.replica-0.part", (later, later))
    saves = Saves()
    saves._began += 30
    saves.begin(str(tmp_path / "new.ckpt"), "aaaaaaaa")
    left = {p.name.split(".ckpt.")[-1] for p in tmp_path.rglob("*.replica-*")}
    assert left == {
        "00000000.replica-0", "11111111.replica-0", "44444444.replica-0", "user's.replica-1", "77777777.replica-0",
        "88888888.replica-0", "88888888.replica-1", "99999999.replica-0.part",
    }  # fmt: skip


class _Subclass(AsyncCheckpointIO):
    pass


class _Threaded(TorchCheckpointIO):
    """Writes later, in a way of its own, each time after the next save was asked for."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)
        self._asked = threading.Semaphore(0)

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self._asked.release()
        copy = {**checkpoint, "state_dict": {k: v.clone() for k, v in checkpoint["state_dict"].items()}}
        self._executor.submit(self._write, copy, path)

    def _write(self, checkpoint: Any, path: Any) -> None:
        self._asked.acquire()
        super().save_checkpoint(checkpoint, path)

    def teardown(self) -> None:
        self._executor.shutdown(wait=True)


class _Count(Callback):
    """Counts a folder's replica files at each epoch's start."""

    def __init__(self, folder: str) -> None:
        self.folder, self.most = folder, 0

    def on_train_epoch_start(self, trainer, pl_module):
        self.most = max(self.most, len(list(Path(self.folder).rglob("*.replica-*"))))


def _ten_epochs(replica: int, folder: str) -> Any:
    counts = []
    for strategy in ("easgd", "easgd_async"):
        for name, io in (("async", AsyncCheckpointIO()), ("subclass", _Subclass()), ("own", _Threaded())):
            where = f"{folder}/{strategy}-{name}"
            count = _Count(where)
            checkpoint = ModelCheckpoint(
                where, filename="{epoch}", save_top_k=2, monitor="epoch", mode="max", save_last=True
            )
            t = trainer(
                strategy=strategy, plugins=[io], callbacks=[count, checkpoint], enable_checkpointing=True, max_epochs=10
            )
            t.fit(Regression(), loader(16))
            counts.append(count.most)
    return counts


def test_who_writes_later_leaves_no_files_behind(tmp_path):
    results = run_replicas(_ten_epochs, 2, str(tmp_path))
    folders = sorted(p for p in tmp_path.iterdir())
    assert len(folders) == 6
    for folder in folders:
        saves = [torch.load(p, weights_only=False)[KEY]["save"] for p in folder.glob("*.ckpt")]
        assert len(saves) >= 3
        files = Counter(p.name.split(".ckpt.")[1].split(".")[0] for p in folder.glob("*.replica-*"))
        assert set(files) <= set(saves)
        assert set(files.values()) == {2}
        last = torch.load(folder / "last.ckpt", weights_only=False)
        for owner in ("0", "1"):
            content = ReplicaFile(folder / "last.ckpt", last[KEY]["save"], owner).read()
            assert content["lightning"]["global_step"] == last["global_step"]
    for counts in results:  # they go while training goes on, not at its end
        assert max(counts) <= 2 * 2 * 4


def _fill_up(replica: int, folder: str, at: int) -> None:
    """Saves until the disk is full: for the file of replica 1, or for the checkpoint itself."""
    written = Counter()
    fsync, save = os.fsync, TorchCheckpointIO.save_checkpoint

    def full(kind: str) -> None:
        written[kind] += 1
        if written[kind] == 3 and at == ("replica", "checkpoint").index(kind):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fsync_or_fail(fd: int) -> None:
        if replica == 1:
            full("replica")
        fsync(fd)

    def save_or_fail(self: Any, *args: Any, **kwargs: Any) -> None:
        full("checkpoint")
        save(self, *args, **kwargs)

    os.fsync, TorchCheckpointIO.save_checkpoint = fsync_or_fail, save_or_fail
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=1)
    trainer(callbacks=[checkpoint], enable_checkpointing=True).fit(Regression(), loader())


def _go_on(replica: int, folder: str) -> int:
    end = _End()
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    t = trainer(callbacks=[end, checkpoint], enable_checkpointing=True, max_steps=6)
    t.fit(Regression(), loader(), ckpt_path=f"{folder}/step=4.ckpt")
    return end.began_at


@pytest.mark.parametrize("at", [0, 1], ids=["the file of replica 1", "the checkpoint"])
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_for_good(tmp_path, at):
    replicas = Replicas(_fill_up, 2, str(tmp_path), at)
    assert all(replicas.join())
    assert "No space left" in replicas.error(1 - at)
    assert not list(tmp_path.glob("*.part"))
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ["step=4.ckpt"]
    if at == 1:
        assert len(list(tmp_path.glob("step=6.ckpt.*"))) == 2
    for path in tmp_path.glob("step=6.ckpt.*"):  # as if it were of a name that does not come again
        path.rename(tmp_path / path.name.replace("step=6", "step=5"))
    assert run_replicas(_go_on, 2, str(tmp_path)) == [4, 4]
    names = sorted(p.name.split(".ckpt")[0] for p in tmp_path.iterdir())
    assert names == ["step=4"] * 3 + ["step=6"] * 3


# --- auto-requeue ---------------------------------------------------------------------------------------------------


class _Requeue(_End):
    """SLURM signals all processes before it takes the nodes away."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGUSR1)


def _requeued(replica: int, folder: str) -> Any:
    os.environ.update(
        SLURM_NTASKS="2", SLURM_JOB_NAME="train", SLURM_JOB_ID="1587881", SLURM_PROCID=str(replica),
        SLURM_LOCALID=str(replica), SLURM_NODEID="0", SLURM_NODELIST="127.0.0.1", SLURM_NTASKS_PER_NODE="2",
        PATH=f"{folder}/bin:{os.environ['PATH']}",
    )  # fmt: skip
    found = []
    # Twice requeued, at steps 3 and 9; each of these went on undisturbed here, to be compared with.
    for at in (3, 9, 0):
        modules.pytorch_lightning.seed_everything(2)
        requeue = _Requeue(at)
        t = trainer(callbacks=[requeue], default_root_dir=f"{folder}/root", num_nodes=1)
        assert type(t.strategy.cluster_environment).__name__ == "SLURMEnvironment"
        t.fit(Regression(), loader(96))
        found.append((requeue.began_at, requeue.replica))
    return found


def test_a_requeued_job_goes_on_where_it_was_and_again(tmp_path):
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/requeued\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    results = run_replicas(_requeued, 2, str(tmp_path))
    assert (tmp_path / "requeued").read_text() == "requeue 1587881\n" * 2
    assert sorted(p.name for p in (tmp_path / "root").iterdir()) == ["hpc_ckpt_1.ckpt", "hpc_ckpt_2.ckpt", "replicas"]
    assert len(list((tmp_path / "root" / "replicas").iterdir())) == 4
    for whole, again, last in results:
        assert [began_at for began_at, _ in (whole, again, last)] == [0, 3, 9]
        assert torch.equal(again[1], whole[1])
        assert torch.equal(last[1], whole[1])
    assert not torch.equal(results[0][0][1], results[1][0][1])


# --- what else is each replica's own --------------------------------------------------------------------------------


class _Stateful:
    """A loader with a state, as torchdata's: the first iterator after it was given one goes on there."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self._at, self._next = batches, 0, None

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        begin, self._next = self._next or 0, None
        self._at = begin
        for batch in self.batches[begin:]:
            self._at += 1
            yield batch
        self._at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state.pop("at")


class _Extra(Regression):
    """Asks for the training's length early, and has a state beside its tensors."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early, self.extra = early, 0

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state

    def training_step(self, batch, batch_idx):
        self.extra += 1 + self.global_rank
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        assert not self.early or self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


class _Batches(_End):
    def __init__(self, average: Any) -> None:
        super().__init__()
        self.average, self.batches = average, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(float(batch[0].sum()))

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        self.averaged = {k: v.clone() for k, v in self.average._average_model.state_dict().items() if "extra" not in k}
        self.extra = pl_module.extra


def _each_its_own(replica: int, folder: str, strategy: str) -> Any:
    found = []
    for early in (False, True):
        where = f"{folder}/{early}"
        for resume in (None, f"{where}/step=5.ckpt", f"{where}/step=9.ckpt"):
            modules.pytorch_lightning.seed_everything(4)
            average = EMAWeightAveraging(decay=0.8)
            end = _Batches(average)
            checkpoint = ModelCheckpoint(where, filename="{step}", every_n_train_steps=1, save_top_k=-1)
            t = trainer(
                strategy=strategy, callbacks=[end, average, checkpoint], enable_checkpointing=True, max_epochs=2
            )
            data = _Stateful(list(torch.utils.data.DataLoader(modules.linear_data(64), 4))[replica::2])
            t.fit(_Extra(early), data, ckpt_path=resume)
            found.append((end.began_at, end.batches, end.replica, end.averaged, end.extra))
    return found


def test_loaders_averages_and_extra_states_are_resumed_each_with_its_own(tmp_path):
    results = run_replicas(_each_its_own, 2, str(tmp_path), "easgd")
    for found in results:
        for whole, first, second in (found[:3], found[3:]):
            assert [began_at for began_at, *_ in (whole, first, second)] == [0, 5, 9]
            for began_at, batches, replica, averaged, extra in (first, second):
                assert batches == whole[1][began_at:]
                assert torch.equal(replica, whole[2])
                assert averaged.keys() == whole[3].keys()
                assert all(torch.equal(averaged[k], v) for k, v in whole[3].items())
                assert extra == whole[4]
    ours, theirs = results[0][0], results[1][0]
    assert any(not torch.equal(ours[3][k], theirs[3][k]) for k in ours[3])
    assert ours[4] != theirs[4]

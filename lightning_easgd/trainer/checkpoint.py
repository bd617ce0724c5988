"""Checkpoints: an ordinary Lightning file whose ``state_dict`` is the center, and one file a replica beside it.

``model.ckpt`` comes with ``model.ckpt.<save>.replica-<i>``, where ``<save>`` names one moment of saving (a
replica of several ranks has a file for each: ``replica-<i>-<member>``). The replicas'
files are written first, each atomically, then ``model.ckpt``, which refers to them, and only when it stands are those
of an earlier save of the same name removed: whenever a job is killed, the newest ``model.ckpt`` has all of its files.

Lightning numbers the checkpoints of SLURM's auto-requeue by all names in their folder that have ``ckpt_`` in them, and
takes every digit for the number. The replicas' files of such a checkpoint stand in the folder ``replicas`` beside it.
"""

import os
import random
import re
import time
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

__all__ = [
    "KEY",
    "ReplicaFile",
    "ReplicaFileError",
    "Saves",
    "local_path",
    "private_part",
    "rng_state",
    "set_apart",
    "set_rng_state",
]

KEY = "lightning_easgd"
_VERSION = 1
# What is one for all in Lightning's own checkpoint, beside the center.
_SHARED = ("pytorch-lightning_version", "hyper_parameters", "hparams_name", KEY)
_FOLDER = "replicas"
_NAME = re.compile(r"(?P<checkpoint>.+)\.(?P<save>[0-9a-f]{8})\.replica-(?P<owner>\d+(?:-\d+)?)(?P<part>\.part)?")


class ReplicaFileError(ValueError):
    """A replica's file is missing, cut short, or belongs to something else."""


def local_path(checkpoint: str | os.PathLike[str]) -> str | None:
    """Returns the absolute path of a checkpoint, as Lightning reads and writes it; None at a URL that is not local."""
    if get_protocol(os.fspath(checkpoint)) not in LocalFileSystem.protocol:
        return None
    return str(LocalFileSystem._strip_protocol(os.fspath(checkpoint)))


def private_part(checkpoint: Mapping[str, Any], center: Any) -> dict[str, Any]:
    """Returns what a replica keeps of Lightning's own checkpoint: everything but what is one for all.

    Args:
        checkpoint: as this process dumped it.
        center: the center's state dict in it; a callback may have moved it, and put weights of the replica's own into
            its place.
    """
    return {key: value for key, value in checkpoint.items() if key not in _SHARED and value is not center}


def set_apart(checkpoint: Mapping[str, Any], module: nn.Module, *, but: Any = None) -> dict[str, Any]:
    """Returns a dumped checkpoint that the module may change under: what is the module's own is a copy in it.

    Args:
        checkpoint: as dumped.
        module: whose parameters and buffers are meant, and views of them.
        but: an entry that is left as it is.
    """
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.layout is torch.strided]
    own = {t.untyped_storage().data_ptr() for t in tensors}

    def copy(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() not in own:
            return tensor
        value = tensor.detach().clone()
        return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value

    return {
        key: value if value is but or key in _SHARED else apply_to_collection(value, Tensor, copy)
        for key, value in checkpoint.items()
    }


class ReplicaFile:
    """The file of one replica beside one checkpoint.

    Args:
        checkpoint: path of the checkpoint, on a file system that all processes of a host share.
        save: name of the moment of saving.
        owner: whose file it is: ``"<replica>"``, or ``"<replica>-<member>"`` where a replica has several ranks.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], save: str, owner: str) -> None:
        self.checkpoint = os.path.abspath(checkpoint)
        self.save, self.owner = save, owner
        folder, name = os.path.split(self.checkpoint)
        # Not of a link's target: writing a checkpoint replaces the link.
        self.path = os.path.join(_home(folder, name), f"{name}.{save}.replica-{owner}")

    def write(self, private: dict[str, Any], own: dict[str, Any], num_replicas: int) -> None:
        """Writes what is private to the replica, atomically.

        Args:
            private: the replica's part of Lightning's dictionary.
            own: the strategy's part.
            num_replicas: how many files the checkpoint has.

        Raises:
            OSError: it cannot be written; nothing is left of it.
        """
        content = {
            "version": _VERSION,
            "save": self.save,
            "owner": self.owner,
            "num_replicas": num_replicas,
            "lightning": private,
            "own": own,
        }
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        part = f"{self.path}.part"
        try:
            with open(part, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except BaseException:
            with suppress(OSError):
                os.remove(part)
            raise

    def read(self) -> dict[str, Any]:
        """Returns what ``write`` wrote: ``lightning`` and ``own``.

        A link to the checkpoint is followed. A checkpoint that was renamed finds its files by the name of the save.

        Raises:
            ReplicaFileError: the file is missing, cannot be read, or is not the one that the checkpoint names.
        """
        hint = "resume with EASGDStrategy(resume='center') to start all replicas from the center instead"
        path = self._find()
        if path is None:
            raise ReplicaFileError(f"replica {self.owner}'s file {self.path!r} is missing; put it there, or {hint}")
        try:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
        except Exception as error:  # a damaged file can raise anything
            raise ReplicaFileError(
                f"replica {self.owner}'s file {path!r} cannot be read ({type(error).__name__}: {error}); {hint}"
            ) from error
        expected = {"version": _VERSION, "save": self.save, "owner": self.owner}
        found = {key: content.get(key) if isinstance(content, dict) else None for key in expected}
        if found != expected:
            raise ReplicaFileError(
                f"replica {self.owner}'s file {path!r} says {found} where {expected} was expected; {hint}"
            )
        return content

    def _find(self) -> str | None:
        """Returns where the file is; the first versions put all beside their checkpoint."""
        for checkpoint in (self.checkpoint, os.path.realpath(self.checkpoint)):
            folder, name = os.path.split(checkpoint)
            for home in (_home(folder, name), folder):
                path = os.path.join(home, f"{name}.{self.save}.replica-{self.owner}")
                if os.path.exists(path):
                    return path
        for checkpoint in (self.checkpoint, os.path.realpath(self.checkpoint)):
            for path, match in _files(os.path.dirname(checkpoint)):
                if (match["save"], match["owner"], match["part"]) == (self.save, self.owner, None):
                    return path
        return None

    @staticmethod
    def remove(checkpoint: str | os.PathLike[str], *, owner: str | None = None, but: Collection[str] = ()) -> None:
        """Removes the files of a checkpoint: of one owner or of all, of every save or of all but some."""
        folder, name = os.path.split(os.path.abspath(checkpoint))
        for path, match in _files(folder):
            if match["checkpoint"] == name and owner in (None, match["owner"]) and match["save"] not in but:
                _remove(path)


class Saves:
    """Which saves of a run stand, and whose files no checkpoint refers to any more. For the process that writes them.

    A ``CheckpointIO`` may write later than it is asked to, in a thread. What stands is therefore read from the
    checkpoint itself, which refers to its save.
    """

    def __init__(self) -> None:
        self._began = time.time()
        self._begun: dict[str, list[str]] = {}  # by checkpoint, from the last that is known to stand
        self._open: set[str] = set()  # checkpoints of which a later save may have been written by now
        self._swept: set[str] = set()

    def begin(self, checkpoint: str, save: str) -> None:
        """Says that a save has begun; on the first one in a folder removes there what earlier runs' saves left."""
        self._begun.setdefault(checkpoint, []).append(save)
        self._open.add(checkpoint)
        folder = os.path.dirname(checkpoint)
        if folder not in self._swept:
            self._swept.add(folder)
            _sweep(folder, self._began)

    def forget(self, checkpoint: str) -> None:
        """Says that a checkpoint is removed, with all that belongs to it."""
        self._begun.pop(checkpoint, None)
        self._open.discard(checkpoint)

    def settle(self, *, writes_later: bool) -> list[tuple[str, list[str]]]:
        """Returns which checkpoints have been written since the last call, each with the saves whose files stay.

        Args:
            writes_later: whether a checkpoint in a format that tells nothing may not have been written yet.
        """
        settled = []
        for checkpoint in sorted(self._open):
            begun = self._begun[checkpoint]
            content = _structure(checkpoint)
            if content is not None:
                stands = max((i for i, save in enumerate(begun) if save.encode() in content), default=None)
            else:
                stands = None if writes_later or not os.path.exists(checkpoint) else len(begun) - 1
            if stands is None:
                continue
            self._begun[checkpoint] = begun[stands:]
            if len(begun) == stands + 1:
                self._open.discard(checkpoint)
            settled.append((checkpoint, begun[stands:]))
        return settled


def _home(folder: str, name: str) -> str:
    """Returns where the replicas' files of a checkpoint of this name belong."""
    return os.path.join(folder, _FOLDER) if "ckpt_" in name else folder


def _files(folder: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Yields the replicas' files of all checkpoints in a folder, and what their names say."""
    for home in (folder, os.path.join(folder, _FOLDER)):
        for name in os.listdir(home) if os.path.isdir(home) else ():
            match = _NAME.fullmatch(name)
            if match is not None:
                yield os.path.join(home, name), match


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):  # another process of this host was faster
        os.remove(path)


def _structure(checkpoint: str) -> bytes | None:
    """Returns the part of a file of ``torch.save`` that is not the tensors' data; None of any other file, or of none.

    A checkpoint refers to a save if its name is in there.
    """
    try:
        with zipfile.ZipFile(checkpoint) as file:
            [name] = [name for name in file.namelist() if name.endswith("/data.pkl")]
            return file.read(name)
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None


def _sweep(folder: str, before: float) -> None:
    """Removes what saves left in a folder that failed before their checkpoint was written.

    Args:
        folder: of the checkpoints.
        before: a time in seconds; what is newer may belong to another job that is saving.
    """
    sets: dict[str, dict[str, list[str]]] = {}
    recent: set[str] = set()
    for path, match in _files(folder):
        try:
            is_old = os.stat(path).st_mtime < before
        except FileNotFoundError:  # another process of this host was faster
            continue
        if match["part"] is None:
            sets.setdefault(match["checkpoint"], {}).setdefault(match["save"], []).append(path)
            recent.update(() if is_old else (match["save"],))
        elif is_old:
            _remove(path)
    unreferred: dict[str, list[str]] = {}
    for name, saves in sets.items():
        checkpoint = os.path.join(folder, name)
        if os.path.exists(checkpoint):
            content = _structure(checkpoint)
            if len(saves) > 1 and content is not None:
                unreferred.update({save: paths for save, paths in saves.items() if save.encode() not in content})
        else:
            unreferred.update(saves)
    unreferred = {save: paths for save, paths in unreferred.items() if save not in recent}
    for name in os.listdir(folder) if unreferred else ():  # a checkpoint that was renamed still refers to its files
        content = None if _NAME.fullmatch(name) else _structure(os.path.join(folder, name))
        if content is not None:
            unreferred = {save: paths for save, paths in unreferred.items() if save.encode() not in content}
    for paths in unreferred.values():
        for path in paths:
            _remove(path)


def rng_state() -> dict[str, Any]:
    """Returns the states of the global random generators of torch (CPU and current CUDA device), numpy and Python."""
    cuda = torch.cuda.is_available() and torch.cuda._initialized  # asking must not start CUDA
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if cuda else None,
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what ``rng_state`` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])

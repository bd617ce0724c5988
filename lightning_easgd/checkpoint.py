"""Checkpoints: an ordinary Lightning file whose ``state_dict`` is the center, and one file a replica beside it.

``model.ckpt`` comes with ``model.ckpt.<save>.replica-<i>``, where ``<save>`` names one moment of saving (a
replica of several ranks has a file for each: ``replica-<i>-<member>``). The replicas'
files are written first, each atomically, then ``model.ckpt``, which refers to them, and only then are those of an
earlier save of the same name removed: whenever a job is killed, the newest ``model.ckpt`` has all of its files.
"""

import os
import random
import re
from contextlib import suppress
from typing import Any

import numpy as np
import torch

__all__ = ["KEY", "ReplicaFile", "ReplicaFileError", "rng_state", "set_rng_state"]

KEY = "lightning_easgd"
_VERSION = 1
# What a replica keeps of Lightning's own checkpoint: everything but the weights and what is one for all.
_SHARED = ("state_dict", "pytorch-lightning_version", "hyper_parameters", "hparams_name", KEY)


class ReplicaFileError(ValueError):
    """A replica's file is missing, cut short, or belongs to something else."""


class ReplicaFile:
    """The file of one replica beside one checkpoint.

    Args:
        checkpoint: path of the checkpoint, on a file system that all processes of a host share; a link is followed.
        save: name of the moment of saving.
        owner: whose file it is: ``"<replica>"``, or ``"<replica>-<member>"`` where a replica has several ranks.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], save: str, owner: str) -> None:
        self.checkpoint = os.path.realpath(checkpoint)
        self.save, self.owner = save, owner
        self.path = f"{self.checkpoint}.{save}.replica-{owner}"

    def write(self, checkpoint: dict[str, Any], own: dict[str, Any], num_replicas: int) -> None:
        """Writes what is private to the replica, atomically.

        Args:
            checkpoint: Lightning's dictionary as this process dumped it.
            own: the strategy's part.
            num_replicas: how many files the checkpoint has.
        """
        content = {
            "version": _VERSION,
            "save": self.save,
            "owner": self.owner,
            "num_replicas": num_replicas,
            "lightning": {key: value for key, value in checkpoint.items() if key not in _SHARED},
            "own": own,
        }
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        part = f"{self.path}.part"
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)

    def read(self) -> dict[str, Any]:
        """Returns what ``write`` wrote: ``lightning`` and ``own``.

        Raises:
            ReplicaFileError: the file is missing, cannot be read, or is not the one that the checkpoint names.
        """
        hint = "resume with EASGDStrategy(resume='center') to start all replicas from the center instead"
        if not os.path.exists(self.path):
            raise ReplicaFileError(f"replica {self.owner}'s file {self.path!r} is missing; put it there, or {hint}")
        try:
            content: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=False)
        except Exception as error:  # a damaged file can raise anything
            raise ReplicaFileError(
                f"replica {self.owner}'s file {self.path!r} cannot be read ({type(error).__name__}: {error}); {hint}"
            ) from error
        expected = {"version": _VERSION, "save": self.save, "owner": self.owner}
        found = {key: content.get(key) if isinstance(content, dict) else None for key in expected}
        if found != expected:
            raise ReplicaFileError(
                f"replica {self.owner}'s file {self.path!r} says {found} where {expected} was expected; {hint}"
            )
        return content

    @staticmethod
    def remove(checkpoint: str | os.PathLike[str], *, owner: str | None = None, but: str | None = None) -> None:
        """Removes the files of a checkpoint: of one owner or of all, of every save or of all but one."""
        folder, name = os.path.split(os.path.realpath(checkpoint))
        whose = r"\d+(?:-\d+)?" if owner is None else re.escape(owner)
        ours = re.compile(rf"{re.escape(name)}\.([0-9a-f]{{8}})\.replica-{whose}(\.part)?")
        for found in os.listdir(folder) if os.path.isdir(folder) else ():
            match = ours.fullmatch(found)
            if match is not None and match[1] != but:
                with suppress(FileNotFoundError):  # another process of this host was faster
                    os.remove(os.path.join(folder, found))


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

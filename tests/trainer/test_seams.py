"""Lightning's private names: all that this package touches stand in one table, and are looked for at setup."""

import ast
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lightning_easgd
from lightning_easgd import EASGDStrategy
from lightning_easgd.trainer.seams import PRIVATE, Patches, is_a
from tests import modules
from tests.helpers import run_replicas
from tests.modules import NAMESPACES, REGRESSIONS, loader, trainer

ROOT = Path(lightning_easgd.__file__).parent
# Private names of others than Lightning: torch's modules, loaders, reducer; fsspec's; Python's.
TORCHS = {
    "_BatchNorm",
    "_C",
    "_NormBase",
    "_compiled_call_impl",
    "_distributed_c10d",
    "_dynamo",
    "_exit",
    "_foreach_add_",
    "_foreach_copy_",
    "_foreach_mul_",
    "_foreach_sub_",
    "_indices",
    "_get_default_store",
    "_initialized",
    "_non_persistent_buffers_set",
    "_remove_autograd_hooks",
    "_set_pg_timeout",
    "_strip_protocol",
}
# Of Lightning's objects that are not there yet when a run is set up; guarded where they are used.
LATER = {
    "_DataLoaderIterDataFetcher": "the training data's fetcher",
    "_compiler_ctx": "a LightningModule",
    "_duration": "a Timer",
    "_interval": "a Timer",
    "_load_state_dicts": "the training data's loader",
    "_iterator": "the training data's loader, and torch's",
    "_num_yielded": "torch's iterator of a loader",
}


def glue() -> list[Path]:
    return sorted(ROOT.glob("*.py"))


@functools.cache
def own_names() -> set[str]:
    """Returns what the package itself defines: methods, functions, attributes that it assigns."""
    names: set[str] = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    names.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def touched(path: Path) -> set[str]:
    """Returns the private names that a file reads as attributes, or replaces by ``patch``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and "patch" in ast.unparse(node.func) and len(node.args) == 3:
            name = node.args[1]
            found |= {name.value} if isinstance(name, ast.Constant) else set()
    return found


@pytest.mark.parametrize("path", glue(), ids=lambda path: path.name)
def test_what_is_touched_stands_in_the_table(path):
    listed = {name for names in PRIVATE.values() for name in names}
    # ``_layer_sync`` and its like are the strategy's own, which it inherits and also assigns.
    assert touched(path) - own_names() - TORCHS - LATER.keys() <= listed


def _without(replica: int, namespace: str) -> str:
    t = trainer(namespace, devices=1)
    del type(t.fit_loop.epoch_loop)._broadcast_sigterm_tensor
    try:
        t.fit(REGRESSIONS[namespace](), loader())
    except RuntimeError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_name_that_lightning_does_not_have_is_refused_in_words(namespace):
    [said] = run_replicas(_without, 1, namespace)
    assert said.startswith(
        "EASGDStrategy needs trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor, which "
        f"{namespace} {NAMESPACES[namespace].__version__} does not have"
    )


def test_every_name_is_looked_for():
    real = trainer(devices=1, strategy=EASGDStrategy())
    for owner, names in PRIVATE.items():
        for name in names:
            thing: Any = real
            for part in owner.split(".")[1:]:
                thing = getattr(thing, part)
            assert hasattr(type(thing), name) or name in vars(thing), f"{owner}.{name}"


def test_a_patch_puts_back_what_was_there():
    patch = Patches("pytorch_lightning 2.0")
    owner = SimpleNamespace(mine=1)
    patch(owner, "mine", lambda: 2)
    patch(owner, "mine", lambda: 3)

    class Inherits:
        def hook(self) -> str:
            return "own"

    other = Inherits()
    patch(other, "hook", lambda: "replaced")
    assert other.hook() == "replaced"
    with pytest.raises(RuntimeError, match=r"needs Inherits.renamed, which pytorch_lightning 2\.\S+ does not have"):
        patch(other, "renamed", lambda: None)
    patch.close()
    assert owner.mine == 1
    assert other.hook() == "own"
    assert "hook" not in vars(other)


def _after_fits(replica: int) -> Any:
    """What is there during and after fits of one process; each of the tests below looks at a part."""
    seen = []
    t = trainer(devices=1)
    loop, connector = t.fit_loop.epoch_loop.val_loop, t._signal_connector
    run = loop.run
    loop.run = mine = lambda: (seen.append("run"), run())[1]
    handler = connector._sigterm_notifier_fn
    t.fit(modules.Regression(), loader(), loader())
    is_back = loop.run is mine and connector._sigterm_notifier_fn == handler

    timer = Timer()
    trainer(devices=1, callbacks=[timer]).fit(modules.Regression(), loader())

    sees, module = _Sees(), modules.Regression()
    names, state = [name for name, _ in module.named_modules()], list(module.state_dict())
    trainer(devices=1, callbacks=[sees]).fit(module, loader())
    for_ddp = sees.module is module, sees.names == names, sees.state == state
    is_gone = not hasattr(module, "no_sync") and not hasattr(module, "module")

    module.module, again = torch.nn.Linear(1, 1), _Sees()
    trainer(devices=1, callbacks=[again]).fit(module, loader())
    return seen, is_back, timer.calls, for_ddp, is_gone, again.module is module.module


class Timer(modules.pytorch_lightning.Callback):
    """One of a user's own, which has nothing to do with Lightning's."""

    calls = 0

    def time_elapsed(self) -> float:
        return 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        self.calls += 1


class _Sees(modules.pytorch_lightning.Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        self.module = trainer.model.module
        with trainer.model.no_sync():
            self.names = [name for name, _ in trainer.model.named_modules()]
        self.state = list(trainer.model.state_dict())


def test_what_is_replaced_comes_back_and_what_is_a_users_own_is_left_alone():
    [(seen, is_back, calls, for_ddp, is_gone, is_modules_own)] = run_replicas(_after_fits, 1)
    assert seen == ["run"]
    assert is_back
    assert calls == 16  # of a callback that is called Timer
    assert for_ddp == (True, True, True)  # trainer.model.module, no_sync, and no module more than there were
    assert is_gone
    assert is_modules_own


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_classes_are_known_by_what_they_are(namespace):
    callbacks = NAMESPACES[namespace].callbacks

    class Later(callbacks.Timer):
        pass

    assert is_a(Later(), "callbacks.Timer")
    assert not is_a(Timer(), "callbacks.Timer")
    assert is_a(callbacks.ModelCheckpoint(), "callbacks.Checkpoint")

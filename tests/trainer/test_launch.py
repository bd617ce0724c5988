"""Jobs as users start them: a script of its own, torchrun, spawn, LightningCLI; and what their loggers got."""

import importlib
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import COMMAND_S, ROOT, free_port, run_replicas
from tests.modules import REGRESSIONS, loader


def run(*command: str, cwd: Path) -> str:
    """Runs a command in ``cwd`` and returns what it printed; its failure is the test's."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env = {k: v for k, v in env.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_PORT")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=COMMAND_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


SCRIPT = """
import os, sys
from lightning_easgd import EASGD, EASGDStrategy
from pytorch_lightning.loggers import WandbLogger
from tests.modules import Regression, flat, loader, trainer

if __name__ == "__main__":
    module, name = Regression(), sys.argv[1]
    logger = WandbLogger(project="test", save_dir=".") if name == "wandb" else False
    strategy = EASGDStrategy(EASGD(period=2)) if name == "wandb" else name
    t = trainer(strategy=strategy, logger=logger, log_every_n_steps=1)
    t.fit(module, loader())
    world_size = t.world_size
    if name == "easgd_spawn":  # whose processes would import all of it again
        t = trainer(strategy="auto", devices=1)
    found = t.validate(module, loader(shuffle=False), verbose=False)
    rank = os.environ.get("LOCAL_RANK", "0")
    with open(f"rank-{rank}.txt", "w") as file:  # what ranks print may run together
        print(rank, world_size, float(flat(module).sum()), found[0]["val_loss"], file=file)
"""


def results(folder: Path) -> list[list[str]]:
    """Returns rank, world size, sum of the weights and validation loss of each process."""
    return [path.read_text().split() for path in sorted(folder.glob("rank-*.txt"))]


def wandb_records(path: Path) -> Iterator[bytes]:
    """Yields the records of a W&B file: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield record
            record = b""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_a_script_launches_its_own_processes(script, tmp_path):
    """One job of two: they train to one center, and make one W&B run with the strategy's config."""
    from wandb.proto.wandb_internal_pb2 import Record

    run(sys.executable, script, "wandb", cwd=tmp_path)
    (rank0, size0, *first), (rank1, size1, *second) = results(tmp_path)
    assert (rank0, rank1, size0, size1) == ("0", "1", "2", "2")
    assert first == second
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    config, history = {}, []
    for data in wandb_records(file):
        record = Record.FromString(data)
        config |= {"/".join([u.key, *u.nested_key]): json.loads(u.value_json) for u in record.config.update}
        if record.history.item:
            history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    expected = {"name": "EASGDStrategy", "algorithm": "EASGD", "period": 2, "moving_rate": 0.1, "num_replicas": 2}
    assert {f"strategy/{key}": value for key, value in expected.items()}.items() <= config.items()
    ours = [row for row in history if "easgd/consensus_distance" in row]
    assert [row["trainer/global_step"] for row in ours] == [1, 3, 5, 7]
    assert [row["easgd/exchanges"] for row in ours] == [1, 2, 3, 4]


def test_torchrun_launches(script, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    run(*command, f"--master-port={free_port()}", script, "easgd", cwd=tmp_path)
    (rank0, _, *first), (rank1, _, *second) = results(tmp_path)
    assert (rank0, rank1) == ("0", "1")
    assert first == second


END = """
import atexit, sys, threading
from tests.modules import Regression, loader, trainer

if __name__ == "__main__":
    module = Regression()
    trainer(strategy="easgd").fit(module, loader())
    trainer(strategy="easgd").validate(module, loader(), verbose=False)

    def refuse(_):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    atexit.register(setattr, threading.Thread, "start", refuse)  # as Python 3.12 does, and called before all others
    if sys.argv[1] == "raise":
        raise KeyError("the script's own")
    sys.exit(int(sys.argv[1]))
"""


FORKS = """
import os, runpy, sys
import tests.preload  # once for all of them

for number, ends in enumerate(sys.argv[2:]):
    ranks = {}
    for rank in range(2):
        process = os.fork()
        if process == 0:
            os.environ |= {"MASTER_PORT": sys.argv[1].split(",")[number], "LOCAL_RANK": str(rank), "RANK": str(rank)}
            sys.argv[:] = ["script.py", ends]
            os.dup2(os.open(f"said-{number}-{rank}.txt", os.O_WRONLY | os.O_CREAT), 2)
            runpy.run_path("script.py", run_name="__main__")
            sys.exit()  # as any interpreter does: this is its main thread, and nobody waits above it
        ranks[process] = rank
    codes = [0, 0]
    for process, rank in ranks.items():
        codes[rank] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(*codes, flush=True)
"""


def test_jobs_end_with_their_own_exit_codes(tmp_path):
    """What aborts once in a few runs if torch's threads are not waited for. ``tests/soak.py`` runs many more."""
    (tmp_path / "script.py").write_text(END)
    ends = ("0", "0", "3", "raise")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0"}
    ports = ",".join(str(free_port()) for _ in ends)
    done = subprocess.run(
        [sys.executable, "-c", FORKS, ports, *ends],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
    )
    assert [line.split() for line in done.stdout.splitlines()[-4:]] == [["0"] * 2, ["0"] * 2, ["3"] * 2, ["1"] * 2], (
        done
    )
    for number, end in enumerate(ends):
        for rank in range(2):
            words = (tmp_path / f"said-{number}-{rank}.txt").read_text()
            assert "atexit" not in words
            assert ("the script's own" in words) == (end == "raise")


@pytest.mark.parametrize("name", ["easgd_fork", pytest.param("easgd_spawn", marks=pytest.mark.slow)])
def test_processes_started_by_multiprocessing_bring_the_center_back(script, tmp_path, name):
    run(sys.executable, script, name, cwd=tmp_path)
    [(_, _, weights, loss)] = results(tmp_path)  # the main process, which goes on alone
    assert float(loss) < 10
    assert float(weights) != 0


def test_the_demo_runs_and_compares(tmp_path):
    example = str(ROOT / "examples" / "digits.py")
    arguments = ["--epochs=1", "--no-baseline", "--wandb=off", f"--out={tmp_path / 'out'}"]
    printed = run(sys.executable, example, *arguments, cwd=tmp_path)
    assert re.search(r"center\D+\d+\.\d+ %", printed), printed
    assert len(re.findall(r"replica_\d\D+\d+\.\d+ %", printed)) == 2
    assert (tmp_path / "out" / "digits.png").stat().st_size > 1000


def _cli(replica: int, folder: str, namespace: str, arguments: list[str]) -> str:
    """Runs a LightningCLI in ``folder`` and returns the strategy that it made."""
    os.chdir(folder)
    sys.argv = ["cli.py", "fit", *arguments]
    cli = importlib.import_module(f"{namespace}.cli").LightningCLI(OWN_DATA[namespace])
    assert cli.trainer.state.finished
    return repr(cli.trainer.strategy)


def own_data(base: type) -> type:
    class Module(base):
        def train_dataloader(self):
            return loader()

    return Module


OWN_DATA = {namespace: own_data(base) for namespace, base in REGRESSIONS.items()}
QUIET = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_epochs=1", "--trainer.logger=false",
         "--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]  # fmt: skip


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("form", ["plain", "nested"])
def test_lightning_cli_takes_it(tmp_path, namespace, form):
    home = {"pytorch_lightning": "lightning_easgd", "lightning.pytorch": "lightning_easgd.pytorch"}[namespace]
    arguments = {
        "plain": ["--trainer.strategy=easgd"],
        "nested": [
            f"--trainer.strategy.class_path={home}.EASGDStrategy",
            "--trainer.strategy.init_args.evaluate=replica",
            "--trainer.strategy.init_args.algorithm.class_path=lightning_easgd.EASGD",
            "--trainer.strategy.init_args.algorithm.init_args.period=4",
        ],
    }[form]
    [strategy] = run_replicas(_cli, 1, str(tmp_path), namespace, [*QUIET, *arguments])
    period = {"plain": 10, "nested": 4}[form]
    assert strategy.startswith(f"<EASGDStrategy(EASGD(period={period},")

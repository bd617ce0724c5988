"""What runs in the process of one replica: each method trains the same work, and stands still between two orders."""

import logging
import os
import resource
import signal
import socket
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, get_args

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from benchmarks._network import Host
from benchmarks._work import Batches, Data, Work
from lightning_easgd import EASGD, AllReduce, EASGDStrategy
from lightning_easgd.communication._wire import Wire

TIMEOUT = timedelta(minutes=20)
WIRES: tuple[Wire, ...] = get_args(Wire)
FLOATS_A_NUMBER = {"float32": 1.0, "bfloat16": 1 / 2, "int8": 1 / 4 + 1 / 256}  # on the wire; see ``AllReduce``


@dataclass(frozen=True)
class Job:
    """What one replica is to do.

    Attributes:
        method: a key of ``METHODS``.
        work: see ``Work``.
        data: see ``load``.
        period: steps from one exchange to the next.
        seed: of the parameters and of the data's order.
        host: of this replica.
        replica: this one.
        num_replicas: all of them.
    """

    method: str
    work: str
    data: Data
    period: int
    seed: int
    host: Host
    replica: int
    num_replicas: int

    def batches(self) -> "DataLoader[Any]":
        return DataLoader(Batches(self.data, self.replica, self.num_replicas, self.seed), batch_size=None)


@dataclass(frozen=True)
class Order:
    """What a replica is to do next.

    Attributes:
        steps: to make; 0 is the end of all.
        keep_every: steps from one copy of the model that is kept to the next; 0 keeps none.
    """

    steps: int
    keep_every: int = 0


class Pacer:
    """Makes as many steps as it is told to and reports on them; between two orders the replica stands still.

    What is under way at the end of an order is completed within it, so that no communication goes unmeasured. The model
    that is kept before that is what the replica has at the time, without waiting for what is under way.

    Args:
        connection: to the parent, who sends orders, and "kept" for the copies that the last one has left.
        complete: ends what is under way.
        exposed_s: seconds that the replica has stood still for communication so far; None where nobody counts them.
        weights: the method's model, (d,).
    """

    def __init__(
        self,
        connection: "Connection[Any, Any]",
        complete: Callable[[], None] = lambda: None,
        exposed_s: Callable[[], float] | None = None,
        weights: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        self._connection, self._complete, self._exposed_s, self._weights = connection, complete, exposed_s, weights
        self.ended = False
        self._kept: list[tuple[float, torch.Tensor]] = []  # when, in seconds since the order, and what

    def wait(self) -> None:
        """Stands still until there are steps to make, or no more."""
        while (order := self._connection.recv()) == "kept":
            self._connection.send_bytes(torch.stack([weights for _, weights in self._kept]).numpy().tobytes())
        self.ended = order.steps == 0
        self._order: Order = order
        self._made = 0
        self._kept.clear()
        self._exposed_before = self._exposed_s() if self._exposed_s else 0.0
        self._began = time.perf_counter()

    def stepped(self) -> None:
        """Counts a step; at an order's last one reports and waits for the next."""
        if self.ended:
            return
        self._made += 1
        is_last = self._made == self._order.steps
        if is_last:
            self._complete()
        if self._order.keep_every and self._made % self._order.keep_every == 0:
            assert self._weights is not None
            self._kept.append((time.perf_counter() - self._began, self._weights().detach().clone()))
        if not is_last:
            return
        self._connection.send(
            {
                "seconds": time.perf_counter() - self._began,
                "kept_at": [at for at, _ in self._kept],
                "exposed_s": self._exposed_s() - self._exposed_before if self._exposed_s else None,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
        self.wait()


class Paced(Callback):
    """The pacer, inside of a Trainer."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, EASGDStrategy):
            (center,) = (coupling.center for coupling in strategy.couplings)
            self._pacer = Pacer(
                self._connection, strategy.couplings[0].drain, lambda: center.traffic.exposed_s, lambda: center.value
            )
        else:
            self._pacer = Pacer(self._connection, weights=lambda: parameters_to_vector(pl_module.parameters()))
        self._pacer.wait()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._pacer.stepped()
        trainer.should_stop = self._pacer.ended


class PostLocalSGDStrategy(DDPStrategy):
    """Lightning's post-local SGD from the first step on, with the hook that Lightning installs on CUDA alone."""

    def __init__(self, period: int) -> None:
        state = PostLocalSGDState(None, None, start_localSGD_iter=0, post_local_gradient_allreduce=False)
        super().__init__(ddp_comm_state=state, ddp_comm_hook=post_localSGD_hook, model_averaging_period=period)

    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, torch.nn.parallel.DistributedDataParallel)
        self.model.register_comm_hook(self._ddp_comm_state, post_localSGD_hook)


def lightning(
    job: Job, connection: "Connection[Any, Any]", endpoint: tuple[str, int], strategy: Callable[[Job], Strategy]
) -> None:
    """Trains with a Trainer; ``strategy`` makes its strategy."""
    if job.method == "local":
        devices = 1
    else:
        devices = job.num_replicas
        address, port = endpoint
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(job.replica))
        os.environ["WORLD_SIZE"] = str(devices)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy(job),
        max_epochs=1,
        callbacks=[Paced(connection)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Work(job.work, job.seed), job.batches())


def torchft(job: Job, connection: "Connection[Any, Any]", endpoint: tuple[str, int], delay: int | None) -> None:
    """Trains in a plain loop with torchft's ``LocalSGD``, or its ``DiLoCo`` that sends ``delay`` steps ahead."""
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer
    from torchft.local_sgd import DiLoCo, LocalSGD

    address, port = endpoint
    module = Work(job.work, job.seed)
    optimizer = module.configure_optimizers()
    with ExitStack() as stack:
        if job.replica == 0:
            lighthouse = LighthouseServer(bind=f"[::]:{port}", min_replicas=job.num_replicas)
            stack.callback(lighthouse.shutdown)
        store = dist.TCPStore(job.host.address, 0, is_master=True, wait_for_workers=False)
        manager = Manager(
            pg=ProcessGroupGloo(timeout=TIMEOUT),
            load_state_dict=module.load_state_dict,
            state_dict=module.state_dict,
            min_replica_size=job.num_replicas,
            use_async_quorum=False,
            timeout=TIMEOUT,
            quorum_timeout=TIMEOUT,
            rank=0,
            world_size=1,
            store_addr=job.host.address,
            store_port=store.port,
            lighthouse_addr=f"http://{address}:{port}",
            replica_id=f"replica{job.replica}",
            hostname=job.host.address,
            heartbeat_interval=timedelta(seconds=1),  # so that who stands still is not heard while others are measured
            init_sync=False,  # the seed has made them equal
            max_retries=0,
        )
        stack.callback(manager.shutdown, wait=False)
        if delay is None:
            stack.enter_context(LocalSGD(manager, module, optimizer, sync_every=job.period))
        else:
            # As the paper's: arXiv:2311.08105.
            outer = torch.optim.SGD(module.parameters(), lr=0.7, momentum=0.9, nesterov=True)
            stack.enter_context(
                DiLoCo(manager, [module], optimizer, outer, sync_every=job.period, fragment_sync_delay=delay)
            )
        pacer = Pacer(connection, weights=lambda: parameters_to_vector(module.parameters()))
        pacer.wait()
        for number, batch in enumerate(job.batches()):
            if pacer.ended:
                break
            optimizer.zero_grad()
            module.training_step(batch, number).backward()
            optimizer.step()
            pacer.stepped()


def bare(job: Job, connection: "Connection[Any, Any]", endpoint: tuple[str, int], wire: Wire) -> None:
    """All-reduces of a vector of as many bytes as the work's parameters have on the wire, and nothing else."""
    address, port = endpoint
    store = dist.TCPStore(address, port, job.num_replicas, is_master=job.replica == 0, timeout=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=job.replica, world_size=job.num_replicas, timeout=TIMEOUT)
    vector = torch.zeros(round(Work(job.work).num_parameters * FLOATS_A_NUMBER[wire]))
    pacer = Pacer(connection)
    pacer.wait()
    while not pacer.ended:
        dist.all_reduce(vector)
        pacer.stepped()
    dist.destroy_process_group()


METHODS: dict[str, Callable[[Job, "Connection[Any, Any]", tuple[str, int]], None]] = {
    "local": partial(lightning, strategy=lambda job: SingleDeviceStrategy("cpu")),
    "ddp": partial(lightning, strategy=lambda job: DDPStrategy()),
    "post_local_sgd": partial(lightning, strategy=lambda job: PostLocalSGDStrategy(job.period)),
    "torchft_local_sgd": partial(torchft, delay=None),
    "torchft_diloco_5": partial(torchft, delay=5),
    "torchft_diloco_9": partial(torchft, delay=9),
    **{
        f"easgd_{wire}": partial(
            lightning, strategy=lambda job, wire=wire: EASGDStrategy(EASGD(job.period), AllReduce(wire=wire))
        )
        for wire in WIRES
    },
    **{f"bare_{wire}": partial(bare, wire=wire) for wire in WIRES},
}


def run(job: Job, connection: "Connection[Any, Any]") -> None:
    """The process of a replica: says at which port it can be met, is told where replica 0 is, and takes orders."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    job.host.enter()
    os.environ["GLOO_SOCKET_IFNAME"] = job.host.interface
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    with socket.socket() as s:
        s.bind(("", 0))
        connection.send(s.getsockname()[1])
    METHODS[job.method](job, connection, connection.recv())

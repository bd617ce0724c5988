"""The callback that shows what the coupling does. Bound to both Lightning namespaces by ``_lightning``."""

from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_easgd.core.coupling import Coupling
from lightning_easgd.core.report import Report
from lightning_easgd.metrics import ConsensusDistance
from lightning_easgd.trainer.strategy import ElasticStrategy

if TYPE_CHECKING:
    from pytorch_lightning import Callback as _Callback
    from pytorch_lightning import LightningModule, Trainer
else:
    _Callback = object

__all__ = ["ElasticMonitor"]


class ElasticMonitor(_Callback):
    """Logs how far the replicas are apart, what holds them together, and what communication costs.

    The figures of all replicas ride in the exchanges, so it makes no collective of its own; they are known two
    exchanges later, or at the next meeting point, and are logged with the step at which they were measured, through
    every logger of the Trainer on global rank zero:

    ==================================== ==========================================================================
    ``easgd/consensus_distance``         mean over replicas of the Euclidean distance to the center
    ``easgd/consensus_distance_max``     the largest of them since the last entry
    ``easgd/consensus_distance_relative`` the mean over the norm of the center
    ``easgd/force_norm``                 mean norm of what a replica adds to the center in an exchange
    ``easgd/update_norm``                mean norm of the local update of the step that exchanges
    ``easgd/force_to_update``            the first over the second
    ``easgd/equilibrium``                the second less the first, mean: near 0 the elastic force holds the replicas
    ``easgd/exchanges``                  exchanges so far
    ``easgd/bytes_sent``                 bytes that replica 0 has sent so far
    ``easgd/exposed_s``                  seconds a replica stood still for communication so far, mean
    ``easgd/hidden_s``                   seconds of communication behind compute so far, mean
    ==================================== ==========================================================================

    Over an asynchronous transport, where the other replicas' figures are the last that each has announced, also:

    ==================================== ==========================================================================
    ``easgd/staleness``                  additions of others between the reading and the addition of a delta, mean
    ``easgd/drift``                      distance that the center moved meanwhile, mean
    ``easgd/additions_per_s``            additions to the center a second, of all replicas
    ``easgd/wait_s``                     seconds a replica waited for locks or a server so far, mean
    ``easgd/gate_s``                     seconds a replica waited at the gate (``slack``) so far, mean
    ==================================== ==========================================================================

    A module with several optimizers gets ``easgd/0/...``, ``easgd/1/...``. At the start of ``fit`` the strategy's
    hyper-parameters go to every logger's ``log_hyperparams`` (with W&B: into the run's config) as ``strategy/period``,
    ``strategy/algorithm`` and so on, apart from the module's own. A logger that refuses them costs a warning.

    ``EASGDStrategy`` adds this callback by itself where the Trainer has a logger and no monitor.
    """

    def __init__(self, every_n_exchanges: int = 1) -> None:
        """Creates the monitor.

        Args:
            every_n_exchanges: measure and log each n-th exchange, n >= 1. Measuring costs about three passes over the
                parameters and, for its moment, one vector of their size.

        Raises:
            ValueError: ``every_n_exchanges`` is not an integer >= 1.
        """
        if isinstance(every_n_exchanges, bool) or not isinstance(every_n_exchanges, int) or every_n_exchanges < 1:
            raise ValueError(f"ElasticMonitor(every_n_exchanges={every_n_exchanges!r}): must be an integer >= 1")
        super().__init__()
        self.every_n_exchanges = every_n_exchanges
        self._logged: dict[int, int] = {}

    @override
    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, ElasticStrategy):
            rank_zero_warn(
                f"ElasticMonitor shows nothing with {type(trainer.strategy).__name__}: use Trainer(strategy='easgd')"
            )
            return
        self._logged.clear()
        trainer.strategy.request_reports(self.every_n_exchanges)

    @override
    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if isinstance(trainer.strategy, ElasticStrategy):
            values = {f"strategy/{name}": value for name, value in trainer.strategy.hyperparameters().items()}
            for logger in trainer.loggers:
                try:
                    logger.log_hyperparams(values)
                except Exception as error:  # its own kind; a run is not to end because a tracker keeps old values
                    rank_zero_warn(
                        f"{type(logger).__name__} did not take the strategy's hyper-parameters, and training goes on "
                        f"without them there: {error}"
                    )

    @override
    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(trainer.strategy, ElasticStrategy):
            self._log_new(trainer, trainer.strategy.couplings)

    @override
    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        if isinstance(trainer.strategy, ElasticStrategy):
            self._log_new(trainer, trainer.strategy.couplings)

    def _log_new(self, trainer: "Trainer", couplings: list[Coupling]) -> None:
        for index, coupling in enumerate(couplings):
            prefix = "easgd" if len(couplings) == 1 else f"easgd/{index}"
            for report in coupling.reports:
                if report.exchange <= self._logged.get(index, 0):
                    continue
                self._logged[index] = report.exchange
                figures = _figures(report)
                if not coupling.center.synchronous:
                    figures |= _asynchronous_figures(report)
                metrics = {f"{prefix}/{key}": value for key, value in figures.items()}
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step=report.at)
                trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})


def _figures(report: Report) -> dict[str, float]:
    """Returns a report's figures by key, reduced over the replicas."""
    distance = ConsensusDistance(sync_on_compute=False)
    distance.update(report.distance, report.center_norm)
    mean = MeanMetric(sync_on_compute=False)
    figures = {key: float(value) for key, value in distance.compute().items()}
    figures["force_norm"] = float(mean(report.force))
    figures["update_norm"] = float(mean(report.update))
    figures["force_to_update"] = figures["force_norm"] / figures["update_norm"] if figures["update_norm"] else 0.0
    figures["equilibrium"] = float((report.update - report.force).mean())
    figures["exchanges"] = float(report.exchange)
    figures["bytes_sent"] = float(report.bytes_sent)
    figures["exposed_s"] = float(mean(report.exposed_s))
    figures["hidden_s"] = float(mean(report.hidden_s))
    return figures


def _asynchronous_figures(report: Report) -> dict[str, float]:
    """Returns what only a center that replicas reach at their own times has."""
    return {
        "staleness": float(report.staleness.mean()),
        "drift": float(report.drift.mean()),
        "additions_per_s": report.additions_per_s,
        "wait_s": float(report.wait_s.mean()),
        "gate_s": float(report.gate_s.mean()),
    }

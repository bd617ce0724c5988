"""Warns of a center that training has not moved: what is evaluated and saved is then not what was trained."""

from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from lightning_easgd.trainer.run import Run

__all__ = ["UnchangedCenter"]


class UnchangedCenter:
    """Looks whether exchanges have moved the center, at evaluations and at the end of a run.

    Args:
        run: whose this is.
    """

    def __init__(self, run: "Run") -> None:
        self._run, self._strategy = run, run.strategy
        self._last_seen = (0, 0)  # steps and additions at the last evaluation
        self._additions_at_start = 0
        self._has_said = False

    @property
    def _additions(self) -> int:
        return sum(coupling.center.additions for coupling in self._strategy.couplings)

    @property
    def _period(self) -> str:
        return f"an exchange is due every {self._strategy.algorithm.period} optimizer steps"

    def look_at_start(self) -> None:
        """Notes where the center is before the first step."""
        if self._run.steps.count == 0:
            self._additions_at_start = self._additions
            self._last_seen = (0, self._additions_at_start)

    def look_at_evaluation(self) -> None:
        """Warns, once per run, of an evaluation that sees the center of the one before."""
        steps, additions = self._run.steps.count, self._additions
        (steps_before, additions_before), self._last_seen = self._last_seen, (steps, additions)
        if self._has_said or additions != additions_before or steps <= steps_before:
            return
        if self._run.options.evaluate != "center":
            return
        self._has_said = True
        rank_zero_warn(
            f"EASGDStrategy: this evaluation, after {steps} optimizer steps, sees the same center as the one before, "
            f"{steps - steps_before} steps ago, or as the start of training: {self._period}. Metrics repeat until "
            "then, and EarlyStopping counts that against its patience: exchange more often, or evaluate less often"
        )

    def look_at_end(self) -> None:
        """Warns of a run that ends without an exchange."""
        steps = self._run.steps
        if self._additions != self._additions_at_start:
            return
        if steps.count > 0:
            algorithm = type(self._strategy.algorithm).__name__
            rank_zero_warn(
                f"EASGDStrategy: training ended after {steps.count} optimizer steps without an exchange "
                f"({self._period}). The center, which is saved and which the module now holds, is what training began "
                "with: train longer, or exchange more often, for example "
                f"{algorithm}(period={max(1, steps.count // 2)})"
            )
        elif steps.num_batches > 0 and any(coupling.is_apart for coupling in self._strategy.couplings):
            rank_zero_warn(
                f"EASGDStrategy: training ended after {steps.num_batches} batches without a step of an optimizer that "
                "configure_optimizers returned, and yet parameters have changed. The center, which is saved and which "
                "the module now holds, knows nothing of it: make the updates with such an optimizer"
            )

"""Arguments that the strategy does not have, and what a logger gets of those that it has."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import StrategyRegistry

from lightning_easgd import EASGD, EASGDStrategy, LocalSGD
from tests.helpers import run_replicas
from tests.modules import Regression, loader, trainer


@pytest.mark.parametrize(
    ("keywords", "advice"),
    [
        (
            {"period": 4},
            "it belongs to EASGD(period=4) or ADAG(period=4) or ADMM(period=4), as in EASGDStrategy(EASGD(",
        ),
        ({"moving_rate": 0.1}, "it belongs to EASGD(moving_rate=0.1)"),
        ({"wire": "int8"}, "it belongs to AllReduce(wire='int8')"),
        ({"evalute": "replica"}, "did you mean 'evaluate'?"),
        ({"replicas_size": 2}, "did you mean 'replica_size'?"),
        ({"process_group": 1}, "there is no such argument"),
        ({"find_unused_parameters": True, "quux": 1}, "see help(EASGDStrategy)"),
    ],
)
def test_a_keyword_that_nobody_reads_is_refused(keywords, advice):
    name = list(keywords)[-1]
    with pytest.raises(TypeError, match=re.escape(f"EASGDStrategy({name}={keywords[name]!r}): ") + ".*") as refused:
        EASGDStrategy(**keywords)
    assert advice in str(refused.value)


def test_every_registered_name_has_arguments_that_there_are():
    names = [name for name in StrategyRegistry if getattr(StrategyRegistry[name]["strategy"], "_bound_to", None)]
    assert len(names) > 40
    for name in names:
        assert isinstance(StrategyRegistry.get(name), EASGDStrategy)


class _Refuses(CSVLogger):
    """As MLflow's: a value that was logged once cannot become another."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.kept: dict[str, Any] = {}

    def log_hyperparams(self, params: Any) -> None:
        for name, value in dict(params).items():
            if self.kept.setdefault(name, value) != value:
                raise RuntimeError(f"Changing param values is not allowed: {name} was {self.kept[name]!r}")


class _Named(Regression):
    def __init__(self, data: str = "mine", period: int = 30, algorithm: str = "adam", slack: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()


def _said(run: Callable[[], None]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "EASGDStrategy" in str(w.message) or "_Refuses" in str(w.message)]


def _fits(replica: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    strategy: Any = EASGDStrategy(
        find_unused_parameters=True, static_graph=True, bucket_cap_mb=None, process_group=None
    )
    found["ddp"] = (
        _said(lambda: trainer(devices=1, strategy=strategy).fit(Regression(), loader())),
        strategy._ddp_kwargs,
    )
    logger = _Refuses(folder)

    def fit(module: Any, algorithm: Any, **kwargs: Any) -> None:
        evaluate = kwargs.pop("evaluate", "center")
        t = trainer(devices=1, strategy=EASGDStrategy(algorithm, evaluate=evaluate), val_check_interval=4, **kwargs)
        t.fit(module, loader(), loader())

    found["first"] = _said(lambda: fit(_Named(), EASGD(period=3), logger=logger))
    found["logged"] = dict(logger.kept)
    found["changed"] = _said(lambda: fit(Regression(), EASGD(period=2), logger=logger))
    found["late"] = _said(lambda: fit(Regression(), LocalSGD(period=20)))
    found["due"] = _said(lambda: fit(Regression(), EASGD(period=4), max_epochs=2, num_sanity_val_steps=1))
    found["own"] = _said(lambda: fit(Regression(), EASGD(period=10), evaluate="replica"))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    [found] = run_replicas(_fits, 1, str(tmp_path_factory.mktemp("logs")))
    return found


def test_what_ddp_knows_is_kept_and_said_where_there_is_no_ddp(found):
    [text], kept = found["ddp"]
    assert "EASGDStrategy(find_unused_parameters=..., static_graph=...) has no effect with one process" in text
    assert kept["find_unused_parameters"] is kept["static_graph"] is True


def test_the_modules_values_and_the_strategys_have_names_of_their_own(found):
    logged = found["logged"]
    module = {name: logged[name] for name in ("data", "period", "algorithm", "slack")}
    assert module == {"data": "mine", "period": 30, "algorithm": "adam", "slack": 0.5}
    assert logged["strategy/period"] == 3
    assert logged["strategy/data"] == "shard"
    assert logged["strategy/algorithm"] == "EASGD"
    assert found["first"] == []
    # The same run goes on with another period: a warning, and training.
    [text] = found["changed"]
    assert "_Refuses did not take the strategy's hyper-parameters" in text
    assert "strategy/period was 3" in text


def test_an_evaluation_and_an_end_without_exchange_are_said_once(found):
    evaluation, end = found["late"]
    assert "this evaluation, after 4 optimizer steps, sees the same center" in evaluation
    assert "an exchange is due every 20 optimizer steps" in evaluation
    assert "training ended after 16 optimizer steps without an exchange" in end
    assert "LocalSGD(period=8)" in end


def test_a_run_that_exchanges_hears_nothing_of_it(found):
    assert found["due"] == []
    assert found["own"] == []

"""examples/theory.py: that it draws, and that its numbers are the known ones, by formula and by simulation."""

import importlib.util
import math
import sys
from types import ModuleType

import pytest
import torch

from lightning_easgd.algorithms import EASGD, LocalSGD
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def theory() -> ModuleType:
    spec = importlib.util.spec_from_file_location("theory", ROOT / "examples/theory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_writes_an_image(theory, tmp_path, monkeypatch, capsys):
    image = tmp_path / "new" / "theory.png"
    monkeypatch.setattr(sys, "argv", ["theory.py", "--fast", "--out", str(image)])
    theory.main()
    assert capsys.readouterr().out == f"wrote {image}\n"
    assert image.read_bytes().startswith(b"\x89PNG")
    assert 10_000 < image.stat().st_size < 150_000


def test_help(theory, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["theory.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        theory.main()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--out" in text
    assert "--fast" in text


def test_cycles(theory):
    assert theory.admm_cycle(3, 1e-3, 2.5) == pytest.approx(1.00097389, abs=1e-8)
    assert theory.easgd_cycle(3, 1e-3, 2.5e-3) == pytest.approx(0.99926975, abs=1e-8)


def test_variance(theory):
    assert theory.closed_variance(4, 0.1, 0.9) == pytest.approx(0.0104558, abs=1e-7)
    assert theory.measured_variance(4, 0.1, 0.9, 4000) == pytest.approx(0.0104558, rel=0.05)


@pytest.mark.parametrize(("p", "eta"), [(1, 0.2), (1, 0.3), (4, 0.5), (4, 0.1)])
def test_mean_square_rate_of_a_batch(theory, p, eta):
    """T13, with mean 1 and deviation 2."""
    closed = 1 - 2 * eta + eta**2 * (1 + 4 / p)
    assert theory.mean_square_rate(LocalSGD(1), p, eta, 1.0, 2.0) == pytest.approx(closed, abs=1e-12)


@pytest.mark.parametrize(("algorithm", "p"), [(EASGD(1, center_rate=0.9), 2), (EASGD(1, -0.5, 1.0), 1)], ids=repr)
def test_mean_square_rate_by_draws(theory, algorithm, p):
    closed = theory.mean_square_rate(algorithm, p, 0.3, 1.0, 1.0)
    assert theory.measured_mean_square_rate(algorithm, p, 0.3, 1.0, 1.0, 100_000) == pytest.approx(closed, rel=0.02)


def test_mean_square_rate_without_noise_is_the_square_of_the_radius(theory):
    radius = theory.pair_radius(0.1, 0.5, 0.5)
    assert theory.mean_square_rate(EASGD(1, 0.5), 1, 0.1, 1.0, 0.0) == pytest.approx(radius**2, abs=1e-12)


def test_trap(theory):
    assert theory.trap(0.5, 3000) == pytest.approx((math.sqrt(0.5), 0.0), abs=1e-3)
    assert theory.trap(0.8, 3000) == pytest.approx((1.0, 1.0), abs=1e-3)


@pytest.mark.parametrize("alpha", [-0.7, -0.2, 0.0, 0.3])
@pytest.mark.parametrize("beta", [0.4, 0.9])
def test_pair(theory, alpha, beta):
    assert theory.pair_radius(0.1, alpha, beta) == pytest.approx(theory.closed_pair_radius(0.1, alpha, beta), abs=1e-12)


@pytest.mark.parametrize(("e", "beta", "best", "radius"), [(0.1, 0.9, -0.4, 0.7), (0.01, 1.0, -0.81, 0.9)])
def test_best_moving_rate(theory, e, beta, best, radius):
    """T11: a double root, which rounding splits by its square root."""
    assert theory.pair_radius(e, best, beta) == pytest.approx(radius, abs=1e-7)
    for alpha in torch.linspace(-1, 0.5, 16).tolist():
        assert theory.pair_radius(e, alpha, beta) >= radius - 1e-7

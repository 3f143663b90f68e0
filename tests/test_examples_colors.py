"""Coloured MNIST: colours found again, their divergence against known answers, runs that resume."""

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import gaussian_kde
from sklearn.cluster import KMeans
from sklearn.metrics import pairwise_distances
from torch import Tensor

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


def module(name: str) -> Any:
    return importlib.import_module(name)


def bars(count: int, *, size: int = 16) -> Tensor:
    """Return grey images with a bar of full intensity and soft edges."""
    images = -torch.ones(count, 1, size, size)
    images[:, :, 3:-3, 5:10] = 0.2
    images[:, :, 3:-3, 6:9] = 1
    return images


def normal(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) / 2


def test_the_formula_of_the_appendix() -> None:
    colors, rng = module("lab.data.colors"), torch.Generator().manual_seed(0)
    grey, colours = bars(200), colors.draw(200, rng)
    images = colors.coloured(grey, colours, rng)
    assert images.shape == (200, 3, 16, 16)
    assert images.min() >= -1
    assert images.max() <= 1
    assert images.median() < -0.8  # the background
    middle = images[:, :, 8, 7]
    dim = colours.abs().amax(1) < 0.3  # hardly ever clipped
    assert (middle - colours)[dim].std() == pytest.approx(colors.NOISE, rel=0.15)
    edge = images[:, :, 8, 5]  # I = 0.6: I * C + I - 1
    assert (edge - (0.6 * colours - 0.4))[dim].mean().abs() < 0.05
    assert colors.draw(20_000, rng).std().item() == pytest.approx(0.5, rel=0.03)


def test_colours_are_those_of_scikit_learns_k_means() -> None:
    colors, rng = module("lab.data.colors"), torch.Generator().manual_seed(0)
    images = colors.coloured(bars(20), colors.draw(20, rng), rng)
    back, front = colors.clusters(images.flatten(2).movedim(1, 2))
    for image, one, two in zip(images, back, front, strict=True):
        pixels = image.flatten(1).T.double().numpy()
        black = np.full((1, 3), -1.0)
        farthest = pixels[pairwise_distances(pixels, black)[:, 0].argmax()]
        means = KMeans(2, init=np.stack([black[0], farthest]), n_init=1, tol=0).fit(pixels)
        centres = sorted(means.cluster_centers_, key=lambda c: np.linalg.norm(c + 1))
        assert np.allclose(centres, torch.stack([one, two]), atol=1e-4)


def test_colours_are_found_again_and_dark_digits_discarded() -> None:
    colors, rng = module("lab.data.colors"), torch.Generator().manual_seed(0)
    colours = torch.tensor([[0.5, -0.5, 0.0], [-0.9, 0.8, -0.9], [0.2, 0.2, 0.2]])
    found = colors.foreground(colors.coloured(bars(3), colours, rng))
    assert len(found) == 3
    assert (found - colours).abs().max() < 0.25  # soft edges are darker
    black = colors.coloured(bars(5), -torch.ones(5, 3), rng)
    assert len(colors.foreground(black)) == 0
    assert len(colors.foreground(-torch.ones(2, 3, 16, 16))) == 0


def test_data_against_data_is_at_the_floor_and_far_below_one_colour() -> None:
    colors = module("lab.data.colors")
    data, again = normal(900, 0), normal(900, 1)
    floor = colors.js_divergence(data, again)
    assert 0 < floor < 0.06
    assert colors.js_divergence(data, data) == pytest.approx(0, abs=1e-12)
    narrow = colors.js_divergence(data, again / 2)
    single = colors.js_divergence(data, torch.zeros(900, 3))
    assert 2 * floor < narrow < single < math.log(2)
    assert colors.js_divergence(data, torch.empty(0, 3)) == math.log(2)
    assert colors.js_divergence(data, torch.full((900, 3), 50.0)) == pytest.approx(math.log(2))


def test_a_single_colour_has_the_analytic_divergence() -> None:
    """Of N(0, 1 + h^2), the kernel density of normal data, and N(0, h^2), that of one colour."""
    colors = module("lab.data.colors")
    data = normal(2000, 0)
    h = 2000 ** (-1 / 7)

    def log_density(r: float, variance: float) -> float:
        return -r * r / (2 * variance) - 1.5 * math.log(2 * math.pi * variance)

    def integrand(r: float, own: float, other: float) -> float:
        p, q = log_density(r, own), log_density(r, other)
        apart = p - float(np.logaddexp(p, q)) + math.log(2)
        return 4 * math.pi * r * r * math.exp(p) * apart

    wide, thin = 1 + h * h, h * h
    expected = (
        quad(integrand, 0, 12, (wide, thin))[0] + quad(integrand, 0, 12, (thin, wide))[0]
    ) / 2
    found = colors.js_divergence(data, data.mean(0).expand(2000, 3))
    assert found == pytest.approx(expected, abs=0.02)


def test_the_density_of_the_data_is_scipys() -> None:
    colors = module("lab.data.colors")
    data, places = normal(300, 0), normal(50, 1).double().numpy()
    (density,) = colors.densities(data)
    root = np.linalg.cholesky(np.cov(data.double().numpy().T))
    whitened = np.linalg.solve(root, places.T).T
    ours = density.score_samples(whitened) - np.log(np.linalg.det(root))
    assert np.allclose(ours, gaussian_kde(data.double().numpy().T).logpdf(places.T), atol=2e-3)

"""The closed-form factor: exact for a known process, best among its like, and held-out nats per pixel of images in a file."""

import numpy as np
import pytest
import torch

import banded_gmrf as bg
from banded_gmrf.diagnostics import sample_growth
from bench.quality import PATCH, fit, held_out_quality, load_photographs, neighbour_covariance, scikit_image_photographs


def test_covariance_counts_each_pixel_with_all_its_neighbours():
    image = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    stencil = bg.Stencil([(0, 1), (1, -1)])
    here, right, below = image[:2, 1:3], image[:2, 2:4], image[1:, :2]
    values = torch.stack([here, right, below]).flatten(1)
    torch.testing.assert_close(neighbour_covariance(image[None], stencil), values @ values.T / 4)


def test_fit_is_exact_where_the_field_has_the_stencil():
    """A stationary autoregression along the rows: its precision is banded, and every border pixel has its own best column."""
    correlation, variance, width = 0.7, 2.5, 6
    index = torch.arange(width, dtype=torch.float64)
    covariance = variance * correlation ** (index[:, None] - index).abs()
    stencil = bg.Stencil([(0, 1)])
    L = fit(covariance[:2, :2], stencil, (1, width)).to_dense()
    torch.testing.assert_close(L @ L.T, torch.linalg.inv(covariance))


def test_fit_is_the_most_likely_column():
    torch.manual_seed(3)
    images = torch.nn.functional.avg_pool2d(torch.randn(2, 40, 50, dtype=torch.float64), 3, 1)
    stencil = bg.Stencil.square(3)
    S = neighbour_covariance(images, stencil)
    factor = fit(S, stencil, (5, 6))
    inner = torch.cat([factor.log_diag[None].exp(), factor.off_diag])[:, 2, 3].requires_grad_()
    (gradient,) = torch.autograd.grad(0.5 * inner @ S @ inner - inner[0].log(), inner)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-10, rtol=0)  # a solve with a condition of 1e3


def test_a_fit_whose_samples_grow_is_damped():
    """Of an image much smoother than four neighbours can follow."""
    image = torch.randn(1, 80, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(8):
        image = torch.nn.functional.avg_pool2d(image, 2, 1)
    image = image / image.std() + 0.01 * torch.randn(
        image.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    stencil = bg.Stencil.cross(2)
    S = neighbour_covariance(image, stencil)
    factor = fit(S, stencil, (40, 40))
    assert sample_growth(bg.GMRF(torch.zeros(40, 40, dtype=torch.float64), factor), 64) < 3
    inner = torch.cat([factor.log_diag[None].exp(), factor.off_diag])[:, 20, 20]
    torch.testing.assert_close(inner @ S @ inner, torch.ones((), dtype=torch.float64))
    first = torch.linalg.solve(S, torch.eye(5, dtype=torch.float64)[:, 0])
    likeliest = bg.StencilCholesky(
        (0.5 * first[0].log()).expand(40, 40), (first[1:] / first[0].sqrt())[:, None, None].expand(4, 40, 40), stencil
    )
    assert sample_growth(bg.GMRF(torch.zeros(40, 40, dtype=torch.float64), likeliest), 64) > 100


@pytest.fixture
def photographs(tmp_path):
    generator = np.random.default_rng(0)
    coarse = generator.normal(128, 30, (6, PATCH // 4 + 2, PATCH // 4 + 2)).repeat(4, axis=1).repeat(4, axis=2)
    path = tmp_path / "images.npz"
    np.savez(path, train=coarse[:4].clip(0, 255).astype(np.uint8), test=coarse[4:].clip(0, 255).astype(np.uint8))
    return path


def test_larger_stencils_explain_held_out_images_better(photographs):
    quality = held_out_quality({"1", "5", "3"}, load_photographs(photographs))
    assert [score["stencil"] for score in quality["scores"]] == ["1", "3", "5"]
    nats = [score["nats_per_pixel"] for score in quality["scores"]]
    assert nats[0] > nats[1] > nats[2]
    assert quality["scores"][0]["gain_over_smallest"] == 0
    assert quality["scores"][2]["gain_over_smallest"] == pytest.approx(nats[0] - nats[2])
    assert quality["patches"] == 2
    assert "images.npz" in quality["photographs"]


def test_photographs_are_split_like_a_chessboard(tmp_path):
    path = tmp_path / "photographs.npz"
    image = np.arange(2)[:, None] + 10 * np.arange(3)  # the same gray level throughout each patch
    np.savez(path, first=image.repeat(PATCH, axis=0).repeat(PATCH, axis=1), second=np.zeros((2 * PATCH, 2 * PATCH + 9)))
    (train, test), (other, _) = load_photographs(path).sets
    assert train[:, 5, 5].round().tolist() == [0, 20, 11]
    assert test[:, 5, 5].round().tolist() == [10, 1, 21]
    assert other.shape == (2, PATCH, PATCH)


def test_files_without_photographs_are_refused(tmp_path):
    path = tmp_path / "other.npz"
    for arrays in (
        {"images": np.zeros((2, 80, 80))},
        {"train": np.zeros((2, 8, 8)), "test": np.zeros((2, 80, 80))},
        {"small": np.zeros((100, 200))},
    ):
        np.savez(path, **arrays)
        with pytest.raises(
            ValueError, match=r"other.npz has .* expected train and test \(count, height, width\) of at least 64"
        ):
            load_photographs(path)
    for bad, values in ((np.linspace(0, 1, 128 * 128), "0 to 1"), (np.full(128 * 128, 300, np.uint16), "300 to 300")):
        np.savez(path, first=bad.reshape(128, 128))
        with pytest.raises(ValueError, match=f"first of other.npz has values from {values}, expected gray levels"):
            load_photographs(path)
    for missing in (tmp_path, tmp_path / "none.npz"):
        with pytest.raises(ValueError, match="cannot be read"):
            load_photographs(missing)


def test_photographs_of_scikit_image_are_gray_levels():
    for train, test in scikit_image_photographs().sets:
        assert train.shape[1:] == test.shape[1:] == (PATCH, PATCH)
        for patches in (train, test):
            assert -0.5 <= patches.min() < 128 < patches.max() <= 255.5

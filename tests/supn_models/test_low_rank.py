"""The head of a low-rank part, and segmentation by a distribution of whole images of logits."""

import math

import pytest
import skimage.data
import torch
from torch import nn

import banded_gmrf as bg
from supn_models import (
    ConvVAE,
    CovarianceNetwork,
    LatentCovarianceNetwork,
    LowRankHead,
    SegmentationHead,
    StencilCholeskyHead,
    StructuredLikelihood,
    categorical_log_likelihood,
)

STENCIL, GRID = bg.Stencil.square(3), (7, 5)


@pytest.mark.parametrize(("grid", "out_channels"), [((9,), None), ((7, 5), None), ((3, 4, 5), None), ((7, 5), 3), ((9,), 2)])
def test_head_starts_small_with_a_gradient(grid, out_channels):
    head = LowRankHead(6, 4, len(grid), initial_stddev=0.05, out_channels=out_channels)
    features = torch.randn(2, 6, *grid)
    factors = head(features)
    sites = grid if out_channels is None else (*grid, out_channels)
    assert factors.shape == (2, 4, *sites)
    assert 0 < factors.square().mean().sqrt() < 0.02  # 0.1 of 0.05, estimated from 24 weights or more
    stencil = bg.Stencil.cross(1, ndim=len(sites))
    factor = StencilCholeskyHead(6, stencil, 0.05, out_channels=out_channels)(features)
    q = bg.LowRankGMRF(torch.zeros(sites), factor, factors)
    q.log_prob(0.05 * torch.randn(2, *sites)).sum().backward()
    assert all(torch.count_nonzero(parameter.grad) == parameter.numel() for parameter in head.parameters())


def test_heads_find_a_low_rank_part():
    """Data with one factor known: a brightness that all pixels share, beside independent noise."""
    head, local = LowRankHead(1, 2, initial_stddev=0.1), StencilCholeskyHead(1, STENCIL, 0.1)
    features = torch.ones(64, 1, *GRID)
    data = 0.1 * torch.randn(64, *GRID) + 0.2 * torch.randn(64, 1, 1)
    optimizer = torch.optim.Adam([*head.parameters(), *local.parameters()], lr=0.02)
    for _ in range(150):
        loss = -bg.LowRankGMRF(torch.zeros(GRID), local(features), head(features)).log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shared = head(features)[0].square().sum(0).mean()
    # The sample variance of 64 numbers has a standard error of 18 %.
    assert 0.5 * 0.04 < shared < 1.8 * 0.04


def test_head_under_autocast_keeps_the_precision_of_its_weights():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LowRankHead(6, 4)(torch.randn(2, 6, *GRID)).dtype == torch.float32


@pytest.mark.parametrize("num_factors", [0, 3])
@pytest.mark.parametrize(("stencil", "grid"), [(STENCIL, GRID), (bg.Stencil([1, 2]), (9,))])
def test_segmentation_head_gives_a_distribution_of_logits(num_factors, stencil, grid):
    q = SegmentationHead(6, 4, stencil, num_factors)(torch.randn(2, 6, *grid))
    assert type(q) is (bg.LowRankGMRF if num_factors else bg.GMRF)
    assert (q.batch_shape, q.event_shape) == ((2,), (*grid, 4))
    assert len(q.stencil) == len(stencil)
    labels = torch.randint(4, (2, *grid))
    loss = -categorical_log_likelihood(q, labels)
    assert loss.shape == (2,)
    assert loss.isfinite().all()


@pytest.mark.parametrize("num_factors", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_segmentation_head_keeps_the_precision_of_its_weights(num_factors, dtype):
    """Whatever that of the features, as its parts do: not a number differs from those of the same features in float32."""
    head, features = SegmentationHead(6, 3, STENCIL, num_factors), torch.randn(2, 6, *GRID).to(dtype)
    expected = head(features.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = head(features.float())
    for q in (head(features), under_autocast):
        assert torch.equal(q.loc, expected.loc)
        assert torch.equal(q.log_diag, expected.log_diag)
        assert num_factors == 0 or torch.equal(q.factors, expected.factors)


@pytest.mark.parametrize("num_factors", [0, 3])
def test_segmentation_head_does_not_look_into_its_numbers(num_factors):
    """A GPU would have to wait for that at each step. What is not finite shows in the likelihood."""
    q = SegmentationHead(6, 3, STENCIL, num_factors)(torch.full((1, 6, *GRID), math.nan))
    assert categorical_log_likelihood(q, torch.zeros(1, *GRID, dtype=torch.int64)).isnan()


def test_the_likelihood_is_that_of_the_samples():
    head = SegmentationHead(6, 3, STENCIL, 2)
    q, labels = head(torch.randn(2, 6, *GRID)), torch.randint(3, (2, *GRID))
    torch.manual_seed(1)
    actual = categorical_log_likelihood(q, labels, num_samples=5)
    torch.manual_seed(1)
    samples = q.rsample((5,))
    each = -nn.functional.cross_entropy(samples.movedim(-1, 2).flatten(0, 1), labels.repeat(5, 1, 1), reduction="none")
    expected = each.double().sum((1, 2)).exp().reshape(5, 2).mean(0).log()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    labels[:, 0] = -1  # nobody has said what these are
    assert (categorical_log_likelihood(q, labels) > actual).all()
    torch.testing.assert_close(categorical_log_likelihood(q, torch.full_like(labels, -1)), torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_likelihood_of_large_images_is_summed_in_enough_precision(dtype):
    """Over so many sites that float16 has no number for the sum, and bfloat16 none within 100 nats."""
    head = SegmentationHead(6, 3, STENCIL, 2).to(dtype)
    q, labels = head(torch.randn(1, 6, 256, 256, dtype=dtype)), torch.randint(3, (1, 256, 256))
    torch.manual_seed(1)
    actual = categorical_log_likelihood(q, labels, num_samples=2)
    torch.manual_seed(1)
    samples = q.rsample((2,)).double()
    each = -nn.functional.cross_entropy(samples.movedim(-1, 2).flatten(0, 1), labels.repeat(2, 1, 1), reduction="none")
    expected = each.sum((1, 2)).logsumexp(0, keepdim=True) - math.log(2)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The samples are the same; float32 has 2**-8 nats to the last bit of 65536, and sums them in pairs.
    torch.testing.assert_close(actual.double(), expected, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)
    actual.mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def borders_of_coins(count: int, size: int, generator: torch.Generator, first_row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops of a photograph of coins (count, 1, size, size), and each as one of many observers would segment it.

    An observer calls coin whatever is brighter than a threshold of their own, the same for the whole crop.
    """
    photograph = torch.from_numpy(skimage.data.coins()[:, ::2].copy())[::2].float() / 255
    rows = torch.randint(first_row, first_row + 75 - size, (count,), generator=generator).tolist()
    columns = torch.randint(photograph.shape[1] - size, (count,), generator=generator).tolist()
    crops = torch.stack([photograph[i : i + size, j : j + size] for i, j in zip(rows, columns, strict=True)])
    thresholds = 0.35 + 0.3 * torch.rand(count, 1, 1, generator=generator)
    return crops[:, None] - 0.5, (crops > thresholds).long()


def test_segmentations_of_coins_by_observers_who_disagree():
    """What observers share over an image a distribution of whole images learns, and one of independent pixels cannot."""
    generator = torch.Generator().manual_seed(0)
    images, labels = borders_of_coins(200, 12, generator, first_row=0)
    test_images, test_labels = borders_of_coins(100, 12, generator, first_row=75)

    def score(stencil: bg.Stencil, num_factors: int) -> float:
        torch.manual_seed(0)
        head = SegmentationHead(8, 2, stencil, num_factors)
        network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), head)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
        for _ in range(60):
            batch = torch.randint(len(images), (32,))
            loss = -categorical_log_likelihood(network(images[batch]), labels[batch], num_samples=4).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            return float(categorical_log_likelihood(network(test_images), test_labels, num_samples=64).mean())

    independent, structured = score(bg.Stencil.square(1), 0), score(STENCIL, 4)
    certain = -144 * math.log(2)
    assert certain < independent
    assert structured > independent + 4  # nats for a crop, of 8 that one run gave


def test_bad_arguments():
    features = torch.randn(2, 6, *GRID)
    for arguments, message in (
        ((0, 4), "in_channels is 0, expected an integer of at least 1"),
        ((6, 0), "num_factors is 0, expected an integer of at least 1"),
        ((6, 4, 4), "ndim is 4, expected an integer from 1 to 3"),
        ((6, 4, 2, -1.0), r"initial_stddev is -1.0, expected a positive finite number"),
        ((6, 4, 2, 1.0, 0.0), r"initial_scale is 0.0, expected a positive finite number"),
        ((6, 4, 3, 1.0, 0.1, 3), "ndim is 3, expected an integer from 1 to 2"),
        ((6, 4, 2, 1.0, 0.1, 0), "out_channels is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LowRankHead(*arguments)
    with pytest.raises(ValueError, match=r"features has shape \(2, 5, 7, 5\), expected \(batch, 6, \*grid\)"):
        LowRankHead(6, 4)(features[:, :5])
    with pytest.raises(TypeError, match=r"features is a ndarray, expected a torch\.Tensor"):
        LowRankHead(6, 4)(features.numpy())
    with pytest.raises(ValueError, match="num_classes is 1, expected an integer of at least 2"):
        SegmentationHead(6, 1, STENCIL)
    with pytest.raises(ValueError, match="num_factors is -1"):
        SegmentationHead(6, 2, STENCIL, -1)
    with pytest.raises(ValueError, match="stencil has 3 axes, expected 1 or 2"):
        SegmentationHead(6, 2, bg.Stencil.box((1, 1, 1)))
    q = SegmentationHead(6, 3, STENCIL, 2)(features)
    labels = torch.zeros(2, *GRID, dtype=torch.int64)
    with pytest.raises(TypeError, match="logits is a Tensor, expected a distribution of logits"):
        categorical_log_likelihood(q.loc, labels)
    no_grid = torch.distributions.MultivariateNormal(torch.zeros(4, 3), torch.eye(3))
    with pytest.raises(
        ValueError, match=r"logits has events \(3,\), expected \(\*grid, num_classes\) with at least one grid axis"
    ):
        categorical_log_likelihood(no_grid, torch.zeros(4, dtype=torch.int64))
    one_axis = bg.GMRF(torch.zeros(3), bg.StencilCholesky(torch.zeros(3), torch.zeros(1, 3), bg.Stencil([1])))
    with pytest.raises(ValueError, match=r"logits has events \(3,\)"):
        categorical_log_likelihood(one_axis, torch.tensor(0))
    with pytest.raises(TypeError, match=r"labels is torch.float32, expected torch.int64"):
        categorical_log_likelihood(q, labels.float())
    with pytest.raises(ValueError, match=r"labels has shape \(7, 5\), expected \(2, 7, 5\)"):
        categorical_log_likelihood(q, labels[0])
    with pytest.raises(ValueError, match="labels has entries that are 3 or more"):
        categorical_log_likelihood(q, labels + 3)
    with pytest.raises(ValueError, match="num_samples is 0"):
        categorical_log_likelihood(q, labels, num_samples=0)


@pytest.mark.parametrize("from_image", [True, False])
def test_networks_predict_factors_beside_the_local_part(from_image):
    torch.manual_seed(0)
    grid, stencil = (9, 6), bg.Stencil.square(3)
    if from_image:
        network = CovarianceNetwork(1, stencil, channels=4, num_factors=3)
    else:
        network = LatentCovarianceNetwork(grid, 2, stencil, decoder_channels=(4,), channels=4, num_factors=3)
    base = ConvVAE(grid, latent_size=2, channels=(4,))
    likelihood = StructuredLikelihood(base, network).eval()
    code, x = torch.randn(5, 2), torch.randn(5, *grid)
    q = likelihood(code)
    assert isinstance(q, bg.LowRankGMRF)
    assert (q.batch_shape, q.event_shape, q.rank) == ((5,), grid, 3)
    assert torch.equal(q.log_diag, likelihood.factor(code, base.decode(code)).log_diag)
    assert torch.equal(likelihood.around(code, base.decode(code)).log_prob(x), q.log_prob(x))
    q.log_prob(x).sum().backward()
    slopes = [parameter.grad for name, parameter in network.named_parameters() if "low_rank" in name]
    assert len(slopes) == 2
    assert all(slope.abs().sum() > 0 for slope in slopes)
    again = type(network).from_config(network.config)
    again.load_state_dict(network.state_dict())
    assert again.config == network.config
    # A network without them has the parameters that it had before there were any.
    plain = type(network).from_config({**network.config, "num_factors": 0})
    assert not any("low_rank" in name for name in plain.state_dict())
    with pytest.raises(ValueError, match="num_factors is -1, expected"):
        type(network).from_config({**network.config, "num_factors": -1})

"""The head and the networks: shapes, the promised first prediction, gradients, and arguments that do not fit."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import banded_gmrf as bg
from supn_models import (
    ConvAutoencoder,
    ConvDecoder,
    ConvEncoder,
    ConvVAE,
    CovarianceMLP,
    CovarianceNetwork,
    LatentCovarianceNetwork,
    LowRankHead,
    SegmentationHead,
    StencilCholeskyHead,
)

CASES = [
    pytest.param(bg.Stencil.box((2,)), (13,), id="1 axis"),
    pytest.param(bg.Stencil.square(5), (8, 8), id="2 axes"),
    pytest.param(bg.Stencil.square(3), (7, 1), id="odd and single"),
    pytest.param(bg.Stencil.square(1), (5, 9), id="diagonal"),
    pytest.param(bg.Stencil.square(5), (1, 1), id="one site"),
    pytest.param(bg.Stencil.cross(1, ndim=3), (3, 6, 5), id="3 axes"),
]

SQUARE = bg.Stencil.square(3)


def nll(factor: bg.StencilCholesky, residual: torch.Tensor) -> torch.Tensor:
    return bg.negative_log_likelihood(residual, factor.log_diag, factor.off_diag, factor.stencil).mean()


@pytest.mark.parametrize(("stencil", "grid"), CASES)
def test_head_starts_as_a_diagonal_gaussian(stencil, grid):
    factor = StencilCholeskyHead(6, stencil, initial_stddev=0.05)(torch.randn(2, 6, *grid))
    assert factor.batch_shape == (2,)
    assert factor.grid == grid
    assert factor.off_diag.shape == (2, len(stencil), *grid)
    assert torch.count_nonzero(factor.off_diag) == 0
    torch.testing.assert_close(1 / factor.diag, torch.full((2, *grid), 0.05))


@pytest.mark.parametrize(("stencil", "grid"), CASES)
def test_covariance_network_learns_on_any_grid(stencil, grid):
    torch.manual_seed(0)
    network = CovarianceNetwork(2, stencil, channels=4, initial_stddev=0.1)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    image, residual = torch.randn(3, 2, *grid), torch.randn(3, *grid)
    first = nll(network(image), residual)
    torch.testing.assert_close(first, -torch.distributions.Normal(0, 0.1).log_prob(residual).flatten(1).sum(1).mean())
    first.backward()
    optimizer.step()  # Before this step the head's zero weights let no gradient through to the layers below.
    optimizer.zero_grad()
    second = nll(network(image), residual)
    second.backward()
    assert second < first
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.count_nonzero(parameter.grad) > 0, name


def test_covariance_network_scales_with_the_data():
    """Residuals and initial_stddev in other units: the same weights, the same whitened residual and gradients."""
    image, residual = torch.randn(2, 1, 9, 8), torch.randn(2, 9, 8)
    gradients = []
    for unit in (1.0, 1e-3):
        torch.manual_seed(0)
        head = StencilCholeskyHead(1, bg.Stencil.square(3), initial_stddev=unit)
        torch.nn.init.normal_(head.conv.weight, std=0.1)
        nll(head(image), residual * unit).backward()
        gradients.append(head.conv.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_one_seed_gives_one_trunk_whatever_the_stencil():
    trunks = []
    for size in (1, 5):
        torch.manual_seed(0)
        state = CovarianceNetwork(1, bg.Stencil.square(size), channels=4).state_dict()
        trunks.append({key: value for key, value in state.items() if not key.startswith("head.")})
    assert trunks[0].keys() == trunks[1].keys()
    assert all(torch.equal(trunks[0][key], trunks[1][key]) for key in trunks[0])


def test_head_of_channels_that_are_not_coupled_is_a_head_for_each():
    """Colours as the last axis of the grid: three channels, and a stencil that does not reach from one to another."""
    plane = bg.Stencil.square(3)
    colours = bg.Stencil([(*offset, 0) for offset in plane.offsets])
    head, features = StencilCholeskyHead(4, colours, 0.1, out_channels=3), torch.randn(2, 4, 5, 6)
    nn.init.normal_(head.conv.weight, std=0.1)
    L = head(features)
    assert (L.batch_shape, L.grid) == ((2,), (5, 6, 3))
    residual = torch.randn(2, 5, 6, 3)
    likelihoods = []
    for channel in range(3):
        alone = StencilCholeskyHead(4, plane, 0.1)
        alone.conv.load_state_dict({name: tensor[channel::3] for name, tensor in head.conv.state_dict().items()})
        single = alone(features)
        assert torch.equal(single.log_diag, L.log_diag[..., channel])
        assert torch.equal(single.off_diag, L.off_diag[..., channel])
        likelihoods.append(nll(single, residual[..., channel]))
    torch.testing.assert_close(nll(L, residual), sum(likelihoods))


@pytest.mark.parametrize("grid", [(5, 6), (1, 1), (4,)])
def test_head_of_channels_learns_that_they_are_correlated(grid):
    """From equal values in all channels: the diagonal start cannot say so, a step of the head does."""
    stencil = bg.Stencil.box((*[0] * len(grid), 2))  # all pairs of channels of one site
    head, features = StencilCholeskyHead(2, stencil, out_channels=3), torch.ones(64, 2, *grid)
    residual = torch.randn(64, *grid, 1) + 0.5 * torch.randn(64, *grid, 3)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        nll(head(features), residual).backward()
        optimizer.step()
    # All sites share one 3 x 3 factor, and the likelihood's maximum is the data's own precision.
    site = residual.reshape(-1, 3)
    n = math.prod(grid) * 3
    precision = head(features[:1]).to_dense()[0].reshape(n, n)[-3:, -3:]
    torch.testing.assert_close(precision @ precision.mT, torch.linalg.inv(site.mT @ site / len(site)), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        # One factor, or a stencil without offsets: the weights have one shape, and no offset tells the two kinds apart.
        (LowRankHead(4, 1), StencilCholeskyHead(4, bg.Stencil.square(1)), "of a LowRankHead, this is a StencilCholeskyHead"),
        (StencilCholeskyHead(4, bg.Stencil.square(1)), LowRankHead(4, 1), "of a StencilCholeskyHead, this is a LowRankHead"),
        (
            LowRankHead(4, 1, out_channels=3),
            StencilCholeskyHead(4, bg.Stencil([], ndim=3), out_channels=3),
            "of a LowRankHead, this is a StencilCholeskyHead",
        ),
        (
            StencilCholeskyHead(4, bg.Stencil.square(3), 0.05),
            StencilCholeskyHead(4, bg.Stencil.square(3)),
            "of a StencilCholeskyHead with initial_stddev 0.05, this one has 1.0",
        ),
        (
            StencilCholeskyHead(4, bg.Stencil([1, 2])),
            StencilCholeskyHead(4, bg.Stencil([1, 3])),
            r"with stencil .*\[\[1\], \[2\]\]",
        ),
        (
            StencilCholeskyHead(4, bg.Stencil.box((0, 2)), out_channels=1),
            StencilCholeskyHead(4, bg.Stencil.box((0, 2))),
            "out_channels 1, this one has None",
        ),
        (LowRankHead(4, 2, initial_stddev=2.0), LowRankHead(4, 2), "initial_stddev 2.0, this one has 1.0"),
        (LowRankHead(4, 6), LowRankHead(4, 2, out_channels=3), "out_channels None, this one has 3"),
        (
            CovarianceMLP(3, (2, 2), bg.Stencil.square(3), standardise=False),
            CovarianceMLP(3, (2, 2), bg.Stencil.square(3)),
            "standardise False, this one has True",
        ),
        (
            CovarianceMLP(3, (4,), bg.Stencil.box((1,))),
            CovarianceMLP(3, (2, 2), bg.Stencil.box((0, 1))),
            r"with grid \[4\], this one has \[2, 2\]",
        ),
    ],
)
def test_weights_that_meant_something_else_are_refused(there, here, words):
    """They are of the same shapes, and were taken without a word."""
    with pytest.raises(ValueError, match=words):
        here.load_state_dict(there.state_dict())
    there.half().load_state_dict(copy.deepcopy(there).state_dict())
    there.load_state_dict({name: tensor.half() for name, tensor in there.state_dict().items()})


@pytest.mark.parametrize("head", [StencilCholeskyHead(4, bg.Stencil.square(3), 0.3), LowRankHead(4, 2)])
def test_an_initial_stddev_need_not_be_the_same_to_the_last_bit(head):
    measured_again = copy.deepcopy(head)
    measured_again.initial_stddev *= 1 + 1e-12
    head.load_state_dict(measured_again.state_dict())


@pytest.mark.parametrize(
    "state", [[1.0, 0.0], None, torch.zeros(0), torch.ones(2, dtype=torch.float64), torch.tensor(3), torch.tensor([[91, 93]])]
)
@pytest.mark.parametrize(
    "head",
    [StencilCholeskyHead(4, SQUARE), LowRankHead(4, 2), CovarianceMLP(3, (2, 2), SQUARE)],
    ids=lambda head: type(head).__name__,
)
def test_a_state_that_is_not_of_a_head_is_refused(head, state):
    words = f"_extra_state is .*, expected what the state_dict of a {type(head).__name__} holds"
    with pytest.raises(ValueError if isinstance(state, torch.Tensor) else TypeError, match=words):
        head.load_state_dict({**head.state_dict(), "_extra_state": state})


def test_a_stencil_without_an_axis_of_channels_is_named():
    head = StencilCholeskyHead(4, bg.Stencil.square(3), out_channels=3)
    with pytest.raises(ValueError, match="with 1 grid axes: the last of the stencil's 2 axes counts out_channels"):
        head(torch.zeros(2, 4, 12, 14))


def test_head_stays_finite_far_from_training():
    head = StencilCholeskyHead(1, bg.Stencil.square(3))
    torch.nn.init.ones_(head.conv.weight)
    factor = head(torch.full((1, 1, 4, 4), -1e6))
    assert torch.isfinite(factor.log_diag).all()
    assert torch.isfinite(factor.off_diag).all()
    assert (factor.diag > 0).all()


def test_head_is_not_rounded_under_autocast():
    head = StencilCholeskyHead(4, bg.Stencil.square(3))
    torch.nn.init.normal_(head.conv.weight)
    features = torch.randn(2, 4, 3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        factor = head(features)
    assert torch.equal(factor.log_diag, head(features).log_diag)
    assert torch.equal(factor.off_diag, head(features).off_diag)


@pytest.mark.parametrize(("kernel_size", "norm"), [(3, "group"), (5, "batch")])
@pytest.mark.parametrize(("in_channels", "grid"), [(1, (21,)), (1, (32, 32)), (3, (17, 30)), (1, (5, 9, 1))])
def test_autoencoder_takes_any_size(in_channels, grid, kernel_size, norm):
    torch.manual_seed(0)
    autoencoder = ConvAutoencoder(grid, in_channels, 6, (4, 8), kernel_size, norm).eval()
    images = torch.rand(2, in_channels, *grid)
    code = autoencoder.encode(images)
    assert code.shape == (2, 6)
    reconstruction = autoencoder(images)
    assert reconstruction.shape == images.shape
    torch.testing.assert_close(autoencoder.decode(code), reconstruction)
    (reconstruction - images).square().mean().backward()
    assert all(torch.count_nonzero(p.grad) > 0 for p in autoencoder.parameters())


def test_config_builds_the_same_network():
    torch.manual_seed(0)
    cross, image, code = bg.Stencil.cross(2), torch.rand(1, 1, 9, 7), torch.rand(1, 3)
    latent = {"decoder_channels": [4], "kernel_size": 3, "norm": "batch", "channels": 5, "initial_stddev": 0.3}
    for network, inputs in (
        (CovarianceNetwork(1, cross, channels=4, num_levels=2, initial_stddev=0.3), (image,)),
        (LatentCovarianceNetwork((9, 7), 3, cross, **latent), (code,)),
        (LatentCovarianceNetwork([9, 7], 3, cross, image_channels=1, num_levels=2, **latent), (code, image)),
        (ConvAutoencoder((9, 7), latent_size=3, channels=[4], kernel_size=5, norm="batch"), (image,)),
        (ConvVAE((9, 7), latent_size=3, channels=[4], kernel_size=3), (image,)),
    ):
        network.eval()
        twin = type(network).from_config(json.loads(json.dumps(network.config))).eval()
        twin.load_state_dict(network.state_dict())
        assert json.dumps(twin.config) == json.dumps(network.config)
        ours, theirs = network(*inputs), twin(*inputs)
        if isinstance(ours, bg.StencilCholesky):
            assert ours.stencil == theirs.stencil
            ours, theirs = ours.log_diag, theirs.log_diag
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StencilCholeskyHead(0, SQUARE), "in_channels is 0"),
        (lambda: StencilCholeskyHead(1, 5), "stencil is a int"),
        (lambda: StencilCholeskyHead(1, SQUARE, initial_stddev=0.0), "initial_stddev is 0.0"),
        (lambda: StencilCholeskyHead(1, SQUARE, initial_stddev=float("nan")), "initial_stddev is nan"),
        (lambda: StencilCholeskyHead(4, SQUARE)(torch.rand(1, 3, 8, 8)), r"features has shape \(1, 3, 8, 8\)"),
        (lambda: StencilCholeskyHead(1, SQUARE, out_channels=0), "out_channels is 0"),
        (lambda: StencilCholeskyHead(1, bg.Stencil([1]), out_channels=3), "stencil has 1 axis"),
        (lambda: StencilCholeskyHead(1, SQUARE, out_channels=3)(torch.rand(1, 1, 8, 8)), r"features has shape \(1, 1, 8, 8\)"),
        (lambda: CovarianceNetwork(1.5, SQUARE), "in_channels is 1.5"),
        (lambda: CovarianceNetwork(1, "square"), "stencil is a str"),
        (lambda: CovarianceNetwork(1, SQUARE, channels=0), "channels is 0"),
        (lambda: CovarianceNetwork(1, SQUARE, num_levels=0), "num_levels is 0"),
        (lambda: CovarianceNetwork(1, SQUARE)(torch.rand(1, 8, 8)), r"image has shape \(1, 8, 8\)"),
        (lambda: CovarianceNetwork(1, SQUARE)(torch.rand(1, 1, 0, 8)), r"image has shape \(1, 1, 0, 8\)"),
        (lambda: ConvAutoencoder((8, 8, 8, 8)), r"grid is \(8, 8, 8, 8\)"),
        (lambda: ConvAutoencoder((8, 0)), r"grid is \(8, 0\)"),
        (lambda: ConvAutoencoder((8, 8), in_channels=0), "in_channels is 0"),
        (lambda: ConvAutoencoder((8, 8), latent_size=0), "latent_size is 0"),
        (lambda: ConvAutoencoder((8, 8), channels=()), r"channels is \(\)"),
        (lambda: ConvAutoencoder((8, 8), channels=None), "channels is None"),
        (lambda: ConvAutoencoder((8, 8), channels=(4, True)), "channels is True"),
        (lambda: ConvAutoencoder((8, 8), kernel_size=2), "kernel_size is 2"),
        (lambda: ConvAutoencoder((8, 8), norm=None), "norm is None"),
        (lambda: ConvDecoder(0, (8, 8), 4, (4,)), "out_channels is 0"),
        (lambda: ConvEncoder(1, (8, 8), 4, (4,))(torch.rand(1, 1, 8, 9)), r"images has grid \(8, 9\)"),
        (lambda: ConvDecoder(1, (8, 8), 4, (4,))(torch.rand(1, 5)), r"code has shape \(1, 5\)"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# By class: arguments that fit, those that count something and the least that they may count, and lengths.
CONSTRUCTORS = {
    StencilCholeskyHead: ({"in_channels": 2, "stencil": SQUARE}, {"in_channels": 1, "out_channels": 1}, ["initial_stddev"]),
    LowRankHead: (
        {"in_channels": 2, "num_factors": 2},
        {"in_channels": 1, "num_factors": 1, "ndim": 1, "out_channels": 1},
        ["initial_stddev", "initial_scale"],
    ),
    SegmentationHead: (
        {"in_channels": 2, "num_classes": 2, "stencil": SQUARE},
        {"in_channels": 1, "num_classes": 2, "num_factors": 0},
        ["initial_stddev"],
    ),
    CovarianceNetwork: (
        {"in_channels": 2, "stencil": SQUARE},
        {"in_channels": 1, "channels": 1, "num_levels": 1, "num_factors": 0},
        ["initial_stddev"],
    ),
    LatentCovarianceNetwork: (
        {"grid": (4, 4), "latent_size": 2, "stencil": SQUARE, "decoder_channels": (2,), "channels": 2},
        {
            "latent_size": 1,
            "image_channels": 0,
            "decoder_channels": 1,
            "kernel_size": 1,
            "channels": 1,
            "num_levels": 1,
            "num_factors": 0,
        },
        ["initial_stddev"],
    ),
    CovarianceMLP: (
        {"in_features": 2, "grid": (2, 2), "stencil": SQUARE},
        {"in_features": 1, "hidden": 1, "bottleneck": 1},
        ["initial_stddev"],
    ),
}
OPTIONAL = ("out_channels", "bottleneck")


@pytest.mark.parametrize("make", CONSTRUCTORS)
def test_constructors_name_arguments_of_any_wrong_kind(make):
    good, counts, lengths = CONSTRUCTORS[make]
    make(**good)
    several = torch.tensor([0.1, 0.2, 0.3])
    for name, least in counts.items():
        for value in (None, True, False, 2.0, math.nan, "2", least - 1, several, several.bool()):
            if value is not None or name not in OPTIONAL:
                with pytest.raises(ValueError, match=f"^{name} is "):
                    make(**good | {name: value})
    for name in lengths:
        for value in (None, True, "0.1", 1j, 0, -1.0, math.nan, math.inf, several, torch.tensor(True), torch.tensor(math.nan)):
            with pytest.raises(ValueError, match=f"^{name} is "):
                make(**good | {name: value})
        make(**good | {name: several[0]})  # measured, such as the standard deviation of a tensor
    if "stencil" in good:
        with pytest.raises(ValueError, match=r"^stencil is a NoneType"):
            make(**good | {"stencil": None})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: StencilCholeskyHead(1, SQUARE)(x.numpy()), "features is a ndarray, expected a torch.Tensor"),
        (lambda x: StencilCholeskyHead(1, SQUARE)(x.byte()), "features is torch.uint8, expected float16"),
        (lambda x: CovarianceNetwork(1, SQUARE)(x.numpy()), "image is a ndarray, expected a torch.Tensor"),
        (lambda x: ConvAutoencoder((8, 8))(x.numpy()), "images is a ndarray, expected a torch.Tensor"),
        (lambda x: ConvDecoder(1, (8, 8), 4, (4,))(x[0, 0, :, :4].numpy()), "code is a ndarray, expected a torch.Tensor"),
        (lambda x: CovarianceMLP(64, (8, 8), SQUARE)(x.numpy()), "x is a ndarray, expected a torch.Tensor"),
        (lambda x: ConvAutoencoder(8), "grid is 8, expected the number of sites along each of 1 to 3 axes"),
        (lambda x: ConvAutoencoder((8, 8.5)), r"grid\[1\] is 8.5, expected an integer"),
    ],
)
def test_arguments_of_other_types_are_named(make, words):
    with pytest.raises(TypeError, match=words):
        make(torch.rand(1, 1, 8, 8))

"""The multi-layer perceptron: the factor it lays out, its configuration, and its errors."""

import pytest
import torch

import banded_gmrf as bg
from supn_models import CovarianceMLP
from tests.dense import exists

LAYOUTS = [
    ((7,), bg.Stencil.box((6,))),
    ((7,), bg.Stencil([], ndim=1)),
    ((5, 4), bg.Stencil.square(3)),
    ((1, 3), bg.Stencil.square(5)),
    ((2, 3, 2), bg.Stencil.box((1, 1, 1))),
]


def random_network(grid, stencil, **options) -> CovarianceMLP:
    """A network whose outputs are not the zeros that it starts from."""
    network = CovarianceMLP(6, grid, stencil, (5, 4), initial_stddev=0.5, **options).double().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize(("grid", "stencil"), LAYOUTS)
@pytest.mark.parametrize("bottleneck", [None, 3])
def test_first_prediction_is_diagonal(grid, stencil, bottleneck):
    L = CovarianceMLP(6, grid, stencil, (5,), bottleneck, initial_stddev=0.5)(torch.randn(4, 2, 3))
    assert L.batch_shape == (4,)
    assert L.grid == grid
    torch.testing.assert_close(L.diag, torch.full((4, *grid), 2.0))
    assert not L.off_diag.any()


@pytest.mark.parametrize(("grid", "stencil"), LAYOUTS)
def test_every_existing_entry_has_an_output_of_its_own(grid, stencil):
    network = random_network(grid, stencil)
    mask = exists(stencil.offsets, grid)
    outputs = sum(linear.out_features for linear in (network.to_log_ratio, network.to_entries) if linear is not None)
    assert outputs == torch.tensor(grid).prod() + mask.sum()
    off_diag = network(torch.randn(3, 6).double()).off_diag
    assert not off_diag[:, ~mask].any()
    assert (off_diag[:, mask] != 0).all()
    assert len(off_diag[0, mask].unique()) == mask.sum()


@pytest.mark.parametrize(("grid", "stencil"), LAYOUTS)
def test_standardised_factor_is_diagonal_times_unit_triangular(grid, stencil):
    """L = D W: scaling a residual's sites leaves W, the part below the diagonal, as it is."""
    network = random_network(grid, stencil)
    raw = random_network(grid, stencil, standardise=False)
    # Weights that mean something else there, which load_state_dict refuses.
    raw.load_state_dict({**network.state_dict(), "_extra_state": raw.get_extra_state()})
    x = torch.randn(3, 6).double()
    L, unscaled = network(x).to_dense(), raw(x).to_dense()
    D = torch.diag_embed(L.diagonal(dim1=-2, dim2=-1))
    W = unscaled.tril(-1) + torch.eye(L.shape[-1]).double()
    torch.testing.assert_close(L, D @ W)


def test_gradients_reach_every_parameter():
    network = random_network((4, 3), bg.Stencil.square(3), bottleneck=8)
    L = network(torch.randn(5, 6).double())
    bg.negative_log_likelihood(torch.randn(5, 4, 3).double(), L.log_diag, L.off_diag, L.stencil).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.to_entries.parameters())
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_gradients_are_the_same_bits_each_time():
    """On three threads, among which the batch does not divide evenly."""
    network = CovarianceMLP(50, (50,), bg.Stencil.box((49,)))
    torch.nn.init.normal_(network.to_entries.weight, std=0.1)
    x, weights = torch.randn(256, 50), torch.randn(256, 50, 50)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        gradients = []
        for _ in range(6):
            network.zero_grad()
            (network(x).to_dense() * weights).sum().backward()
            gradients.append(network.to_log_ratio.weight.grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_config_builds_the_same_network():
    network = random_network((4, 3), bg.Stencil.square(3), bottleneck=2, standardise=False)
    same = CovarianceMLP.from_config(network.config).double().eval()
    same.load_state_dict(network.state_dict())
    x = torch.randn(2, 6).double()
    assert torch.equal(same(x).to_dense(), network(x).to_dense())
    assert same.config == network.config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features is 0"),
        ({"hidden": (3, -1)}, "hidden is -1"),
        ({"bottleneck": 0}, "bottleneck is 0"),
        ({"initial_stddev": 0.0}, "initial_stddev is 0.0"),
        ({"hidden": 100}, "hidden is 100, expected a sequence"),
        ({"hidden": "34"}, "hidden is '34', expected a sequence"),
        ({"hidden": (3, True)}, "hidden is True"),
        ({"standardise": None}, "standardise is None, expected True or False"),
        ({"standardise": torch.tensor([True, False])}, r"standardise is tensor\(\[ True, False\]\), expected True or False"),
        ({"grid": None}, "grid is None, expected a sequence"),
        ({"grid": (4, True)}, "grid is True"),
        ({"grid": 5}, "grid is 5, expected a sequence"),
        ({"grid": (4,)}, "grid is"),
        ({"stencil": 3}, "stencil is a int"),
    ],
)
def test_bad_arguments(arguments, message):
    good = {"in_features": 6, "grid": (4, 3), "stencil": bg.Stencil.square(3)}
    with pytest.raises(ValueError, match=message):
        CovarianceMLP(**good | arguments)


def test_input_of_another_size():
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\), expected \(batch, ...\) with 6 numbers each"):
        random_network((3,), bg.Stencil([1]))(torch.randn(2, 5).double())

"""Each tool under each of torch's transformations: right, or refused by name."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import banded_gmrf as bg
from tests.cases import STENCILS
from tests.dense import random_factor

# torch itself calls what it deprecates, the first time that forward mode maps over tangents.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

STENCIL, GRID = STENCILS["3x3"], (4, 3)
GENERATOR = torch.Generator().manual_seed(0)
LOG_DIAG, OFF_DIAG = random_factor(STENCIL.offsets, GRID, generator=GENERATOR, nan_outside=False)
LOC, Y, TANGENT = torch.randn(3, *GRID, dtype=torch.float64, generator=GENERATOR)
MASK = torch.rand(GRID, generator=GENERATOR) < 0.5
FACTORS = torch.randn(2, *GRID, dtype=torch.float64, generator=GENERATOR)


def factor(log_diag):
    return bg.StencilCholesky(log_diag, OFF_DIAG, STENCIL)


def field(log_diag, scale=1.0):
    return bg.GMRF(scale * LOC, bg.StencilCholesky(log_diag, scale * OFF_DIAG, STENCIL), validate_args=False)


def low_rank(log_diag, scale=1.0):
    local = field(log_diag, scale)
    return bg.LowRankGMRF(local.loc, local.precision_cholesky, scale * log_diag.sin() * FACTORS, validate_args=False)


def precision(log_diag):
    return bg.StencilPrecision(log_diag.exp() + 5, OFF_DIAG, STENCIL)


# Each to one number, of the log-diagonal.
TOOLS = {
    "log_prob": lambda d: field(d).log_prob(Y),
    "variance": lambda d: field(d).variance.sin().sum(),
    "covariance_columns": lambda d: field(d).covariance_columns((1, 1)).sin().sum(),
    "correlation_with": lambda d: field(d).correlation_with((1, 1)).sin().sum(),
    "kl_divergence": lambda d: bg.kl_divergence(field(d), field(d.sin(), 0.7)),
    "nearest": lambda d: factor(d).nearest(STENCILS["5x5"]).off_diag.sin().sum(),
    "from_precision": lambda d: bg.StencilCholesky.from_precision(precision(d)).off_diag.sin().sum(),
    "condition": lambda d: field(d).condition(MASK, Y).mean.sin().sum(),
    "posterior": lambda d: field(d).posterior(Y, noise=field(0.9 * d, 0.5)).mean.sin().sum(),
    "log_evidence": lambda d: field(d).posterior(Y, 0.3).log_evidence,
    "low-rank log_prob": lambda d: low_rank(d).log_prob(Y),
    "low-rank whiten": lambda d: low_rank(d).whiten(Y).sin().sum(),
    "low-rank variance": lambda d: low_rank(d).variance.sin().sum(),
    "low-rank kl_divergence": lambda d: bg.kl_divergence(low_rank(d), low_rank(d.sin(), 0.7)),
    "low-rank posterior": lambda d: low_rank(d).posterior(Y, 0.3).mean.sin().sum(),
    "low-rank log_evidence": lambda d: low_rank(d).condition(MASK, Y).log_evidence,
    "leading_eigenpairs": lambda d: field(d).leading_eigenpairs(2).eigenvalues.sin().sum(),
}
ONCE = {"leading_eigenpairs": RuntimeError}  # the error where a second derivative is asked for
ONCE_BY_AUTOGRAD = {
    **ONCE,
    **dict.fromkeys(("condition", "posterior", "low-rank posterior", "low-rank log_evidence"), NotImplementedError),
}


def by_differences(function, at, step=1e-5):
    """Central differences of a number or a tensor along each entry: (*values, *entries)."""
    entries = torch.eye(at.numel(), dtype=at.dtype).reshape(-1, *at.shape) * step
    columns = [(function(at + e) - function(at - e)) / (2 * step) for e in entries]
    return torch.stack(columns, -1).unflatten(-1, at.shape)


def by_autograd(function, create_graph=False):
    def derivative(at):
        at = at if at.requires_grad else at.clone().requires_grad_()
        return torch.autograd.grad(function(at), at, create_graph=create_graph)[0]

    return derivative


def tangent_of(function):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(LOG_DIAG, TANGENT))).tangent


# Central differences of step h err by h² and by rounding over h: 1e-10, of second derivatives 1e-9 relative to the largest.
def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=max(1e-7 * float(expected.abs().max()), 1e-8))


@pytest.mark.parametrize("tool", TOOLS)
def test_first_derivatives_in_either_mode(tool):
    function = TOOLS[tool]
    expected = by_differences(function, LOG_DIAG)
    along = (expected * TANGENT).sum()
    for derivative in (by_autograd(function), grad(function), jacrev(function), jacfwd(function)):
        assert_close(derivative(LOG_DIAG), expected)
    assert_close(vjp(function, LOG_DIAG)[1](torch.tensor(2.0).double())[0], 2 * expected)
    assert_close(jvp(function, (LOG_DIAG,), (TANGENT,))[1], along)
    assert_close(tangent_of(function), along)


@pytest.mark.parametrize("tool", TOOLS)
def test_second_derivatives_or_a_refusal(tool):
    function = TOOLS[tool]
    for derivative in (hessian(function), jacrev(jacrev(function)), jacfwd(jacfwd(function))):
        if tool in ONCE:
            with pytest.raises(ONCE[tool], match="has first derivatives only"):
                derivative(LOG_DIAG)
        else:
            assert_close(derivative(LOG_DIAG), by_differences(by_autograd(function), LOG_DIAG))
    twice = by_autograd(lambda at: (by_autograd(function, create_graph=True)(at) * TANGENT).sum())
    if tool in ONCE_BY_AUTOGRAD:
        with pytest.raises(ONCE_BY_AUTOGRAD[tool], match=r"first derivatives only|differentiable once"):
            twice(LOG_DIAG)
    else:
        assert_close(twice(LOG_DIAG), (by_differences(by_autograd(function), LOG_DIAG) * TANGENT).sum((-2, -1)))


@pytest.mark.parametrize("tool", TOOLS)
def test_vmap_also_of_a_gradient(tool):
    function = TOOLS[tool]
    several = torch.stack([LOG_DIAG, LOG_DIAG + 0.1 * TANGENT, 0.5 * LOG_DIAG])
    assert_close(vmap(function)(several), torch.stack([function(one) for one in several]))
    assert_close(vmap(grad(function))(several), torch.stack([grad(function)(one) for one in several]))


def test_checks_under_vmap_see_every_element():
    several = torch.stack([LOG_DIAG, LOG_DIAG - 20])  # the second precision is not positive definite
    build = vmap(lambda d: bg.StencilCholesky.from_precision(bg.StencilPrecision(d.exp() + 1e-9, OFF_DIAG, STENCIL)).log_diag)
    with pytest.raises(torch.linalg.LinAlgError, match=r"of batch element \(1,\)"):
        build(torch.stack([LOG_DIAG + 3, LOG_DIAG - 20]))
    with pytest.raises(torch.linalg.LinAlgError, match=r"of batch element \(0,\)"):
        build(several.flip(0))


@pytest.mark.parametrize("tool", ["log_prob", "variance", "kl_divergence", "nearest", "log_evidence", "low-rank log_prob"])
def test_compiled_to_one_graph(tool, monkeypatch, keep_torch_defaults):
    monkeypatch.setattr("banded_gmrf.recursions.strips._MIN_BLOCK_SITES", 1)  # several blocks
    function = TOOLS[tool]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(compiled(LOG_DIAG), function(LOG_DIAG))
    assert_close(by_autograd(compiled)(LOG_DIAG), by_autograd(function)(LOG_DIAG))


def test_posteriors_of_several_noise_variances_by_vmap():
    q = field(LOG_DIAG)

    def evidence(variance):
        return q.posterior(Y, variance).log_evidence

    several = torch.tensor([0.1, 0.3, 2.0], dtype=torch.float64)
    assert_close(vmap(evidence)(several), torch.stack([evidence(one) for one in several]))
    with pytest.raises(ValueError, match="noise_variance has negative"):
        vmap(evidence)(-several)

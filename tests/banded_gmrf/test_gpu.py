"""What one does with a GMRF, on a GPU: the values and gradients that the CPU gives, where the other tests are exact."""

import pytest
import torch

import banded_gmrf as bg
from banded_gmrf import diagnostics
from tests.cases import STENCILS, random_cholesky
from tests.emulation import DEVICE as CUDA

pytestmark = pytest.mark.gpu

GRID = (9, 7)
PRECISE = {"tolerance": 1e-13}


def _low_rank(q, x):
    return bg.LowRankGMRF(q.loc, q.precision_cholesky, torch.stack((x[0], x[1].sin(), x[0] * x[1]), 1))


def _loc_near(q, x):
    return bg.GMRF(x.mean(0), q.precision_cholesky)


# Of a GMRF q with batch (2,) and x (2, *GRID); of a random result only what does not depend on the numbers drawn.
TOOLS = {
    "variance": lambda q, x: q.marginal_variance("exact").variance,
    "covariance columns": lambda q, x: q.covariance_columns([(0, 0), (4, 3), (8, 6)]),
    "correlations": lambda q, x: q.correlation_with((4, 3)),
    "covariance matrix": lambda q, x: q.covariance_matrix,
    "precision matrix": lambda q, x: q.precision_matrix,
    "log_prob": lambda q, x: q.log_prob(x),
    "whiten": lambda q, x: q.whiten(x),
    "condition": lambda q, x: q.condition(x > 0, x, **PRECISE).mean,
    "evidence of pixels": lambda q, x: q.condition(x > 0, x, **PRECISE).log_evidence,
    "posterior": lambda q, x: q.posterior(x, x.detach().square() + 0.1, **PRECISE).mean,
    "evidence of noisy pixels": lambda q, x: q.posterior(x, x.detach().square() + 0.1, **PRECISE).log_evidence,
    "correlated noise": lambda q, x: q.posterior(x, noise=bg.GMRF(q.loc[0], q.precision_cholesky), **PRECISE).mean,
    "divergence": lambda q, x: bg.kl_divergence(q, _loc_near(q, x), "exact"),
    "eigenvalues": lambda q, x: q.leading_eigenpairs(5).eigenvalues,
    "projection": lambda q, x: q.project_on_leading(x, 5),
    "low rank: log_prob": lambda q, x: _low_rank(q, x).log_prob(x.square()),
    "low rank: whiten": lambda q, x: _low_rank(q, x).whiten(x),
    "low rank: variance": lambda q, x: _low_rank(q, x).variance,
    "low rank: divergence": lambda q, x: bg.kl_divergence(_low_rank(q, x), _loc_near(q, x)),
    "low rank: condition": lambda q, x: _low_rank(q, x).condition(x > 0, x, **PRECISE).mean,
    "low rank: evidence": lambda q, x: _low_rank(q, x).posterior(x, 0.3, **PRECISE).log_evidence,
    "from_samples": lambda q, x: bg.StencilCholesky.from_samples(torch.cat((x, x.sin())), q.stencil, ridge=0.1).off_diag,
    "from_covariance": lambda q, x: bg.StencilCholesky.from_covariance(q.covariance_matrix, q.stencil, GRID).log_diag,
    "nearest": lambda q, x: q.precision_cholesky.nearest(bg.Stencil.square(3)).off_diag,
    "autocorrelation": lambda q, x: diagnostics.autocorrelation(x, max_lag=2),
    "coverage": lambda q, x: diagnostics.chi_squared_coverage(x),
}


def _value_and_gradients(tool, device):
    torch.manual_seed(0)
    L = random_cholesky(STENCILS["5x5"], GRID, (2,))
    x, loc = torch.randn(2, 2, *GRID, dtype=torch.float64)
    leaves = [t.detach().to(device).requires_grad_() for t in (x, loc, L.log_diag, L.off_diag.nan_to_num())]
    x, loc, log_diag, off_diag = leaves
    value = tool(bg.GMRF(loc, bg.StencilCholesky(log_diag, off_diag, L.stencil)), x)
    assert value.device.type == device
    if not value.requires_grad:
        return [value.cpu()]
    cotangent = torch.randn(value.shape, dtype=torch.float64).to(device)
    gradients = torch.autograd.grad(value, leaves, cotangent, allow_unused=True)
    return [value.detach().cpu(), *(g.cpu() for g in gradients if g is not None)]


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_values_and_gradients_are_the_cpus(tool):
    values = _value_and_gradients(tool, CUDA)
    with bg.use_backend("cpu"):
        on_cpu = _value_and_gradients(tool, "cpu")
    for actual, expected in zip(values, on_cpu, strict=True):
        # Solvers stop at a relative residual of 10⁻¹³, and a factor of 63 sites has cond(Λ) ≈ 10³ at most.
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def test_samples_have_the_covariance():
    torch.manual_seed(0)
    L = random_cholesky(STENCILS["3x3"], (3, 4))
    q = bg.GMRF(torch.zeros(3, 4, dtype=torch.float64), L)
    on_gpu = bg.GMRF(q.loc.to(CUDA), bg.StencilCholesky(L.log_diag.to(CUDA), L.off_diag.to(CUDA), L.stencil))
    count = 100_000
    posterior_covariance = torch.linalg.inv(q.precision_matrix + torch.eye(12, dtype=torch.float64))
    for distribution, expected in (
        (on_gpu, q.covariance_matrix),
        (on_gpu.posterior(on_gpu.loc, 1.0), posterior_covariance),
    ):
        samples = distribution.sample((count,)).flatten(1).cpu()
        stddev = expected.diagonal().sqrt()
        # The error of an entry has a standard deviation of at most √(2 / count) in units of the standard deviations.
        error = (samples.T.cov() - expected) / stddev / stddev[:, None]
        assert error.abs().max() < 6 * (2 / count) ** 0.5

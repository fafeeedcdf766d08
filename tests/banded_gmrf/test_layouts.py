"""Tensors that are not contiguous give what their contiguous copies give."""

import pytest
import torch

import banded_gmrf as bg
from tests.cases import STENCILS, random_cholesky

# BLAS may sum in another order for another layout, and the solver stops at a relative residual of 10⁻¹³.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
PRECISE = {"tolerance": 1e-13}
GRID = (4, 3)


def transposed(tensor):
    return tensor.mT.contiguous().mT


def strided(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


def expanded(tensor):
    """Of the first element of the batch."""
    return tensor[:1].expand(tensor.shape)


def divergence(q, x):
    p = bg.GMRF(q.loc + 1, random_cholesky(STENCILS["5x5"], GRID, (2,)))
    return torch.stack([bg.kl_divergence(q, p), bg.kl_divergence(p, q)])


TOOLS = {
    "condition": lambda q, x: q.condition(x > 0, x, **PRECISE).mean,
    "posterior": lambda q, x: q.posterior(x, x.square() + 0.1, **PRECISE).mean,
    "posterior, correlated noise": lambda q, x: q.posterior(x, noise=q, **PRECISE).mean,
    "posterior samples": lambda q, x: q.posterior(x, x.square() + 0.1, **PRECISE).rsample((3,)),
    "evidence": lambda q, x: q.posterior(x, x.square() + 0.1, **PRECISE).log_evidence,
    "variance": lambda q, x: q.variance,
    "Monte Carlo variance": lambda q, x: q.marginal_variance("monte_carlo", num_samples=3).variance,
    "divergence": divergence,
    "eigenvalues": lambda q, x: q.leading_eigenpairs(3).eigenvalues,
    "eigenvectors": lambda q, x: q.leading_eigenpairs(3).eigenvectors,
    "projection": lambda q, x: q.project_on_leading(x, 3, degree=50),
}


@pytest.mark.parametrize("layout", [transposed, strided, expanded])
@pytest.mark.parametrize("tool", TOOLS)
def test_results_do_not_depend_on_the_layout(tool, layout):
    L = random_cholesky(STENCILS["3x3"], GRID, batch=(2,))
    tensors = [layout(t) for t in (torch.randn(2, *GRID).double(), L.log_diag, L.off_diag, torch.randn(2, *GRID).double())]
    assert not any(t.is_contiguous() for t in tensors)
    results = []
    for loc, log_diag, off_diag, x in (tensors, [t.contiguous() for t in tensors]):
        torch.manual_seed(1)
        results.append(TOOLS[tool](bg.GMRF(loc, bg.StencilCholesky(log_diag, off_diag, L.stencil)), x))
    torch.testing.assert_close(*results, **CLOSE)

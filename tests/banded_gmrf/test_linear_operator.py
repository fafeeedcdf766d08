"""The operators for linear_operator, against dense matrices, and inside that library's own functions."""

import pytest
import torch

import banded_gmrf as bg
from tests.cases import STENCILS, dense, random_cholesky

linear_operator = pytest.importorskip("linear_operator")
doors = pytest.importorskip("banded_gmrf.linear_operator")

GRIDS = {"3x3": (3, 5), "line": (7,), "volume": (3, 2, 4)}
CASES = [(name, batch) for name in GRIDS for batch in ((), (2,), (2, 1, 3))]


def matrices(name: str, batch=()) -> tuple[bg.StencilCholesky, dict]:
    """A factor, and by the operator's name its operator and the dense matrix."""
    L = random_cholesky(STENCILS[name], GRIDS[name], batch)
    root = dense(L)
    precision = root @ root.mT
    return L, {
        "factor": (doors.CholeskyOperator.of(L), root),
        "transposed": (doors.CholeskyOperator.of(L, transposed=True), root.mT),
        "inverse": (doors.CholeskyOperator.of(L, inverted=True), root.inverse()),
        "precision": (doors.PrecisionOperator.of(L), precision),
        "covariance": (doors.CovarianceOperator.of(L), precision.inverse()),
    }


def close(actual, expected):
    # Products of at most 24 terms in float64; inverses of matrices whose condition numbers are below 10⁵.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_products_and_dense_matrices(name, batch):
    for operator, matrix in matrices(name, batch)[1].values():
        x = torch.randn(*batch, matrix.shape[-1], 3).double()
        assert operator.shape == matrix.shape
        close(operator @ x, matrix @ x)
        close(operator.mT @ x, matrix.mT @ x)
        close(operator.to_dense(), matrix)


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_solves_determinants_and_diagonals(name, batch):
    operators = matrices(name, batch)[1]
    for kind in ("precision", "covariance"):
        operator, matrix = operators[kind]
        b = torch.randn(*batch, matrix.shape[-1], 2).double()
        close(torch.linalg.solve(operator, b), torch.linalg.solve(matrix, b))
        inv_quad, logdet = operator.inv_quad_logdet(b, logdet=True)
        terms = (b * torch.linalg.solve(matrix, b)).sum(-2)
        close(inv_quad, terms.sum(-1))
        close(operator.inv_quad(b, reduce_inv_quad=False), terms)
        close(logdet, matrix.logdet())
        close(operator.logdet(), matrix.logdet())
        close(operator.diagonal(), matrix.diagonal(dim1=-2, dim2=-1))
        root = operator.root_decomposition().root.to_dense()
        close(root @ root.mT, matrix)


def test_vectors():
    for operator, matrix in matrices("3x3")[1].values():
        x = torch.randn(matrix.shape[-1]).double()
        close(operator @ x, matrix @ x)
    covariance, matrix = matrices("3x3")[1]["covariance"]
    close(covariance.solve(x), torch.linalg.solve(matrix, x))
    close(covariance.inv_quad(x), x @ torch.linalg.solve(matrix, x))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of linear_operator's own sparse tensors
def test_what_the_library_does_with_an_operator():
    for operator, matrix in matrices("3x3", (2,))[1].values():
        x = torch.randn(matrix.shape[-1], 2).double()
        close(operator.expand(3, 2, *matrix.shape[-2:]).to_dense(), matrix.expand(3, *matrix.shape))
        close(operator[1].to_dense(), matrix[1])
        close(operator[..., 2:4, :5].to_dense(), matrix[..., 2:4, :5])
        close(((2 * operator).add_diagonal(torch.ones(1).double())) @ x, (2 * matrix + torch.eye(15)) @ x)
        close(operator.unsqueeze(0).to_dense(), matrix[None])
        assert operator.float().dtype == torch.float32
        assert operator.detach().to_dense().requires_grad is False


@pytest.mark.parametrize("kind", ["precision", "covariance"])
def test_gradients(kind):
    L = random_cholesky(STENCILS["3x3"], (3, 4))
    b = torch.randn(12, 2).double()

    def through(make):
        parameters = [L.log_diag.clone().requires_grad_(), L.off_diag.nan_to_num().requires_grad_()]
        A = make(bg.StencilCholesky(*parameters, L.stencil))
        value = (A @ b).square().sum() + torch.linalg.solve(A, b).sum() + torch.logdet(A)
        return torch.autograd.grad(value, parameters)

    def matrix(factor):
        precision = dense(factor) @ dense(factor).mT
        return precision if kind == "precision" else precision.inverse()

    operator = doors.PrecisionOperator if kind == "precision" else doors.CovarianceOperator
    for actual, expected in zip(through(operator.of), through(matrix), strict=True):
        close(actual, expected)


def test_samples_have_the_covariance():
    torch.manual_seed(0)
    operator, matrix = matrices("line")[1]["covariance"]
    samples = operator.zero_mean_mvn_samples(20000)
    # The standard error of an entry is at most √2 σᵢσⱼ / √20000 = 0.01 σᵢσⱼ.
    scale = matrix.diagonal().sqrt()
    assert ((samples.T @ samples / 20000 - matrix) / (scale[:, None] * scale)).abs().max() < 0.05


def test_a_distribution_of_gpytorch():
    distributions = pytest.importorskip("gpytorch.distributions")
    q = bg.GMRF(torch.randn(3, 5).double(), random_cholesky(STENCILS["3x3"], (3, 5)))
    p = distributions.MultivariateNormal(q.loc.flatten(), doors.CovarianceOperator.of(q))
    x = q.sample((4,))
    close(p.log_prob(x.flatten(1)), q.log_prob(x))
    close(p.variance, q.variance.flatten())


def test_other_arguments_are_refused():
    with pytest.raises(TypeError, match="field is a Tensor, expected a GMRF or a StencilCholesky"):
        doors.PrecisionOperator.of(torch.eye(3))

"""A field as gpytorch's prior: its distributions and its exact regression, against our own."""

import pytest
import torch

import banded_gmrf as bg
from tests.cases import STENCILS, random_cholesky

pytest.importorskip("linear_operator")
gpytorch = pytest.importorskip("gpytorch")

from banded_gmrf.linear_operator import CovarianceOperator  # noqa: E402

GRID = (5, 6)
# Of what linear_operator indexes with.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


class FieldKernel(gpytorch.kernels.Kernel):
    """The covariance of a field between sites, which are given by their numbers in raster order."""

    def __init__(self, field: bg.GMRF):
        super().__init__()
        self.covariance = CovarianceOperator.of(field)

    def forward(self, a, b, diag=False, **options):
        rows, columns = a[..., 0].long(), b[..., 0].long()
        return self.covariance.diagonal()[rows] if diag else self.covariance[rows, :][:, columns]


class Regression(gpytorch.models.ExactGP):
    """Observations of some sites of a field, with noise."""

    def __init__(self, sites, y, likelihood, field):
        super().__init__(sites, y, likelihood)
        self.mean, self.kernel = field.loc.flatten(), FieldKernel(field)

    def forward(self, sites):
        return gpytorch.distributions.MultivariateNormal(self.mean[sites[..., 0].long()], self.kernel(sites))


@pytest.fixture
def field():
    torch.manual_seed(0)
    return bg.GMRF(torch.randn(GRID).double(), random_cholesky(STENCILS["5x5"], GRID))


def close(actual, expected):
    # float64; gpytorch adds a jitter of about 1e-8 to the matrices that it factorises.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_distribution(field):
    ours = field.sample((3,))
    theirs = gpytorch.distributions.MultivariateNormal(field.loc.flatten(), CovarianceOperator.of(field))
    close(theirs.log_prob(ours.flatten(1)), field.log_prob(ours))
    close(theirs.entropy(), field.entropy())
    close(theirs.variance.reshape(GRID), field.variance)
    u = torch.randn(4, *GRID).double()
    samples = theirs.rsample(torch.Size((4,)), base_samples=u.flatten(1)).reshape(4, *GRID)
    close(samples, field.loc + field.precision_cholesky.solve(u, transpose=True))


def test_exact_regression(field):
    seen = torch.rand(GRID) < 0.4
    y = (field.sample() + 0.3 * torch.randn(GRID)).masked_fill(~seen, 0)
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = 0.09
    model = Regression(seen.flatten().nonzero().double(), y[seen], likelihood, field)
    posterior = field.posterior(y, noise_variance=torch.full(GRID, torch.inf).double().masked_fill(seen, 0.09))
    evidence = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    close(evidence(model(*model.train_inputs), y[seen]) * seen.sum(), posterior.log_evidence)
    model.eval()
    with torch.no_grad():
        theirs = model(torch.arange(seen.numel()).double()[:, None])
    close(theirs.mean.reshape(GRID), posterior.mean)
    close(theirs.variance.reshape(GRID), posterior.variance)

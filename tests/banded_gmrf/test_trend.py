"""Posteriors of fields with a linear trend, against dense float64 linear algebra."""

import pytest
import torch
from torch.distributions import MultivariateNormal

import banded_gmrf as bg

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
GRID = (4, 5)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def field(sparse):
    precision = bg.matern_precision(GRID, 2.0, 1)
    loc = random(2, *GRID)
    return bg.SparseGMRF(loc, precision) if sparse else bg.GMRF(loc, bg.StencilCholesky.from_precision(precision))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (3, 3)])
def test_trends_equal_the_dense_ones(sparse, shape):
    q, X = field(sparse), random(3, *GRID)
    prior = torch.linalg.inv(bg.matern_precision(GRID, 2.0, 1).to_dense())
    V = {(): 2.0, (3,): torch.tensor([0.5, 1, 2]).double(), (3, 3): torch.eye(3).double() + 0.3}[shape]
    dense_V = V if shape == (3, 3) else torch.as_tensor(V).double().expand(3).diag()
    y, noise = random(*GRID), 0.2 + torch.rand(GRID, dtype=torch.float64)
    noise[0, 1], noise[2, 2:] = 0, torch.inf
    p = q.posterior(y, noise, covariates=X, covariate_variance=V)
    rows, seen = X.flatten(1), noise.flatten() < torch.inf
    joint = torch.cat(
        [torch.cat([prior + rows.mT @ dense_V @ rows, rows.mT @ dense_V], 1), torch.cat([dense_V @ rows, dense_V], 1)]
    )
    data = MultivariateNormal(
        q.loc.flatten(1)[:, seen], joint[:20, :20][seen][:, seen] + noise.flatten()[seen].diag(), validate_args=False
    )
    gain = torch.linalg.solve(data.covariance_matrix[0], joint[:20][seen]).mT
    apart = (y.flatten()[seen] - data.mean).unsqueeze(-1)
    mean = torch.cat([q.loc.flatten(1), torch.zeros(2, 3).double()], 1) + (gain @ apart).squeeze(-1)
    after = joint - gain @ joint[:20][seen]
    torch.testing.assert_close(p.mean.flatten(1), mean[:, :20], **CLOSE)
    torch.testing.assert_close(
        p.variance.flatten(1), after.diagonal()[:20].where(noise.flatten() > 0, 0).expand(2, 20), **CLOSE
    )
    torch.testing.assert_close(p.coefficients.mean, mean[:, 20:], **CLOSE)
    torch.testing.assert_close(p.coefficients.covariance_matrix, after[20:, 20:].expand(2, 3, 3), **CLOSE)
    torch.testing.assert_close(p.log_evidence, data.log_prob(y.flatten()[seen]), **CLOSE)
    free = noise.flatten() > 0
    expected = MultivariateNormal(mean[:, :20][:, free], after[:20, :20][free][:, free], validate_args=False)
    x = y.where(noise == 0, random(4, 2, *GRID))
    torch.testing.assert_close(p.log_prob(x), expected.log_prob(x.flatten(2)[..., free]), **CLOSE)
    torch.testing.assert_close(p.entropy(), expected.entropy(), **CLOSE)
    torch.testing.assert_close(
        p.constrain(X[:1], torch.zeros(1).double()).mean.flatten(1) @ rows[0], torch.zeros(2).double(), **CLOSE
    )
    wide = p.expand((3, 2))
    assert isinstance(wide, bg.TrendPosterior)
    assert wide.coefficients.mean.shape == (3, 2, 3)
    assert wide.sample((4,)).shape == (4, 3, 2, *GRID)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_trend_of_a_field_in_less_than_float64(sparse, dtype):
    """Computed in float64 from what the dtype holds, and given in the dtype."""
    exact, X, y = field(sparse).to(dtype).to(torch.float64), random(3, *GRID), random(2, *GRID).to(dtype)
    p, expected = (q.posterior(y.to(q.loc.dtype), 0.3, covariates=X, covariate_variance=2.0) for q in (exact.to(dtype), exact))
    assert p.mean.dtype == dtype
    torch.testing.assert_close(p.mean, expected.mean.to(dtype))
    torch.testing.assert_close(p.variance, expected.variance.to(dtype))
    torch.testing.assert_close(p.coefficients.mean, expected.coefficients.mean, **CLOSE)
    torch.testing.assert_close(p.log_evidence, expected.log_evidence, **CLOSE)
    assert p.sample((2,)).dtype == dtype
    with pytest.raises(TypeError, match=r"observation is torch.float64, the distribution is"):
        exact.to(dtype).posterior(y.double(), 0.3, covariates=X, covariate_variance=2.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"covariates": random(*GRID)}, ValueError, r"covariates has shape \(4, 5\), expected \(m, 4, 5\), m at least 1"),
        ({"covariates": random(2, *GRID) / 0}, ValueError, "covariates has NaN or infinite entries"),
        ({"covariates": None}, TypeError, "covariate_variance is given without covariates"),
        ({"covariate_variance": None}, TypeError, "covariate_variance is None, expected the prior variance"),
        ({"covariate_variance": -1.0}, ValueError, "covariate_variance is -1.0, expected finite and positive"),
        ({"covariate_variance": torch.inf}, ValueError, "covariate_variance is inf, expected finite and positive"),
        (
            {"covariate_variance": torch.ones(3)},
            ValueError,
            r"covariate_variance has shape \(3,\), expected \(\), \(2,\) or \(2, 2\)",
        ),
        (
            {"covariate_variance": torch.ones(2, 2)},
            torch.linalg.LinAlgError,
            "covariate_variance is not symmetric and positive",
        ),
    ],
)
def test_bad_trends(change, error, message):
    given = {"covariates": random(2, *GRID), "covariate_variance": 1.0}
    with pytest.raises(error, match=message):
        field(True).posterior(random(*GRID), 1.0, **(given | change))

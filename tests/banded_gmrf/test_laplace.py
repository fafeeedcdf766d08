"""Laplace's approximation against dense float64 linear algebra at the mode."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, NegativeBinomial, Normal, Poisson, StudentT

import banded_gmrf as bg
from banded_gmrf.operators import Convolution, Downsample
from tests.banded_gmrf.test_conditioning import random_gmrf
from tests.cases import STENCILS, dense
from tests.dense import random_factor

CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def likelihoods(grid):
    """Functions of the field, site by site, of data that fit it."""
    x = random(*grid)
    counts, hits = torch.poisson(x.exp()), torch.bernoulli(x.sigmoid())
    heavy = x + 0.5 * StudentT(torch.tensor(3.0, dtype=torch.float64)).sample(grid)
    return {
        "normal": lambda f: Normal(f, 0.7).log_prob(x),
        "poisson": lambda f: Poisson(f.exp()).log_prob(counts),
        "bernoulli": lambda f: Bernoulli(logits=f).log_prob(hits),
        "negative binomial": lambda f: NegativeBinomial(4.0, logits=f).log_prob(counts),
        "student": lambda f: StudentT(3.0, f, 0.5).log_prob(heavy),
    }


def curvature(log_likelihood, seen):
    return -torch.autograd.functional.hessian(lambda f: log_likelihood(f.reshape(seen.shape)).sum(), seen.flatten())


def check(q, n, log_likelihood, A, shape):
    """The mode, the precision there and the evidence, all dense, of one field."""
    grid, L = q.event_shape, dense(q.precision_cholesky)
    mode = n.mean.detach().clone().requires_grad_()
    seen = (A @ mode.flatten()).reshape(shape)
    log_density = q.log_prob(mode) + log_likelihood(seen).sum()
    (slope,) = torch.autograd.grad(log_density, mode)
    torch.testing.assert_close(slope, torch.zeros(grid, dtype=torch.float64), rtol=0, atol=1e-7)
    precision = L @ L.mT + A.mT @ curvature(log_likelihood, seen.detach()) @ A
    covariance = torch.linalg.inv(precision)
    exact = n.marginal_variance("exact").variance
    torch.testing.assert_close(exact.flatten(), covariance.diagonal(), **CLOSE)
    evidence = log_density + 0.5 * grid.numel() * math.log(2 * math.pi) - 0.5 * torch.logdet(precision)
    torch.testing.assert_close(n.log_evidence, evidence.detach(), **CLOSE)
    x = n.mean + 0.1 * random(2, *grid)
    expected = torch.distributions.MultivariateNormal(n.mean.flatten(), precision_matrix=precision, validate_args=False)
    torch.testing.assert_close(n.log_prob(x), expected.log_prob(x.flatten(1)), **CLOSE)
    return covariance


@pytest.mark.parametrize("method", ["direct", "iterative"])
@pytest.mark.parametrize("kind", list(likelihoods((2, 2))))
@pytest.mark.parametrize(("name", "grid"), [("3x3", (4, 5)), ("line", (7,)), ("volume", (3, 2, 3))])
def test_modes_curvatures_and_evidence(name, grid, kind, method):
    q, log_likelihood = random_gmrf(name, grid), likelihoods(grid)[kind]
    n = q.laplace(log_likelihood, method=method)
    assert isinstance(n, bg.ConditionalGMRF)
    assert n.newton.decrement <= 1e-10
    assert torch.equal(n.mode, n.mean)
    check(q, n, log_likelihood, torch.eye(torch.Size(grid).numel()).double(), grid)


@pytest.mark.parametrize("method", ["direct", "iterative"])
@pytest.mark.parametrize("kind", ["poisson", "student"])
def test_through_an_operator(kind, method):
    q = random_gmrf("3x3", (6, 5))
    operator = Downsample(2) @ Convolution(random(3, 3), "reflect")
    log_likelihood = likelihoods((3, 3))[kind]
    n = q.laplace(log_likelihood, operator=operator, method=method)
    check(q, n, log_likelihood, operator.bind((6, 5)).to_dense(), (3, 3))


def test_a_normal_likelihood_gives_the_posterior_after_one_step():
    q, y = random_gmrf("5x5", (5, 4), batch=(2,)), random(5, 4)
    n = q.laplace(lambda f: Normal(f, 0.5).log_prob(y))
    p = q.posterior(y, 0.25)
    assert n.newton.iterations <= 2
    for name in ("mean", "variance", "log_evidence"):
        torch.testing.assert_close(getattr(n, name), getattr(p, name), **CLOSE)
    torch.testing.assert_close(n.entropy(), p.entropy(), **CLOSE)


@pytest.mark.parametrize("method", ["direct", "iterative"])
def test_samples_have_the_covariance_at_the_mode(method):
    count, grid = 20_000, (3, 3)
    q, log_likelihood = random_gmrf("3x3", grid), likelihoods(grid)["poisson"]
    n = q.laplace(log_likelihood, method=method)
    covariance = check(q, n, log_likelihood, torch.eye(9).double(), grid)
    x = n.sample((count,)).flatten(1)
    variance = covariance.diagonal()
    assert ((x.mean(0) - n.mean.flatten()).abs() <= 5 * (variance / count).sqrt()).all()
    assert ((x.T.cov() - covariance).abs() <= 5 * ((variance[:, None] * variance + covariance.square()) / count).sqrt()).all()


def test_batches_of_priors_and_of_data():
    grid = (4, 3)
    q, counts = random_gmrf("3x3", grid, batch=(2, 1)), torch.poisson(torch.ones(3, *grid, dtype=torch.float64))
    n = q.laplace(lambda f: Poisson(f.exp()).log_prob(counts))
    assert (n.batch_shape, n.event_shape) == ((2, 3), grid)
    assert n.sample((5,)).shape == (5, 2, 3, *grid)
    assert n.log_evidence.shape == n.entropy().shape == (2, 3)
    one = bg.GMRF(q.loc[1, 0], q.precision_cholesky[1, 0])
    alone = one.laplace(lambda f: Poisson(f.exp()).log_prob(counts[2]))
    for name in ("mean", "variance", "log_evidence"):
        torch.testing.assert_close(getattr(n, name)[1, 2], getattr(alone, name), **CLOSE)
    wide = n.expand((4, 2, 3))
    torch.testing.assert_close(wide.mean, n.mean.expand(4, 2, 3, *grid))
    assert wide.newton == n.newton
    c = n.constrain(torch.ones(1, *grid, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert c.mean.flatten(2).sum(-1).abs().max() < 1e-10


def test_nothing_observed_gives_the_prior():
    q = random_gmrf("3x3", (4, 3))
    n = q.laplace(torch.zeros_like)
    torch.testing.assert_close(n.mean, q.loc)
    torch.testing.assert_close(n.variance, q.variance)


@pytest.mark.parametrize("method", ["direct", "iterative"])
@pytest.mark.parametrize("quantity", ["mean", "variance", "log_evidence", "rsample"])
def test_gradients_by_the_implicit_function_theorem(quantity, method):
    stencil, grid = STENCILS["3x3"], (3, 2)
    counts = torch.poisson(torch.ones(grid, dtype=torch.float64))

    def function(loc, log_diag, off_diag, offset):
        q = bg.GMRF(loc, bg.StencilCholesky(log_diag, off_diag, stencil), validate_args=False)
        n = q.laplace(lambda f: counts * (f + offset) - (f + offset).exp(), method=method, tolerance=1e-14)
        torch.manual_seed(1)
        if quantity == "rsample":
            return n.rsample((2,))
        return n.marginal_variance("exact").variance if quantity == "variance" else getattr(n, quantity)

    tensors = [random(*grid), *random_factor(stencil.offsets, grid, nan_outside=False), random(*grid)]
    # The iteration solves to 10⁻⁶.
    tolerance = {"atol": 1e-5} if method == "direct" else {"atol": 1e-4}
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors], **tolerance)


def test_a_search_that_does_not_converge_says_so():
    q, log_likelihood = random_gmrf("3x3", (4, 3)), likelihoods((4, 3))["poisson"]
    with pytest.warns(
        RuntimeWarning, match=r"Newton's method stopped after 1 iterations, where a step promises .* nats, above"
    ):
        n = q.laplace(log_likelihood, max_iterations=1)
    assert n.newton.iterations == 1
    assert n.newton.decrement > 1e-10


def test_samples_where_the_curvature_is_negative_need_a_factor():
    q = random_gmrf("3x3", (4, 3))
    far = q.loc + 3.0
    n = q.laplace(lambda f: 0.01 * StudentT(3.0, f, 0.5).log_prob(far), method="iterative")
    with pytest.raises(ValueError, match="log_likelihood is not concave at the mode: samples need the method 'direct'"):
        n.sample()
    assert q.laplace(lambda f: 0.01 * StudentT(3.0, f, 0.5).log_prob(far), method="direct").sample().isfinite().all()


def root(f):
    return -(f - f.detach()).abs().sqrt()  # its derivatives at 0 are infinite, and NaN


@pytest.mark.parametrize(
    ("log_likelihood", "options", "error", "message"),
    [
        (1.0, {}, TypeError, "log_likelihood is a float, expected a function of the field"),
        (lambda f: f.sum(), {}, ValueError, r"log_likelihood\(x\) is \(\), expected \(\*batch, 4, 3\): site by site"),
        (lambda f: None, {}, ValueError, r"log_likelihood\(x\) is NoneType, expected"),
        (lambda f: f / 0, {}, ValueError, "log_likelihood has NaN or infinite entries at the prior's mean"),
        (
            root,
            {},
            ValueError,
            r"log_likelihood has a (first|second) derivative that is NaN at site \(0, 0\)|depends on x at others",
        ),
        (lambda f: -(f - f.roll(1, -1)).square(), {}, ValueError, "at one site depends on x at others"),
        (torch.zeros_like, {"tolerance": 0.0}, ValueError, "tolerance is 0.0, expected more than 0"),
        (torch.zeros_like, {"max_iterations": 0}, ValueError, "max_iterations is 0, expected at least 1"),
        (torch.zeros_like, {"method": "exact"}, ValueError, "method is 'exact', expected 'auto', 'direct' or 'iterative'"),
        (torch.zeros_like, {"operator": abs}, TypeError, "operator is a builtin_function_or_method, expected a LinearOperator"),
    ],
)
def test_bad_input(log_likelihood, options, error, message):
    with pytest.raises(error, match=message):
        random_gmrf("3x3", (4, 3)).laplace(log_likelihood, **options)


def test_transformations_are_refused():
    q = random_gmrf("3x3", (4, 3))
    with pytest.raises(NotImplementedError, match="laplace takes no transformations"):
        torch.func.grad(lambda s: q.laplace(lambda f: -(f * s).square()).mean.sum())(torch.ones(()).double())


def test_nothing_has_a_graph_where_nothing_is_differentiated():
    q = random_gmrf("3x3", (4, 3))
    counts = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    for y, differentiated in ((counts.detach(), False), (counts, True)):
        n = q.laplace(lambda x, y=y: y * x - x.exp())
        for value in (n.mean, n.variance, n.log_evidence, n.sample((2,))):
            assert value.requires_grad == (differentiated and value.shape != (2, 4, 3))

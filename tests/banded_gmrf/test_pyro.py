import subprocess
import sys

import pytest
import torch

import banded_gmrf as bg
from tests.cases import STENCILS, random_cholesky
from tests.dense import random_factor

pyro = pytest.importorskip("pyro", reason="pyro-ppl is not installed")
from pyro import distributions as dist  # noqa: E402
from pyro import poutine  # noqa: E402
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO  # noqa: E402
from pyro.infer.autoguide import AutoNormal  # noqa: E402
from pyro.ops.integrator import _handle_torch_singular  # noqa: E402

from banded_gmrf.pyro import GMRF  # noqa: E402

GRID = (3, 4)
STENCIL = STENCILS["3x3"]


@pytest.fixture(autouse=True)
def clean_pyro():
    """Pyro's checks of shapes and supports on, and no parameter left for the next test."""
    with pyro.validation_enabled():
        yield
    pyro.clear_param_store()


def observations(count):
    return torch.randn(count, *GRID, dtype=torch.float64)


def test_importing_the_library_does_not_import_pyro():
    program = "import sys, banded_gmrf; sys.exit('pyro' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_pyro_distribution_is_the_same_distribution():
    loc, L = observations(2), random_cholesky(STENCIL, GRID)
    q, plain = GMRF(loc, L), bg.GMRF(loc, L)
    assert isinstance(q, bg.GMRF)
    x = q.sample()
    assert torch.equal(q.log_prob(x), plain.log_prob(x))
    assert q.event_dim == 2
    assert q.shape((5,)) == (5, 2, *GRID)
    assert type(q.expand((5, 2))) is GMRF
    assert q.expand_by((5,)).batch_shape == (5, 2)
    assert q.to_event(1).event_shape == (2, *GRID)
    masked = q.mask(torch.tensor([True, False]))
    assert torch.equal(masked.log_prob(x), plain.log_prob(x) * torch.tensor([1.0, 0.0]))
    with pytest.raises(NotImplementedError):  # the shape of the event is that of the arguments
        GMRF.infer_shapes(loc=loc.shape)


def test_sample_and_log_density_of_a_trace():
    L = random_cholesky(STENCIL, GRID)

    def model():
        return pyro.sample("x", GMRF(torch.zeros(GRID, dtype=torch.float64), L))

    trace = poutine.trace(model).get_trace()
    x = trace.nodes["x"]["value"]
    assert x.shape == GRID
    expected = bg.GMRF(torch.zeros(GRID, dtype=torch.float64), L).log_prob(x)
    assert torch.equal(trace.log_prob_sum(), expected)


def test_plates_repeat_latent_sites_and_subsample_observed_ones():
    L, data = random_cholesky(STENCIL, GRID), observations(6)

    def model():
        with pyro.plate("images", 6, subsample_size=2) as chosen:
            latent = pyro.sample("latent", GMRF(torch.zeros(GRID, dtype=torch.float64), L))
            pyro.sample("seen", GMRF(latent, L), obs=data[chosen])
        return chosen

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    latent, chosen = trace.nodes["latent"]["value"], trace.nodes["_RETURN"]["value"]
    assert latent.shape == (2, *GRID)
    assert not torch.equal(latent[0], latent[1])
    # A subsampled plate counts each of its sites 6 / 2 times.
    expected = 3 * bg.GMRF(latent, L).log_prob(data[chosen])
    torch.testing.assert_close(trace.nodes["seen"]["log_prob"], expected, rtol=1e-12, atol=0)


def test_nested_plates_and_obs_mask():
    L, data = random_cholesky(STENCIL, GRID, batch=(2,)), observations(2).expand(5, 2, *GRID)
    seen = torch.tensor([True, False])

    def model():
        with pyro.plate("repeats", 5, dim=-2), pyro.plate("images", 2, dim=-1):
            return pyro.sample("x", GMRF(torch.zeros(GRID, dtype=torch.float64), L), obs=data, obs_mask=seen)

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    x = trace.nodes["_RETURN"]["value"]
    assert x.shape == (5, 2, *GRID)
    assert torch.equal(x[:, 0], data[:, 0])
    assert not torch.equal(x[:, 1], data[:, 1])


def prior_seen_through_white_noise(data, L):
    zero = torch.zeros(GRID, dtype=torch.float64)

    def model():
        mean = pyro.sample("mean", GMRF(zero, L))
        with pyro.plate("images", len(data)):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(2), obs=data)

    return model


def take_steps(model, guide):
    """Three steps of SVI, several particles at once; their losses."""
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    return torch.tensor([svi.step() for _ in range(3)])


def test_svi_fits_a_gmrf_guide():
    initial = {"loc": observations(1)[0]}
    initial["log_diag"], initial["off_diag"] = random_factor(STENCIL.offsets, GRID)

    def guide():
        loc, log_diag, off_diag = (pyro.param(name, value.clone()) for name, value in initial.items())
        pyro.sample("mean", GMRF(loc, bg.StencilCholesky(log_diag, off_diag, STENCIL)))

    losses = take_steps(prior_seen_through_white_noise(observations(5), random_cholesky(STENCIL, GRID)), guide)
    assert losses.isfinite().all()
    existing = {"off_diag": STENCIL.mask(GRID)}
    for name, value in initial.items():
        moved = (pyro.param(name) - value)[existing.get(name, ...)]
        # Adam moves each parameter by about its learning rate, whatever the size of the gradient.
        assert ((moved != 0) & (moved.abs() < 0.1)).all()


def test_svi_with_a_guide_made_from_the_support():
    model = prior_seen_through_white_noise(observations(5), random_cholesky(STENCIL, GRID))
    guide = AutoNormal(model)
    assert take_steps(model, guide).isfinite().all()
    assert guide.median()["mean"].shape == GRID


FLAT = torch.zeros(4, 3, dtype=torch.float64)


def diagonal(log_diag):
    """A GMRF with these logarithms on the diagonal of its factor, and no correlation."""
    return bg.GMRF(FLAT, bg.StencilCholesky(FLAT + log_diag, FLAT.new_zeros(4, 4, 3), STENCIL), validate_args=False)


FAILURES = {
    "from_precision": lambda: bg.StencilCholesky.from_precision(
        bg.StencilPrecision(FLAT + 1, FLAT - torch.ones(4, 1, 1), STENCIL)
    ),
    "from_precision, singular": lambda: bg.StencilCholesky.from_precision(bg.matern_precision((4, 3), 1e9, 1)),
    "from_precision, nearest": lambda: bg.StencilCholesky.from_precision(bg.matern_precision((4, 3), 1e9, 1), STENCIL),
    "from_covariance": lambda: bg.StencilCholesky.from_covariance(torch.ones(12, 12).double(), STENCIL, (4, 3)),
    "from_samples": lambda: bg.StencilCholesky.from_samples(FLAT.expand(40, 4, 3), STENCIL),
    "from_samples, stationary": lambda: bg.StencilCholesky.from_samples(FLAT.expand(40, 4, 3), STENCIL, stationary=True),
    "nearest": lambda: diagonal(800.0).precision_cholesky.nearest(bg.Stencil.cross(1)),
    "posterior, direct": lambda: diagonal(800.0).posterior(FLAT + 1, 1.0, method="direct").mean,
    "posterior, iterative": lambda: diagonal(400.0).posterior(FLAT + 1, 1.0, method="iterative").mean,
    "condition, direct": lambda: diagonal(-800.0).condition(FLAT > 1, FLAT, method="direct").variance,
    "log_evidence": lambda: diagonal(800.0).posterior(FLAT, 1.0).log_evidence,
    "constrain": lambda: diagonal(800.0).constrain(torch.ones(1, 4, 3).double(), torch.ones(1).double()).mean,
    "laplace": lambda: diagonal(0.0).laplace(lambda x: 5 * x.square()).mean,
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Newton's method says that it found no mode
def test_numerical_failures_are_what_pyro_takes_for_a_divergence(failure):
    with pytest.raises(torch.linalg.LinAlgError) as caught:
        FAILURES[failure]()
    assert _handle_torch_singular(caught.value)


def test_nuts_with_a_matern_field_and_counts_takes_a_singular_precision_for_a_divergence():
    counts = torch.poisson(torch.full((4, 5), 3.0, dtype=torch.float64))
    calls, singular = [], []

    def model():
        reached = pyro.sample("range", dist.LogNormal(torch.tensor(1.0, dtype=torch.float64), 0.5))
        calls.append(reached)
        if len(calls) > 60 and len(calls) % 7 == 0:  # past the search for a step: Pyro's own fails after an exception there
            reached = reached * 1e9
        try:
            L = bg.StencilCholesky.from_precision(bg.matern_precision((4, 5), reached, 1))
        except torch.linalg.LinAlgError:
            singular.append(len(calls))
            raise
        field = pyro.sample("field", GMRF(torch.ones(4, 5, dtype=torch.float64), L))
        pyro.sample("counts", dist.Poisson(field.exp()).to_event(2), obs=counts)

    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=10, warmup_steps=10, disable_progbar=True)
    mcmc.run()
    assert singular
    samples = mcmc.get_samples()
    assert samples["field"].shape == (10, 4, 5)
    assert samples["field"].isfinite().all()
    assert len(samples["range"].unique()) > 2

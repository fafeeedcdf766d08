"""A field as deepinv's prior, noise and fidelity: against dense matrices, and inside deepinv's solvers."""

import pytest
import torch

import banded_gmrf as bg
from docs.extensions.torchvision_operators import declare_missing_operators
from tests.cases import STENCILS, dense, random_cholesky

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torchvision's own use of torch.jit

declare_missing_operators()
deepinv = pytest.importorskip("deepinv")
doors = pytest.importorskip("banded_gmrf.deepinv")

GRID = (4, 5)
CASES = {"gray": ((), (2, 1)), "channels alike": ((), (2, 3)), "one image": ((), (1, 1)), "a field each": ((2, 1), (2, 1))}


def field(batch=(), grid=GRID, stencil="3x3", dtype=torch.float64) -> bg.GMRF:
    L = random_cholesky(STENCILS[stencil], grid, batch, dtype)
    return bg.GMRF(torch.randn(*batch, *grid, dtype=dtype), L)


def precision(q: bg.GMRF) -> torch.Tensor:
    return dense(q.precision_cholesky) @ dense(q.precision_cholesky).mT


def close(actual, expected):
    # Products of 20 terms, and solutions of systems whose condition numbers are below 10⁵, in float64.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def times(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (matrix @ x.flatten(-2).unsqueeze(-1)).squeeze(-1).unflatten(-1, GRID)


@pytest.mark.parametrize(("batch", "lead"), CASES.values(), ids=CASES)
def test_the_prior_is_exact(batch, lead):
    q = field(batch)
    prior, x = doors.GMRFPrior(q), torch.randn(*lead, *GRID).double()
    close(prior(x), -q.log_prob(x).sum(1))
    close(prior.grad(x), times(precision(q), x - q.loc))
    close(prior.grad(x), deepinv.optim.Prior.grad(prior, x.clone()).detach())
    for gamma in (0.3, x.new_tensor(0.3), x.new_full((len(x), 1, 1, 1), 0.3)):
        expected = q.loc + times((torch.eye(20) + 0.3 * precision(q)).inverse(), x - q.loc)
        close(prior.prox(x, None, gamma=gamma), expected)
        close(prior.prox(x, gamma=gamma), q.posterior(x, noise_variance=0.3).mean)


def test_what_is_kept_between_proximal_steps_follows_the_field():
    q = field()
    prior, x = doors.GMRFPrior(q), torch.randn(1, 1, *GRID).double()
    prior.prox(x, gamma=0.5)
    q.log_diag.add_(0.7)
    close(prior.prox(x, gamma=0.5), q.posterior(x, noise_variance=0.5).mean)
    close(prior.prox(x, gamma=2.0), q.posterior(x, noise_variance=2.0).mean)


def test_a_proximal_step_has_gradients():
    L = random_cholesky(STENCILS["3x3"], GRID)
    log_diag, gamma = L.log_diag.clone().requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    q = bg.GMRF(torch.randn(GRID).double(), bg.StencilCholesky(log_diag, L.off_diag, L.stencil))
    x = torch.randn(1, 1, *GRID).double().requires_grad_()
    shrunk = (torch.eye(20).double() + gamma * precision(q)).inverse()
    expected = torch.autograd.grad((q.loc + times(shrunk, x - q.loc)).square().sum(), [log_diag, gamma, x])
    actual = torch.autograd.grad(doors.GMRFPrior(q).prox(x, gamma=gamma).square().sum(), [log_diag, gamma, x])
    for one, other in zip(actual, expected, strict=True):
        close(one, other)


def test_noise_is_drawn_from_the_field():
    q = field()
    noise = doors.GMRFNoise(q, rng=torch.Generator().manual_seed(0))
    x = torch.randn(5000, 1, *GRID).double()
    whitened = q.whiten(noise(x, seed=1) - x)
    torch.testing.assert_close(noise(x, seed=1), noise(x, seed=1), rtol=0, atol=0)
    # Standard errors 1 / √5000 = 0.014 for means and correlations, √2 as much for variances.
    assert whitened.mean(0).abs().max() < 0.07
    flat = whitened.flatten(1)
    assert (flat.T @ flat / 5000 - torch.eye(20)).abs().max() < 0.1


def test_the_fidelity_whitens():
    q, physics = field(), deepinv.physics.Denoising()
    fidelity, x, y = doors.GMRFFidelity(q), *torch.randn(2, 3, 2, *GRID).double()
    likelihood = -q.log_prob(y - x).sum(1)
    constant = -q.log_prob(q.loc) * 2
    close(fidelity(x, y, physics), likelihood - constant)
    close(fidelity.grad(x, y, physics), -times(precision(q), y - x - q.loc))
    u = fidelity.prox(x, y, physics, gamma=0.3)
    close(0.3 * fidelity.grad(u, y, physics) + u - x, torch.zeros_like(x))


def test_a_solver_of_deepinv_finds_the_posterior_mean():
    """Deblurring under correlated noise: proximal gradient descent, and the linear system solved at once."""
    q = bg.GMRF(torch.zeros(GRID).double(), bg.StencilCholesky.from_precision(bg.matern_precision(GRID, 2.0, 1)))
    noise = bg.GMRF(torch.zeros(GRID).double(), bg.StencilCholesky.from_precision(bg.car_precision(GRID, 0.5, 10.0)))
    blur = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).double()[None, None] / 16
    physics = deepinv.physics.Blur(blur, padding="circular", noise_model=doors.GMRFNoise(noise))
    y = physics(q.sample((2, 1)))
    bound = torch.linalg.eigvalsh(precision(noise)).max()
    solver = deepinv.optim.PGD(
        doors.GMRFFidelity(noise), doors.GMRFPrior(q), stepsize=1 / float(bound), lambda_reg=1.0, max_iter=30
    )
    expected = q.posterior(y[:, 0], noise=noise, operator=physics).mean
    # The distance from the mean shrinks by 0.28 in each step. `deepinv` keeps its step sizes in float32.
    torch.testing.assert_close(solver(y, physics)[:, 0], expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_modules_move_and_convert_their_field():
    for module in (doors.GMRFPrior(field()), doors.GMRFNoise(field()), doors.GMRFFidelity(field()).d):
        assert module.float().distribution.loc.dtype == torch.float32
        assert module.distribution.off_diag.dtype == torch.float32


def test_what_does_not_fit_is_refused():
    q = field()
    with pytest.raises(TypeError, match="distribution is a Tensor, expected a GMRF"):
        doors.GMRFPrior(torch.zeros(3))
    prior, x = doors.GMRFPrior(q), torch.zeros(1, 1, *GRID).double()
    for call in (prior, prior.grad, prior.prox):
        with pytest.raises(ValueError, match=r"x has shape \(4, 5\), expected \(N, ..., 4, 5\)"):
            call(x[0, 0])
        with pytest.raises(ValueError, match=r"expected \(\.\.\., 4, 5\)"):
            call(x[..., :4])
        with pytest.raises(TypeError, match="float32"):
            call(x.float())
    for gamma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="gamma is"):
            prior.prox(x, gamma=gamma)
    with pytest.raises(ValueError, match="expected"):
        doors.GMRFNoise(q)(x[..., :4])
    with pytest.raises(ValueError, match="expected"):
        doors.GMRFFidelity(q)(x[..., :4], x[..., :4], deepinv.physics.Denoising())

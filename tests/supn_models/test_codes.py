"""Codes of images that are seen in part: against the formulas of linear Gaussian models, and against autograd."""

import pytest
import torch
from torch import nn

import banded_gmrf as bg
from supn_models import ConvAutoencoder, ConvVAE, LatentCovarianceNetwork, StructuredLikelihood, infer_code

# Of torch's own, when its rules of forward mode are first imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")

GRID, LATENT, BATCH = (7, 6), 3, 2


class LinearVAE(ConvVAE):
    """Its decoder is linear, so that one step is exact."""

    def __init__(self):
        super().__init__(GRID, latent_size=LATENT, channels=(4,))
        self.linear = nn.Linear(LATENT, GRID[0] * GRID[1])

    def decode(self, code):
        return self.linear(code).reshape(-1, 1, *GRID)


def likelihood_of(vae):
    """A factor that is the same for all codes, and that has entries off the diagonal."""
    network = LatentCovarianceNetwork(GRID, LATENT, bg.Stencil.square(3), decoder_channels=(4,), channels=4, initial_stddev=0.5)
    nn.init.normal_(network.covariance.head.conv.bias, std=0.2)
    return StructuredLikelihood(vae, network).double().eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def known_sites():
    known = torch.rand(BATCH, *GRID) < 0.5
    known[1] = False  # of the second image nothing is known
    return known


def dense_posterior(likelihood, known, y, noise_variance=0.0):
    """Mean and covariance of the code, and mean and covariance of the image, of the first image of a linear model."""
    origin = likelihood.autoencoder.decode(torch.zeros(1, LATENT, dtype=torch.float64))[0, 0]
    eye = torch.eye(LATENT, dtype=torch.float64)
    J = (likelihood.autoencoder.decode(eye)[:, 0] - origin).flatten(1).T
    local = likelihood(torch.zeros(1, LATENT, dtype=torch.float64)).covariance_matrix[0]
    site = known[0].flatten()
    seen = (local + J @ J.T)[site][:, site] + noise_variance * torch.eye(int(site.sum()), dtype=torch.float64)
    residual = (y[0] - origin).flatten()[site]
    code_gain, gain = J[site].T @ torch.linalg.inv(seen), (local + J @ J.T)[:, site] @ torch.linalg.inv(seen)
    image = origin + (gain @ residual).reshape(GRID)
    covariance = local + J @ J.T - gain @ (local + J @ J.T)[site]
    return code_gain @ residual, eye - code_gain @ J[site], image, covariance


@pytest.mark.parametrize("noise_variance", [0.0, 0.3])
def test_a_linear_decoder_has_the_posterior_of_the_textbook(noise_variance):
    likelihood, known = likelihood_of(LinearVAE()), known_sites()
    y = torch.randn(BATCH, *GRID, dtype=torch.float64)

    def observe(q):
        if noise_variance:
            variance = torch.full(known.shape, torch.inf, dtype=torch.float64).masked_fill(known, noise_variance)
            return q.posterior(y, noise_variance=variance)
        return q.condition(known, y)

    found = infer_code(likelihood, observe, torch.randn(BATCH, LATENT, dtype=torch.float64))
    mean, covariance, image, image_covariance = dense_posterior(likelihood, known, y, noise_variance)
    assert found.converged.all()
    # In float64: the rounding of a Jacobian and of a few solves.
    torch.testing.assert_close(found.code.mean[0], mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.code.covariance_matrix[0], covariance, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.image.mean[0], image, rtol=1e-8, atol=1e-8)
    variance = image_covariance.diagonal().reshape(GRID)
    torch.testing.assert_close(found.image.variance[0], variance, rtol=1e-7, atol=1e-9)
    # Without observations the code is the prior's.
    torch.testing.assert_close(found.code.mean[1], torch.zeros(LATENT, dtype=torch.float64))
    torch.testing.assert_close(found.code.covariance_matrix[1], torch.eye(LATENT, dtype=torch.float64))


def test_at_the_mode_the_density_has_no_slope():
    vae = ConvVAE(GRID, latent_size=LATENT, channels=(4, 8), norm="group")
    for parameter in vae.decoder.parameters():
        parameter.data.mul_(1.5)  # further from linear
    likelihood, known = likelihood_of(vae), known_sites()
    y = vae.decode(torch.randn(BATCH, LATENT, dtype=torch.float64))[:, 0] + 0.1 * torch.randn(BATCH, *GRID)
    start = 2 * torch.randn(BATCH, LATENT, dtype=torch.float64)
    found = infer_code(likelihood, lambda q: q.condition(known, y), start, max_iterations=100, tolerance=1e-12)
    assert found.converged.all()

    def log_density(code):
        q = likelihood(code)
        evidence = bg.GMRF(q.mean, q.precision_cholesky).condition(known, y).log_evidence
        return evidence - 0.5 * code.square().sum(1)

    code = found.code.mean.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(log_density(code).sum(), code)
    # A step that promises 10⁻¹² nats has a slope near 10⁻⁶ standard deviations.
    assert slope.abs().max() < 1e-4
    assert (log_density(found.code.mean) > log_density(start)).all()


class WithFactors(StructuredLikelihood):
    """A likelihood whose residual has one factor."""

    def __init__(self, likelihood, factors):
        super().__init__(likelihood.autoencoder, likelihood.covariance)
        self.factors = factors

    def forward(self, code):
        q = super().forward(code)
        return bg.LowRankGMRF(q.mean, q.precision_cholesky, self.factors.expand(len(code), *self.factors.shape))


def test_factors_of_the_residual_are_taken_along():
    local, known = likelihood_of(LinearVAE()), known_sites()
    likelihood = WithFactors(local, 0.3 * torch.randn(1, *GRID, dtype=torch.float64))
    y = torch.randn(BATCH, *GRID, dtype=torch.float64)
    found = infer_code(likelihood, lambda q: q.condition(known, y), torch.zeros(BATCH, LATENT, dtype=torch.float64))
    mean, covariance, image, image_covariance = dense_posterior(likelihood, known, y)
    torch.testing.assert_close(found.code.mean[0], mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.code.covariance_matrix[0], covariance, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.image.mean[0], image, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.image.variance[0], image_covariance.diagonal().reshape(GRID), rtol=1e-7, atol=1e-9)


def test_float32_and_too_few_iterations():
    likelihood = likelihood_of(ConvVAE(GRID, latent_size=LATENT, channels=(4, 8), norm="group")).float()
    known, y = known_sites(), torch.randn(BATCH, *GRID)
    start = torch.randn(BATCH, LATENT)
    found = infer_code(likelihood, lambda q: q.condition(known, y), start)
    assert found.image.mean.dtype == torch.float32
    assert found.code.mean.dtype == torch.float64
    with pytest.warns(RuntimeWarning, match="has not converged for . of 2 images in 1 iterations") as warned:
        infer_code(likelihood, lambda q: q.condition(known, y), start, max_iterations=1, tolerance=1e-12)
    assert warned[0].filename == __file__  # it names the caller's line
    with torch.autocast("cpu", torch.bfloat16):
        again = infer_code(likelihood, lambda q: q.condition(known, y), start)
    assert torch.equal(again.code.mean, found.code.mean)


def test_bad_arguments():
    likelihood, start = likelihood_of(LinearVAE()), torch.zeros(BATCH, LATENT, dtype=torch.float64)
    known, y = known_sites(), torch.zeros(BATCH, *GRID, dtype=torch.float64)

    def observe(q):
        return q.condition(known, y)

    plain = StructuredLikelihood(ConvAutoencoder(GRID, latent_size=LATENT), likelihood.covariance)
    with pytest.raises(TypeError, match="likelihood is that of a ConvAutoencoder, expected a ConvVAE"):
        infer_code(plain, observe, start)
    with pytest.raises(TypeError, match="likelihood is a LinearVAE, expected a StructuredLikelihood"):
        infer_code(likelihood.autoencoder, observe, start)
    with pytest.raises(TypeError, match=r"start is a NoneType, expected a torch.Tensor"):
        infer_code(likelihood, observe, None)
    with pytest.raises(TypeError, match=r"start is torch.float32, likelihood is torch.float64"):
        infer_code(likelihood, observe, start.float())
    with pytest.raises(ValueError, match="start has NaN or infinite entries"):
        infer_code(likelihood, observe, start / 0)
    with pytest.raises(ValueError, match="values has NaN or infinite entries where something was observed"):
        infer_code(likelihood, lambda q: q.condition(known, y / 0), start)
    with pytest.raises(TypeError, match="tolerance is None, expected a number"):
        infer_code(likelihood, observe, start, tolerance=None)
    with pytest.raises(TypeError, match=r"likelihood is torch.bfloat16, expected float32 or float64"):
        infer_code(likelihood_of(LinearVAE()).bfloat16(), observe, start.bfloat16())
    with pytest.raises(ValueError, match=r"start has shape \(2, 4\), expected \(batch, 3\)"):
        infer_code(likelihood, observe, torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="tolerance is 0, expected more than 0"):
        infer_code(likelihood, observe, start, tolerance=0)
    with pytest.raises(ValueError, match="max_iterations is 0"):
        infer_code(likelihood, observe, start, max_iterations=0)
    with pytest.raises(TypeError, match="observe gives ConditionalGMRF, expected a posterior of the distribution"):
        infer_code(likelihood, lambda q: q.local.condition(known, y), start)
    with pytest.raises(ValueError, match=r"observe gives a batch \(2,\), expected \(1,\)"):
        infer_code(likelihood, observe, start[:1])


@pytest.mark.parametrize("part", ["autoencoder", "covariance"])
def test_networks_in_training_are_refused(part):
    """Their results would depend on the rest of the batch, and each step would change their statistics."""
    vae = ConvVAE(GRID, latent_size=LATENT, channels=(4, 8)).eval()
    network = LatentCovarianceNetwork(GRID, LATENT, bg.Stencil.square(3), decoder_channels=(4,), channels=4).eval()
    likelihood = StructuredLikelihood(vae, network)
    getattr(likelihood, part).train()
    before = {name: buffer.clone() for name, buffer in likelihood.named_buffers()}
    known, y, start = known_sites(), torch.randn(BATCH, *GRID), torch.zeros(BATCH, LATENT)
    with pytest.raises(ValueError, match=rf"expected evaluation mode \(likelihood.eval\(\)\): its {part}\..* is a BatchNorm"):
        infer_code(likelihood, lambda q: q.condition(known, y), start)
    assert all(torch.equal(before[name], buffer) for name, buffer in likelihood.named_buffers())
    likelihood.eval()
    assert infer_code(likelihood, lambda q: q.condition(known, y), start).code.mean.shape == (BATCH, LATENT)

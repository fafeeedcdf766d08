"""The structured likelihood of an autoencoder, and the importance-sampled bound where log p(x) is known in closed form."""

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

import banded_gmrf as bg
from supn_models import (
    ConvAutoencoder,
    ConvVAE,
    CovarianceNetwork,
    LatentCovarianceNetwork,
    StructuredLikelihood,
    importance_log_likelihood,
    importance_log_weights,
)
from tests.cases import dense, random_cholesky

GRID = (3, 4)
STENCIL = bg.Stencil.square(3)


class LinearGaussian:
    """x = W z + b + noise with structured or white precision, all in float64, where every density is Gaussian."""

    def __init__(self, latent_size: int, structured: bool):
        n = 12
        self.W = 0.5 * torch.randn(n, latent_size, dtype=torch.float64)
        self.b = torch.randn(n, dtype=torch.float64)
        factor = random_cholesky(STENCIL if structured else bg.Stencil.square(1), GRID)
        self.factor = factor
        self.precision = dense(factor) @ dense(factor).mT
        self.marginal = MultivariateNormal(self.b, self.precision.inverse() + self.W @ self.W.mT)

    def sample(self, count: int) -> torch.Tensor:
        return self.marginal.sample((count,)).reshape(count, 1, *GRID)

    def log_prob(self, images: torch.Tensor) -> torch.Tensor:
        return self.marginal.log_prob(images.flatten(1))

    def posterior(self, images: torch.Tensor, widen: float = 1.0) -> Independent:
        """The true posterior's means and standard deviations, the latter times ``widen``: exact for one latent number."""
        precision = torch.eye(self.W.shape[1], dtype=torch.float64) + self.W.mT @ self.precision @ self.W
        mean = (images.flatten(1) - self.b) @ self.precision @ self.W @ precision.inverse()
        stddev = precision.inverse().diagonal().sqrt()
        return Independent(Normal(mean, (widen * stddev).expand_as(mean)), 1)

    def likelihood(self, code: torch.Tensor) -> bg.GMRF | Independent:
        mean = (code @ self.W.mT + self.b).reshape(-1, *GRID)
        if len(self.factor.stencil):
            return bg.GMRF(mean, self.factor)
        return Independent(Normal(mean[:, None], 1 / self.factor.diag), 3)


@pytest.mark.parametrize("structured", [True, False])
def test_bound_is_exact_at_the_true_posterior(structured):
    toy = LinearGaussian(1, structured)
    images = toy.sample(5)
    weights = importance_log_weights(images, toy.posterior(images), toy.likelihood, 3)
    assert weights.shape == (5, 3)
    torch.testing.assert_close(weights, toy.log_prob(images)[:, None].expand(5, 3))


@pytest.mark.parametrize("structured", [True, False])
def test_bound_converges_from_below(structured):
    toy = LinearGaussian(2, structured)
    images = toy.sample(4)
    exact, posterior = toy.log_prob(images), toy.posterior(images, widen=1.7)
    log_weights = importance_log_weights(images, posterior, toy.likelihood, 20_000, chunk_size=10_000)
    bounds = [log_weights.unflatten(1, (-1, size)).logsumexp(2) - torch.tensor(size).log() for size in (1, 10, 1000)]
    means = [bound.mean() for bound in bounds]
    assert means[0] < means[1] < means[2]
    assert (bounds[0].mean(1) < exact).all()
    # The relative error of a mean of 20,000 weights, measured from the weights; five of them cover what chance does.
    weights = (log_weights - exact[:, None]).exp()
    error = weights.std(1) / 20_000**0.5
    assert (error < 0.05).all()
    assert ((weights.mean(1) - 1).abs() < 5 * error).all()
    same = importance_log_likelihood(images, posterior, toy.likelihood, 20_000, chunk_size=10_000)
    assert ((same - exact).abs() < 5 * error / (1 - 5 * error)).all()


def test_chunks_do_not_change_the_bound():
    toy = LinearGaussian(2, structured=True)
    images = toy.sample(3)
    bounds = []
    for chunk_size in (1, 7, 100):
        counts = []

        def likelihood(code, counts=counts):
            counts.append(len(code))
            return toy.likelihood(code)

        generator = torch.Generator().manual_seed(1)
        posterior = toy.posterior(images, 1.5)
        bounds.append(importance_log_likelihood(images, posterior, likelihood, 5, chunk_size=chunk_size, generator=generator))
        assert max(counts) <= chunk_size
        assert sum(counts) == 15
    torch.testing.assert_close(bounds[1], bounds[0])
    torch.testing.assert_close(bounds[2], bounds[0])


def networks():
    layers = {"channels": (4, 6), "kernel_size": 3, "norm": "batch"}
    decoder = {"decoder_channels": (4, 6), "kernel_size": 3, "channels": 5, "initial_stddev": 0.3}
    vae = ConvVAE((9, 7), latent_size=3, **layers)
    return vae, {
        "code": LatentCovarianceNetwork((9, 7), 3, STENCIL, **decoder),
        "mean": CovarianceNetwork(1, STENCIL, channels=4, initial_stddev=0.3),
        "both": LatentCovarianceNetwork((9, 7), 3, STENCIL, image_channels=1, **decoder),
    }


@pytest.mark.parametrize("source", ["code", "mean", "both"])
def test_structured_likelihood_of_each_network(source):
    vae, covariances = networks()
    vae.requires_grad_(False).eval()
    model = StructuredLikelihood(vae, covariances[source])
    torch.nn.init.normal_(next(m for n, m in model.covariance.named_modules() if n.endswith("head")).conv.weight, std=0.1)
    images = torch.rand(4, 1, 9, 7)
    code = vae.encode(images)
    q = model(code)
    assert (q.batch_shape, q.event_shape) == ((4,), (9, 7))
    assert torch.equal(q.mean, vae.decode(code)[:, 0])
    (-q.log_prob(images[:, 0])).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("covariance."), name
    model.eval()
    bound = importance_log_likelihood(images, vae.posterior(images), model, 6, chunk_size=4)
    assert bound.shape == (4,)
    assert bound.dtype == torch.float64
    assert torch.isfinite(bound).all()


def test_an_autoencoder_has_a_structured_likelihood():
    autoencoder = ConvAutoencoder((9, 7), latent_size=3, channels=(4,))
    q = StructuredLikelihood(autoencoder, CovarianceNetwork(1, STENCIL, channels=4, initial_stddev=0.3))(torch.rand(2, 3))
    torch.testing.assert_close(q.variance, torch.full((2, 9, 7), 0.09))


@torch.no_grad()
@pytest.mark.parametrize("source", ["mean", "code"])
def test_a_compiled_covariance_network(source, keep_torch_defaults):
    vae = ConvVAE(GRID, latent_size=2, channels=(4,)).eval()
    network = CovarianceNetwork(1, STENCIL, 4, 1)
    if source == "code":
        network = LatentCovarianceNetwork(GRID, 2, STENCIL, decoder_channels=(4,), channels=4)
    code = torch.randn(3, 2)
    expected = StructuredLikelihood(vae, network.eval())(code)
    found = StructuredLikelihood(vae, torch.compile(network, backend="eager"))(code)
    torch.testing.assert_close(found.log_diag, expected.log_diag)


def test_a_likelihood_of_other_networks_is_refused():
    vae = ConvVAE(GRID, latent_size=2, channels=(4,))
    network = CovarianceNetwork(1, STENCIL, 4, 1)
    with pytest.raises(TypeError, match="autoencoder is a CovarianceNetwork, expected a ConvAutoencoder"):
        StructuredLikelihood(network, vae)
    with pytest.raises(TypeError, match="covariance is a Identity, expected a CovarianceNetwork or"):
        StructuredLikelihood(vae, torch.nn.Identity())


def test_a_bound_of_networks_in_training_is_refused():
    vae, images = ConvVAE(GRID, latent_size=2, channels=(4,)).eval(), torch.randn(3, 1, *GRID)
    posterior = vae.posterior(images)
    network = LatentCovarianceNetwork(GRID, 2, STENCIL, decoder_channels=(4,), channels=4)
    with pytest.raises(ValueError, match="likelihood is in training mode, expected evaluation mode"):
        importance_log_weights(images, posterior, StructuredLikelihood(vae, network), 2)
    with pytest.raises(ValueError, match="likelihood is in training mode, expected evaluation mode"):
        importance_log_likelihood(images, posterior, vae.train().likelihood, 2)


def test_empty_batch():
    vae, covariances = networks()
    images = torch.empty(0, 1, 9, 7)
    model = StructuredLikelihood(vae, covariances["both"]).eval()
    for likelihood in (vae.likelihood, model):
        assert importance_log_likelihood(images, vae.posterior(images), likelihood, 3).shape == (0,)


def test_bad_arguments_are_named():
    vae, covariances = networks()
    vae.eval()
    images = torch.rand(2, 1, 9, 7)
    posterior = vae.posterior(images)
    cases = [
        (lambda: importance_log_weights(images, posterior, vae.likelihood, 0), "num_samples is 0"),
        (lambda: importance_log_weights(images, posterior, vae.likelihood, 2, chunk_size=0), "chunk_size is 0"),
        (lambda: importance_log_weights(images[:1], posterior, vae.likelihood, 2), r"posterior has mean \(2, 3\)"),
        (
            lambda: importance_log_weights(images[..., :6], posterior, vae.likelihood, 2),
            r"images has shape \(4, 1, 9, 6\), expected \(batch, 1, 9, 7\)",
        ),
        (lambda: StructuredLikelihood(ConvAutoencoder((9, 7), 3), covariances["mean"]), "3 image channels"),
        (lambda: covariances["both"](torch.rand(2, 3)), r"image has shape None, expected \(2, 1, 9, 7\)"),
        (lambda: covariances["both"](torch.rand(2, 3), images[:1]), r"image has shape \(1, 1, 9, 7\)"),
        (lambda: covariances["code"](torch.rand(2, 4)), r"code has shape \(2, 4\)"),
        (lambda: LatentCovarianceNetwork((9,), 3, STENCIL), r"grid is \(9,\), expected 2 axes"),
        (lambda: LatentCovarianceNetwork((9, 7), 3, STENCIL, image_channels=-1), "image_channels is -1"),
        (lambda: LatentCovarianceNetwork((9, 7), 3, STENCIL, channels=0), "channels is 0"),
        (lambda: LatentCovarianceNetwork((9, 7), 3, "square"), "stencil is a str"),
    ]
    for make, words in cases:
        with pytest.raises(ValueError, match=words):
            make()

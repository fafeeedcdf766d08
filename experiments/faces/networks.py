"""Train the base models, and the covariance networks of their residuals."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import banded_gmrf as bg
from supn_models import ConvAutoencoder, ConvVAE, CovarianceNetwork, LatentCovarianceNetwork, StructuredLikelihood

from .. import distributed
from ..stopping import EarlyStopping
from ..training import ShuffledEpochs, derived_seed, fit, seeded_generator, warmup_cosine
from .images import Images, TrainingImages
from .presets import BETAS, Config, Covariance

# The order in which convolutions are fastest on CPUs, and on GPUs in bfloat16.
MEMORY_FORMAT = torch.channels_last
_IMAGES_FOR_SCALE = 512
_VALIDATED_AT_ONCE = 64

# The options of `training.fit` for the network of a name.
Options = Callable[[str], dict[str, Any]]


@dataclass
class Networks:
    """The networks of a run, the losses of every step, and the learning curves of base models that were scored; by name.

    A curve is the mean loss of each pass ("training"), the score of validation images after it ("validation"), and the number
    of the pass with the best one ("best").
    """

    bases: dict[str, ConvAutoencoder] = field(default_factory=dict)
    likelihoods: dict[str, StructuredLikelihood] = field(default_factory=dict)
    base_losses: dict[str, list[float]] = field(default_factory=dict)
    covariance_losses: dict[str, list[float]] = field(default_factory=dict)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)

    def modules(self) -> dict[str, nn.Module]:
        """Base models and covariance networks, for a checkpoint."""
        return {**self.bases, **{name: likelihood.covariance for name, likelihood in self.likelihoods.items()}}


def train_all(config: Config, images: TrainingImages, device: torch.device, options: Options) -> Networks:
    """`train_bases`, then `train_covariances`."""
    networks = train_bases(config, images, device, options)
    train_covariances(config, networks, images, device, options)
    return networks


def train_bases(config: Config, images: TrainingImages, device: torch.device, options: Options) -> Networks:
    """Train all base models of a run, and freeze them.

    Args:
        config: the run's.
        images: `images.images_for_training`.
        device: where to.
        options: of each training.
    """
    networks = Networks()
    for name in config.bases:
        base = networks.bases[name] = build_base(config, name).to(device, memory_format=MEMORY_FORMAT)
        stopping = base_stopping(config, name, base, images)
        losses = train_base(config, name, base, images.base, stopping=stopping, **options(name))
        networks.base_losses[name] = losses
        if stopping is not None:
            networks.curves[name] = _learning_curve(losses, stopping)
        base.requires_grad_(False)
    return networks


def given_bases(
    config: Config, bases: dict[str, ConvAutoencoder], curves: dict[str, dict[str, Any]], device: torch.device
) -> Networks:
    """The base models of a run, frozen, where an earlier one has trained them: those that ``config`` needs of a file's."""
    return Networks(
        {name: bases[name].requires_grad_(False).to(device, memory_format=MEMORY_FORMAT) for name in config.bases},
        curves={name: curve for name, curve in curves.items() if name in config.bases},
    )


def train_covariances(
    config: Config, networks: Networks, images: TrainingImages, device: torch.device, options: Options
) -> None:
    """Train the covariance networks of a run behind the base models in ``networks``, and put them there.

    Args:
        config, images, device, options: as of `train_bases`.
        networks: with base models.
    """
    for covariance in config.covariances:
        base, name = networks.bases[covariance.base], covariance.name
        network = build_covariance(config, covariance, residual_stddev(base, images.covariance))
        likelihood = StructuredLikelihood(base, network.to(device, memory_format=MEMORY_FORMAT))
        networks.likelihoods[name] = likelihood
        networks.covariance_losses[name] = train_covariance(config, covariance, likelihood, images.covariance, **options(name))
        network.requires_grad_(False)


def _learning_curve(losses: list[float], stopping: EarlyStopping) -> dict[str, Any]:
    steps = len(losses) // len(stopping.scores)
    passes = [losses[first : first + steps] for first in range(0, len(losses), steps)]
    return {
        "training": [sum(of_pass) / len(of_pass) for of_pass in passes],
        "validation": stopping.scores,
        "best": stopping.best_epoch,
    }


def build_base(config: Config, name: str) -> ConvAutoencoder:
    """A base model as it is before training."""
    torch.manual_seed(derived_seed(config.seed, f"{name} weights"))
    network = ConvAutoencoder if BETAS[name] is None else ConvVAE
    return network(
        (config.size, config.size), latent_size=config.latent_size, channels=config.channels, kernel_size=5, norm="batch"
    )


def train_base(config: Config, name: str, network: ConvAutoencoder, images: Images, **options: Any) -> list[float]:
    """Minimise the mean squared error, or -log p(x | z) + β KL in nats per pixel; return the loss of every step.

    Args:
        config: the run's.
        name: of `BETAS`.
        network: what is trained, in place.
        images: for training.
        options: state, console, workers, log, stopping: of `training.fit`.
    """
    loss, epochs = partial(base_loss, name, network), config.base_epochs
    if BETAS[name] is None:
        return fit_on_images(config, network, loss, images, name, epochs, **options)
    with_noise = partial(_with_noise, config)
    return fit_on_images(config, network, loss, images, name, epochs, prepare=with_noise, **options)


def base_loss(name: str, network: ConvAutoencoder, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """What training minimises, a mean over images.

    The gradient error is that of Mathieu, Couprie and LeCun, Deep multi-scale video prediction beyond mean square error, ICLR
    2016, here at three resolutions: absolute errors, and those of the differences of neighbours.

    Args:
        name: of `BETAS`.
        network: the base model.
        images: (B, 1, H, W).
        noise: (B, latent_size), standard normal, for a variational one.
    """
    if BETAS[name] is not None:
        return network.loss(images, BETAS[name], noise).mean() / images[0].numel()
    residual = images - network(images)
    if name == "AE-L1":
        return residual.abs().mean()
    if name == "AE-gradient":
        return sum(_absolute_and_gradient(nn.functional.avg_pool2d(residual, 2**level)) for level in range(3)) / 3
    return residual.square().mean()


def _absolute_and_gradient(residual: Tensor) -> Tensor:
    return residual.abs().mean() + sum(residual.diff(dim=axis).abs().mean() for axis in (-2, -1))


def base_stopping(config: Config, name: str, network: ConvAutoencoder, images: TrainingImages) -> EarlyStopping | None:
    """Ends the training of a base model by its own loss of the validation images, if the run is to do so.

    The codes of a variational one are drawn once: its scores differ by what it has learned alone.
    """
    purpose = f"{name} validation noise"
    noise = torch.randn(len(images.validation), config.latent_size, generator=seeded_generator(config.seed, purpose))

    def score(x: Tensor, rows: slice) -> Tensor:
        return base_loss(name, network, x, noise[rows].to(x))

    return stopping_by(config, images, score)


def stopping_by(config: Config, images: TrainingImages, score: Callable[[Tensor, slice], Tensor]) -> EarlyStopping | None:
    """Ends a training by a score of the validation images; None if the run has none or is not to do so.

    Args:
        config: the run's.
        images: its images.
        score: the mean over some validation images, given them and their rows.
    """
    if config.patience is None:
        return None
    x = images.validation

    @torch.no_grad()
    def mean_score() -> float:
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for _, rows in distributed.own_batches(len(x), _VALIDATED_AT_ONCE):
            total += score(x[rows], rows).double() * len(x[rows])
        return distributed.sum_over_processes(total).item() / len(x)

    return EarlyStopping(mean_score, _order(config, images.base, "").steps_per_epoch, config.patience)


def residual_stddev(base: ConvAutoencoder, images: Images) -> float:
    """Root mean square of the residuals of a sample of images: where a covariance network starts."""
    device = next(base.parameters()).device
    if isinstance(images, tuple):
        sample = images[0][:_IMAGES_FOR_SCALE]
    else:
        first = Subset(images, range(min(_IMAGES_FOR_SCALE, len(images))))
        sample = next(iter(DataLoader(first, batch_size=len(first)))).to(device)
    with torch.no_grad():
        return (sample - base(sample)).square().mean().sqrt().item()


def build_covariance(
    config: Config, covariance: Covariance, initial_stddev: float
) -> CovarianceNetwork | LatentCovarianceNetwork:
    """A covariance network as it is before training; one seed starts those of all stencils alike."""
    torch.manual_seed(derived_seed(config.seed, f"covariance weights from {covariance.source}"))
    stencil = bg.Stencil.square(covariance.stencil_size)
    if covariance.source == "μ":
        return CovarianceNetwork(1, stencil, config.features, initial_stddev=initial_stddev)
    return LatentCovarianceNetwork(
        (config.size, config.size),
        config.latent_size,
        stencil,
        image_channels=int(covariance.source == "both"),
        decoder_channels=config.channels,
        channels=config.features,
        initial_stddev=initial_stddev,
    )


def train_covariance(
    config: Config,
    covariance: Covariance,
    likelihood: StructuredLikelihood,
    images: Images,
    title: str | None = None,
    **options: Any,
) -> list[float]:
    """Maximise log p(x | z), the base model frozen; return the loss of every step in nats per pixel.

    The code of a VAE is drawn from q(z | x) anew at each step, as in the bound of log p(x) and in its own training; that of an
    autoencoder is the encoder's.

    Args:
        config: the run's.
        covariance: which network it is.
        likelihood: the base model with the network, which is trained in place.
        images: for training.
        title: sets it apart from trainings of other networks of this name; None for its name.
        options: state, console, workers, log: of `training.fit`.
    """
    base = likelihood.autoencoder

    def prepare(x: Tensor) -> tuple[Tensor, ...]:
        if isinstance(base, ConvVAE):
            posterior = base.posterior(x)
            code = posterior.mean + posterior.stddev * own_noise(config).to(x)
        else:
            code = base.encode(x)
        mean = base.decode(code)
        return code, mean, (x - mean)[:, 0]

    def nats_per_pixel(code: Tensor, mean: Tensor, residual: Tensor) -> Tensor:
        if likelihood.covariance.config["num_factors"]:
            return -likelihood.around(code, mean).log_prob(mean[:, 0] + residual).mean() / residual[0].numel()
        factor = likelihood.factor(code, mean)
        nats = bg.negative_log_likelihood(residual, factor.log_diag, factor.off_diag, factor.stencil)
        return nats.mean() / factor.grid.numel()

    return fit_on_images(
        config,
        likelihood.covariance,
        nats_per_pixel,
        images,
        title or covariance.name,
        config.covariance_epochs,
        prepare=prepare,
        **options,
    )


def fit_on_images(
    config: Config, network: nn.Module, loss: Callable[..., Tensor], images: Images, name: str, epochs: int, **options: Any
) -> list[float]:
    """Minimise ``loss`` over the parameters of a network on batches of images; return the loss of every step.

    Args:
        config: the run's.
        network: what is trained, in place.
        loss: of what ``prepare`` makes of a batch, or of the batch.
        images: for training.
        name: sets the order of the images and what is drawn apart from those of other trainings; shown as the title.
        epochs: passes over the images.
        options: state, console, workers, log, prepare, stopping: of `training.fit`.
    """
    rows = _order(config, images, name)
    steps = epochs * rows.steps_per_epoch
    stopping = options.get("stopping")
    rate = warmup_cosine(config.learning_rate, steps)
    if stopping is not None:
        rate = partial(stopping.rate, peak=config.learning_rate)
    # Alike for a new and for a resumed training: what was drawn before it is not.
    torch.manual_seed(derived_seed(config.seed, f"{name} training"))
    return fit(
        network,
        loss,
        images,
        steps=steps,
        rows=rows,
        learning_rate=rate,
        title=name,
        bfloat16=config.bfloat16,
        compiled=config.compiled,
        **options,
    )


def _order(config: Config, images: Images, name: str) -> ShuffledEpochs:
    count = len(images[0]) if isinstance(images, tuple) else len(images)
    return ShuffledEpochs(count, config.batch_size, derived_seed(config.seed, f"{name} order"))


def _with_noise(config: Config, images: Tensor) -> tuple[Tensor, Tensor]:
    return images, own_noise(config).to(images)


def own_noise(config: Config) -> Tensor:
    """This process's part (B, latent_size) of a batch's noise, drawn on the CPU: alike in all processes, on all devices."""
    return distributed.own_part(torch.randn(config.batch_size, config.latent_size))

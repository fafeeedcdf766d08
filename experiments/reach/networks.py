"""Train the networks of each row."""

import copy
from typing import Any

import torch
from torch import Tensor

import banded_gmrf as bg
from supn_models import ConvVAE, LatentCovarianceNetwork, StructuredLikelihood

from ..faces.images import Images, TrainingImages
from ..faces.networks import MEMORY_FORMAT, build_base, fit_on_images, own_noise, residual_stddev, train_covariance
from ..faces.presets import Covariance
from ..training import derived_seed
from . import offsets
from .presets import BASE, Config, Row

_IMAGES_FOR_OFFSETS = 512


def stencils(config: Config, vae: ConvVAE, images: TrainingImages) -> dict[str, bg.Stencil]:
    """The stencil of each choice of offsets, of `presets.OFFSETS`; the greedy one from residuals of training images."""
    dense = bg.Stencil.square(config.stencil_size)
    found = {"dense": dense}
    wanted = {row.offsets for row in config.rows}
    if "dilated" in wanted:
        found["dilated"] = offsets.dilated(len(dense))
    if "greedy" in wanted:
        x = images.covariance[0][:_IMAGES_FOR_OFFSETS]
        with torch.no_grad():
            found["greedy"] = offsets.greedy((x - vae(x))[:, 0], len(dense), config.reach)
    return found


def train_row(
    config: Config,
    row: Row,
    seed: int,
    stencil: bg.Stencil,
    vae: ConvVAE,
    images: TrainingImages,
    dense: StructuredLikelihood | None,
    **options: Any,
) -> tuple[StructuredLikelihood, list[float]]:
    """A likelihood of a row, trained; and the loss of every step in nats per pixel.

    Args:
        config: the run's.
        row: which.
        seed: counted from 0.
        stencil: of its offsets.
        vae: the frozen one.
        images: of the run.
        dense: the likelihood of the same seed behind the frozen VAE, with which fine-tuning begins.
        options: state, console, on_state: of `training.fit`.
    """
    faces, seen = config.of_seed(seed), _images_of(row, images)
    if row.training == "frozen":
        likelihood = StructuredLikelihood(vae, build(config, row, seed, stencil, residual_stddev(vae, seen)))
        likelihood.covariance.to(next(vae.parameters()).device, memory_format=MEMORY_FORMAT)
        about = Covariance(BASE, config.stencil_size)
        losses = train_covariance(faces, about, likelihood, seen, title=row.name, **options)
    elif row.training == "fine-tuned":
        likelihood = copy.deepcopy(dense).requires_grad_(True)
        losses = train_jointly(config, row, seed, likelihood, seen, config.epochs, **options)
    else:
        base = build_base(faces, BASE).to(next(vae.parameters()).device, memory_format=MEMORY_FORMAT)
        stddev = images.base[0][:_IMAGES_FOR_OFFSETS].std().item()  # of its first residuals: its means are near 0
        network = build(config, row, seed, stencil, stddev).to(next(vae.parameters()).device, memory_format=MEMORY_FORMAT)
        likelihood = StructuredLikelihood(base, network)
        losses = train_jointly(config, row, seed, likelihood, seen, config.scratch_epochs, **options)
    return likelihood.requires_grad_(False).eval(), losses


def _images_of(row: Row, images: TrainingImages) -> Images:
    """What the networks of a row are trained on."""
    if row.images == "unseen" or images.covariance is images.base:
        return images.covariance
    return (torch.cat((images.base[0], images.covariance[0])),)


def build(config: Config, row: Row, seed: int, stencil: bg.Stencil, initial_stddev: float) -> LatentCovarianceNetwork:
    """The covariance network of a row before training; one seed starts those of all rows alike."""
    faces = config.of_seed(seed)
    torch.manual_seed(derived_seed(faces.seed, "covariance weights from z"))
    return LatentCovarianceNetwork(
        (faces.size, faces.size),
        faces.latent_size,
        stencil,
        decoder_channels=faces.channels,
        channels=faces.features,
        initial_stddev=initial_stddev,
        num_factors=row.rank,
    )


def train_jointly(
    config: Config, row: Row, seed: int, likelihood: StructuredLikelihood, images: Images, epochs: int, **options: Any
) -> list[float]:
    """Minimise -log p(x | z) + KL in nats per pixel over the VAE and the covariance network, with one code for each image.

    What keeps it stable: the network predicts the weights of a local regression, which do not grow as the residual
    shrinks; it starts from a diagonal covariance of the residual's size; gradients are clipped.

    Args:
        config, row, seed: the run's, and which.
        likelihood: trained in place.
        images: for training.
        epochs: passes.
        options: state, console, on_state: of `training.fit`.
    """
    faces, vae = config.of_seed(seed), likelihood.autoencoder

    def loss(x: Tensor, noise: Tensor) -> Tensor:
        q = vae.posterior(x)
        p = likelihood(q.mean + q.stddev * noise)
        return (vae.divergence(q) - p.log_prob(x[:, 0])).mean() / x[0].numel()

    return fit_on_images(
        faces, likelihood, loss, images, row.name, epochs, prepare=lambda x: (x, own_noise(faces).to(x)), **options
    )

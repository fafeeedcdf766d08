"""Unknown pixels of faces from the others: a structured residual, and the code, given what is known."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from banded_gmrf.inference.inferred_field import InferredField
from supn_models import StructuredLikelihood

from ..training import seeded_generator
from .estimators import inferred
from .presets import Config

LEVELS = (0.5, 0.9, 0.99)
FILLED, INFERRED = "code of the image filled in", "code inferred"
# Draws of each image.
DRAWS = 3
_BATCH = 10


@dataclass(frozen=True)
class Inpainted:
    """Images of which some pixels are unknown, completed.

    Args:
        mean: (count, height, width).
        stddev: of each pixel, (count, height, width); 0 of those that are known.
        samples: (DRAWS, count, height, width).
        converged: bool (count,), false where the search for a code has not; None where none was made.
    """

    mean: Tensor
    stddev: Tensor
    samples: Tensor
    converged: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Inpainted":
        """Those of some images."""
        converged = None if self.converged is None else self.converged[rows]
        return Inpainted(self.mean[rows], self.stddev[rows], self.samples[:, rows], converged)


def masks(config: Config) -> dict[str, Tensor]:
    """Bool (count or 1, size, size), true where a pixel is known."""
    size, count = config.faces.size, config.inpainted
    half, block = torch.ones(2, 1, size, size, dtype=torch.bool)
    half[..., size // 2 :] = False
    edge = 3 * size // 16
    block[..., size // 2 - edge : size // 2 + edge, size // 2 - edge : size // 2 + edge] = False
    scattered = torch.rand(count, size, size, generator=seeded_generator(config.faces.seed, "missing pixels")) < 0.1
    return {
        "right half missing": half,
        f"block of {2 * edge} x {2 * edge} missing": block,
        "90 % missing": scattered,
    }


@torch.no_grad()
def inpaint(
    config: Config, likelihood: StructuredLikelihood, average: Tensor, images: Tensor, known: Tensor
) -> tuple[Tensor, dict[str, Inpainted]]:
    """Complete images: (count, height, width) by the VAE alone, and distributions by the names `FILLED` and `INFERRED`.

    The VAE's code of an image with unknown pixels is that of the image filled in: with the average image at first, then with
    what was found, ``config.rounds`` times; with the conditional mean, or with the VAE's mean alone. `FILLED` takes that code
    for known. `INFERRED` begins there and has the code's posterior given the known pixels (`supn_models.infer_code`).

    Args:
        config: the run's.
        likelihood: the VAE with its structured covariance network.
        average: of the training images, (height, width).
        images: (count, 1, height, width), of which the known pixels are read.
        known: bool (count, height, width).
    """
    parts = [
        _inpaint(config, likelihood, average, *part) for part in zip(images.split(_BATCH), known.split(_BATCH), strict=True)
    ]
    found = {name: _joined([part[name] for _, part in parts]) for name in (FILLED, INFERRED)}
    return torch.cat([vae for vae, _ in parts]), found


def _inpaint(
    config: Config, likelihood: StructuredLikelihood, average: Tensor, images: Tensor, known: Tensor
) -> tuple[Tensor, dict[str, Inpainted]]:
    image, vae = images[:, 0], likelihood.autoencoder
    plain = conditional = image.where(known, average)
    for _ in range(config.rounds):
        plain = image.where(known, vae(plain[:, None])[:, 0])
        code = vae.encode(conditional[:, None])
        q = likelihood(code).condition(known, image)
        conditional = q.mean
    found = inferred(likelihood, lambda q: q.condition(known, image), code)
    return plain, {FILLED: _described(q), INFERRED: _described(found.image, found.converged)}


def _described(q: InferredField, converged: Tensor | None = None) -> Inpainted:
    return Inpainted(q.mean, q.stddev, q.sample((DRAWS,)), converged)


def _joined(parts: Sequence[Inpainted]) -> Inpainted:
    mean, stddev, samples = (torch.cat([getattr(part, key) for part in parts], -3) for key in ("mean", "stddev", "samples"))
    converged = [part.converged for part in parts if part.converged is not None]
    return Inpainted(mean, stddev, samples, torch.cat(converged) if converged else None)


def scores(
    images: Tensor, known: Tensor, average: Tensor, vae: Tensor, found: dict[str, Inpainted]
) -> dict[str, dict[str, float]]:
    """Mean squared errors of the unknown pixels, black being 0 and white 1, and coverage of intervals, by completion.

    Args:
        images: (count, 1, height, width).
        known: bool (count, height, width).
        average: of the training images, (height, width).
        vae, found: of `inpaint`.
    """
    unknown, image = ~known, images[:, 0]

    def error(estimate: Tensor) -> float:
        return (estimate - image).square()[unknown].mean().item() / 4

    rows = {"average face": {"mse": error(average.expand_as(image))}, "VAE": {"mse": error(vae)}}
    for name, of in found.items():
        inside = torch.special.erf(((image - of.mean).abs() / of.stddev)[unknown].double() / 2**0.5)
        rows[name] = {
            "mse": error(of.mean),
            "mse_of_a_sample": error(of.samples[0]),
            **{f"coverage_{level:g}": (inside <= level).double().mean().item() for level in LEVELS},
        }
        if of.converged is not None:
            rows[name]["not_converged"] = int((~of.converged).sum())
    return rows

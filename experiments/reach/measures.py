"""What is measured of a likelihood on test images."""

from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.distributions import Independent, Normal

from banded_gmrf import diagnostics
from supn_models import StructuredLikelihood

from ..faces.presets import Config as Faces
from ..faces.scores import score
from ..whiteness import excess_kurtosis, lag_autocorrelation

LEVELS = (0.5, 0.9, 0.99)
BLOCK = 8
PRINCIPAL = (8, 32)
_FAR = 16
_BATCH = 8


def regions(size: int) -> Tensor:
    """Weights (2, size, size) of the means over both eyes of a face that fills the image: rows 20 to 29 of 64, 12 columns."""
    top, bottom, left, right = (round(size * edge / 64) for edge in (20, 30, 14, 26))
    weights = torch.zeros(2, size, size, dtype=torch.float64)
    weights[0, top:bottom, left:right] = 1
    weights[1] = weights[0].flip(-1)
    return weights / weights[0].sum()


@torch.no_grad()
def measure(
    faces: Faces, likelihood: StructuredLikelihood, images: Tensor, measured: int, title: str, console: Console | None
) -> dict[str, Any]:
    """All measures, as JSON can hold them; "nats" and "bound" for each image, in nats.

    Args:
        faces: of the run that the VAE is of.
        likelihood: in evaluation mode.
        images: for testing, (count, 1, H, W).
        measured: how many of them, the first ones, for coverage, conformal scale and the correlation of both eyes.
        title, console: what is shown as progress, and where.
    """
    of_images = score(faces, likelihood.autoencoder, likelihood, images, title, console)
    whitened = of_images.whitened
    far = min(_FAR, faces.size // 2)
    return {
        "nats": [round(value, 3) for value in of_images.nats.tolist()],
        "bound": [round(value, 3) for value in of_images.bound.tolist()],
        "variance": whitened.var().item(),
        "lag_1": lag_autocorrelation(whitened),
        f"lag_{_FAR}": lag_autocorrelation(whitened, far),
        "kurtosis": excess_kurtosis(whitened),
        **_intervals(likelihood, images[:measured]),
    }


@torch.no_grad()
def principal_gains(
    likelihood: StructuredLikelihood, training: Tensor, validation: Tensor, images: Tensor, seed: int
) -> dict[str, float]:
    """What as many factors as in `PRINCIPAL` could gain, in nats per image, that are alike for all images once whitened.

    They are the leading principal components of whitened training residuals, with the variances of validation images, at least
    1; the gain is that of test images over the likelihood without them.

    Args:
        likelihood: in evaluation mode, without factors.
        training: images that the covariance network was trained on, (count, 1, H, W).
        validation: images that no network was trained on.
        images: for testing.
        seed: of the search for the components.
    """
    whitened = [_whitened(likelihood, x).flatten(1) for x in (training, validation, images)]
    most = min(max(PRINCIPAL), *whitened[0].shape)
    torch.manual_seed(seed)
    components = torch.pca_lowrank(whitened[0], most, center=False, niter=4)[2]
    expected, found = ((y @ components).double().square().mean(0) for y in whitened[1:])
    variance = expected.clamp(min=1)
    gains = ((1 - 1 / variance) * found - variance.log()) / 2
    return {str(count): gains[:count].sum().item() for count in PRINCIPAL}


def _whitened(likelihood: StructuredLikelihood, images: Tensor) -> Tensor:
    """Whitened residuals, (count, H, W)."""
    batches = images.split(_BATCH)
    return torch.cat([likelihood(likelihood.autoencoder.encode(x)).whiten(x[:, 0]) for x in batches])


def _intervals(likelihood: StructuredLikelihood, images: Tensor) -> dict[str, Any]:
    """Coverage of pixels and of means of blocks, conformal scale, and how both eyes' means hang together."""
    weights = regions(images.shape[-1]).to(images.device)
    means, stddevs, blocks, moments = [], [], [], []
    for x in images.split(_BATCH):
        q = likelihood(likelihood.autoencoder.encode(x))
        means.append(q.mean)
        stddevs.append(q.stddev)
        blocks.append(len(x) * diagnostics.block_coverage(q, x[:, 0], BLOCK, LEVELS))
        pushed = q.covariance_times(weights[:, None].expand(2, len(x), *q.event_shape))
        moments.append(torch.einsum("ibyx,jyx->bij", pushed, weights))
    mean, stddev = torch.cat(means), torch.cat(stddevs)
    pixels = Independent(Normal(mean, stddev, validate_args=False), 2, validate_args=False)
    x = images[:, 0]
    covariance = torch.cat(moments).mean(0)
    eyes = torch.einsum("byx,iyx->ib", (x - mean).double(), weights)
    found = {"pixels": diagnostics.marginal_coverage(pixels, x, LEVELS), "blocks": sum(blocks) / len(x)}
    return {
        **{name: dict(zip(map(str, LEVELS), shares.tolist(), strict=True)) for name, shares in found.items()},
        "conformal_scale": _conformal_scale(pixels, x),
        "eyes": (covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()).item(),
        "eyes_of_the_data": torch.corrcoef(eyes)[0, 1].item(),
    }


def _conformal_scale(pixels: Independent, x: Tensor, level: float = 0.9) -> float | None:
    """Of intervals of 90 %; None for fewer images than such a scale takes."""
    if len(x) < level / (1 - level):
        return None
    return diagnostics.conformal_scale(pixels, x, level).item()

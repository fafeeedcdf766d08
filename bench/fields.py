"""Factors as in use, for tools whose cost depends on the covariance: of what a blur takes from photographs, or from a file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch

import banded_gmrf as bg

from .quality import scikit_image_photographs

_STENCIL_SIZE = 7
_BLUR = 2.0  # standard deviation in pixels
_RESIDUALS = 16


@dataclass(frozen=True)
class Fields:
    """Factors of B images, and S residuals that they are models of, S = B or B = 1; gray levels in [-1, 1].

    float32 arrays, which reach another process by value.

    Attributes:
        log_diag: (B, H, W).
        off_diag: (B, K-1, H, W).
        stencil_size: f of an f x f patch, at least 3.
        residuals: (S, H, W).
        source: what they are.
    """

    log_diag: np.ndarray
    off_diag: np.ndarray
    stencil_size: int
    residuals: np.ndarray
    source: str


def photograph_residuals() -> Fields:
    """Photographs of scikit-image less their blurred versions: the maximum-likelihood factor of one half of the patches, and
    residuals of the other half."""
    photographs = scikit_image_photographs()
    train, test = (torch.cat(patches).numpy() / 127.5 - 1 for patches in zip(*photographs.sets, strict=True))
    train, test = (patches - scipy.ndimage.gaussian_filter(patches, (0, _BLUR, _BLUR)) for patches in (train, test))
    factor = bg.StencilCholesky.from_samples(torch.from_numpy(train), bg.Stencil.square(_STENCIL_SIZE))
    return Fields(
        factor.log_diag[None].numpy().astype(np.float32),
        factor.off_diag[None].numpy().astype(np.float32),
        _STENCIL_SIZE,
        test[:: len(test) // _RESIDUALS][:_RESIDUALS].astype(np.float32),
        f"one factor for what a blur of {_BLUR:g} pixels takes from {len(train)} patches of {photographs.source}",
    )


def load_fields(path: Path) -> Fields:
    """Those of an .npz file: arrays ``log_diag`` (B, H, W), ``off_diag`` (B, K-1, H, W) and ``stencil_size``, and ``residual``
    (B, H, W), in place of which a sample of each factor is taken if it is not there; a string ``source`` says what they are of.

    Raises:
        ValueError: the file cannot be read, lacks one of these, or they do not fit.
    """
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an .npz file: {error}") from None
    if missing := {"log_diag", "off_diag", "stencil_size"} - arrays.keys():
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}; expected log_diag, off_diag and stencil_size")
    log_diag, off_diag, size = arrays["log_diag"], arrays["off_diag"], arrays["stencil_size"]
    if size.shape != () or size < 3 or size % 2 == 0:
        raise ValueError(f"{path} has stencil_size {size}, expected an odd number of at least 3")
    if log_diag.ndim != 3 or off_diag.shape != (len(log_diag), (size**2 - 1) // 2, *log_diag.shape[1:]):
        raise ValueError(
            f"{path} has log_diag {log_diag.shape} and off_diag {off_diag.shape}, expected (B, H, W) and "
            f"(B, {(size**2 - 1) // 2}, H, W) for stencil_size {size}"
        )
    log_diag, off_diag = log_diag.astype(np.float32), off_diag.astype(np.float32)
    if "residual" in arrays:
        residuals, origin = arrays["residual"].astype(np.float32), "with their residuals"
        if residuals.shape != log_diag.shape:
            raise ValueError(f"{path} has residual {residuals.shape}, expected {log_diag.shape} as log_diag has")
    else:
        factor = bg.StencilCholesky(torch.from_numpy(log_diag), torch.from_numpy(off_diag), bg.Stencil.square(int(size)))
        white = torch.randn(log_diag.shape, generator=torch.Generator().manual_seed(0))
        residuals, origin = factor.solve(white, transpose=True).numpy(), "with a sample of each"
    source = str(arrays.get("source", path.name))
    return Fields(log_diag, off_diag, int(size), residuals, f"{len(log_diag)} factors of {source} {origin}")

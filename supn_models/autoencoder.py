"""A convolutional autoencoder for images of any one size."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from banded_gmrf.stencil import as_grid
from gmrf_kernels.checks import check_tensor

from .layers import check_features, check_positive_int, check_positive_ints, conv, normalization
from .upsampling import upsample


class ConvEncoder(nn.Module):
    """Images (B, in_channels, *grid) to codes (B, latent_size): strided convolutions, then a linear map.

    Args:
        in_channels: channels of an image.
        grid: size of an image in pixels, 1 to 3 axes of any length.
        latent_size: numbers in a code.
        channels: channels after each convolution; each convolution halves the resolution, rounding up.
        kernel_size: sites along each axis of a convolution, odd.
        norm: "group" or "batch" normalisation.

    Raises:
        ValueError: an argument out of range, or images of another shape.
    """

    def __init__(
        self,
        in_channels: int,
        grid: Sequence[int],
        latent_size: int,
        channels: Sequence[int],
        kernel_size: int = 3,
        norm: str = "group",
    ):
        super().__init__()
        coarsest = _grids("in_channels", in_channels, grid, latent_size, channels, kernel_size)[-1]
        ndim = len(grid)
        self.in_channels, self.grid = in_channels, tuple(grid)
        layers: list[nn.Module] = []
        for fine, coarse in itertools.pairwise((in_channels, *channels)):
            layers += [conv(ndim, fine, coarse, kernel_size, stride=2), normalization(norm, ndim, coarse), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * math.prod(coarsest), latent_size))

    def forward(self, images: Tensor) -> Tensor:
        """Codes (B, latent_size) of images (B, in_channels, *grid)."""
        check_features("images", images, self.in_channels, len(self.grid))
        if images.shape[2:] != self.grid:
            raise ValueError(f"images has grid {tuple(images.shape[2:])}, the network was made for {self.grid}")
        return self.layers(images)


class ConvDecoder(nn.Module):
    """Codes (B, latent_size) to images (B, out_channels, *grid): the encoder's resolutions backwards.

    By linear interpolation and convolutions: transposed convolutions, which reach neighbouring pixels through different numbers
    of weights, would leave a checkerboard in every residual.

    Args:
        out_channels: channels of an image.
        grid: size of an image in pixels, 1 to 3 axes of any length.
        latent_size: numbers in a code.
        channels: channels at each resolution below the image's, the finest first, as for `ConvEncoder`.
        kernel_size: as for `ConvEncoder`.
        norm: as for `ConvEncoder`.

    Raises:
        ValueError: an argument out of range, or codes of another shape.
    """

    def __init__(
        self,
        out_channels: int,
        grid: Sequence[int],
        latent_size: int,
        channels: Sequence[int],
        kernel_size: int = 3,
        norm: str = "group",
    ):
        super().__init__()
        grids = _grids("out_channels", out_channels, grid, latent_size, channels, kernel_size)
        ndim = len(grid)
        self.latent_size = latent_size
        self.grids = grids[-2::-1]
        self.from_code = nn.Sequential(
            nn.Linear(latent_size, channels[-1] * math.prod(grids[-1])), nn.Unflatten(1, (channels[-1], *grids[-1]))
        )
        widths = [*channels[::-1], channels[0]]
        self.blocks = nn.ModuleList(
            nn.Sequential(normalization(norm, ndim, coarse), nn.SiLU(), conv(ndim, coarse, fine, kernel_size))
            for coarse, fine in itertools.pairwise(widths)
        )
        self.to_image = nn.Sequential(
            normalization(norm, ndim, channels[0]), nn.SiLU(), conv(ndim, channels[0], out_channels, kernel_size)
        )

    def forward(self, code: Tensor) -> Tensor:
        """Images (B, out_channels, *grid) of codes (B, latent_size)."""
        check_tensor("code", code)
        if code.ndim != 2 or code.shape[1] != self.latent_size:
            raise ValueError(f"code has shape {tuple(code.shape)}, expected (batch, {self.latent_size})")
        x = self.from_code(code)
        for block, grid in zip(self.blocks, self.grids, strict=True):
            x = upsample(block(x), grid)
        return self.to_image(x)


class ConvAutoencoder(nn.Module):
    """Images to a code and back: the mean μ(z) whose residual a covariance network explains.

    Source: the base models of Dorta et al., Structured Uncertainty Prediction Networks, CVPR 2018, section 5, made smaller.

    Args:
        grid: size of an image in pixels, 1 to 3 axes of any length.
        in_channels: channels of an image.
        latent_size: numbers in a code, the bottleneck.
        channels: channels at each resolution below the image's; each is half of the one before, rounded up.
        kernel_size: sites along each axis of a convolution, odd.
        norm: "group" or "batch" normalisation.

    Raises:
        ValueError: an argument out of range, or images or codes of another shape.
    """

    # What the networks give for each number of a code and of an image.
    _outputs_per_value = 1

    def __init__(
        self,
        grid: Sequence[int],
        in_channels: int = 1,
        latent_size: int = 64,
        channels: Sequence[int] = (32, 64, 128),
        kernel_size: int = 3,
        norm: str = "group",
    ):
        super().__init__()
        check_positive_int("in_channels", in_channels)
        check_positive_int("latent_size", latent_size)
        check_positive_ints("channels", channels, fewest=1)
        self.config: dict[str, Any] = {
            "grid": tuple(as_grid(grid)),
            "in_channels": in_channels,
            "latent_size": latent_size,
            "channels": tuple(channels),
            "kernel_size": kernel_size,
            "norm": norm,
        }
        layers = (channels, kernel_size, norm)
        self.encoder = ConvEncoder(in_channels, grid, self._outputs_per_value * latent_size, *layers)
        self.decoder = ConvDecoder(self._outputs_per_value * in_channels, grid, latent_size, *layers)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """A new network with the arguments of another one's ``config``."""
        return cls(**config)

    def encode(self, images: Tensor) -> Tensor:
        """(B, in_channels, *grid) to codes (B, latent_size)."""
        return self.encoder(images)

    def decode(self, code: Tensor) -> Tensor:
        """Codes (B, latent_size) to reconstructions (B, in_channels, *grid), in the units of the images."""
        return self.decoder(code)

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions (B, in_channels, *grid)."""
        return self.decode(self.encode(images))


def _grids(
    name: str, image_channels: int, grid: Sequence[int], latent_size: int, channels: Sequence[int], kernel_size: int
) -> list[tuple[int, ...]]:
    """Check the arguments; return the sizes at all resolutions, that of the image first."""
    check_positive_int(name, image_channels)
    check_positive_int("latent_size", latent_size)
    grid = as_grid(grid)
    check_positive_ints("channels", channels, fewest=1)
    check_positive_int("kernel_size", kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}, expected an odd integer")
    grids = [tuple(grid)]
    for _ in channels:
        grids.append(tuple(-(-n // 2) for n in grids[-1]))
    return grids

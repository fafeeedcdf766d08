"""Networks that predict the covariance of an image's residual: from an image, from a latent code, or from both."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import banded_gmrf as bg
from banded_gmrf.stencil import as_grid
from gmrf_kernels.checks import check_tensor

from .autoencoder import ConvDecoder
from .head import StencilCholeskyHead
from .layers import (
    ResidualBlock,
    check_features,
    check_int,
    check_positive_int,
    check_positive_ints,
    check_stddev,
    check_stencil,
    conv,
)
from .low_rank import LowRankHead
from .upsampling import upsample


class CovarianceNetwork(nn.Module):
    """Image (B, in_channels, *grid) to a `banded_gmrf.StencilCholesky` with batch shape (B,): a small U-Net.

    Fully convolutional: any grid of 1 to 3 axes (those of the stencil), odd sizes included. Every level halves the resolution
    and doubles the channels; with the default 3 levels a prediction depends on about 24 pixels to every side, and through the
    normalisation on means and variances over the whole image. A diagonal covariance is the same network with a stencil that
    has no offsets.

    Source: Dorta et al., Structured Uncertainty Prediction Networks, CVPR 2018; there the input is the latent code, here any
    image, usually the reconstruction (the mean) whose residual is to be explained.

    Args:
        in_channels: channels of the input.
        stencil: shape of the factor's columns.
        channels: channels at full resolution.
        num_levels: number of resolutions; 1 for a plain residual network.
        initial_stddev: standard deviation of the first prediction, in the units of the data (those of a pixel).
        num_factors: R, of a low-rank part that the network then predicts as well, by a `LowRankHead`.

    Raises:
        ValueError: an argument out of range, or an image of another shape.
    """

    def __init__(
        self,
        in_channels: int,
        stencil: bg.Stencil,
        channels: int = 16,
        num_levels: int = 3,
        initial_stddev: float = 1.0,
        num_factors: int = 0,
    ):
        super().__init__()
        check_positive_int("in_channels", in_channels)
        check_positive_int("channels", channels)
        check_positive_int("num_levels", num_levels)
        check_stencil(stencil)
        check_stddev("initial_stddev", initial_stddev)
        check_int("num_factors", num_factors, 0)
        ndim = stencil.ndim
        widths = [channels * 2**level for level in range(num_levels)]
        finer_and_coarser = list(itertools.pairwise(widths))
        self.in_channels, self.channels, self.num_levels = in_channels, channels, num_levels
        self.stem = conv(ndim, in_channels, channels)
        self.down_blocks = nn.ModuleList(ResidualBlock(ndim, width) for width in widths)
        self.down = nn.ModuleList(conv(ndim, fine, coarse, stride=2) for fine, coarse in finer_and_coarser)
        self.up = nn.ModuleList(conv(ndim, coarse, fine, kernel_size=1) for fine, coarse in finer_and_coarser)
        self.up_blocks = nn.ModuleList(ResidualBlock(ndim, fine) for fine, _ in finer_and_coarser)
        # Last, so that one seed starts all other layers alike whatever the stencil.
        self.head = StencilCholeskyHead(channels, stencil, initial_stddev)
        self.low_rank = LowRankHead(channels, num_factors, ndim, initial_stddev) if num_factors else None

    @property
    def stencil(self) -> bg.Stencil:
        """Shape of the factor's columns."""
        return self.head.stencil

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as values that JSON can hold, for `from_config`."""
        return {
            "in_channels": self.in_channels,
            "stencil": {"offsets": self.stencil.offsets, "ndim": self.stencil.ndim},
            "channels": self.channels,
            "num_levels": self.num_levels,
            "initial_stddev": self.head.initial_stddev,
            "num_factors": 0 if self.low_rank is None else self.low_rank.num_factors,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CovarianceNetwork":
        """A new network with the arguments of another one's `config`."""
        return cls(**_with_stencil(config))

    def forward(self, image: Tensor) -> bg.StencilCholesky | tuple[bg.StencilCholesky, Tensor]:
        """L, batch (B,), of images (B, in_channels, *grid); with ``num_factors`` also the factors (B, R, *grid)."""
        check_features("image", image, self.in_channels, self.stencil.ndim)
        x = self.down_blocks[0](self.stem(image))
        skips = []
        for down, block in zip(self.down, self.down_blocks[1:], strict=True):
            skips.append(x)
            x = block(down(x))
        for up, block, skip in reversed(list(zip(self.up, self.up_blocks, skips, strict=True))):
            x = block(skip + upsample(up(x), skip.shape[2:]))
        return self.head(x) if self.low_rank is None else (self.head(x), self.low_rank(x))


class LatentCovarianceNetwork(nn.Module):
    """Codes (B, latent_size), and images with them if asked, to a `banded_gmrf.StencilCholesky` with batch shape (B,).

    A `ConvDecoder` turns the code into features at full resolution; a `CovarianceNetwork`, by default of one level, predicts
    from them and the image. From the decoder's last interpolation to the head there are four convolutions.

    Source: Dorta et al., Structured Uncertainty Prediction Networks, CVPR 2018, section 5.2: a block like the decoder of the
    variational autoencoder, then four convolutions. It leaves the widths open, and whether to predict from the code, from the
    reconstruction (`CovarianceNetwork`) or from both.

    Args:
        grid: size of an image in pixels, as many axes as the stencil has.
        latent_size: numbers in a code.
        stencil: shape of the factor's columns.
        image_channels: channels of an image, usually the reconstruction, that is given beside the code; 0 for none.
        decoder_channels: channels at each resolution below the image's, as for `ConvDecoder`.
        kernel_size: sites along each axis of the decoder's convolutions, odd.
        norm: "group" or "batch" normalisation in the decoder.
        channels: channels of the decoder's features, and at full resolution after them.
        num_levels: resolutions of the `CovarianceNetwork`.
        initial_stddev: standard deviation of the first prediction, in the units of the data (those of a pixel).
        num_factors: as for `CovarianceNetwork`.

    Raises:
        ValueError: an argument out of range, codes or images of another shape, or no image where one is expected.
    """

    def __init__(
        self,
        grid: Sequence[int],
        latent_size: int,
        stencil: bg.Stencil,
        image_channels: int = 0,
        decoder_channels: Sequence[int] = (32, 64, 128, 256, 512),
        kernel_size: int = 5,
        norm: str = "batch",
        channels: int = 32,
        num_levels: int = 1,
        initial_stddev: float = 1.0,
        num_factors: int = 0,
    ):
        super().__init__()
        check_stencil(stencil)
        check_positive_int("channels", channels)
        grid = as_grid(grid)
        if len(grid) != stencil.ndim:
            raise ValueError(f"grid is {tuple(grid)}, expected {stencil.ndim} axes as the stencil has")
        check_int("image_channels", image_channels, 0)
        check_positive_ints("decoder_channels", decoder_channels, fewest=1)
        self.image_channels = image_channels
        self._decoder_config = {
            "grid": tuple(grid),
            "latent_size": latent_size,
            "decoder_channels": tuple(decoder_channels),
            "kernel_size": kernel_size,
            "norm": norm,
        }
        self.decoder = ConvDecoder(channels, grid, latent_size, decoder_channels, kernel_size, norm)
        self.covariance = CovarianceNetwork(
            channels + image_channels, stencil, channels, num_levels, initial_stddev, num_factors
        )

    @property
    def stencil(self) -> bg.Stencil:
        """Shape of the factor's columns."""
        return self.covariance.stencil

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as values that JSON can hold, for `from_config`."""
        config = {**self._decoder_config, "image_channels": self.image_channels, **self.covariance.config}
        del config["in_channels"]
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LatentCovarianceNetwork":
        """A new network with the arguments of another one's `config`."""
        return cls(**_with_stencil(config))

    def forward(self, code: Tensor, image: Tensor | None = None) -> bg.StencilCholesky | tuple[bg.StencilCholesky, Tensor]:
        """What a `CovarianceNetwork` gives, batch (B,).

        Args:
            code: (B, latent_size).
            image: (B, image_channels, *grid), where ``image_channels`` is not 0.
        """
        features = self.decoder(code)
        if self.image_channels:
            expected = (code.shape[0], self.image_channels, *features.shape[2:])
            if image is not None:
                check_tensor("image", image)
            if image is None or image.shape != expected:
                raise ValueError(f"image has shape {None if image is None else tuple(image.shape)}, expected {expected}")
            features = torch.cat((features, image), dim=1)
        return self.covariance(features)


def _with_stencil(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "stencil": bg.Stencil(**config["stencil"])}

"""From features to a Cholesky factor."""

import math

import torch
from torch import Tensor, nn

import banded_gmrf as bg

from .graph import predicted_factor
from .layers import MAX_LOG_RATIO, check_features, check_positive_int, check_stddev, check_stencil, conv, soft_bound


class StencilCholeskyHead(nn.Module):
    """Features (B, C, *grid) to a `banded_gmrf.StencilCholesky` with batch shape (B,), by one pointwise convolution.

    The convolution gives K values per site: s, from which log_diag = s - log(initial_stddev), and K - 1 weights a, from which
    off_diag = a exp(log_diag). A whitened residual then is exp(log_diag[j]) (r[j] + Σ_k a[k, j] r[j + o_k]): a local
    regression whose weights do not depend on the scale of the residual, so that the same network trains alike for
    residuals of 0.01 and of 100. The head starts from zeros: the first prediction is a diagonal Gaussian.

    With a stencil that has no offsets (``Stencil.square(1)``) the prediction stays diagonal.

    Source: Dorta et al., Structured Uncertainty Prediction Networks, CVPR 2018, section 4, which predicts the same K values
    per pixel without the scaling of the off-diagonals.

    Args:
        in_channels: C.
        stencil: stencil of 1, 2 or 3 axes; as many grid axes are expected.
        initial_stddev: standard deviation of the first prediction, in the units of the data (those of a pixel).

    Raises:
        ValueError: an argument out of range, or features of another shape.
    """

    def __init__(self, in_channels: int, stencil: bg.Stencil, initial_stddev: float = 1.0):
        super().__init__()
        check_positive_int("in_channels", in_channels)
        check_stencil(stencil)
        check_stddev("initial_stddev", initial_stddev)
        self.in_channels = in_channels
        self.stencil = stencil
        self.initial_stddev = float(initial_stddev)
        self.conv = conv(stencil.ndim, in_channels, 1 + len(stencil), kernel_size=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, features: Tensor) -> bg.StencilCholesky:
        """The factors, batch (B,), of features (B, C, *grid)."""
        check_features("features", features, self.in_channels, self.stencil.ndim)
        # In the precision of the weights under autocast, too: a likelihood feels errors of its factor that no feature shows.
        with torch.autocast(features.device.type, enabled=False):
            out = self.conv(features.to(self.conv.weight.dtype))
        # Bounded: features far from any seen in training must not make exp overflow.
        log_diag = soft_bound(out[:, 0], MAX_LOG_RATIO) - math.log(self.initial_stddev)
        return predicted_factor(log_diag, out[:, 1:] * log_diag.exp()[:, None], self.stencil)

"""From features to a Cholesky factor."""

import math
from typing import Any

from torch import Tensor, nn

import banded_gmrf as bg

from .graph import predicted_factor
from .head_state import Head
from .layers import (
    MAX_LOG_RATIO,
    check_features,
    check_positive_int,
    check_stddev,
    check_stencil,
    conv,
    in_own_precision,
    soft_bound,
)


class StencilCholeskyHead(Head):
    """Features (B, C, *grid) to a `banded_gmrf.StencilCholesky` with batch shape (B,), by one pointwise convolution.

    The convolution gives K values per site: s, from which log_diag = s - log(initial_stddev), and K - 1 weights a, from which
    off_diag = a exp(log_diag). A whitened residual then is exp(log_diag[j]) (r[j] + Σ_k a[k, j] r[j + o_k]): a local
    regression whose weights do not depend on the scale of the residual, so that the same network trains alike for
    residuals of 0.01 and of 100. The head starts from zeros: the first prediction is a diagonal Gaussian.

    With a stencil that has no offsets (``Stencil.square(1)``) the prediction stays diagonal.

    With ``out_channels``, the factor is that of a field of so many correlated channels, such as colours: its grid is (*grid,
    out_channels), the stencil's last axis counts channels, and each channel has K values per site of its own.

    Source: Dorta et al., Structured Uncertainty Prediction Networks, CVPR 2018, section 4, which predicts the same K values
    per pixel without the scaling of the off-diagonals.

    Args:
        in_channels: the number of channels, C.
        stencil: stencil of 1, 2 or 3 axes; as many grid axes are expected, with ``out_channels`` one less.
        initial_stddev: standard deviation of the first prediction, in the units of the data (those of a pixel).
        out_channels: channels of the field; None for a field without an axis of channels.

    A state_dict says what its weights mean: the kind of head, stencil, ``initial_stddev`` and ``out_channels``. The same
    weights mean another factor with others.

    Raises:
        ValueError: an argument out of range, features of another shape, or the state of another kind of head or of one with
            another stencil, ``initial_stddev`` or ``out_channels``.
    """

    def __init__(self, in_channels: int, stencil: bg.Stencil, initial_stddev: float = 1.0, out_channels: int | None = None):
        super().__init__()
        check_positive_int("in_channels", in_channels)
        check_stencil(stencil)
        check_stddev("initial_stddev", initial_stddev)
        if out_channels is not None:
            check_positive_int("out_channels", out_channels)
            if stencil.ndim == 1:
                raise ValueError("stencil has 1 axis, with out_channels it needs one or two more for the grid")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.stencil = stencil
        self.ndim = stencil.ndim - (out_channels is not None)
        self.initial_stddev = float(initial_stddev)
        self.conv = conv(self.ndim, in_channels, (1 + len(stencil)) * (out_channels or 1), kernel_size=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, features: Tensor) -> bg.StencilCholesky:
        """The factors, batch (B,), of features (B, C, *grid): on the grid (*grid,) or (*grid, out_channels)."""
        why = "" if self.out_channels is None else f": the last of the stencil's {self.stencil.ndim} axes counts out_channels"
        check_features("features", features, self.in_channels, self.ndim, why)
        out = in_own_precision(self.conv, features)
        if self.out_channels is not None:
            out = out.unflatten(1, (-1, self.out_channels)).movedim(2, -1)
        # Bounded: features far from any seen in training must not make exp overflow.
        log_diag = soft_bound(out[:, 0], MAX_LOG_RATIO) - math.log(self.initial_stddev)
        return predicted_factor(log_diag, out[:, 1:] * log_diag.exp()[:, None], self.stencil)

    def _meaning(self) -> dict[str, Any]:
        return {
            "head": "StencilCholeskyHead",
            "initial_stddev": self.initial_stddev,
            "out_channels": self.out_channels,
            "stencil": self.stencil.to_json(),
        }

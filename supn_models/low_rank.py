"""From features to the factors of a low-rank part."""

import math
from typing import Any

from torch import Tensor, nn

from .head_state import Head
from .layers import check_features, check_int, check_positive_int, check_stddev, conv, in_own_precision


class LowRankHead(Head):
    """Features (B, C, *grid) to the factors (B, R, *grid) of a `banded_gmrf.LowRankGMRF`, by one pointwise convolution.

    It stands beside a `StencilCholeskyHead` on the same features, as in ``bg.LowRankGMRF(mean, L, low_rank(features))``. What
    the factors share over a whole image the features must know: they need a receptive field of its size.

    A density does not change with the sign of a factor. Its gradient in factors that are 0 is 0, and a head that starts there
    would never leave. So this one starts from small random weights: factors of ``initial_scale`` times ``initial_stddev`` where
    features have the variance 1.

    Source: Monteiro et al., Stochastic Segmentation Networks, NeurIPS 2020, section 3, with independent sites in place of the
    local field.

    Args:
        in_channels: the number of channels, C.
        num_factors: the number of factors, R.
        ndim: grid axes, 1 to 3; with ``out_channels`` 1 or 2.
        initial_stddev: as for `StencilCholeskyHead`, in the units of the data.
        initial_scale: of the first factors, relative to ``initial_stddev``.
        out_channels: channels of the field, as for `StencilCholeskyHead`: the factors are (B, R, *grid, out_channels), and
            channels share their weights.

    A state_dict says the kind of head, ``initial_stddev`` and ``out_channels``, as that of `StencilCholeskyHead` does.

    Raises:
        ValueError: an argument out of range, features of another shape, or the state of another kind of head or of one with
            another ``initial_stddev`` or ``out_channels``.
    """

    def __init__(
        self,
        in_channels: int,
        num_factors: int,
        ndim: int = 2,
        initial_stddev: float = 1.0,
        initial_scale: float = 0.1,
        out_channels: int | None = None,
    ):
        super().__init__()
        check_positive_int("in_channels", in_channels)
        check_positive_int("num_factors", num_factors)
        check_stddev("initial_stddev", initial_stddev)
        check_stddev("initial_scale", initial_scale)
        if out_channels is not None:
            check_positive_int("out_channels", out_channels)
        check_int("ndim", ndim, 1, 3 if out_channels is None else 2)
        self.in_channels, self.num_factors, self.ndim, self.out_channels = in_channels, num_factors, ndim, out_channels
        self.initial_stddev = float(initial_stddev)
        self.conv = conv(ndim, in_channels, num_factors * (out_channels or 1), kernel_size=1)
        nn.init.normal_(self.conv.weight, std=float(initial_scale) / math.sqrt(in_channels))
        nn.init.zeros_(self.conv.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, R, *grid) of features (B, C, *grid), or (B, R, *grid, out_channels)."""
        check_features("features", features, self.in_channels, self.ndim)
        factors = self.initial_stddev * in_own_precision(self.conv, features)
        if self.out_channels is not None:
            factors = factors.unflatten(1, (-1, self.out_channels)).movedim(2, -1)
        return factors

    def _meaning(self) -> dict[str, Any]:
        return {"head": "LowRankHead", "initial_stddev": self.initial_stddev, "out_channels": self.out_channels}

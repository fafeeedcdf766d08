"""A multi-layer perceptron that predicts the covariance of the residual of a small signal or image."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import banded_gmrf as bg
from gmrf_kernels.checks import check_tensor

from .graph import predicted_factor
from .head_state import Head
from .layers import MAX_LOG_RATIO, check_positive_int, check_positive_ints, check_stddev, check_stencil, soft_bound


class CovarianceMLP(Head):
    """Numbers (B, in_features), or anything that flattens to that, to a `banded_gmrf.StencilCholesky` with batch shape (B,).

    Linear layers with batch normalisation and ReLU, then one linear output for each entry of the factor that exists: the n
    log-diagonals and, for each offset, the sites whose neighbour lies on the grid (with ``Stencil.box((n - 1,))`` on n sites
    the whole lower triangle). For small grids: there are about n K outputs. They start from zeros: the first prediction is a
    diagonal Gaussian.

    With ``standardise``, L = D W: the diagonal D = exp(log_diag) and W with ones on its diagonal, whose other entries are the
    outputs. A whitened residual then is Wᵀ(D r): residuals are first standardised and then combined with weights that do
    not depend on their scale, so that a covariance whose scale varies from site to site while its correlations do not is one
    in which W is constant. Without, the outputs are the entries of L themselves.

    Source: Dorta et al., Structured Uncertainty Prediction Networks, CVPR 2018, section 5.1, there without ``standardise`` and
    without ``bottleneck``.

    Args:
        in_features: numbers in one input.
        grid: grid of the factor.
        stencil: shape of the factor's columns.
        hidden: units of each hidden layer.
        bottleneck: units of one more layer, between the hidden ones and the entries below the diagonal alone: few of them keep
            so many outputs from fitting noise. None: no such layer.
        initial_stddev: standard deviation of the first prediction, in the units of the data.
        standardise: whether the outputs are the entries of W or those of L.

    A state_dict says what its weights mean: the kind of head, ``initial_stddev``, ``standardise``, grid and stencil. The same
    weights mean another factor with others.

    Raises:
        ValueError: an argument out of range, an input of another size, or the state of another kind of head or of one with
            another of these four.
    """

    def __init__(
        self,
        in_features: int,
        grid: Sequence[int],
        stencil: bg.Stencil,
        hidden: Sequence[int] = (100, 100),
        bottleneck: int | None = None,
        initial_stddev: float = 1.0,
        standardise: bool = True,
    ):
        super().__init__()
        check_positive_int("in_features", in_features)
        check_stencil(stencil)
        check_stddev("initial_stddev", initial_stddev)
        check_positive_ints("grid", grid)
        check_positive_ints("hidden", hidden)
        if bottleneck is not None:
            check_positive_int("bottleneck", bottleneck)
        if not isinstance(standardise, bool):
            raise ValueError(f"standardise is {standardise!r}, expected True or False")
        self.config: dict[str, Any] = {
            "in_features": in_features,
            "grid": tuple(grid),
            "stencil": {"offsets": stencil.offsets, "ndim": stencil.ndim},
            "hidden": tuple(hidden),
            "bottleneck": bottleneck,
            "initial_stddev": float(initial_stddev),
            "standardise": standardise,
        }
        self.in_features, self.grid, self.stencil = in_features, tuple(grid), stencil
        self.initial_stddev, self.standardise = float(initial_stddev), standardise
        # Where the outputs for the entries below the diagonal belong in off_diag, and the row of L of each.
        k, row, column = stencil.entries(grid)
        self.register_buffer("_entries", k * math.prod(grid) + column, persistent=False)
        self.register_buffer("_rows", row, persistent=False)
        widths = (in_features, *hidden)
        self.layers = nn.Sequential(*(_layer(*pair) for pair in itertools.pairwise(widths)))
        self.bottleneck = _layer(widths[-1], bottleneck) if bottleneck and len(row) else nn.Identity()
        self.to_log_ratio = _zero_linear(widths[-1], math.prod(grid))
        self.to_entries = _zero_linear(bottleneck or widths[-1], len(row)) if len(row) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CovarianceMLP":
        """A new network with the arguments of another one's ``config``."""
        return cls(**{**config, "stencil": bg.Stencil(**config["stencil"])})

    def forward(self, x: Tensor) -> bg.StencilCholesky:
        """The factors, batch (B,), of inputs (B, ...) with ``in_features`` numbers each."""
        check_tensor("x", x)
        features = x.flatten(1)
        if features.shape[1] != self.in_features:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, ...) with {self.in_features} numbers each")
        hidden = self.layers(features)
        log_diag = soft_bound(self.to_log_ratio(hidden), MAX_LOG_RATIO) - math.log(self.initial_stddev)
        existing = hidden[:, :0] if self.to_entries is None else self.to_entries(self.bottleneck(hidden))
        if self.standardise:
            # Not by an index in brackets: the sums of its backward pass depend on the number of threads, and on chance.
            existing = existing * log_diag.exp().index_select(1, self._rows)
        zeros = existing.new_zeros(x.shape[0], len(self.stencil) * math.prod(self.grid))
        off_diag = zeros.index_copy(1, self._entries, existing)
        return predicted_factor(
            log_diag.unflatten(1, self.grid), off_diag.unflatten(1, (len(self.stencil), *self.grid)), self.stencil
        )

    def _meaning(self) -> dict[str, Any]:
        return {
            "head": "CovarianceMLP",
            "initial_stddev": self.initial_stddev,
            "standardise": self.standardise,
            "grid": self.grid,
            "stencil": self.stencil.to_json(),
        }


def _layer(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear

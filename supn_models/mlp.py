"""A multi-layer perceptron that predicts the covariance of the residual of a small signal or image."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import banded_gmrf as bg

from .head import local_regression
from .layers import check_positive_int, check_stddev, check_stencil


class CovarianceMLP(nn.Module):
    """Numbers (B, in_features), or anything that flattens to that, to a `banded_gmrf.StencilCholesky` with batch shape (B,).

    Linear layers with batch normalisation and ReLU, then a linear layer with one output for each entry of the factor that
    exists: the n log-diagonals and, for each offset, the sites whose neighbour lies on the grid (with ``Stencil.box((n - 1,))``
    on n sites the whole lower triangle). `local_regression` makes the factor of them. For small grids: the last layer has
    about n K outputs. The last layer starts from zeros: the first prediction is a diagonal Gaussian.

    Source: Dorta et al., Structured Uncertainty Prediction Networks, CVPR 2018, section 5.1, which predicts the entries
    without the scaling of the off-diagonals.

    Args:
        in_features: numbers in one input.
        grid: grid of the factor.
        stencil: shape of the factor's columns.
        hidden: units of each hidden layer.
        initial_stddev: standard deviation of the first prediction, in the units of the data.

    Raises:
        ValueError: an argument out of range, or an input of another size.
    """

    def __init__(
        self,
        in_features: int,
        grid: Sequence[int],
        stencil: bg.Stencil,
        hidden: Sequence[int] = (100, 100),
        initial_stddev: float = 1.0,
    ):
        super().__init__()
        check_positive_int("in_features", in_features)
        check_stencil(stencil)
        check_stddev("initial_stddev", initial_stddev)
        for units in hidden:
            check_positive_int("hidden", units)
        exists = stencil.mask(grid).flatten()
        self.in_features, self.grid, self.stencil = in_features, tuple(grid), stencil
        self.hidden, self.initial_stddev = tuple(hidden), float(initial_stddev)
        self.register_buffer("_existing", exists.nonzero()[:, 0], persistent=False)
        widths = (in_features, *hidden)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(widths[-1], math.prod(grid) + len(self._existing))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as values that JSON can hold, for `from_config`."""
        return {
            "in_features": self.in_features,
            "grid": self.grid,
            "stencil": {"offsets": self.stencil.offsets, "ndim": self.stencil.ndim},
            "hidden": self.hidden,
            "initial_stddev": self.initial_stddev,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CovarianceMLP":
        """A new network with the arguments of another one's `config`."""
        return cls(**{**config, "stencil": bg.Stencil(**config["stencil"])})

    def forward(self, x: Tensor) -> bg.StencilCholesky:
        features = x.flatten(1)
        if features.shape[1] != self.in_features:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, ...) with {self.in_features} numbers in each input")
        log_ratio, existing = self.last(self.layers(features)).split((math.prod(self.grid), len(self._existing)), dim=1)
        weights = existing.new_zeros(len(x), len(self.stencil) * math.prod(self.grid))
        weights = weights.index_copy(1, self._existing, existing)
        return local_regression(
            log_ratio.unflatten(1, self.grid),
            weights.unflatten(1, (len(self.stencil), *self.grid)),
            self.stencil,
            self.initial_stddev,
        )

"""Two families of random signals whose noise has a known covariance: splines on 50 points, and 16 x 16 images of ellipses.

A signal is x = μ + e with e ~ N(0, Σ(μ)) and Σ(μ) = D R D: R is a correlation matrix, the same for all splines and turned by
the ellipse's angle for the ellipses, and D = diag(amplitude · exp(slope · μ)) scales it on both sides, so that the noise is
strong where the signal is high.

The paper (Dorta et al., Structured Uncertainty Prediction Networks, CVPR 2018, section 5.1) describes its two covariances in
words only. Those here follow the words; `calibration` has chosen the four free scalars of each so that the rows of the truth
and of the diagonal in the paper's Tables 1 and 2 come out.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import scipy.interpolate
import scipy.special
import torch
from torch import Tensor


@dataclass(frozen=True)
class Signals(ABC):
    """A family of signals. Everything is float64, on the device of the latents, the numbers that a mean is drawn from.

    Args:
        amplitude: standard deviation of the noise where the mean is 0.
        slope: how fast its logarithm grows with the mean.
    """

    amplitude: float
    slope: float

    grid: ClassVar[tuple[int, ...]]
    num_latents: ClassVar[int]

    @abstractmethod
    def latents(self, uniform: Tensor) -> Tensor:
        """Latents (B, num_latents) of a random mean from as many numbers uniform in (0, 1)."""

    @abstractmethod
    def mean(self, latents: Tensor) -> Tensor:
        """μ: (B, *grid)."""

    @abstractmethod
    def correlation(self, latents: Tensor) -> Tensor:
        """R: (B, n, n), or (1, n, n) if it is the same for all; sites in raster order."""

    def stddev(self, mean: Tensor) -> Tensor:
        """Standard deviation of the noise at each site: (B, *grid)."""
        return self.amplitude * torch.exp(self.slope * mean)

    def covariance(self, latents: Tensor) -> Tensor:
        """Σ(μ): (B, n, n)."""
        stddev = self.stddev(self.mean(latents)).flatten(1)
        return stddev[:, :, None] * self.correlation(latents) * stddev[:, None, :]

    def draw(self, count: int, generator: torch.Generator, batch: int = 500) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (count, num_latents), and means and signals (count, *grid) in float32, on the generator's device."""
        uniform = torch.rand(count, self.num_latents, generator=generator, dtype=torch.float64, device=generator.device)
        latents = self.latents(uniform.clamp(min=torch.finfo(uniform.dtype).tiny))
        means, signals = [], []
        for part in latents.split(batch):
            mean = self.mean(part)
            white = torch.randn((*mean.flatten(1).shape, 1), generator=generator, dtype=mean.dtype, device=mean.device)
            noise = torch.linalg.cholesky(self.correlation(part)) @ white
            means.append(mean.float())
            signals.append((mean + self.stddev(mean) * noise.reshape(mean.shape)).float())
        return latents, torch.cat(means), torch.cat(signals)


@dataclass(frozen=True)
class Splines(Signals):
    """Cubic splines through 6 standard normal knots at 50 points; the noise is a Matérn process.

    Args:
        length: its correlation length in points.
        smoothness: Matérn's ν.
    """

    amplitude: float = 0.5677
    slope: float = 0.1939
    length: float = 2.7188
    smoothness: float = 0.7989

    grid: ClassVar[tuple[int, ...]] = (50,)
    num_latents: ClassVar[int] = 6

    def latents(self, uniform: Tensor) -> Tensor:
        return torch.special.ndtri(uniform)

    def mean(self, latents: Tensor) -> Tensor:
        # A spline is linear in its knots' values.
        knots = torch.linspace(0, 1, self.num_latents, dtype=torch.float64)
        basis = scipy.interpolate.CubicSpline(knots, torch.eye(self.num_latents), bc_type="natural")
        return latents @ torch.as_tensor(basis(torch.linspace(0, 1, *self.grid)), dtype=latents.dtype).mT.to(latents.device)

    def correlation(self, latents: Tensor) -> Tensor:
        points = torch.arange(*self.grid, dtype=torch.float64)
        x = math.sqrt(2 * self.smoothness) * (points[:, None] - points).abs() / self.length
        bessel = torch.as_tensor(scipy.special.kv(self.smoothness, x.clamp(min=1e-300).numpy()))
        values = 2 ** (1 - self.smoothness) / math.gamma(self.smoothness) * x**self.smoothness * bessel
        return torch.where(x == 0, 1.0, values)[None].to(latents.device)


@dataclass(frozen=True)
class Ellipses(Signals):
    """A bright ellipse on 16 x 16 pixels; the noise draws lines along its major axis.

    Its edge is soft, by half a pixel on the minor axis and in proportion to the distance from the centre elsewhere. The
    noise's correlation is a Matérn function with ν = 5/2, six times as long along the major axis as across, plus white noise.

    Args:
        length: correlation length across the lines, in pixels.
        nugget: variance of the white noise, in units of that of the lines.
    """

    amplitude: float = 0.09435
    slope: float = 1.6731
    length: float = 0.4848
    nugget: float = 0.01826

    grid: ClassVar[tuple[int, ...]] = (16, 16)
    num_latents: ClassVar[int] = 5
    elongation: ClassVar[float] = 6.0
    edge: ClassVar[float] = 0.5

    def latents(self, uniform: Tensor) -> Tensor:
        """Major and minor semi-axis in pixels, angle in radians, and the centre's row and column from the image's centre."""
        major, ratio, angle, row, column = uniform.unbind(1)
        major = 4 + 3 * major
        return torch.stack([major, major * (0.35 + 0.35 * ratio), math.pi * angle, 5 * row - 2.5, 5 * column - 2.5], 1)

    def mean(self, latents: Tensor) -> Tensor:
        major, minor, angle, row, column = latents.T[..., None, None]
        places = [torch.arange(n, dtype=latents.dtype, device=latents.device) - (n - 1) / 2 for n in self.grid]
        along, across = _turn(places[0][:, None] - row, places[1] - column, angle)
        # The distance beyond the edge as a part of the edge's own: in pixels on the minor axis, times the minor semi-axis.
        outside = torch.hypot(along / major, across / minor) - 1
        return torch.sigmoid(-outside * minor / self.edge)

    def correlation(self, latents: Tensor) -> Tensor:
        angle = latents[:, 2, None, None]
        height, width = self.grid
        rows = torch.arange(1 - height, height, dtype=latents.dtype, device=latents.device)
        columns = torch.arange(1 - width, width, dtype=latents.dtype, device=latents.device)
        along, across = _turn(rows[:, None], columns, angle)
        x = math.sqrt(5) * torch.hypot(along / self.elongation, across) / self.length
        of_displacement = ((1 + x + x.square() / 3) * torch.exp(-x)).flatten(1) / (1 + self.nugget)
        row, column = torch.unravel_index(torch.arange(height * width, device=latents.device), self.grid)
        displacement = (row[:, None] - row + height - 1) * len(columns) + column[:, None] - column + width - 1
        matrix = of_displacement[:, displacement]
        matrix.diagonal(dim1=-2, dim2=-1).fill_(1)
        return matrix


def _turn(rows: Tensor, columns: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Displacements along the direction ``angle`` (from the column axis towards the rows) and across it."""
    cos, sin = angle.cos(), angle.sin()
    return cos * columns + sin * rows, cos * rows - sin * columns

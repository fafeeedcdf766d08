"""Inference with a Matérn field of which a part is seen, as a raster of elevations is: each task by the library, and by hand.

By hand is what one writes without it: SciPy's sparse LU of Λ + W, differences for gradients, dense matrices for variances.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

import banded_gmrf as bg
from banded_gmrf.diagnostics import block_coverage

_RANGE, _VARIANCE, _NOISE = 10.0, 2.0, 0.1
_SEEN = 0.3  # of the sites


class Raster:
    """A sample of a Matérn field (smoothness 1, range 10 pixels) in float64, and what is seen of it.

    Attributes:
        grid: size x size.
        q: the field, a GMRF with the exact factor, or a `SparseGMRF`.
        x: the sample.
        y: the same with noise.
        noise: its variance, infinite at the 70 % of the sites that are not seen.
        counts: of Poisson variables with the rate eˣ.
    """

    def __init__(self, size: int, sparse: bool = False):
        self.grid = (size, size)
        generator = torch.Generator().manual_seed(0)
        noise, seen = (torch.randn(self.grid, dtype=torch.float64, generator=generator) for _ in range(2))
        self.precision = bg.matern_precision(self.grid, _RANGE, 1, _VARIANCE)
        loc = torch.zeros(self.grid, dtype=torch.float64)
        if sparse:
            self.q = bg.SparseGMRF(loc, self.precision)
        else:
            self.q = bg.GMRF(loc, bg.StencilCholesky.from_precision(self.precision))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.x = self.q.sample()
        self.y = self.x + math.sqrt(_NOISE) * noise
        self.seen = seen < seen.flatten().quantile(_SEEN)
        self.noise = torch.full(self.grid, _NOISE, dtype=torch.float64).where(self.seen, math.inf)
        self.counts = torch.poisson(self.x.exp(), generator=generator)

    @functools.cached_property
    def sparse(self) -> scipy.sparse.csc_array:
        """Λ."""
        return to_sparse(self.precision)

    @functools.cached_property
    def weight(self) -> np.ndarray:
        """The diagonal of W, (n,)."""
        return (1 / self.noise).flatten().numpy()

    def posterior(self) -> bg.ConditionalGMRF:
        """Directly, factorised when it is first needed."""
        return self.q.posterior(self.y, self.noise, method="direct")


def to_sparse(precision: bg.StencilPrecision) -> scipy.sparse.csc_array:
    """Λ for SciPy."""
    k, row, column = precision.stencil.entries(precision.grid)
    below = precision.off_diag.flatten(1)[k, column].numpy()
    lower = scipy.sparse.coo_array((below, (row.numpy(), column.numpy())), shape=[precision.grid.numel()] * 2)
    return (lower + lower.T + scipy.sparse.diags_array(precision.diag.flatten().numpy())).tocsc()


def factorised(matrix: scipy.sparse.csc_array) -> scipy.sparse.linalg.SuperLU:
    """SciPy's sparse LU, in its symmetric mode."""
    return scipy.sparse.linalg.splu(
        matrix.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )


def mean(raster: Raster) -> Callable[[], Any]:
    """Factor and mean of the posterior."""
    return lambda: raster.posterior().mean


def mean_by_hand(raster: Raster) -> Callable[[], Any]:
    rhs = raster.weight * raster.y.flatten().numpy()
    return lambda: factorised(raster.sparse + scipy.sparse.diags_array(raster.weight)).solve(rhs)


def variance(raster: Raster) -> Callable[[], Any]:
    """Factor, mean and variances."""

    def run():
        p = raster.posterior()
        return p.mean, p.variance

    return run


def variance_by_hand(raster: Raster) -> Callable[[], Any]:
    """Kriging: a dense factor of the observations' covariance. The covariances themselves are given."""
    seen = raster.seen.flatten()
    columns = raster.q.covariance_columns(raster.seen.nonzero()).flatten(1).mT  # (n, observations)
    prior, y = raster.q.variance.flatten(), raster.y.flatten()[seen]

    def run():
        covariance = columns[seen] + _NOISE * torch.eye(len(y), dtype=torch.float64)
        cholesky = torch.linalg.cholesky(covariance)
        gain = torch.linalg.solve_triangular(cholesky, columns.mT, upper=False)
        weighted = torch.cholesky_solve(y[:, None], cholesky)[:, 0]
        return columns @ weighted, prior - gain.square().sum(0)

    return run


def samples(raster: Raster, count: int) -> Callable[[], Any]:
    """Samples of the posterior, from its factor on."""
    return lambda: raster.posterior().sample((count,))


def samples_by_hand(raster: Raster, count: int) -> Callable[[], Any]:
    """Perturb and solve: (Λ + W)⁻¹(L u + W y + W^½ z). Products with L are the library's."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, *raster.grid)

    def run():
        u, z = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
        weight = (1 / raster.noise).expand(shape)
        rhs = raster.q.precision_cholesky.matvec(u) + weight * raster.y + weight.sqrt() * z
        lu = factorised(raster.sparse + scipy.sparse.diags_array(raster.weight))
        return lu.solve(rhs.flatten(1).numpy().T)

    return run


def _model(raster: Raster, parameters: dict[str, Tensor]) -> bg.ConditionalGMRF:
    precision = bg.matern_precision(raster.grid, parameters["range"], 1, parameters["variance"])
    prior = bg.GMRF(torch.zeros(raster.grid, dtype=torch.float64), bg.StencilCholesky.from_precision(precision))
    return prior.posterior(raster.y, parameters["noise"].expand(raster.grid).where(raster.seen, math.inf))


_START = {"range": 5.0, "variance": 1.0, "noise": 0.3}


def evidence_gradient(raster: Raster) -> Callable[[], Any]:
    """The log evidence and its gradient in range, variance and noise."""

    def run():
        at = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in _START.items()}
        value = _model(raster, at).log_evidence
        return value, torch.autograd.grad(value, list(at.values()))

    return run


def evidence_gradient_by_hand(raster: Raster) -> Callable[[], Any]:
    """Two sparse factors for each value, and a difference for each parameter."""
    y, seen = raster.y.flatten().numpy(), raster.seen.flatten().numpy()

    def logdet(lu: scipy.sparse.linalg.SuperLU) -> float:
        return float(np.log(lu.U.diagonal()).sum())

    def value(at: dict[str, float]) -> float:
        prior = to_sparse(bg.matern_precision(raster.grid, at["range"], 1, at["variance"]))
        weight = seen / at["noise"]
        lu = factorised(prior + scipy.sparse.diags_array(weight))
        m = lu.solve(weight * y)
        squares = m @ (prior @ m) + (weight * (y - m) ** 2).sum()
        constant = seen.sum() * math.log(2 * math.pi * at["noise"])
        return 0.5 * (logdet(factorised(prior)) - logdet(lu) - squares - constant)

    def run():
        start = value(_START)
        return start, [(value(_START | {name: x * (1 + 1e-6)}) - start) / (1e-6 * x) for name, x in _START.items()]

    return run


def fit(raster: Raster) -> Callable[[], bg.EvidenceFit]:
    """The three parameters by maximum evidence."""
    return lambda: bg.maximum_evidence(functools.partial(_model, raster), _START)


def counts(raster: Raster) -> Callable[[], Any]:
    """Laplace's approximation for Poisson counts: mode and variances."""

    def run():
        n = raster.q.laplace(lambda x: raster.counts * x - x.exp(), method="direct")
        return n.mean, n.variance

    return run


def counts_by_hand(raster: Raster) -> Callable[[], Any]:
    """Newton's method for the mode alone, a sparse factor for each step."""
    seen = raster.counts.flatten().numpy()

    def run():
        x, slope = np.zeros(len(seen)), math.inf
        while slope > 1e-10:
            uphill = seen - np.exp(x) - raster.sparse @ x
            step = factorised(raster.sparse + scipy.sparse.diags_array(np.exp(x))).solve(uphill)
            step *= min(1.0, 2.0 / np.abs(step).max())  # in place of a line search
            slope = 0.5 * step @ uphill
            x = x + step
        return x

    return run


def constrained(raster: Raster) -> Callable[[], Any]:
    """Mean and variances of the posterior given that its sum is 0."""
    A, e = torch.ones(1, *raster.grid, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def run():
        c = raster.posterior().constrain(A, e)
        return c.mean, c.variance

    return run


def constrained_by_hand(raster: Raster) -> Callable[[], Any]:
    """The mean alone, by conditioning on the sum."""
    ones, rhs = np.ones(raster.x.numel()), raster.weight * raster.y.flatten().numpy()

    def run():
        lu = factorised(raster.sparse + scipy.sparse.diags_array(raster.weight))
        m, column = lu.solve(rhs), lu.solve(ones)
        return m - column * m.sum() / column.sum()

    return run


def blocks(raster: Raster, block: int) -> Callable[[], Any]:
    """Coverage of means over blocks by the posterior."""
    return lambda: block_coverage(raster.posterior(), raster.x, block)


def blocks_by_hand(raster: Raster, block: int) -> Callable[[], Any]:
    """A solve for each block's weights; of the variances alone."""
    number = torch.arange(raster.grid[0]) // block
    number = (number[:, None] * (int(number[-1]) + 1) + number).flatten().numpy()
    weights = np.eye(number[-1] + 1)[number] / np.bincount(number)

    def run():
        lu = factorised(raster.sparse + scipy.sparse.diags_array(raster.weight))
        return (weights * lu.solve(weights)).sum(0)

    return run

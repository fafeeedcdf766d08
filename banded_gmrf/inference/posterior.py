"""`ConditionalGMRF`: what a GMRF says about a field of which some sites are known, exactly or with noise.

Let W = M Mᵀ be the precision of the noise of the observations y = x + noise (0 where there are none), and *free* the sites
that are not known exactly. The free sites given all observations are a GMRF again, with the precision Λ_ff + W, and a mean
and samples from one linear system each: for x and z drawn from the prior and from N(0, I), x corrected by

    (Λ_ff + W) d = W (y - x) + M z - Λ_fo (x_o - values)

is a draw from the posterior, and the prior's mean with z = 0 becomes the posterior's (Papandreou & Yuille, Gaussian sampling by
local perturbations, NIPS 2010; for exact observations Rue & Held, Gaussian Markov Random Fields, 2005).
No matrix is formed for these: the systems are solved with conjugate gradients. Only the evidence, which takes a determinant,
works on dense blocks of rows.
"""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

import gmrf_kernels

from ..cholesky import StencilCholesky, negative_log_likelihood, squares_matvec
from ..recursions.covariances import check_exact_is_affordable
from ..recursions.strips import block_coefficients, block_rows, scan, strip
from ..stencil import as_integer
from .conjugate_gradients import Convergence, ImplicitGradient, conjugate_gradients
from .noise import CorrelatedNoise, IndependentNoise


class ConditionalGMRF:
    """A GMRF given observations, on the whole grid; made by `GMRF.condition` and `GMRF.posterior`.

    Sites that are known exactly have their value in every sample. The systems are solved in float64 whatever the dtype, because
    in float32 products with Λ of a trained network are not precise enough to reach a residual of 10⁻⁶. Everything is
    differentiable once, in the prior, the observations and the noise, by one more solve.

    Args:
        prior: a `GMRF`.
        known: bool (*batch, *grid), the sites that are known exactly.
        values: (*batch, *grid), the observations; ignored where there is none, NaN included.
        noise: that of the observations which are not exact.
        tolerance: the solver stops at this residual relative to the right-hand side (Euclidean norms).
        max_iterations: of the solver, which then warns.

    Attributes:
        convergence: that of the last solve, for `mean`, `rsample` or a backward pass; None before the first.

    Raises:
        TypeError: ``max_iterations`` is not an integer.
        ValueError: ``tolerance`` is not between 0 and 1, or ``max_iterations`` less than 1.
    """

    convergence: Convergence | None = None

    def __init__(
        self,
        prior,
        known: Tensor,
        values: Tensor,
        noise: IndependentNoise | CorrelatedNoise,
        tolerance: float = 1e-6,
        max_iterations: int = 1000,
    ):
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance is {tolerance}, expected more than 0 and less than 1")
        if as_integer("max_iterations", max_iterations) < 1:
            raise ValueError(f"max_iterations is {max_iterations}, expected at least 1")
        grid = prior.event_shape
        self.batch_shape = torch.broadcast_shapes(
            prior.batch_shape, noise.batch_shape, *(t.shape[: t.ndim - len(grid)] for t in (known, values))
        )
        self.event_shape = grid
        self._prior = prior.expand(self.batch_shape)
        self._tolerance, self._max_iterations = tolerance, max_iterations
        self._factor = prior.precision_cholesky.unexpanded().to(torch.float64)
        self._known, self._noise = known, noise
        values = values.double()
        self._values = values.where(known, noise.observed(values))

    @property
    def mean(self) -> Tensor:
        """(*batch, *grid)."""
        return self._correct(self._prior.mean, self._values.new_zeros(self.event_shape))

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """(*sample_shape, *batch, *grid), differentiable; one solve for all."""
        x = self._prior.rsample(sample_shape)
        return self._correct(x, torch.randn(x.shape, dtype=torch.float64, device=x.device))

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """(*sample_shape, *batch, *grid)."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    @property
    def log_evidence(self) -> Tensor:
        """log p(observations) under the prior and the noise, in nats: (*batch,) in float64, differentiable.

        From p(observations) = p(x) p(observations | x) / p(x | observations) at the posterior mean; the last factor takes the
        determinant of Λ_ff + W, by a block Cholesky factorisation over the rows of the grid.

        Raises:
            ValueError: the grid is too large: n (r + 1)² W² > 2⁴⁰, with n sites in rows of W and stencils, of the prior and of
                correlated noise, that reach r rows.
        """
        check_exact_is_affordable("log_evidence", self._factor, max(self._factor.stencil.row_reach, self._noise.reach))
        with torch.no_grad():
            mean = self.mean.double()  # where the derivative by x is 0
        mean = self._values.where(self._known, mean)
        log_prior = -negative_log_likelihood(mean - self._prior.loc.double(), *self._factor.coefficients)
        log_likelihood = self._noise.log_prob(self._values - mean)
        free = (~self._known).double().flatten(-len(self.event_shape)).sum(-1)
        return log_prior + log_likelihood + 0.5 * (free * math.log(2 * math.pi) - self._logdet())

    def _logdet(self) -> Tensor:
        """log |Λ_ff + W|, by elimination of one block of rows after the other: Λ_ff is the sum of L_f L_fᵀ over its columns."""
        rows, ndim = self.event_shape[0], len(self.event_shape)
        known = self._known.flatten(-ndim).double()
        row = known.shape[-1] // rows

        def step(window: Tensor, block: tuple[int, int], coefficients: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            own = slice(block[0] * row, block[1] * row)
            columns = strip(coefficients, self._factor.stencil, rows - block[0])
            height, width = columns.shape[-2:]
            columns = columns * (1 - known[..., own.start : own.start + height, None])
            parts = window, columns @ columns.mT, torch.diag_embed(known[..., own]), self._noise.gram(noise, rows - block[0])
            size = max(part.shape[-1] for part in parts)
            total = sum(torch.nn.functional.pad(part, (0, size - part.shape[-1]) * 2) for part in parts)
            P = torch.linalg.cholesky(total[..., :width, :width])
            Q = torch.linalg.solve_triangular(P, total[..., :width, width:], upper=False)
            return total[..., width:, width:] - Q.mT @ Q, 2 * P.diagonal(dim1=-2, dim2=-1).log().sum(-1)

        blocks = list(zip(block_rows(self.event_shape), block_coefficients(self._factor), self._noise.blocks(), strict=True))
        return sum(scan(step, known.new_zeros(0, 0), blocks))

    def __repr__(self) -> str:
        return f"ConditionalGMRF(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"

    def _correct(self, x: Tensor, z: Tensor) -> Tensor:
        """``x`` given the observations, with z for their noise: (*sample, *batch, *grid)."""
        dtype, x = x.dtype, x.double()
        start, noise = self._values.where(self._known, x), self._noise
        rhs = noise.precision(self._values - noise.loc - x) + noise.root(z) - self._precision(start - x)
        return (start + self._solve(rhs.masked_fill(self._known, 0))).to(dtype)

    def _precision(self, x: Tensor) -> Tensor:
        return self._factor.matvec(self._factor.matvec(x, transpose=True))

    def _operator(self, x: Tensor) -> Tensor:
        """Λ_ff + W on the free sites, the identity on the others."""
        free = x.masked_fill(self._known, 0)
        return (self._precision(free) + self._noise.precision(free)).where(~self._known, x)

    def _preconditioner(self) -> StencilCholesky:
        """The prior's factor on the free sites, its diagonal enlarged so that that of Λ_ff + W is met exactly.

        What a free site owes to the columns of known ones counts like the noise: it is missing from the product with Lᵀ.
        """
        factor, known = self._factor, self._known.double()
        owed = squares_matvec(factor, known)
        diag = (factor.diag.square() + self._noise.diagonal + owed).sqrt()
        _, both_free = gmrf_kernels.outer(1 - known, 1 - known, factor.stencil.offsets, factor.stencil.ndim)
        off_diag = factor.coefficients.off_diag.where(both_free > 0, 0)
        return StencilCholesky(diag.log().masked_fill(self._known, 0), off_diag, factor.stencil)

    def _solve(self, rhs: Tensor) -> Tensor:
        @torch.no_grad()
        def solve(b: Tensor) -> Tensor:
            M = self._preconditioner()
            x, self.convergence = conjugate_gradients(
                self._operator,
                b,
                lambda r: M.solve(M.solve(r), transpose=True),
                len(self.event_shape),
                self._tolerance,
                self._max_iterations,
            )
            if not self.convergence.residual <= self._tolerance:
                warnings.warn(
                    f"conjugate gradients stopped after {self.convergence.iterations} iterations at a relative residual of "
                    f"{self.convergence.residual:.1e}, above the tolerance of {self._tolerance:.1e}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return x

        x = solve(rhs)
        if torch.is_grad_enabled():
            x = x + ImplicitGradient.apply(rhs - self._operator(x), solve)
        return x

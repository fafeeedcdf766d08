"""`StencilCholesky`, the sparse Cholesky factor of a precision matrix, and the fused likelihood on its tensors."""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

import gmrf_kernels
from gmrf_kernels import operators
from gmrf_kernels.checks import accumulate_dtype, broadcast_batch, check_factor
from gmrf_kernels.ops import apply, solve_normal

from .batched import Batched, expanded, register_pytree
from .coefficients import Coefficients
from .construction.covariance import CovarianceFunction, factor_of_covariance
from .construction.nearest import nearest_factor, warn_of_changed_variance
from .construction.precision import factor_of_precision
from .construction.samples import factor_of_samples
from .precision_matrix import StencilPrecision
from .stencil import Stencil, check_stencil
from .transformations import inspect
from .validation import warn_of_pairs


@register_pytree("banded_gmrf.StencilCholesky", Stencil.to_json, Stencil.from_json)
@dataclasses.dataclass(init=False, eq=False, repr=False)  # of the fields alone: see `Batched`
class StencilCholesky(Batched):
    """Lower-triangular factor L of a precision Λ = L Lᵀ whose columns have the shape of a stencil.

    Column j holds ``exp(log_diag[j])`` on the diagonal and ``off_diag[k, j]`` at row ``j + offsets[k]``. Entries whose row lies
    outside the grid do not exist: what is stored there is ignored, NaN included, and its gradient is 0.

    Args:
        log_diag: (*batch, *grid).
        off_diag: (*batch, K-1, *grid), offsets in the stencil's order. Views and strides are accepted; the batches of the two
            tensors are broadcast.
        stencil: the stencil, with as many axes as the grid.

    float16 and bfloat16 coefficients are computed with in float32. Such off-diagonals may stand beside a float32 log-diagonal,
    where rounding costs most. `to`, `detach` and indexing work as for a tensor that has the batch axes alone. A factor is a
    pytree node of two tensors.

    Raises:
        TypeError: not floating-point tensors of one dtype (float32 is accepted for ``log_diag`` beside float16 and bfloat16).
        ValueError: numbers of offsets, grids, batches or devices that do not fit, or an empty grid.
    """

    log_diag: Tensor
    off_diag: Tensor
    stencil: Stencil

    def __init__(self, log_diag: Tensor, off_diag: Tensor, stencil: Stencil):
        check_stencil(stencil)
        self._batch_shape = check_factor(log_diag, off_diag, len(stencil), stencil.ndim, "log_diag")
        # Kept as given: the backward pass of an expanded coefficient would write a gradient for every repetition.
        self._log_diag = log_diag
        self._off_diag = off_diag
        self.stencil = stencil

    @classmethod
    def from_covariance(
        cls, covariance: Tensor | CovarianceFunction, stencil: Stencil, grid: Sequence[int]
    ) -> "StencilCholesky":
        """The factor with a given stencil whose distribution N(0, (L Lᵀ)⁻¹) is nearest to N(0, Σ).

        It minimises KL(N(0, Σ) ‖ N(0, (L Lᵀ)⁻¹)), hence the expected negative log likelihood of samples of N(0, Σ): no factor
        with that stencil does better. Schäfer, Katzfuss and Owhadi, Sparse Cholesky factorization by Kullback-Leibler
        minimization, SIAM J. Sci. Comput. 2021; it is Vecchia's approximation, and exact where the stencil
        reaches every later site. Differentiable in the covariances.

        Args:
            covariance: Σ as a matrix (*batch, n, n), assumed symmetric, sites in raster order; or a function, for grids whose
                matrix would be too large. The function is called as ``covariance(a, b)`` with indices of sites, int64 tensors
                (m, K, 1, ndim) and (m, 1, K, ndim) on torch's default device, and returns (*batch, m, K, K): the
                covariances of a[i, k] and b[i, l], for some m sites at a time. It decides on the dtype and the device.
            stencil: the stencil, K - 1 offsets.
            grid: numbers of sites along each axis, their product n.

        Returns:
            The factor, with Σ's batch, dtype and device. Entries that do not exist are stored as 0.

        Raises:
            TypeError: ``covariance`` is neither a floating-point tensor nor a function that returns one.
            ValueError: shapes that do not fit.
            torch.linalg.LinAlgError: the covariance of a site and its neighbours is not positive definite, or singular up to
                rounding; a ValueError as well.
        """
        return cls(*factor_of_covariance(covariance, stencil, grid), stencil)

    @classmethod
    def from_samples(
        cls,
        samples: Tensor | Iterable[Tensor],
        stencil: Stencil,
        *,
        loc: Tensor | None = None,
        ridge: float = 0.0,
        stationary: bool = False,
        stable: str | None = None,
    ) -> "StencilCholesky":
        """The maximum-likelihood factor with a given stencil, in closed form.

        Each column is the least-squares regression of a site on its existing forward neighbours. This is `from_covariance` of
        the samples' covariance (divided by S). Only its entries between sites of one column are computed, in float64.
        Differentiable in the samples.

        Args:
            samples: (S, *batch, *grid), or an iterable of such tensors, which may be more than memory holds.
            stencil: the stencil, K - 1 offsets.
            loc: the mean, (*batch, *grid). None is the mean of the samples, of each site by itself, or with ``stationary``
                one for the whole grid.
            ridge: this is added to the variance of every site, in squared units of the samples; the factor then minimises the
                mean negative log likelihood plus ½ ridge ‖L‖²_F.
            stationary: sites share their coefficients. Near an edge of the grid some neighbours do not exist: a site shares
                its coefficients with all sites that have the same existing neighbours. They are estimated wherever on the
                grid these neighbours exist. Nothing makes the most likely such factor stable: its samples may grow from one
                edge of the grid to the other, as `diagnostics.sample_growth` measures. If they grow more than fourfold, it
                warns (RuntimeWarning).
            stable: "project" damps the regressions of such a stationary factor, by e^(-rate · t) for a neighbour t steps of the
                stencil's wavefronts away, with the smallest rate at which its samples grow no more than twofold, and refits the
                diagonal. A ridge that is large enough for that costs more likelihood. None leaves the factor as it is. The rate
                is a constant for derivatives.

        Returns:
            The factor, with the samples' batch, dtype and device. Entries that do not exist are stored as 0.

        Raises:
            TypeError: samples of another type than floating-point tensors of one dtype.
            ValueError: shapes or devices that do not fit; with no ridge, fewer samples than a site has unknowns: its
                coefficients, its variance, and its mean unless ``loc`` is given (with ``stationary`` every place where the
                neighbours exist counts); another ``stable``, or one without ``stationary``.
            torch.linalg.LinAlgError: the samples' covariance is not positive definite; a ValueError as well.
        """
        return cls(*factor_of_samples(samples, stencil, loc, ridge, stationary, stable), stencil)

    @classmethod
    def from_precision(cls, precision: StencilPrecision, stencil: Stencil | None = None) -> "StencilCholesky":
        """The Cholesky factor of a sparse precision Λ, exact or with a given stencil. Differentiable in Λ.

        The exact factor fills in: its stencil is that of Λ and all offsets between the origin and Λ's last one, in raster
        order, that fit the grid. With a reach of r rows of W sites it has about 2 r W offsets, and takes a few n (r W)²
        operations. For r = 2 and 256 x 256 sites in float64 it has 1,022 offsets and 536 MB. On CPUs its operations loop over
        the offsets; the kernels for GPUs have code for each of them, and compile accordingly long.

        With a stencil, the factor `nearest` to the exact one, which takes two to four times as long. Nearest in divergence is
        not nearest in variance: of a Matérn field (smoothness 1, 96 x 96 sites) with a range of 10 pixels,
        ``Stencil.square(7)`` keeps 0.96 of the variance, of a range of 20 0.86, and of 39 0.76, in the middle of the grid 0.68.
        Far from observations such a prior misleads: take the exact factor for kriging, or on larger grids `SparseGMRF`.

        It is computed in float64 and rounded to the dtype of Λ. Where rounding of Λ itself may change variances by more than a
        tenth, as for a smooth field in float32, Λ is refused: build such a field in float64 and round its factor,
        ``StencilCholesky.from_precision(precision).to(torch.float32)``.

        Args:
            precision: Λ, as one of the builders of `banded_gmrf.precisions` or ``StencilPrecision.from_matrix`` gives it.
            stencil: the stencil of the factor; None is the exact factor.

        Raises:
            TypeError: ``precision`` is not a `StencilPrecision`, or ``stencil`` not a `Stencil`.
            torch.linalg.LinAlgError: Λ is not positive definite, or singular up to rounding; a ValueError as well.
            ValueError: Λ has an infinite or NaN entry, or ``stencil`` has another number of axes.

        Warns:
            RuntimeWarning: with a stencil, the mean of the marginal variances changes by more than a fifth.
        """
        exact = cls(*factor_of_precision(precision))
        if stencil is None:
            return exact
        nearest = exact.nearest(stencil)
        if not torch.compiler.is_compiling():
            inspect(
                lambda *tensors: warn_of_changed_variance(cls(*tensors[:2], exact.stencil), cls(*tensors[2:], stencil)),
                *(tensor for factor in (exact, nearest) for tensor in factor.coefficients[:2]),
            )
        return nearest

    @property
    def coefficients(self) -> Coefficients:
        """``log_diag``, ``off_diag`` and stencil as they are stored, before any broadcast or expansion of their batch axes."""
        return Coefficients(self._log_diag, self._off_diag, self.stencil)

    @property
    def log_diag(self) -> Tensor:
        """Log-diagonal of L, (*batch, *grid), expanded to ``batch_shape`` without a copy."""
        return expanded(self._log_diag, self.stencil.ndim, self.batch_shape)

    @property
    def off_diag(self) -> Tensor:
        """Off-diagonals of L, (*batch, K-1, *grid), expanded to ``batch_shape`` without a copy."""
        return expanded(self._off_diag, self.stencil.ndim + 1, self.batch_shape)

    @property
    def batch_shape(self) -> torch.Size:
        """The broadcast of the two tensors' batch axes, or what `expand` made of it."""
        if self._batch_shape is None:
            self._batch_shape = self._stored_batch_shape()
        return self._batch_shape

    @property
    def grid(self) -> torch.Size:
        """Numbers of sites along each axis."""
        return self._log_diag.shape[self._log_diag.ndim - self.stencil.ndim :]

    @property
    def dtype(self) -> torch.dtype:
        """That of the coefficients; of ``log_diag``, where the off-diagonals have fewer bits."""
        return self._log_diag.dtype

    @property
    def device(self) -> torch.device:
        """That of the coefficients."""
        return self._log_diag.device

    @property
    def diag(self) -> Tensor:
        """The diagonal of L, exp(log_diag): (*batch, *grid), in float32 for float16 and bfloat16 coefficients."""
        return self._log_diag.to(accumulate_dtype(self.dtype)).exp().expand(*self.batch_shape, *self.grid)

    def matvec(self, x: Tensor, transpose: bool = False) -> Tensor:
        """L x, or Lᵀx with ``transpose``: (*sample, *batch, *grid), ``x`` broadcast against the batch as torch does.

        Raises:
            TypeError: another dtype than the factor's (float32 is accepted beside float16 and bfloat16).
            ValueError: another grid or device, or a batch that does not broadcast.
        """
        return self._apply(operators.matvec, "x", x, transpose)

    def solve(self, b: Tensor, transpose: bool = False) -> Tensor:
        """L⁻¹b, or L⁻ᵀb with ``transpose``; shapes and errors as for `matvec`."""
        return self._apply(operators.solve, "b", b, transpose)

    def nearest(self, stencil: Stencil) -> "StencilCholesky":
        """The factor with another stencil whose distribution is nearest to this one's, as `from_covariance` defines it.

        The covariances that it needs come from a selected inverse, exactly: a few n (r W)² operations and a window of (r W)²
        numbers, r the rows that the larger of the two stencils reaches and W the sites of a row. Differentiable.

        Raises:
            TypeError: ``stencil`` is not a `Stencil`.
            ValueError: ``stencil`` has another number of axes.
        """
        return StencilCholesky(*nearest_factor(self, stencil), stencil).expand(self.batch_shape)

    def logdet(self) -> Tensor:
        """log |L| = ½ log |Λ| in nats: (*batch,), in float32 for float16 and bfloat16 coefficients."""
        logdet = self._log_diag.to(accumulate_dtype(self.dtype)).flatten(-self.stencil.ndim).sum(-1)
        return logdet.expand(self.batch_shape)

    def expand(self, batch_shape: Sequence[int]) -> "StencilCholesky":
        """The factor repeated over a larger batch; neither it nor its gradient is copied.

        Raises:
            ValueError: ``batch_shape`` is not an expansion of the factor's.
        """
        batch_shape = torch.Size(batch_shape)
        try:
            expands = torch.broadcast_shapes(batch_shape, self.batch_shape) == batch_shape
        except RuntimeError:
            expands = False
        if not expands:
            raise ValueError(f"batch_shape is {tuple(batch_shape)}, expected an expansion of {tuple(self.batch_shape)}")
        return self._from_parts(self.stencil, [self._log_diag, self._off_diag], batch_shape)

    def unexpanded(self) -> "StencilCholesky":
        """The factor without what `expand` repeated: its batch is that of the two tensors."""
        return self._from_parts(self.stencil, [self._log_diag, self._off_diag])

    def to_dense(self) -> Tensor:
        """L as a dense matrix: (*batch, n, n), sites in raster order. Meant for small grids: n² entries."""
        n = self.grid.numel()
        k, row, column = self.stencil.entries(self.grid, self.device)
        diag = torch.diag_embed(self.diag.flatten(-self.stencil.ndim)).flatten(-2)
        below = self.off_diag.flatten(-self.stencil.ndim)[..., k, column].to(diag.dtype)
        return diag.index_copy(-1, row * n + column, below).unflatten(-1, (n, n))

    def to_scipy(self):
        """L as a ``scipy.sparse.csr_array`` (n, n), sites in raster order, for a factor without batch axes.

        Raises:
            ValueError: the factor has batch axes.
        """
        import scipy.sparse

        if self.batch_shape:
            raise ValueError(f"to_scipy takes a factor without batch axes, got batch shape {tuple(self.batch_shape)}")
        n = self.grid.numel()
        k, row, column = self.stencil.entries(self.grid)
        diag = self.diag.detach().cpu().flatten()
        below = self.off_diag.detach().cpu().flatten(1)[k, column].to(diag.dtype)
        sites = torch.arange(n)
        entries = (torch.cat([diag, below]), (torch.cat([sites, row]), torch.cat([sites, column])))
        return scipy.sparse.csr_array(entries, shape=(n, n))

    def _stored_batch_shape(self) -> torch.Size:
        ndim = self.stencil.ndim
        own, below = (t.shape[: t.ndim - axes] for t, axes in ((self._log_diag, ndim), (self._off_diag, ndim + 1)))
        return broadcast_batch("off_diag", below, "log_diag", own)

    def _parts(self) -> dict[str, tuple[Tensor, int]]:
        return {"log_diag": (self._log_diag, self.stencil.ndim), "off_diag": (self._off_diag, self.stencil.ndim + 1)}

    def _static(self) -> Stencil:
        return self.stencil

    @classmethod
    def _from_parts(cls, static, parts, batch_shape=None) -> "StencilCholesky":
        new = cls.__new__(cls)
        new._log_diag, new._off_diag = parts
        new.stencil, new._batch_shape = static, batch_shape
        return new

    def _apply(self, operator: operators.Operator, name: str, vector: Tensor, transpose: bool) -> Tensor:
        stencil = self.stencil
        # What `expand` repeated is one factor that several vectors share.
        return apply(
            *(operator, name, self._log_diag, self._off_diag, vector, stencil.offsets, stencil.ndim, transpose, True),
            factor_name="the factor",
            batch=self.batch_shape,
        )

    def __repr__(self) -> str:
        return (
            f"StencilCholesky(batch_shape={tuple(self.batch_shape)}, grid={tuple(self.grid)}, "
            f"offsets={len(self.stencil)}, dtype={self.dtype}, device={self.device})"
        )


def white_sample(factor: StencilCholesky, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """``factor.solve(u, transpose=True)`` of ``u = standard_normal(shape, dtype)``, which a solve may draw by itself."""
    log_diag, off_diag, stencil = factor.coefficients
    batch = factor.batch_shape
    stored = batch if log_diag.shape[: -stencil.ndim] == batch else factor.unexpanded().batch_shape
    return solve_normal(log_diag, off_diag, shape, dtype, stencil.offsets, stencil.ndim, stored, batch)


def squares_matvec(factor: StencilCholesky, x: Tensor) -> Tensor:
    """The product of the matrix of all squares L²[i, j] with x (*sample, *batch, *grid); for x = 1, the diagonal of Λ."""
    diag, (_, off_diag, stencil) = factor.diag, factor.coefficients
    exists = stencil.mask(factor.grid, device=factor.device)
    squares = off_diag.to(diag.dtype).where(exists, 0).square()  # NaN that is merely ignored has a NaN derivative
    return gmrf_kernels.matvec(diag.square(), squares, x, stencil.offsets, stencil.ndim)


def negative_log_likelihood(residual: Tensor, log_diag: Tensor, off_diag: Tensor, stencil: Stencil) -> Tensor:
    """-log N(residual; 0, (L Lᵀ)⁻¹) in nats, the ½ and the constant included, as one fused operation.

    The forward pass reads each coefficient once; the backward pass writes each gradient once and, for the factor alone, does
    not read the coefficients again.

    Args:
        residual: (*sample, *batch, *grid), broadcast against the factor's batch as torch does.
        log_diag: (*batch, *grid).
        off_diag: (*batch, K-1, *grid).
        stencil: the stencil.

    Returns:
        (*sample, *batch), in float32 where ``residual`` is float16 or bfloat16, else in its dtype.

    Raises:
        TypeError, ValueError: as for `StencilCholesky` and `StencilCholesky.matvec`.

    Warns:
        UserWarning: the residual's batch is (B, 1) and the factor's (B,), which broadcast to B² pairs: a channel left in.
    """
    check_stencil(stencil)
    nats = fused_nats(residual, log_diag, off_diag, stencil)
    if residual.ndim > log_diag.ndim and residual.shape[-stencil.ndim - 1] == 1:
        warn_of_pairs("residual", residual.shape[: -stencil.ndim], "log_diag", log_diag.shape[: -stencil.ndim])
    return nats


def fused_nats(residual: Tensor, log_diag: Tensor, off_diag: Tensor, stencil: Stencil) -> Tensor:
    """`negative_log_likelihood` of what was looked at before."""
    return gmrf_kernels.negative_log_likelihood(residual, log_diag, off_diag, stencil.offsets, stencil.ndim)

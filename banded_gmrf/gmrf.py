"""`GMRF`, the Gaussian Markov random field as a torch distribution."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from gmrf_kernels.checks import accumulate_dtype, check_vector

from .analysis import marginals, spectra
from .analysis.marginals import VarianceEstimate
from .analysis.spectra import Eigenpairs
from .batched import Batched, expanded, register_pytree
from .cholesky import StencilCholesky, fused_nats, white_sample
from .inference.conditioning import Conditionable
from .stencil import Stencil
from .validation import Finite, FiniteWhereItExists, all_finite, as_sample_shape, as_sites, broadcast_fields, unit_vectors

_MAX_DENSE_SITES = 2**13


@register_pytree("banded_gmrf.GMRF")
@dataclasses.dataclass(init=False, eq=False, repr=False)  # of the fields alone: see `Batched`
class GMRF(Distribution, Batched, Conditionable):
    """Gaussian Markov random field x ~ N(loc, Λ⁻¹), Λ = L Lᵀ, on a grid of 1 to 3 axes.

    A `torch.distributions.Distribution` with ``event_shape`` = grid; log densities and entropies are in nats. `to`, `detach`
    and indexing work as for a tensor that has the batch axes alone, and a distribution is a pytree node.

    In a Pyro model use ``banded_gmrf.pyro.GMRF``, the same with the methods that Pyro needs: ``pyro.sample`` takes no plain
    torch distribution. ``import banded_gmrf`` itself never imports Pyro.

    Args:
        loc: the mean, (*batch, *grid), of the factor's dtype (float32 is accepted beside float16 and bfloat16).
        precision_cholesky: the factor L; its batch is broadcast against that of ``loc`` and never copied.
        validate_args: check that ``loc``, ``log_diag`` and the existing entries of ``off_diag`` are finite, and samples given
            to `log_prob`; None takes torch's default. One pass over the coefficients at construction.

    Raises:
        TypeError: ``precision_cholesky`` is not a `StencilCholesky`, or the dtypes differ.
        ValueError: grids, batches or devices that do not fit; with ``validate_args``, NaN or infinity.
    """

    has_rsample = True

    loc: Tensor
    precision_cholesky: StencilCholesky
    validate_args: bool | None

    def __init__(self, loc: Tensor, precision_cholesky: StencilCholesky, validate_args: bool | None = None):
        if not isinstance(precision_cholesky, StencilCholesky):
            raise TypeError(f"precision_cholesky is a {type(precision_cholesky).__name__}, expected a StencilCholesky")
        grid = precision_cholesky.grid
        check_vector("loc", loc, "precision_cholesky", precision_cholesky.coefficients.off_diag, grid)
        batch = broadcast_fields("loc", loc.shape[: loc.ndim - len(grid)], "precision_cholesky", precision_cholesky.batch_shape)
        self.loc = expanded(loc, len(grid), batch)
        self._factor = precision_cholesky
        checks = self._validate_args if validate_args is None else validate_args
        # Torch's own loop over the constraints takes longer than a small likelihood: it is left to find what is wrong.
        sound = checks and all_finite(loc, *precision_cholesky.coefficients[:2])
        super().__init__(batch, grid, validate_args=False if sound else validate_args)
        if sound and validate_args is None:
            del self._validate_args  # torch's default, as given
        elif sound:
            self._validate_args = validate_args

    @property
    def arg_constraints(self):
        finite = Finite(len(self._event_shape))
        return {"loc": finite, "log_diag": finite, "off_diag": FiniteWhereItExists(self._factor.stencil)}

    @constraints.dependent_property(is_discrete=False)
    def support(self):
        return constraints.independent(constraints.real, len(self._event_shape))

    @property
    def stencil(self) -> Stencil:
        """Shape of the factor's columns."""
        return self._factor.stencil

    @property
    def log_diag(self) -> Tensor:
        """Log-diagonal of the factor, (*batch, *grid)."""
        return self.precision_cholesky.log_diag

    @property
    def off_diag(self) -> Tensor:
        """Off-diagonals of the factor, (*batch, K-1, *grid)."""
        return self.precision_cholesky.off_diag

    @property
    def precision_cholesky(self) -> StencilCholesky:
        """The factor L, expanded to ``batch_shape`` without a copy."""
        return expanded(self._factor, 0, self._batch_shape)

    @property
    def validate_args(self) -> bool | None:
        """As at construction; None where torch's default was taken."""
        return self.__dict__.get("_validate_args")

    def expand(self, batch_shape: Sequence[int], _instance=None) -> "GMRF":
        """The distribution repeated over a larger batch; neither ``loc`` nor the factor is copied.

        Raises:
            RuntimeError: ``batch_shape`` is not an expansion of the distribution's, as for torch's own distributions.
        """
        new = self._get_checked_instance(GMRF, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(*batch_shape, *self._event_shape)
        new._factor = self._factor
        super(GMRF, new).__init__(batch_shape, self._event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """(*batch, *grid)."""
        return self.loc

    @property
    def mode(self) -> Tensor:
        """(*batch, *grid)."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variances, the diagonal of Λ⁻¹: (*batch, *grid), by `marginal_variance` with its defaults."""
        return self.marginal_variance().variance

    def marginal_variance(self, method: str = "auto", num_samples: int = 256) -> VarianceEstimate:
        """Marginal variances, the diagonal of Λ⁻¹, with their standard errors; differentiable in the factor.

        With n sites in rows of W = n / grid[0] and a stencil that reaches r rows down, exact variances take about
        2 n (r + 1)² W² operations, and memory for a few matrices of (r + 1) W rows. A first axis that is the longest is best.
        A row of a colour image (3, 64, 64) is a whole channel, W = 4096; of the same image as (64, 64, 3), a line of pixels,
        W = 192. Monte Carlo takes one solve and one product with L per sample.

        Args:
            method: "exact", a selected inverse by blocks (Takahashi, Fagan & Chen, PICA 1973; Lin, Lu, Ying, Car & E, Fast
                algorithm for extracting the diagonal of the inverse matrix, Comm. Math. Sci. 2009); "monte_carlo", from
                samples, Rao-Blackwellised over each site given all others (Sidén, Lindgren, Bolin & Villani, JCGS 2018); or
                "auto", which is exact while n (r + 1)² W² ≤ 2⁴⁰ (a 7 x 7 stencil on 512 x 512 sites) and Monte Carlo beyond.
            num_samples: of Monte Carlo. The standard error is at most √(2 / num_samples) times the variance.

        Returns:
            A named tuple of ``variance`` and ``standard_error``, both (*batch, *grid); the latter is 0 if the method is exact.

        Raises:
            ValueError: another method, or fewer than one sample.
        """
        estimate = marginals.marginal_variance(self._factor, method, num_samples)
        return VarianceEstimate(*(t.to(self.loc.dtype).expand(self.loc.shape) for t in estimate))

    def covariance_columns(self, sites: Sequence[Sequence[int]] | Sequence[int] | int) -> Tensor:
        """Covariances of some sites with all sites, columns of Λ⁻¹: two solves for all of them at once.

        Args:
            sites: one site, a tuple of ``ndim`` indices (an integer will do for one axis), or a sequence of m such tuples.

        Returns:
            (*batch, *grid) for one site, (m, *batch, *grid) for m; in float32 for float16 and bfloat16 factors.

        Raises:
            TypeError: an index is not an integer.
            ValueError: a site has another number of axes, or lies outside the grid.
        """
        sites = as_sites(sites, self._event_shape, self._factor.device)
        units = self._units(sites.reshape(-1, sites.shape[-1]))
        columns = self._covariance_times(units).expand(len(units), *self._batch_shape, *self._event_shape)
        return columns if sites.ndim > 1 else columns[0]

    def correlation_with(self, site: Sequence[Sequence[int]] | Sequence[int] | int) -> Tensor:
        """Correlations of one site, or of m, with all sites; arguments, shapes and errors as for `covariance_columns`.

        In [-1, 1] up to rounding where `variance` is exact. Elsewhere the variances of these sites are still exact, from their
        own columns, but the variances of the other sites are Monte Carlo estimates from 256 samples, drawn from torch's
        generator. The correlations with them have a relative standard error of at most √(1 / 512) = 4.4 %, and may leave
        [-1, 1].
        """
        ndim = len(self._event_shape)
        sites = as_sites(site, self._event_shape, self._factor.device)
        many = sites.reshape(-1, ndim)
        units = self._units(many)
        columns = self._covariance_times(units)
        times = units.sum(0)  # a site may be asked for twice
        exact = columns.where(units > 0, 0).sum(0) / times.clamp(min=1)
        stddev = exact.where(times > 0, self.variance.to(columns.dtype)).sqrt()
        own = stddev[(..., *many.unbind(-1))].movedim(-1, 0)
        correlations = columns / (stddev * own.reshape(*own.shape, *[1] * ndim))
        return correlations if sites.ndim > 1 else correlations[0]

    @property
    def covariance_matrix(self) -> Tensor:
        """Σ as a dense matrix (*batch, n, n), sites in raster order, by 2 n solves; for n ≤ 8192 sites.

        Raises:
            ValueError: more sites.
        """
        return self._dense("covariance_matrix", self._covariance_times)

    @property
    def precision_matrix(self) -> Tensor:
        """Λ as a dense matrix (*batch, n, n), sites in raster order, for n ≤ 8192 sites.

        Raises:
            ValueError: more sites.
        """
        return self._dense(
            "precision_matrix", lambda columns: self._factor.matvec(self._factor.matvec(columns, transpose=True))
        )

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """loc + L⁻ᵀu with u ~ N(0, I): (*sample_shape, *batch, *grid), differentiable in ``loc`` and the factor."""
        shape = self._extended_shape(as_sample_shape(sample_shape))
        x = white_sample(self._factor, shape, self.loc.dtype)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.loc + x
        # Nobody else has this solution. Of large images, new memory for the sum would cost more than the numbers.
        return x.add_(self.loc)

    def whiten(self, value: Tensor) -> Tensor:
        """Lᵀ(value - loc), standard normal if ``value`` follows this distribution.

        Returns:
            (*sample, *batch, *grid), in float32 for a float16 or bfloat16 ``value``.

        Raises:
            TypeError: another dtype than the factor's (float32 is accepted beside float16 and bfloat16).
            ValueError: another grid or device, or a batch that does not broadcast.
        """
        return self._factor.matvec(self._residual(value), transpose=True)

    def log_prob(self, value: Tensor) -> Tensor:
        """log N(value; loc, Λ⁻¹) in nats.

        Returns:
            (*sample, *batch), in float32 for a float16 or bfloat16 ``value``.

        Raises:
            TypeError, ValueError: as for `whiten`; with ``validate_args`` also for NaN.
        """
        residual = self._residual(value)
        if self._validate_args and value.numel() > 0:  # torch's check of the support fails on no values at all
            self._validate_sample(value)
        return -fused_nats(residual, *self._factor.coefficients)

    def leading_eigenpairs(self, k: int) -> Eigenpairs:
        """The k largest eigenvalues of Σ and their eigenvectors, by Lanczos iterations on solves with L.

        ARPACK's implicitly restarted ones (Lehoucq, Sorensen & Yang, ARPACK Users' Guide, SIAM 1998), in float64, one
        distribution after the other. The eigenvalues are differentiable in the factor where they are simple; the eigenvectors
        are constants.

        Args:
            k: at least 1, less than the number n of sites. The time grows with n k² once k is in the hundreds.

        Returns:
            A named tuple of ``eigenvalues`` (*batch, k) in descending order, ``eigenvectors`` (*batch, k, *grid) of unit norm,
            and ``residuals`` (*batch, k), ‖Σv - λv‖ / λ. A residual above 10⁻⁶ warns (RuntimeWarning).

        Raises:
            TypeError: ``k`` is not an integer.
            ValueError: ``k`` out of range.
            scipy.sparse.linalg.ArpackError: no convergence.
        """
        values, vectors, residuals = (t.to(self.loc.dtype) for t in spectra.leading_eigenpairs(self._factor, k))
        batch = self._batch_shape
        return Eigenpairs(values.expand(*batch, k), vectors.expand(*batch, k, *self._event_shape), residuals.expand(*batch, k))

    def project_on_leading(self, x: Tensor, k: int, degree: int = 2000) -> Tensor:
        """x projected on the k leading eigenvectors of Σ, without computing them: `leading_eigenpairs` takes longer.

        A polynomial of Λ is applied to x. Up to 10⁻³, it is 1 on the k smallest eigenvalues of Λ and 0 on the others, except
        near the cut. The cut lies between the k-th and the next eigenvalue. It is found by counting eigenvalues below a
        threshold; eigenvalues closer than rounding of the largest one count as equal. Around the cut the weights fall from
        0.999 to 0.001 within ±12 / degree on the scale of arccos(1 - 2 λ / b); b, the largest row sum of |L| |L|ᵀ, bounds the
        eigenvalues.
        Differentiable in x, with no gradient in the factor. A degree too low to give the leading eigenvectors their weight
        warns (RuntimeWarning).

        Each count takes about n (r + 1)² W² operations, with n sites in rows of W = n / grid[0] and a stencil that reaches r
        rows: a row of a colour image (3, 64, 64) has W = 4096, one of the same image as (64, 64, 3) has W = 192.

        Args:
            x: (*sample, *batch, *grid); a residual, from which ``loc`` was taken.
            k: at least 1, less than the number n of sites.
            degree: of the polynomial: as many products with L and with Lᵀ.

        Returns:
            (*sample, *batch, *grid) in the dtype of x, or float32 for float16 and bfloat16.

        Raises:
            TypeError, ValueError: as for `whiten`; ``k`` or ``degree`` is not an integer, or out of range; a grid with
                n (r + 1)² W² > 2⁴⁰.
        """
        self.check_field("x", x)
        projected = spectra.project_on_leading(self._factor, x.to(accumulate_dtype(x.dtype)), k, degree)
        return projected.expand(torch.broadcast_shapes(projected.shape, (*self._batch_shape, *self._event_shape)))

    def entropy(self) -> Tensor:
        """Differential entropy ½ n (1 + log 2π) - log |L| in nats: (*batch,)."""
        n = math.prod(self._event_shape)
        return (0.5 * n * (1 + math.log(2 * math.pi)) - self._factor.logdet()).expand(self._batch_shape)

    def check_field(self, name: str, field: Tensor) -> None:
        """Check that a field (*sample, *batch, *grid) fits the distribution; ``name`` is what an error calls it.

        Raises:
            TypeError: another dtype than the factor's (float32 is accepted beside float16 and bfloat16).
            ValueError: another grid or device, or a batch that does not broadcast.
        """
        check_vector(name, field, "precision_cholesky", self._factor.coefficients.off_diag, self._event_shape)
        broadcast_fields(name, field.shape[: field.ndim - len(self._event_shape)], "the distribution", self._batch_shape)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {getattr(self, name).shape}" for name in self.arg_constraints)
        return f"{type(self).__name__}({shapes})"

    def _dense(self, name: str, operator: Callable[[Tensor], Tensor]) -> Tensor:
        """An operator on vectors as a matrix (*batch, n, n)."""
        n = self._event_shape.numel()
        if n > _MAX_DENSE_SITES:
            raise ValueError(f"{name} takes at most {_MAX_DENSE_SITES} sites, the grid {tuple(self._event_shape)} has {n}")
        sites = torch.cartesian_prod(*(torch.arange(size, device=self._factor.device) for size in self._event_shape))
        columns = operator(self._units(sites.reshape(n, -1)))
        return columns.flatten(-len(self._event_shape)).movedim(0, -1).expand(*self._batch_shape, n, n)

    def _covariance_times(self, x: Tensor) -> Tensor:
        """Σx of vectors (*sample, *batch, *grid)."""
        return self._factor.solve(self._factor.solve(x), transpose=True)

    def _units(self, sites: Tensor) -> Tensor:
        """Unit vectors of the sites (m, ndim): (m, *1, *grid), an axis of size 1 for each of the batch."""
        return unit_vectors(sites, self._event_shape, len(self._batch_shape), accumulate_dtype(self._factor.dtype))

    def _parts(self) -> dict[str, tuple[Tensor | StencilCholesky, int]]:
        return {"loc": (self.loc, self._factor.stencil.ndim), "precision_cholesky": (self._factor, 0)}

    def _static(self) -> bool | None:
        return self.validate_args

    @classmethod
    def _from_parts(cls, static, parts, batch_shape=None) -> "GMRF":
        new = cls.__new__(cls)
        new.loc, new._factor = parts
        if static is not None:
            new._validate_args = static
        ndim = new._factor.stencil.ndim
        shape = new.loc.shape if isinstance(new.loc, Tensor) else torch.Size()
        new._batch_shape, new._event_shape = shape[: max(0, len(shape) - ndim)], shape[max(0, len(shape) - ndim) :]
        return new

    def _residual(self, value: Tensor) -> Tensor:
        self.check_field("value", value)
        return value.to(accumulate_dtype(value.dtype)) - self.loc

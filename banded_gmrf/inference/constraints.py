"""`ConstrainedGMRF`: a distribution of fields given that linear functions of them have exact values.

With V = Σ Aᵀ and S = A V a field x of N(μ, Σ) becomes x + V S⁻¹(e - A x), which has A x = e and the conditional distribution
(conditioning by kriging: Rue & Held, Gaussian Markov Random Fields, 2005, section 2.3.3). The density on the fields that fulfil
the constraints is π(x | A x = e) = π(x) π(A x | x) / π(A x) with π(A x | x) = |A Aᵀ|^(-½), ibid.

An intrinsic field is x + N γ, γ of a flat density. Its constraints determine γ, too, by generalised least squares, with the
covariance Γ = (Nᵀ Aᵀ S⁻¹ A N)⁻¹; then e - A x is met by N γ as far as that goes, and by V S⁻¹ for the rest (universal kriging:
Chilès & Delfiner, Geostatistics, 2012, section 3.4).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gmrf_kernels.checks import accumulate_dtype, broadcast_batch, check_device, check_tensor, check_vector

from ..analysis.marginals import VarianceEstimate
from ..errors import NotPositiveDefiniteError
from ..operators.base import as_operator
from ..validation import as_sites, check_finite
from .inferred_field import InferredField


class ConstrainedGMRF(InferredField):
    """A GMRF or a posterior, given that A x = e exactly; made by `GMRF.constrain` and `ConditionalGMRF.constrain`.

    A `torch.distributions.Distribution`. Its densities and entropies are those on the fields that fulfil the constraints, an
    affine subspace with m dimensions less, in nats.

    Args:
        base: the distribution without constraints.
        A: (m, *grid), one field of weights for each constraint; or a linear operator, see `banded_gmrf.operators`.
        e: (*batch, m), the values; of an operator (*batch, *output_shape).
        validate_args: check samples given to `log_prob`; None takes torch's default.

    Raises:
        TypeError: not floating-point tensors, or an operator without an adjoint.
        ValueError: shapes, batches or devices that do not fit, NaN or infinity, or constraints that repeat or contradict each
            other, or bind only sites that are known exactly.
    """

    _conditioned = "_base"
    _own = ("_A", "_bound", "_e", "_gain", "_root", "_drift")

    def __init__(self, base, A, e: Tensor, validate_args: bool | None = None):
        grid, device = base.event_shape, base.mean_in_double().device
        A, e = _as_matrix(A, e, grid, device)
        free = base.free_sites()
        bound = A if free is None else A * free.flatten(-len(grid)).unsqueeze(-2)
        _check_independent(A, bound, e)
        batch = broadcast_batch("e", e.shape[:-1], "the distribution", base.batch_shape)
        super().__init__(batch, grid, validate_args=validate_args)
        self._base = base.expand(batch) if batch != base.batch_shape else base
        self._A, self._bound, self._e = A, bound, e
        rows = bound.movedim(-2, 0).unflatten(-1, grid)
        rows = rows.reshape(len(rows), *[1] * (len(base.batch_shape) + len(grid) + 1 - rows.ndim), *rows.shape[1:])
        gain = base.covariance_times(rows.expand(len(rows), *base.batch_shape, *grid))
        self._gain = gain.flatten(-len(grid)).movedim(0, -1)  # V, (*batch, n, m)
        self._root = torch.linalg.cholesky(A @ self._gain)  # of S
        null = base.null_space()
        self._drift = None if null is None else _Drift(null, A, self._gain, self._root)

    def expand(self, batch_shape: Sequence[int], _instance=None) -> "ConstrainedGMRF":
        """The distribution repeated over a larger batch; nothing is computed again.

        Raises:
            RuntimeError: ``batch_shape`` is not an expansion of the distribution's, as for torch's own distributions.
        """
        return self._expanded(self._get_checked_instance(ConstrainedGMRF, _instance), batch_shape)

    @property
    def mean(self) -> Tensor:
        """(*batch, *grid)."""
        return self._correct(self._base.mean_in_double()).to(self._dtype).expand(self._extended_shape())

    def marginal_variance(self, method: str = "auto", num_samples: int = 256) -> VarianceEstimate:
        """Variances of all sites with their standard errors: those of the distribution without constraints, less what these
        explain, which is exact. Arguments, result and errors as there."""
        estimate = self._base.marginal_variance(method, num_samples)
        change = -self._explained().square().sum(-1)
        if self._drift is not None:
            change = change + self._drift.root.square().sum(-1)
        variance = (estimate.variance.double() + change.unflatten(-1, self._event_shape)).clamp(min=0)
        return VarianceEstimate(
            *(t.to(self._dtype).expand(self._extended_shape()) for t in (variance, estimate.standard_error))
        )

    def covariance_columns(self, sites: Sequence[Sequence[int]] | Sequence[int] | int) -> Tensor:
        """Covariances of some sites with all sites; arguments, shapes and errors as for `GMRF.covariance_columns`."""
        grid = self._event_shape
        columns = self._base.covariance_columns(sites)
        indices = as_sites(sites, grid, columns.device)

        def columns_of(root: Tensor) -> Tensor:
            own = root.unflatten(-2, grid)[(..., *indices.reshape(-1, len(grid)).unbind(-1), slice(None))]
            product = (root @ own.mT).movedim(-1, 0).unflatten(-1, grid)
            return product if indices.ndim > 1 else product[0]

        change = -columns_of(self._explained())
        if self._drift is not None:
            change = change + columns_of(self._drift.root)
        return (columns.double() + change).to(columns.dtype)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """(*sample_shape, *batch, *grid), differentiable."""
        return self._correct(self._base.rsample(sample_shape).double()).to(self._dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density on the fields with A x = e, in nats; -∞ for others.

        Returns:
            (*sample, *batch), in float32 for a float16 or bfloat16 ``value``.

        Raises:
            TypeError, ValueError: as for the distribution without constraints; with ``validate_args`` also a value that does
                not fulfil the constraints.
        """
        check_vector("value", value, "the distribution", self._base.mean, self._event_shape)
        x = value.double().flatten(-len(self._event_shape)).unsqueeze(-1)
        error = ((self._A @ x).squeeze(-1) - self._e).abs()
        scale = (self._A.abs() @ x.abs()).squeeze(-1) + self._e.abs()
        contradicts = ~(error <= 1000 * torch.finfo(value.dtype).eps * scale).all(-1)  # rounding of a sample
        if self._validate_args and contradicts.any():
            raise ValueError("value does not fulfil the constraints, where its density is 0")
        log_prob = self._base.log_prob(value).double() + self._log_correction()
        return log_prob.masked_fill(contradicts, -math.inf).to(accumulate_dtype(value.dtype))

    def entropy(self) -> Tensor:
        """Differential entropy on the fields with A x = e in nats, (*batch)."""
        # Of both the log densities at the mean and the entropies differ by ½ for each dimension.
        of_values = self._half_logdet() + 0.5 * len(self._A) * (1 + math.log(2 * math.pi))
        entropy = self._base.entropy().double() - of_values + 0.5 * self._logdet_gram()
        return entropy.to(accumulate_dtype(self._dtype)).expand(self._batch_shape)

    @property
    def log_evidence(self) -> Tensor:
        """log p(observations | A x = e) of a posterior, in nats: (*batch) in float64, differentiable.

        Raises:
            AttributeError: the distribution without constraints is no posterior.
            ValueError: as for `ConditionalGMRF.log_evidence`.
        """
        before = ConstrainedGMRF(self._base.prior, self._A.unflatten(-1, self._event_shape), self._e)
        return (self._base.log_evidence + self._log_of_values() - before._log_of_values()).expand(self._batch_shape)

    def __repr__(self) -> str:
        return (
            f"ConstrainedGMRF(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}, m={len(self._A)})"
        )

    @property
    def _dtype(self) -> torch.dtype:
        return self._base.mean.dtype

    def _correct(self, x: Tensor) -> Tensor:
        """x + V S⁻¹(e - A x), of an intrinsic field x + N γ + V S⁻¹(e - A x - A N γ)."""
        missing = self._e.unsqueeze(-1) - self._A @ x.flatten(-len(self._event_shape)).unsqueeze(-1)
        step = self._gain @ torch.cholesky_solve(missing, self._root)
        if self._drift is not None:
            step = step + self._drift.fitted(torch.linalg.solve_triangular(self._root, missing, upper=False))
        return x + step.squeeze(-1).unflatten(-1, self._event_shape)

    def _explained(self) -> Tensor:
        """R with V S⁻¹Vᵀ = R Rᵀ, (*batch, n, m)."""
        return torch.linalg.solve_triangular(self._root.mT, self._gain, upper=True, left=False)

    def _logdet_gram(self) -> Tensor:
        """log |A Aᵀ|, A on the free sites."""
        return torch.logdet(self._bound @ self._bound.mT)

    def _log_of_values(self) -> Tensor:
        """log N(e; A μ, S); of an intrinsic field up to what its own density leaves out."""
        mean = self._base.mean_in_double().flatten(-len(self._event_shape)).unsqueeze(-1)
        missing = self._e.unsqueeze(-1) - self._A @ mean
        whitened = torch.linalg.solve_triangular(self._root, missing, upper=False).squeeze(-1)
        squares = whitened.square().sum(-1)
        if self._drift is not None:
            squares = squares - self._drift.explained(whitened.unsqueeze(-1)).square().sum((-2, -1))
        return -0.5 * squares - self._half_logdet() - 0.5 * len(self._A) * math.log(2 * math.pi)

    def _half_logdet(self) -> Tensor:
        """½ log |S|, of an intrinsic field ½ log |S| - ½ log |Γ|."""
        half = self._root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return half if self._drift is None else half + self._drift.half_logdet()

    def _log_correction(self) -> Tensor:
        return -0.5 * self._logdet_gram() - self._log_of_values()


class _Drift:
    """What the constraints say of γ in x + N γ.

    Args:
        null: N, (*batch, n, k).
        A: (m, n).
        gain: V, (*batch, n, m).
        root: the Cholesky factor of S.

    Attributes:
        root: what γ adds to the covariance, root rootᵀ = D Γ Dᵀ with D = N - V S⁻¹A N; (*batch, n, k).
    """

    def __init__(self, null: Tensor, A: Tensor, gain: Tensor, root: Tensor):
        seen = torch.linalg.solve_triangular(root, A @ null, upper=False)  # A N in units of S
        _check_drift(null, A)
        self._basis, self._triangle = torch.linalg.qr(seen)
        unseen = null - gain @ torch.linalg.solve_triangular(root.mT, seen, upper=True)
        self.root = torch.linalg.solve_triangular(self._triangle, unseen, upper=True, left=False)

    def explained(self, whitened: Tensor) -> Tensor:
        """The part of S^(-½)(e - A μ), (*batch, m, 1), that A N γ can meet, in an orthonormal basis."""
        return self._basis.mT @ whitened

    def fitted(self, whitened: Tensor) -> Tensor:
        """D γ of the best γ, (*batch, n, 1)."""
        return self.root @ self.explained(whitened)

    def half_logdet(self) -> Tensor:
        """-½ log |Γ|."""
        return self._triangle.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def _as_matrix(A, e: Tensor, grid: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """The constraints as a matrix (m, n) and their values as (*batch, m), in float64."""
    check_tensor("e", e)
    if isinstance(A, Tensor):
        check_tensor("A", A)
        if A.ndim != len(grid) + 1 or A.shape[1:] != grid or len(A) == 0:
            raise ValueError(f"A has shape {tuple(A.shape)}, expected (m, {', '.join(map(str, grid))}), m at least 1")
        A = A.double().flatten(1)
    else:
        operator = as_operator(A, "A").bind(grid, device)
        shape = operator.output_shape
        if operator.batch_shape:
            raise ValueError(f"A has batch shape {tuple(operator.batch_shape)}, expected none")
        if e.shape[e.ndim - len(shape) :] != shape:
            raise ValueError(f"e has shape {tuple(e.shape)}, expected (..., {', '.join(map(str, shape))})")
        A, e = operator.to_dense(), e.flatten(e.ndim - len(shape))
    if e.ndim < 1 or e.shape[-1] != len(A):
        raise ValueError(f"e has shape {tuple(e.shape)}, expected (..., {len(A)}), one value for each constraint")
    if A.device != device:
        raise ValueError(f"A is on {A.device}, the distribution is on {device}")
    check_device("e", e, "A", A)
    for name, tensor in (("A", A), ("e", e)):
        check_finite(name, tensor)
    return A, e.double()


@torch.no_grad()
def _check_drift(null: Tensor, A: Tensor) -> None:
    """Raise where A N has less than k independent columns."""
    k = null.shape[-1]
    seen = A / A.norm(dim=-1, keepdim=True) @ torch.linalg.qr(null)[0]
    if len(A) < k or not bool((torch.linalg.svdvals(seen) > 1e-8).all()):
        raise NotPositiveDefiniteError(
            f"A does not determine all of the {k} directions that the precision leaves open, expected constraints of each: "
            "the input is not positive-definite"
        )


@torch.no_grad()
def _check_independent(A: Tensor, bound: Tensor, e: Tensor) -> None:
    """Raise ValueError where constraints are functions of each other, or of what is known."""
    m = len(A)
    rank = int(torch.linalg.matrix_rank(A)) if A.shape[-1] >= m else A.shape[-1]
    if rank < m:
        values = e.reshape(-1, m).mT
        both = torch.linalg.matrix_rank(torch.cat([A, values], 1)) if values.shape[1] else rank
        how = "contradict" if int(both) > rank else "repeat"
        raise ValueError(f"A has {m} constraints that {how} each other: its rank is {rank}, expected {m}")
    if bound is not A and bool((torch.linalg.matrix_rank(bound) < m).any()):
        raise ValueError(
            f"A has constraints that bind only sites that are known exactly, expected {m} independent ones of the others"
        )

"""The null space of a singular precision, and sites which make it regular where they are pinned.

Let the columns of N span the null space of Λ, k of them, and B = Λ + E C Eᵀ pin as many sites, E their unit vectors. Then Λ is
the limit, for t to infinity, of the precision of x + N γ with x ~ N(loc, B⁻¹) and γ ~ N(0, t I):

    (B⁻¹ + t N Nᵀ)⁻¹  →  B - B N (Nᵀ B N)⁻¹ Nᵀ B = B - E C Eᵀ,    as B N = E C (Eᵀ N) and Eᵀ N is square and regular.

Intrinsic fields: Rue & Held, Gaussian Markov Random Fields, 2005, chapter 3.
"""

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
from torch import Tensor

from ..errors import NotPositiveDefiniteError, of_batch
from ..precision_matrix import StencilPrecision
from ..recursions.dissection import DissectedCholesky

_MAX_DIMENSIONS = 8
_DENSE_SITES = 64
# Of the eigenvalues of Λ, its diagonal scaled to 1: what counts as 0, and the shift that makes it regular, at least.
_ZERO = 1e-13
_SHIFT = 1e-11


@torch.no_grad()
def null_space(precision: StencilPrecision) -> Tensor:
    """A basis N of the null space of a singular Λ in float64: (*batch, n, k), a constant.

    Raises:
        torch.linalg.LinAlgError: Λ has a negative direction, or a null space of no or more than 8 dimensions, or not of as many
            in all of the batch.
    """
    n, batch = precision.grid.numel(), precision.batch_shape
    scale = precision.diag.expand(*batch, *precision.grid).flatten(-len(precision.grid)).sqrt()
    bases = []
    for number in range(batch.numel()):
        index = tuple(int(i) for i in np.unravel_index(number, batch)) if batch else ()
        values, vectors = _smallest_eigenpairs(precision[index] if batch else precision, scale[index])
        dimensions = int((values <= _ZERO).sum())
        if not 0 < dimensions <= min(_MAX_DIMENSIONS, n) or values[0] < -_ZERO:
            how = "a negative direction" if values[0] < -_ZERO else f"a null space of {dimensions} dimensions or more"
            raise NotPositiveDefiniteError(
                f"precision{of_batch(torch.tensor(index))} has {how}, expected one that is positive definite, or positive "
                f"semi-definite with a null space of 1 to {_MAX_DIMENSIONS} dimensions: the input is not positive-definite"
            )
        bases.append(vectors[:, :dimensions] / scale[index].unsqueeze(-1))
    if len({basis.shape for basis in bases}) != 1:
        raise NotPositiveDefiniteError(
            f"precision has null spaces of {sorted({basis.shape[1] for basis in bases})} dimensions in one batch, expected one "
            "number: the input is not positive-definite"
        )
    return torch.stack(bases).reshape(*batch, *bases[0].shape)


@torch.no_grad()
def pins(precision: StencilPrecision, null: Tensor) -> Tensor:
    """The diagonal of E C Eᵀ, (*batch, *grid): at k sites that tell the fields of the null space (*batch, n, k) apart."""
    n, k = null.shape[-2:]
    diag = precision.diag.expand(*precision.batch_shape, *precision.grid).reshape(-1, n)
    pinned = torch.zeros_like(diag)
    for element, basis in enumerate(null.reshape(-1, n, k)):
        sites = scipy.linalg.qr(basis.mT.cpu().numpy(), mode="r", pivoting=True)[1][:k].copy()
        pinned[element, sites] = diag[element, sites]
    return pinned.reshape(*precision.batch_shape, *precision.grid)


def _smallest_eigenpairs(precision: StencilPrecision, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of D^(-½) Λ D^(-½), D = diag(scale)², without batch axes: values (m,) that ascend, vectors (n, m)."""
    grid, n = precision.grid, len(scale)
    if n <= _DENSE_SITES:
        return torch.linalg.eigh(precision.to_dense() / (scale.unsqueeze(-1) * scale))
    shift = max(_SHIFT, 16 * n * torch.finfo(torch.float64).eps)
    factor = DissectedCholesky(StencilPrecision(precision.diag * (1 + shift), precision.off_diag, precision.stencil))

    def on_vectors(function) -> scipy.sparse.linalg.LinearOperator:
        def apply(x: np.ndarray) -> np.ndarray:
            return function(torch.from_numpy(x.reshape(-1)).to(scale)).cpu().numpy()

        return scipy.sparse.linalg.LinearOperator((n, n), matvec=apply, dtype=np.float64)

    def product(x: Tensor) -> Tensor:
        return precision.matvec((x / scale).unflatten(-1, grid)).flatten() / scale

    _, vectors = scipy.sparse.linalg.eigsh(
        on_vectors(product),
        k=_MAX_DIMENSIONS + 1,
        sigma=-shift,
        OPinv=on_vectors(lambda x: scale * factor.solve(scale * x)),
        v0=np.random.default_rng(0).standard_normal(n),
    )
    vectors = torch.from_numpy(np.linalg.qr(vectors)[0]).to(scale)
    products = torch.stack([product(v) for v in vectors.mT], -1)
    values, rotation = torch.linalg.eigh(vectors.mT @ products)
    return values, vectors @ rotation

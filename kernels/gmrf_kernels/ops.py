"""The operations as users of raw tensors call them.

They check their arguments, broadcast as torch does, and sort the batch axes into those that own a factor (B) and those that
share one (S), so that a shared factor is read once and never copied. `operators` has what they call.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import operators
from .backends import backend_of
from .checks import MOST_REMEMBERED, accumulate_dtype, check_device, check_dtype, check_factor, check_tensor, check_vector
from .layout import Layout, layout_of
from .normals import standard_normal, stream_key
from .registration import nothing_intervenes, requires_grad
from .stencils import Offsets


def apply(
    operator: operators.Operator,
    name: str,
    diag: Tensor,
    off_diag: Tensor,
    vector: Tensor,
    offsets: Offsets,
    ndim: int,
    transpose: bool,
    log: bool,
    factor_name: str = "off_diag",
    batch: torch.Size | None = None,
) -> Tensor:
    """`matvec` or `solve`, as `operator`, of arguments that are checked here.

    Errors call the vector ``name`` and what it is to fit ``factor_name``. ``batch`` is the factor's where some of it repeats
    what is stored.
    """
    direct = nothing_intervenes((diag, off_diag, vector))
    layout, canonical = _settled(name, vector, "diag", diag, off_diag, len(offsets), ndim, direct, factor_name, batch)
    call = operator.direct if direct else operator
    if canonical:
        return call(diag, off_diag, vector, offsets, transpose, log)
    dtype = accumulate_dtype(vector.dtype)
    y = call(
        layout.factor(_converted(diag, dtype), ndim),
        layout.factor(off_diag, ndim + 1),
        layout.vector(_converted(vector, dtype)),
        offsets,
        transpose,
        log,
    )
    return _converted(layout.batched(y), vector.dtype)


def _converted(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


# Layouts of tensors that passed the checks, and whether they are canonical, by all that is checked.
_known: dict[tuple, tuple[Layout, bool]] = {}


def _settled(
    name: str,
    vector: Tensor,
    diag_name: str,
    diag: Tensor,
    off_diag: Tensor,
    num_offsets: int,
    ndim: int,
    direct: bool,
    factor_name: str = "off_diag",
    batch: torch.Size | None = None,
) -> tuple[Layout, bool]:
    """The layout of an operation's arguments, which are checked; ``direct`` where they are plain tensors.

    Also whether such tensors go into the operator, and its result comes out, as they are.
    """
    key = None
    if direct:
        key = (
            *(vector.shape, diag.shape, off_diag.shape, vector.dtype, diag.dtype, off_diag.dtype),
            *(vector.device, diag.device, off_diag.device, num_offsets, ndim, name, factor_name, batch),
        )
        known = _known.get(key)
        if known is not None:
            return known
    stored = check_factor(diag, off_diag, num_offsets, ndim, diag_name)
    grid = diag.shape[diag.ndim - ndim :]
    check_vector(name, vector, factor_name, off_diag, grid)
    layout = layout_of(name, vector.shape[: vector.ndim - ndim], stored, stored if batch is None else batch, grid)
    canonical = False
    if direct:
        canonical = vector.dtype == diag.dtype == accumulate_dtype(vector.dtype)
        canonical = canonical and layout.is_canonical(vector.shape, diag.shape, off_diag.shape)
        if len(_known) >= MOST_REMEMBERED:
            _known.clear()
        _known[key] = layout, canonical
    return layout, canonical


def matvec(
    diag: Tensor, off_diag: Tensor, x: Tensor, offsets: Offsets, ndim: int, transpose: bool = False, log: bool = False
) -> Tensor:
    """Product L x, or Lᵀx with ``transpose``, for a factor L stored by column.

    Args:
        diag: (*batch, *grid), the diagonal of L, of any sign; of the dtype of ``off_diag``, or float32 where that is float16 or
            bfloat16.
        off_diag: (*batch, K-1, *grid); entry k of column j stands at row j + offsets[k]. Entries whose row lies outside the
            grid are ignored, NaN included.
        x: (*sample, *batch, *grid), broadcast against the factor's batch as torch does; of the factor's dtype, or float32
            where that is float16 or bfloat16.
        offsets: the K-1 forward offsets, in raster order.
        ndim: number of grid axes, 1 to 3.
        transpose: multiply by Lᵀ.
        log: ``diag`` is the logarithm of the diagonal, which is then positive.

    Returns:
        (*sample, *batch, *grid) in the dtype of ``x``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named.
    """
    return apply(operators.matvec, "x", diag, off_diag, x, offsets, ndim, transpose, log)


def solve(
    diag: Tensor, off_diag: Tensor, b: Tensor, offsets: Offsets, ndim: int, transpose: bool = False, log: bool = False
) -> Tensor:
    """Solution of L x = b, or of Lᵀx = b with ``transpose``; arguments, shapes and errors as for `matvec`."""
    return apply(operators.solve, "b", diag, off_diag, b, offsets, ndim, transpose, log)


def solve_normal(
    log_diag: Tensor,
    off_diag: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    offsets: Offsets,
    ndim: int,
    stored: torch.Size,
    batch: torch.Size,
) -> Tensor:
    """L⁻ᵀu of ``u = standard_normal(shape, dtype)``, on the device of the factor, which was checked.

    The CPU backend draws u inside of its solve where nothing else is to see it. The result has the same bits either way.

    Args:
        log_diag, off_diag, offsets, ndim: as for `solve`.
        shape: (*sample, *batch, *grid).
        dtype: of the result.
        stored: the batch that the factor's tensors broadcast to.
        batch: the factor's, where some of it repeats what is stored.
    """
    inside = None
    if dtype == log_diag.dtype and dtype in (torch.float32, torch.float64) and 0 not in shape:
        tensors = log_diag, off_diag
        if nothing_intervenes(tensors) and not requires_grad(tensors):
            inside = getattr(backend_of(log_diag), "solve_normal", None)
    if inside is not None:
        split = len(shape) - ndim
        layout = layout_of("b", shape[:split], stored, batch, shape[split:])
        if layout.sorted and layout.batch == tuple(shape[:split]):
            factor = layout.factor(log_diag, ndim), layout.factor(off_diag, ndim + 1)
            return layout.batched(inside(*factor, layout.canonical_vector, stream_key(), offsets, True, True))
    u = standard_normal(shape, dtype, log_diag.device)
    return apply(operators.solve, "b", log_diag, off_diag, u, offsets, ndim, True, True, "the factor", batch)


def outer(a: Tensor, b: Tensor, offsets: Offsets, ndim: int, sample_ndim: int = 0) -> tuple[Tensor, Tensor]:
    """The entries of a bᵀ on the stencil, laid out as a factor: the adjoint of `matvec` with respect to L.

    Args:
        a, b: (*sample, *batch, *grid), of one shape, dtype and device.
        offsets, ndim: as for `matvec`.
        sample_ndim: this many leading axes are summed over.

    Returns:
        The diagonal (*batch, *grid) and the off-diagonals (*batch, K-1, *grid); 0 where an entry does not exist.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named.
    """
    check_tensor("a", a)
    check_tensor("b", b)
    check_dtype("b", b, "a", a)
    check_device("b", b, "a", a)
    if a.shape != b.shape or a.ndim < ndim + sample_ndim:
        raise ValueError(
            f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}, expected one shape with {sample_ndim} sample axes "
            f"and a grid of {ndim} axes"
        )
    batch, grid = a.shape[sample_ndim : a.ndim - ndim], a.shape[a.ndim - ndim :]
    if 0 in grid:
        raise ValueError(f"a has the empty grid {tuple(grid)}, every axis needs at least one site")
    canonical = (math.prod(a.shape[:sample_ndim]), math.prod(batch), *grid)
    dtype = accumulate_dtype(a.dtype)
    a_vectors, b_vectors = (_converted(t, dtype).reshape(canonical) for t in (a, b))
    diag, off_diag = operators.outer(a_vectors, b_vectors, offsets, a.dtype)
    return diag.reshape(*batch, *grid).to(a.dtype), off_diag.reshape(*batch, len(offsets), *grid)


def negative_log_likelihood(residual: Tensor, log_diag: Tensor, off_diag: Tensor, offsets: Offsets, ndim: int) -> Tensor:
    """-log N(residual; 0, (L Lᵀ)⁻¹) in nats, the factor's diagonal being ``exp(log_diag)``: one fused operation.

    Args:
        residual: (*sample, *batch, *grid), broadcast against the factor's batch as torch does; dtype as for `matvec`.
        log_diag: (*batch, *grid), of the dtype of ``off_diag``, or float32 where that is float16 or bfloat16.
        off_diag, offsets, ndim: as for `matvec`.

    Returns:
        (*sample, *batch), in float32 where ``residual`` is float16 or bfloat16, else in its dtype.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, named.
    """
    direct = nothing_intervenes((residual, log_diag, off_diag))
    layout, canonical = _settled("residual", residual, "log_diag", log_diag, off_diag, len(offsets), ndim, direct)
    if canonical:
        return operators.nll_value(residual, log_diag, off_diag, offsets, direct)
    dtype = accumulate_dtype(residual.dtype)
    value = operators.nll_value(
        layout.vector(_converted(residual, dtype)),
        layout.factor(_converted(log_diag, dtype), ndim),
        layout.factor(off_diag, ndim + 1),
        offsets,
        direct,
    )
    return layout.batched(value)

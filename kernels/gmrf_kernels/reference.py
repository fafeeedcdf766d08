"""Reference backend: the operations in plain torch, for any device and any floating dtype.

This file is the definition of what every other backend computes. Shapes, in all of them:

* ``diag`` (B, *grid), ``off_diag`` (B, K-1, *grid): the factor L of each batch element, stored by column; where ``log``,
  ``diag`` is the logarithm of its diagonal;
* ``x``, ``b``, ``a`` (S, B, *grid): S vectors for each factor.

``off_diag`` may be float16 or bfloat16; everything else then is float32, and so is the arithmetic.
"""

import math

import torch
from torch import Tensor

from .stencils import Offsets, overlap, wavefront_slopes


def matvec(diag: Tensor, off_diag: Tensor, x: Tensor, offsets: Offsets, transpose: bool, log: bool) -> Tensor:
    """L x, or Lᵀx with ``transpose``: (S, B, *grid)."""
    diag = diag.exp() if log else diag
    y = (diag * x).contiguous()
    for k, offset in enumerate(offsets):
        here, there = overlap(offset, diag.shape[1:])
        entries = off_diag[:, k][:, *here].to(x.dtype)
        if transpose:
            y[:, :, *here] += entries * x[:, :, *there]
        else:
            y[:, :, *there] += entries * x[:, :, *here]
    return y


def solve(diag: Tensor, off_diag: Tensor, b: Tensor, offsets: Offsets, transpose: bool, log: bool) -> Tensor:
    """L⁻¹b, or L⁻ᵀb with ``transpose``: (S, B, *grid). Substitution, one wavefront of independent sites at a time."""
    diag = diag.exp() if log else diag
    grid = diag.shape[1:]
    sites = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")).flatten(1)
    order = torch.tensor(wavefront_slopes(offsets, len(grid))) @ sites
    wavefronts = [sites[:, order == t] for t in range(int(order.max()) + 1)]

    x = b.new_zeros(b.shape)
    rest = b.clone()
    for sites in reversed(wavefronts) if transpose else wavefronts:
        neighbours = []
        for k, offset in enumerate(offsets):
            moved = sites + torch.tensor(offset)[:, None]
            exists = ((moved >= 0) & (moved < torch.tensor(grid)[:, None])).all(0)
            here, there = tuple(sites[:, exists]), tuple(moved[:, exists])
            neighbours.append((off_diag[:, k][:, *here].to(b.dtype), here, there))
        if transpose:
            for entries, here, there in neighbours:
                rest[:, :, *here] -= entries * x[:, :, *there]
        x[:, :, *sites] = rest[:, :, *sites] / diag[:, *sites]
        if not transpose:
            for entries, here, there in neighbours:
                rest[:, :, *there] -= entries * x[:, :, *here]
    return x


def outer(a: Tensor, b: Tensor, offsets: Offsets, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """P(a bᵀ), summed over the S vectors: its diagonal (B, *grid) and off-diagonals (B, K-1, *grid) in ``dtype``."""
    grid = a.shape[2:]
    off_diag = a.new_zeros((a.shape[1], len(offsets), *grid), dtype=dtype)
    for k, offset in enumerate(offsets):
        here, there = overlap(offset, grid)
        off_diag[:, k][:, *here] = (a[:, :, *there] * b[:, :, *here]).sum(0).to(dtype)
    return (a * b).sum(0).contiguous(), off_diag


def nll(residual: Tensor, log_diag: Tensor, off_diag: Tensor, offsets: Offsets) -> tuple[Tensor, Tensor]:
    """Negative log likelihood (S, B) in nats, and the whitened residual y = Lᵀ residual (S, B, *grid)."""
    n = math.prod(log_diag.shape[1:])
    y = matvec(log_diag, off_diag, residual, offsets, transpose=True, log=True)
    value = 0.5 * y.square().flatten(2).sum(-1) - log_diag.flatten(1).sum(-1) + 0.5 * n * math.log(2 * math.pi)
    return value, y


def nll_factor_grad(
    scale: Tensor, residual: Tensor, whitened: Tensor, log_diag: Tensor, offsets: Offsets, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradient of ``(scale * value).sum()``, ``scale`` (S, B), for ``log_diag`` and, in ``dtype``, ``off_diag``."""
    scaled = scale.reshape(*scale.shape, *[1] * (residual.ndim - 2)) * whitened
    diag, off_diag = outer(residual, scaled, offsets, dtype)
    return diag * log_diag.exp() - scale.sum(0).reshape(-1, *[1] * (log_diag.ndim - 1)), off_diag


def inner_products(fields: Tensor, rows: int) -> Tensor:
    """Inner products of fields (T, B, *grid) with the first ``rows`` of them: (B, T, rows) in float64.

    Entries above the diagonal may be missing: they are then 0. (Here they are not.)
    """
    flat = fields.flatten(2).double()
    return torch.einsum("tbn,rbn->btr", flat, flat[:rows])


def combinations(weights: Tensor, fields: Tensor, room: int = 0) -> Tensor:
    """Σ_u weights[:, t, u] fields[u], of weights (B, T, U) in float64 and fields (U, B, *grid): (T, B, *grid).

    With ``room``, behind them are so many fields more, for the caller to fill.
    """
    rows = weights.shape[1]
    result = fields.new_empty(rows + room, *fields.shape[1:])
    combined = torch.einsum("btu,ubn->tbn", weights, fields.flatten(2).double())
    result[:rows] = combined.unflatten(-1, fields.shape[2:])
    return result

"""Reference backend: the operations in plain torch, for any device and any floating dtype.

This file is the definition of what every other backend computes. Shapes, in all of them:

* ``diag`` (B, *grid), ``off_diag`` (B, K-1, *grid): the factor L of each batch element, stored by column; where ``log``,
  ``diag`` is the logarithm of its diagonal;
* ``x``, ``b``, ``a`` (S, B, *grid): S vectors for each factor.

``off_diag`` may be float16 or bfloat16; everything else then is float32, and so is the arithmetic.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .low_rank import capacitance_logdet, capacitance_root, cotangent_weights
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


def low_rank_log_density(
    residual: Tensor,
    log_diag: Tensor,
    off_diag: Tensor,
    factors: Tensor,
    offsets: Offsets,
    keep: bool = True,
    matvec: Callable[..., Tensor] = matvec,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The log densities of residuals under N(0, Λ⁻¹ + F Fᵀ) with factors F, in nats.

    Args:
        residual: (S, B, *grid).
        log_diag, off_diag: the factor L of Λ.
        factors: F, (B, R, *grid), with R > 0.
        offsets: the stencil's.
        keep: whether the gradient will be asked for. If not, a backend may return None for the whitened fields.
        matvec: that of the backend.

    Returns:
        The log densities (S, B); the whitened factors V and the rests y - V a, (R + S, B, *grid); and in float64 (B, R, R + S),
        Cᵀ and beside it the weights a, where C Cᵀ = I + VᵀV.
    """
    rank = factors.shape[1]
    whitened = matvec(log_diag, off_diag, torch.cat([factors.movedim(1, 0), residual]), offsets, True, True)
    fields = whitened.flatten(2).movedim(0, 1).double()
    inner = fields[:, :rank] @ fields.mT
    root = capacitance_root(inner[..., :rank])
    weights = torch.cholesky_solve(inner[..., rank:], root)
    rests = fields[:, rank:] - weights.mT @ fields[:, :rank]
    whitened[rank:] = rests.movedim(0, 1).unflatten(-1, residual.shape[2:])
    squares = rests.square().sum(-1) + weights.square().sum(-2)
    logdet = log_diag.flatten(1).sum(1, dtype=root.dtype) - capacitance_logdet(root)
    constant = 0.5 * fields.shape[-1] * math.log(2 * math.pi)
    value = (logdet[:, None] - 0.5 * squares - constant).T
    return value.to(residual.dtype), whitened, torch.cat([root.mT, weights], -1)


def low_rank_gradients(
    value_bar: Tensor,
    residual: Tensor,
    log_diag: Tensor,
    off_diag: Tensor,
    factors: Tensor,
    whitened: Tensor,
    system: Tensor,
    offsets: Offsets,
    wanted: Sequence[bool],
    matvec: Callable[..., Tensor] = matvec,
    outer: Callable[..., tuple[Tensor, Tensor]] = outer,
) -> list[Tensor | None]:
    """Gradients of ``(value_bar * value).sum()`` of `low_rank_log_density`, for its first four arguments where ``wanted``.

    In them the weights a are constants, because the density is greatest there. Of one residual,

        ȳ = -(y - V a),   V̄ = (y - V a) aᵀ - V (C Cᵀ)⁻¹
    """
    rank, grid = factors.shape[1], residual.shape[2:]
    of_residual, of_log_diag, of_off_diag, of_factors = wanted
    combined = torch.einsum("btu,ubn->tbn", cotangent_weights(value_bar, system), whitened.flatten(2).double())
    rests = -value_bar.reshape(*value_bar.shape, *[1] * len(grid)) * whitened[rank:]
    whitened_bar = torch.cat([combined.to(rests.dtype).unflatten(-1, grid), rests])
    residual_bar = log_diag_bar = off_diag_bar = factors_bar = None
    if of_residual:
        residual_bar = matvec(log_diag, off_diag, whitened_bar[rank:], offsets, False, True)
    if of_factors:
        factors_bar = matvec(log_diag, off_diag, whitened_bar[:rank], offsets, False, True).movedim(0, 1)
    if of_log_diag or of_off_diag:
        fields = torch.cat([factors.movedim(1, 0), residual])
        diag_bar, off_diag_bar = outer(fields, whitened_bar, offsets, off_diag.dtype)
        log_diag_bar = diag_bar * log_diag.exp() + value_bar.sum(0).reshape(-1, *[1] * len(grid))
    return [residual_bar, log_diag_bar if of_log_diag else None, off_diag_bar if of_off_diag else None, factors_bar]

"""Dense strips of a stencil-shaped factor: sparse recursions over sites become dense algebra over rows of the grid.

A *row* is all sites that share an index on the first axis, W of them; a *block* is a few consecutive rows, one unless rows are
short. The columns of L that belong to a block are zero outside the block and the next r rows, r the stencil's reach along
the first axis. These entries as a dense matrix are the block's *strip*: lower triangular on top, and below it whatever couples
the block to later rows.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gmrf_kernels.stencils import overlap

from ..coefficients import HasCoefficients
from ..stencil import Stencil

_MIN_BLOCK_SITES = 32  # smaller matrices cost more in calls than in arithmetic


def block_rows(grid: torch.Size) -> list[tuple[int, int]]:
    """First row and end row of each block; the last block may be shorter than the others."""
    step = max(1, _MIN_BLOCK_SITES // math.prod(grid[1:]))
    return [(start, min(start + step, grid[0])) for start in range(0, grid[0], step)]


def block_coefficients(factor: HasCoefficients) -> tuple[Tensor, ...]:
    """The factor's coefficients in float64, cut into blocks: (*batch, K, rows, ...), the diagonal of L first.

    In float64 whatever their dtype: rounding grows with the condition number of Λ, which is large for smooth fields.
    The batch is that of the tensors behind the factor: what was expanded is not repeated.
    """
    log_diag, off_diag, stencil = factor.coefficients
    ndim = stencil.ndim
    log_diag, off_diag = log_diag.to(torch.float64), off_diag.to(torch.float64)
    diag = log_diag.exp().unsqueeze(-ndim - 1)
    batch = torch.broadcast_shapes(diag.shape[: -ndim - 1], off_diag.shape[: -ndim - 1])
    coefficients = torch.cat([t.expand(*batch, *t.shape[-ndim - 1 :]) for t in (diag, off_diag)], -ndim - 1)
    return coefficients.split([stop - start for start, stop in block_rows(factor.grid)], -ndim)


def scan(step: Callable[..., tuple[Any, Tensor]], state: Any, blocks: Sequence[tuple]) -> list[Tensor]:
    """Fold ``step(state, *block) -> (state, result)`` over blocks, the state being a tensor or a tuple; return the results.

    Where a backward pass of autograd may come, only the states between short segments of blocks are kept, and the rest is
    computed again in that pass: the memory grows with the square root of the number of blocks.
    """

    def segment(state: Any, part: Sequence[tuple]) -> tuple[Any, list[Tensor]]:
        results = []
        for block in part:
            state, result = step(state, *block)
            results.append(result)
        return state, results

    # What checkpoints rely on, hooks on saved tensors, torch.func's transformations refuse, and the compiler has its own way.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return segment(state, blocks)[1]
    length = max(1, math.isqrt(len(blocks)) // 4)  # a step keeps about 16 times as much as a state
    results = []
    for first in range(0, len(blocks), length):
        part = blocks[first : first + length]
        state, values = checkpoint(segment, state, part, use_reentrant=False, preserve_rng_state=False)
        results += values
    return results


def strip(coefficients: Tensor, stencil: Stencil, rows_left: int) -> Tensor:
    """The strip of one block, dense.

    Args:
        coefficients: one of `block_coefficients`.
        stencil: the factor's.
        rows_left: rows of the grid from the block's first one on.

    Returns:
        (*batch, h, w): w is the number of sites of the block; h also counts the sites of the next rows that it reaches.
    """
    rows, *rest = coefficients.shape[-stencil.ndim :]
    row = math.prod(rest)
    height, width = (rows + stencil.row_reach) * row, rows * row
    index = _strip_index.__wrapped__ if torch.compiler.is_compiling() else _strip_index  # dynamo warns of caches
    source, target = index(stencil, rows, tuple(rest), coefficients.device)
    entries = coefficients.flatten(-stencil.ndim - 1).index_select(-1, source)
    dense = entries.new_zeros(*entries.shape[:-1], height * width).index_copy(-1, target, entries)
    return dense.unflatten(-1, (height, width))[..., : rows_left * row, :]


@functools.lru_cache(maxsize=64)
def _strip_index(stencil: Stencil, rows: int, rest: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where a block's existing entries are among its flattened coefficients, and where in its flattened strip."""
    row = math.prod(rest)
    width = rows * row
    along, sites = torch.arange(rows)[:, None] * row, torch.arange(row).reshape(rest)
    sources, targets = [torch.arange(width)], [torch.arange(width) * (width + 1)]
    for k, offset in enumerate(stencil.offsets, start=1):
        here, there = overlap(offset[1:], rest)
        column = (along + sites[here].flatten()).flatten()
        below = (along + offset[0] * row + sites[there].flatten()).flatten()
        # Within a row no entry leaves the block; whether the row below is still on the grid, the caller's crop decides.
        sources.append(k * width + column)
        targets.append(below * width + column)
    return torch.cat(sources).to(device), torch.cat(targets).to(device)

"""Dense float64 counterparts of stencil-shaped factors, built entry by entry, and random factors to compare them on."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def neighbours(offsets: Sequence[Sequence[int]], grid: Sequence[int]):
    """Every entry of a factor below the diagonal, as (k, site j, site j + offsets[k]), the sites as index tuples."""
    for k, offset in enumerate(offsets):
        for site in itertools.product(*(range(n) for n in grid)):
            neighbour = tuple(i + o for i, o in zip(site, offset, strict=True))
            if all(0 <= i < n for i, n in zip(neighbour, grid, strict=True)):
                yield k, site, neighbour


def exists(offsets: Sequence[Sequence[int]], grid: Sequence[int]) -> Tensor:
    """(K-1, *grid) bool: the entry of ``off_diag`` exists."""
    mask = torch.zeros((len(offsets), *grid), dtype=torch.bool)
    for k, site, _ in neighbours(offsets, grid):
        mask[k][site] = True
    return mask


def dense_factor(log_diag: Tensor, off_diag: Tensor, offsets: Sequence[Sequence[int]]) -> Tensor:
    """L as a float64 matrix (n, n), sites in raster order, from (*grid) and (K-1, *grid); differentiable in both."""
    grid = log_diag.shape
    raster = {site: i for i, site in enumerate(itertools.product(*(range(n) for n in grid)))}
    entries = list(neighbours(offsets, grid))
    L = torch.diag(log_diag.double().flatten().exp())
    if entries:
        rows = torch.tensor([raster[there] for _, _, there in entries])
        cols = torch.tensor([raster[here] for _, here, _ in entries])
        stored_at = torch.tensor([(k, *here) for k, here, _ in entries]).unbind(1)
        L = L.index_put((rows, cols), off_diag[stored_at].double())
    return L


def random_factor(
    offsets: Sequence[Sequence[int]],
    grid: Sequence[int],
    batch: Sequence[int] = (),
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
    nan_outside: bool = True,
) -> tuple[Tensor, Tensor]:
    """A well-conditioned factor: log_diag (*batch, *grid) and off_diag (*batch, K-1, *grid).

    With ``nan_outside`` the entries of ``off_diag`` that do not exist are NaN, so that whatever reads one shows it.
    """
    log_diag = 0.3 * torch.randn((*batch, *grid), dtype=torch.float64, generator=generator)
    off_diag = torch.randn((*batch, len(offsets), *grid), dtype=torch.float64, generator=generator)
    off_diag *= 0.5 / max(1, len(offsets)) ** 0.5
    if nan_outside:
        off_diag.masked_fill_(~exists(offsets, grid), float("nan"))
    return log_diag.to(dtype), off_diag.to(dtype)

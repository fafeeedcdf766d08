"""The numbers that make a factor, as they are stored: all that recursions over rows and constructions ask of one."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .stencil import Stencil


class Coefficients(NamedTuple):
    """Log-diagonal (*batch, *grid), off-diagonals (*batch, K-1, *grid) and their stencil; the batches may differ."""

    log_diag: Tensor
    off_diag: Tensor
    stencil: Stencil


class HasCoefficients(Protocol):
    """What recursions and constructions take for a factor: `StencilCholesky`, which is built on them, is one."""

    @property
    def coefficients(self) -> Coefficients: ...

    @property
    def stencil(self) -> Stencil: ...

    @property
    def grid(self) -> torch.Size: ...

"""A case: one stencil, grid, batch, number of samples, dtype and device; and the tensors on which its operations are timed.

The right-hand side of every triangular solve is made from its solution by the reference's product, so that the result to
expect of a solve is known without one: the reference's own solves would take longer than everything that is measured.
"""

import functools
import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import banded_gmrf as bg

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}

# Random coefficients repeat after this many: drawing them would take longer than timing them. Odd, so that images differ.
_DRAWN = 2**22 + 1


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of the vectors beside coefficients of ``dtype``, in which the library computes: float32 beside 16 bits."""
    return torch.promote_types(dtype, torch.float32)


def parse_stencil(text: str, ndim: int | None = None) -> bg.Stencil:
    """A stencil from its name on the command line, for a grid of ``ndim`` axes, by default as many as it names, or 2.

    ``7`` is a patch of 7 pixels along every axis, ``3x7x7`` one with a size for each axis, ``cross2`` the neighbours along the
    axes up to 2 pixels away.

    Raises:
        ValueError: no such stencil, or sizes for another number of axes.
    """
    if match := re.fullmatch(r"cross(\d+)", text):
        return bg.Stencil.cross(int(match[1]), ndim or 2)
    if not re.fullmatch(r"\d+(x\d+){0,2}", text):
        raise ValueError(f"stencil {text!r}: expected an odd size as 7, a size for each axis as 3x7x7, or a cross as cross2")
    sizes = [int(size) for size in text.split("x")]
    if any(size % 2 == 0 for size in sizes):
        raise ValueError(f"stencil {text!r}: sizes are odd, so that there is a middle pixel")
    if ndim is not None and len(sizes) not in (1, ndim):
        raise ValueError(f"stencil {text!r} has {len(sizes)} axes, the grid has {ndim}")
    sizes = sizes * (ndim or 2) if len(sizes) == 1 else sizes
    return bg.Stencil.box([size // 2 for size in sizes])


def fits(stencil: str, ndim: int) -> bool:
    """Whether the stencil of this name exists on grids of ``ndim`` axes."""
    return stencil.count("x") in (0, ndim - 1) or stencil.startswith("cross")


def parse_resolution(text: str) -> tuple[int, ...]:
    """A grid from its name on the command line: 64 is 64 x 64 pixels, 3x64 three bands of them, 8x64x48 a volume.

    Raises:
        ValueError: none of these, or an axis without pixels.
    """
    if not re.fullmatch(r"\d+(x\d+){0,2}", text):
        raise ValueError(f"resolution {text!r}: expected pixels as 64, bands and pixels as 3x64, or three axes as 8x64x48")
    axes = tuple(int(size) for size in text.split("x"))
    if 0 in axes:
        raise ValueError(f"resolution {text!r}: every axis needs at least one pixel")
    return axes if len(axes) == 3 else (*axes, axes[-1])


@dataclass(frozen=True)
class Case:
    """What an operation is timed on. ``samples`` vectors share each of the ``batch`` factors."""

    stencil: str
    grid: tuple[int, ...]
    batch: int
    samples: int = 1
    dtype: str = "float32"
    device: str = "cpu"

    def __str__(self) -> str:
        images = f"{self.batch} x {' x '.join(map(str, self.grid))}"
        samples = f", {self.samples} samples each" if self.samples > 1 else ""
        dtype = "" if self.dtype == "float32" else f", {self.dtype}"
        return f"stencil {self.stencil}, {images}{samples}{dtype}"

    @property
    def num_coefficients(self) -> int:
        """K, coefficients per pixel: the stencil's neighbours and the diagonal."""
        return len(parse_stencil(self.stencil, len(self.grid))) + 1

    @property
    def pixels(self) -> int:
        """Pixels of all images of the batch: N in "What fast means" of docs/design.md."""
        return self.batch * math.prod(self.grid)

    @property
    def coefficient_bytes(self) -> int:
        return self.num_coefficients * self.pixels * DTYPES[self.dtype].itemsize

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector for every sample of every factor; float32 beside 16-bit coefficients."""
        return self.samples * self.pixels * vector_dtype(DTYPES[self.dtype]).itemsize

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"grid": list(self.grid), "num_coefficients": self.num_coefficients}


class Problem:
    """The tensors of a case. The same case gives the same numbers.

    Attributes:
        coefficients: (batch, K, *grid), as a network predicts them; the factor's two tensors are views of it.
        factor: the `StencilCholesky`.
        x, v: (samples, batch, *grid), two independent sets of vectors.
    """

    def __init__(self, case: Case):
        self.case = case
        self.stencil = parse_stencil(case.stencil, len(case.grid))
        generator = torch.Generator().manual_seed(0)
        dtype = DTYPES[case.dtype]
        shape = (case.batch, case.num_coefficients, *case.grid)
        coefficients = _draw(shape, generator).mul_(0.3 / max(1, len(self.stencil)) ** 0.5)  # well conditioned
        self.coefficients = coefficients.to(case.device, dtype)
        vectors = (case.samples, case.batch, *case.grid)
        self.x, self.v = (_draw(vectors, generator).to(case.device, vector_dtype(dtype)) for _ in range(2))
        self.factor = bg.StencilCholesky(self.coefficients[:, 0], self.coefficients[:, 1:], self.stencil)

    @functools.cached_property
    def white(self) -> Tensor:
        """u = Lᵀx."""
        return self.reference_matvec(self.x, transpose=True)

    @functools.cached_property
    def cotangent(self) -> Tensor:
        """g = L v."""
        return self.reference_matvec(self.v)

    def reference_matvec(self, x: Tensor, transpose: bool = False) -> Tensor:
        with bg.use_backend("reference"):
            return self.factor.matvec(x, transpose)


def _draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.empty(shape)
    drawn = torch.randn(min(_DRAWN, values.numel()), generator=generator)
    for part in values.flatten().split(len(drawn)):
        part.copy_(drawn[: len(part)])
    return values

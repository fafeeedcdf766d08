"""Linear interpolation onto a finer grid, right in compiled code, too.

torch.compile writes the backward pass of torch's interpolation as a scatter into zeros. With its setting
``reorder_for_peak_memory``, on by default, the code generator of torch 2.13 may read these zeros before it has scattered: every
layer below such an interpolation then has a gradient of exactly 0, without a word. Compiled code therefore calls an
operator of our own, of which the code generator sees no inside: torch's interpolation, and its gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
_BACKWARD = {
    1: torch.ops.aten.upsample_linear1d_backward,
    2: torch.ops.aten.upsample_bilinear2d_backward,
    3: torch.ops.aten.upsample_trilinear3d_backward,
}


def upsample(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Interpolate x (B, C, *coarse) linearly onto a finer grid of any size: (B, C, *grid)."""
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()  # programs of torch's own operators
    return _upsample(x, list(grid)) if compiling else _interpolate(x, grid)


def _interpolate(x: Tensor, grid: Sequence[int]) -> Tensor:
    return nn.functional.interpolate(x, size=tuple(grid), mode=_MODES[len(grid)])


@torch.library.custom_op("supn_models::upsample", mutates_args=())
def _upsample(x: Tensor, grid: Sequence[int]) -> Tensor:
    return _interpolate(x, grid).contiguous()


@torch.library.custom_op("supn_models::upsample_adjoint", mutates_args=())
def _adjoint(y: Tensor, coarse: Sequence[int]) -> Tensor:
    return _BACKWARD[len(coarse)](y, y.shape[2:], (*y.shape[:2], *coarse), False).contiguous()


@_upsample.register_fake
@_adjoint.register_fake
def _(x, grid):
    return x.new_empty((*x.shape[:2], *grid))


def _setup(ctx, inputs, output):
    ctx.grid = inputs[0].shape[2:]


_upsample.register_autograd(lambda ctx, g: (_adjoint(g, ctx.grid), None), setup_context=_setup)
_adjoint.register_autograd(lambda ctx, g: (_upsample(g, ctx.grid), None), setup_context=_setup)


def _register_vmap(op):
    def rule(info, in_dims, x, grid):
        return op(x.movedim(in_dims[0], 0).flatten(0, 1), grid).unflatten(0, (info.batch_size, -1)), 0

    op.register_vmap(rule)


_register_vmap(_upsample)
_register_vmap(_adjoint)

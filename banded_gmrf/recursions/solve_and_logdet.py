"""A⁻¹b and log |A| of a block-banded matrix, with derivatives that do not run back through its elimination.

The gradient by A of what depends on x = A⁻¹b, through x̄, and on log |A|, through λ̄, is

    Ā = λ̄ A⁻¹ - ½ (v xᵀ + x vᵀ),   v = A⁻¹x̄.

It is needed only where A has entries, and these blocks of A⁻¹ follow from the factor by the recursion of `covariances`.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .elimination import BlockCholesky, block_cholesky


def solve_and_logdet(
    contribution: Callable[..., tuple[Tensor, Tensor]],
    blocks: Sequence[tuple],
    widths: Sequence[int],
    device: torch.device,
    factor: BlockCholesky,
    b: Tensor,
) -> tuple[Tensor, Tensor]:
    """A⁻¹b and log |A|, differentiable by autograd any number of times.

    First derivatives take about as long as the factor, which is much less than a backward pass through the elimination. Those
    of higher order take that way.

    Args:
        contribution, blocks, widths, device: A, as for `block_cholesky`. It depends on nothing that is differentiated but the
            tensors in ``blocks``.
        factor: of A, without a graph.
        b: vectors (*sample, *batch, n), which broadcast against the factor's batch.

    Returns:
        (*sample, *batch, n) and (*batch).
    """
    tensors = [part for block in blocks for part in block if isinstance(part, Tensor)]
    return _SolveAndLogdet.apply(contribution, blocks, widths, device, factor, b, *tensors)


class _SolveAndLogdet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, contribution, blocks, widths, device, factor, b, *tensors):
        x = factor.solve(b)
        ctx.save_for_backward(b, x, *tensors)
        # Without their tensors, which may be results of this pass: autograd keeps these.
        layouts = [tuple(None if isinstance(part, Tensor) else part for part in block) for block in blocks]
        ctx.matrix, ctx.factor = (contribution, layouts, widths, device), factor
        return x, factor.logdet()

    @staticmethod
    def backward(ctx, x_bar, logdet_bar):
        b, x, *tensors = ctx.saved_tensors
        contribution, layouts, widths, device = ctx.matrix
        new = iter(tensors)
        blocks = [tuple(next(new) if part is None else part for part in layout) for layout in layouts]
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad[5:]
            eliminated = block_cholesky(contribution, blocks, widths, device)
            inputs = [t for t, needs in zip((b, *tensors), needed, strict=True) if needs]
            outputs = eliminated.solve(b), eliminated.logdet()
            gradients = iter(
                torch.autograd.grad(outputs, inputs, (x_bar, logdet_bar), create_graph=True, materialize_grads=True)
            )
            return (None,) * 5 + tuple(next(gradients) if needs else None for needs in needed)
        v = ctx.factor.solve(x_bar)
        by_matrix = _by_blocks(ctx.factor, widths, x, v, logdet_bar)
        gradients = []
        for block, width, bar in zip(blocks[::-1], widths[::-1], by_matrix, strict=True):
            gradients[:0] = _pull_back(contribution, block, width, bar)
        return (*(None,) * 5, v.sum_to_size(b.shape), *gradients)


def _by_blocks(factor: BlockCholesky, widths: Sequence[int], x: Tensor, v: Tensor, logdet_bar: Tensor) -> Iterator[Tensor]:
    """Ā (*batch, m, m) of a block's sites and those after it that it is coupled to, from the last block to the first."""
    batch = logdet_bar.shape
    own = [1] * (x.ndim - 1 - len(batch)) + list(batch)
    shared = [axis for axis, size in enumerate(own) if size == 1]  # its vectors are columns: one product of matrices
    kept = [axis for axis, size in enumerate(own) if size != 1]
    x, v = (t.permute(*kept, -1 % t.ndim, *shared).flatten(len(kept) + 1) if shared else t.unsqueeze(-1) for t in (x, v))
    stop = sum(widths)
    for width, covariance in zip(widths[::-1], factor.inverse_blocks(), strict=True):
        start = stop - width
        here = slice(start, start + covariance.shape[-1])
        outer = (v[..., here, :] @ x[..., here, :].mT).reshape(covariance.shape)
        yield logdet_bar[..., None, None] * covariance - 0.5 * (outer + outer.mT)
        stop = start


def _pull_back(contribution: Callable, block: tuple, width: int, bar: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of a block's tensors from that of A."""
    leaves = [part.detach().requires_grad_() if isinstance(part, Tensor) else part for part in block]
    with torch.enable_grad():
        gram, diagonal = contribution(*leaves)
    size = gram.shape[-1]
    bars = (gram, bar[..., :size, :size]), (diagonal, bar[..., :width, :width].diagonal(dim1=-2, dim2=-1))
    outputs, bars = zip(*((out, bar.sum_to_size(out.shape)) for out, bar in bars if out.requires_grad), strict=True)
    return torch.autograd.grad(outputs, [leaf for leaf in leaves if isinstance(leaf, Tensor)], bars, allow_unused=True)

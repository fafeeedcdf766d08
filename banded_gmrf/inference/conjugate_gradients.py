"""Solution of many symmetric positive definite systems at once, by conjugate gradients; differentiable once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Convergence(NamedTuple):
    """How a solve ended: ``iterations``, and the largest ``residual`` of its systems relative to their right-hand sides."""

    iterations: int
    residual: float


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    b: Tensor,
    preconditioner: Callable[[Tensor], Tensor],
    ndim: int,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Convergence]:
    """Solve many symmetric positive definite systems A x = b at once, from x = 0.

    Args:
        operator, preconditioner: A, and an approximation of A⁻¹.
        b: right-hand sides (*batch, *grid).
        ndim: axes of the grid.
        tolerance: for ‖b - A x‖ / ‖b‖.
        max_iterations: the most products with A, one more for the residual not counted.

    Returns:
        x, and its convergence, the residual computed from x itself.
    """
    axes = tuple(range(-ndim, 0))

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).sum(axes, keepdim=True)

    x, residual = torch.zeros_like(b), b.clone()
    limit = tolerance**2 * dot(b, b)
    direction = preconditioned = preconditioner(residual)
    rho = dot(residual, preconditioned)
    iterations = 0
    while iterations < max_iterations:
        active = dot(residual, residual) > limit
        if not active.any():
            break
        product = operator(direction)
        step = (rho / dot(direction, product)).where(active, 0)
        x += step * direction
        residual -= step * product
        preconditioned = preconditioner(residual)
        rho, previous = dot(residual, preconditioned), rho
        direction = preconditioned + (rho / previous).where(active, 0) * direction
        iterations += 1
    error = b - operator(x)
    norm = dot(b, b)
    relative = (dot(error, error) / norm).where(norm != 0, 0).sqrt()
    return x, Convergence(iterations, float(relative.max()) if relative.numel() else 0.0)


class ImplicitGradient(torch.autograd.Function):
    """Zero, with the derivative of A⁻¹ r for a symmetric A: of a residual r = b - A x it gives x that of A⁻¹ b."""

    @staticmethod
    def forward(ctx, residual: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        return torch.zeros_like(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        return ctx.solve(g), None

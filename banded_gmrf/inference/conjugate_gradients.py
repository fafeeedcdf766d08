"""Solution of many symmetric positive definite systems at once, by conjugate gradients; differentiable once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NotPositiveDefiniteError


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

    Raises:
        torch.linalg.LinAlgError, which is a ValueError here: A is not positive definite, or not finite.
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
        curvature = dot(direction, product)
        if not (((curvature > 0) & curvature.isfinite()) | ~active).all():
            raise NotPositiveDefiniteError(
                f"conjugate gradients met a direction without finite, positive curvature in iteration {iterations + 1}: the "
                "system is singular, or the input is not positive-definite"
            )
        step = (rho / curvature).where(active, 0)
        x += step * direction
        residual -= step * product
        preconditioned = preconditioner(residual)
        rho, previous = dot(residual, preconditioned), rho
        direction = preconditioned + (rho / previous).where(active, 0) * direction
        iterations += 1
    x = x + 0 * dot(b, b)  # NaN or infinity on the right-hand side is no solution of 0
    return x, Convergence(iterations, relative_residual(b - operator(x), b, ndim))


def relative_residual(error: Tensor, b: Tensor, ndim: int) -> float:
    """The largest ‖b - A x‖ / ‖b‖ of all systems, of errors b - A x (*batch, *grid); NaN if any is."""
    axes = tuple(range(-ndim, 0))
    norm = b.square().sum(axes)
    relative = (error.square().sum(axes) / norm).where(norm != 0, 0).sqrt()
    return float(relative.max()) if relative.numel() else 0.0


class ImplicitGradient(torch.autograd.Function):
    """Zero, with the derivative of A⁻¹ r for a symmetric A: of a residual r = b - A x it gives x that of A⁻¹ b.

    A second derivative is refused: x is a constant in the first one.
    """

    @staticmethod
    def forward(ctx, residual: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        ctx.save_for_backward(residual)
        return torch.zeros_like(residual)

    @staticmethod
    def backward(ctx, g: Tensor):
        # The result hangs on the residual, hence on A: whatever asks for a second derivative by A comes past the refusal.
        return _Once.apply(ctx.solve(g.detach()), *ctx.saved_tensors, g), None


class _Once(torch.autograd.Function):
    """The first argument, for which no derivative is known."""

    @staticmethod
    def forward(ctx, value: Tensor, *depends_on: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        raise NotImplementedError(
            "solutions of a posterior's systems are differentiable once: for second derivatives use the transformations of "
            "torch.func, which the method 'direct' takes"
        )

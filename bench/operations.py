"""The operations that are timed: what each is given, what must come out, how the library is called, and the bytes it must move.

The bytes are the fewest of "What fast means" in docs/design.md for the coefficients, and each vector once. A likelihood and a
sample read the coefficients once, the gradient of a factor is written once, and every triangular solve of a backward pass reads
the coefficients again. With many samples for each factor most of what moves are vectors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import banded_gmrf as bg
import gmrf_kernels

from .cases import Case, Problem, vector_dtype

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Prepared:
    """A call that is ready to be timed, everything converted: ``run()`` is timed, ``read`` puts its result into tensors."""

    run: Callable[[], Any]
    read: Callable[[Any], Tensors] = lambda result: result


@dataclass(frozen=True)
class Operation:
    """One thing to time.

    Attributes:
        title: for tables and plots.
        given: the vectors that go in.
        expected: what must come out; none of it from a triangular solve.
        prepare: the library's call as a function without arguments.
        coefficients: how often all coefficients, or gradients of them, must be read or written.
        vectors: how often a vector for each sample must be read or written.
    """

    title: str
    given: Callable[[Problem], Tensors]
    expected: Callable[[Problem], Tensors]
    prepare: Callable[[Problem], Callable[[], Tensors]]
    coefficients: int
    vectors: int

    def bytes(self, case: Case) -> int:
        """The fewest bytes that must be read and written."""
        return self.coefficients * case.coefficient_bytes + self.vectors * case.vector_bytes


# The calls hold on to what they need of the problem and no more, so that its memory can be told.


def _log_prob(problem: Problem) -> Callable[[], Tensors]:
    x, stencil, log_diag, off_diag = problem.x, problem.stencil, problem.factor.log_diag, problem.factor.off_diag
    return lambda: (-bg.negative_log_likelihood(x, log_diag, off_diag, stencil),)


def _log_prob_grad(problem: Problem) -> Callable[[], Tensors]:
    x, stencil, (log_diag, off_diag) = problem.x, problem.stencil, trained(problem)

    def run():
        value = -bg.negative_log_likelihood(x, log_diag, off_diag, stencil)
        return value.detach(), *torch.autograd.grad(value.sum(), (log_diag, off_diag))

    return run


def _sample(problem: Problem) -> Callable[[], Tensors]:
    factor, u = problem.factor, problem.white
    return lambda: (factor.solve(u, transpose=True),)


def _rsample_grad(problem: Problem) -> Callable[[], Tensors]:
    u, g, stencil, (log_diag, off_diag) = problem.white, problem.cotangent, problem.stencil, trained(problem)

    def run():
        x = bg.StencilCholesky(log_diag, off_diag, stencil).solve(u, transpose=True)
        return x.detach(), *torch.autograd.grad(x, (log_diag, off_diag), g)

    return run


def _solve(problem: Problem) -> Callable[[], Tensors]:
    factor, b = problem.factor, problem.cotangent
    return lambda: (factor.solve(b),)


def _precision_solve(problem: Problem) -> Callable[[], Tensors]:
    factor, (b,) = problem.factor, _precision_times_x(problem)
    return lambda: (factor.solve(factor.solve(b), transpose=True),)


def _precision_times_x(problem: Problem) -> Tensors:
    return (problem.reference_matvec(problem.white),)


def _expected_rsample_grad(problem: Problem) -> Tensors:
    with bg.use_backend("reference"):
        diag, off_diag = gmrf_kernels.outer(problem.x, problem.v, problem.stencil.offsets, problem.stencil.ndim, sample_ndim=1)
    return problem.x, -diag * problem.factor.diag, -off_diag


def by_reference(prepare: Callable[[Problem], Callable[[], Tensors]]) -> Callable[[Problem], Tensors]:
    """The same call on the reference backend."""

    def expected(problem: Problem) -> Tensors:
        with bg.use_backend("reference"):
            return prepare(problem)()

    return expected


def trained(problem: Problem) -> Tensors:
    """The factor's two tensors as leaves of autograd."""
    factor = problem.factor
    return tuple(tensor.detach().requires_grad_() for tensor in (factor.log_diag, factor.off_diag))


OPERATIONS = {
    "log_prob": Operation(
        title="log likelihood",
        given=lambda problem: (problem.x,),
        expected=by_reference(_log_prob),
        prepare=_log_prob,
        coefficients=1,
        vectors=1,  # x
    ),
    "log_prob_grad": Operation(
        title="log likelihood and its gradient",
        given=lambda problem: (problem.x,),
        expected=by_reference(_log_prob_grad),
        prepare=_log_prob_grad,
        coefficients=2,
        vectors=1,  # x
    ),
    "sample": Operation(
        title="sample",
        given=lambda problem: (problem.white,),
        expected=lambda problem: (problem.x,),
        prepare=_sample,
        coefficients=1,
        vectors=2,  # u, x
    ),
    "rsample_grad": Operation(
        title="sample and its gradient",
        given=lambda problem: (problem.white, problem.cotangent),
        expected=_expected_rsample_grad,
        prepare=_rsample_grad,
        coefficients=3,
        vectors=4,  # u, x, and in the backward pass g, x
    ),
    "solve": Operation(
        title="solve with L",
        given=lambda problem: (problem.cotangent,),
        expected=lambda problem: (problem.v,),
        prepare=_solve,
        coefficients=1,
        vectors=2,  # b, x
    ),
    "precision_solve": Operation(
        title="solve with the precision",
        given=_precision_times_x,
        expected=lambda problem: (problem.x,),
        prepare=_precision_solve,
        coefficients=2,
        vectors=4,  # b, L⁻¹b written and read again, x
    ),
}


def difference(results: Tensors, expected: Tensors) -> float:
    """The largest difference of any result, relative to the largest expected value; infinite for other shapes or for NaN."""
    worst = 0.0
    for result, right in zip(results, expected, strict=True):
        if result.shape != right.shape:
            return math.inf
        if right.numel() > 0:
            right = right.to(vector_dtype(right.dtype))
            relative = (result.to(right) - right).abs().max().item() / (right.abs().max().item() or 1.0)
            worst = max(worst, math.inf if math.isnan(relative) else relative)
    return worst


def tolerance(case_dtype: torch.dtype) -> float:
    """What `difference` may be: a thousand rounding errors of the arithmetic, and a few of the dtype of the result.

    Results are sums of at most K products, along chains that a well-conditioned factor shortens: right ones differ by some
    ten rounding errors, wrong ones by a sizeable part of the value.
    """
    return max(1024 * torch.finfo(vector_dtype(case_dtype)).eps, 4 * torch.finfo(case_dtype).eps)

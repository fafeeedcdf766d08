"""What ``python -m bench calls`` calls: groups of calls that are compared with each other."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

import banded_gmrf as bg
from gmrf_kernels import backends, standard_normal

from .cases import Problem
from .operations import trained

Call = Callable[[], object]

# Whole-grid factors beside a field: so many, unless they take more memory; the density holds a few times as much.
_RANKS = 1, 16, 64
_MOST_FACTOR_BYTES = 2**28


@dataclass(frozen=True)
class Group:
    """Calls that are compared with each other.

    Attributes:
        title: what they do.
        calls: by layer, or by what is called.
        unit: the name of the call by whose time the others are divided.
        aims: the project's, for these ratios, in words.
        alike: all calls have the same result, which is checked before they are timed.
    """

    title: str
    calls: dict[str, Call]
    unit: str
    aims: dict[str, str]
    alike: bool = False


class _Shortest(torch.autograd.Function):
    """The shortest function of autograd of two tensors: no checks, and nothing kept by autograd.

    ``value()`` gives its value, and with what ``gradients`` is to be called.
    """

    @staticmethod
    def forward(ctx, value, gradients, log_diag, off_diag):
        result, kept = value()
        ctx.gradients = lambda: gradients(kept)
        return result

    @staticmethod
    def backward(ctx, _):
        return None, None, *ctx.gradients()


# As for operations, the calls hold on to what they need and no more.


def fixed_costs(problem: Problem) -> Iterator[Group]:
    """A solve with Lᵀ, a likelihood, and a likelihood with its gradient, each at all layers."""
    factor, stencil, x = problem.factor, problem.stencil, problem.x
    log_diag, off_diag = factor.log_diag, factor.off_diag
    backend, operators = backends.backend_for(log_diag.device), torch.ops.gmrf_kernels
    offsets, flat = stencil.offsets, [component for offset in stencil.offsets for component in offset]
    # Kernels take it in float32 beside 16-bit off-diagonals.
    exact_log_diag = log_diag.to(x.dtype)
    loc = torch.zeros_like(log_diag)
    q = bg.GMRF(loc, factor, validate_args=False)
    yield Group(
        "solve with Lᵀ",
        {
            "backend": lambda: backend.solve(exact_log_diag, off_diag, x, offsets, True, True),
            "operator": lambda: operators.solve(exact_log_diag, off_diag, x, flat, True, True),
            "function": lambda: factor.solve(x, transpose=True),
        },
        "backend",
        {"function": "≤ 2"},
        alike=True,
    )
    yield Group(
        "log likelihood",
        {
            "backend": lambda: backend.nll(x, exact_log_diag, off_diag, offsets)[0],
            "operator": lambda: operators.nll(x, exact_log_diag, off_diag, flat)[0],
            "function": lambda: bg.negative_log_likelihood(x, log_diag, off_diag, stencil),
            "distribution": lambda: -q.log_prob(x),
        },
        "backend",
        {"function": "≤ 2"},
        alike=True,
    )
    leaves = trained(problem)
    exact_leaves = (exact_log_diag.detach().requires_grad_(), leaves[1])
    ones = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device)

    def value() -> tuple:
        return backend.nll(x, exact_log_diag, off_diag, offsets)

    def gradients(whitened: torch.Tensor) -> tuple:
        return backend.nll_factor_grad(ones, x, whitened, exact_log_diag, offsets, off_diag.dtype)

    def of_backend() -> object:
        return gradients(value()[1])

    def of_operator() -> object:
        return torch.autograd.grad(operators.nll(x, *exact_leaves, flat)[0].sum(), exact_leaves)

    def of_function() -> object:
        return torch.autograd.grad(bg.negative_log_likelihood(x, *leaves, stencil).sum(), leaves)

    def of_distribution() -> object:
        trained_q = bg.GMRF(loc, bg.StencilCholesky(*leaves, stencil), validate_args=False)
        return torch.autograd.grad(-trained_q.log_prob(x).sum(), leaves)

    known_value, known_gradients = value()[0], of_backend()

    def of_torch() -> object:
        known = _Shortest.apply(lambda: (known_value.detach(), None), lambda _: known_gradients, *leaves)
        return torch.autograd.grad(known.sum(), leaves)

    def shortest() -> object:
        return torch.autograd.grad(_Shortest.apply(value, gradients, *leaves).sum(), leaves)

    calls = {"backend": of_backend, "torch alone": of_torch, "backend in torch": shortest}
    calls |= {"operator": of_operator, "function": of_function}
    calls |= {"distribution": of_distribution}
    yield Group("log likelihood and its gradient", calls, "backend", {"function": "≤ 2.2"}, alike=True)


def constructions(problem: Problem) -> Iterator[Group]:
    """What a factor and a distribution cost to make, beside the likelihood that follows."""
    factor, stencil, x = problem.factor, problem.stencil, problem.x
    log_diag, off_diag = factor.log_diag, factor.off_diag
    loc = torch.zeros_like(log_diag)
    yield Group(
        "construction",
        {
            "likelihood": lambda: bg.negative_log_likelihood(x, log_diag, off_diag, stencil),
            "StencilCholesky": lambda: bg.StencilCholesky(log_diag, off_diag, stencil),
            "GMRF, unchecked": lambda: bg.GMRF(loc, factor, validate_args=False),
            "GMRF, checked": lambda: bg.GMRF(loc, factor, validate_args=True),
        },
        "likelihood",
        {"GMRF, checked": "≤ 1"},
    )


def samples_beside_solves(problem: Problem) -> Iterator[Group]:
    """A sample of the distribution, the solve in it, the same with numbers drawn before it, and as many numbers by torch."""
    factor, white = problem.factor, problem.white
    loc = torch.zeros_like(factor.log_diag)
    q = bg.GMRF(loc, factor, validate_args=False)

    def drawn_before() -> torch.Tensor:
        return factor.solve(standard_normal(white.shape, white.dtype, white.device), transpose=True).add_(loc)

    yield Group(
        "sample",
        {
            "solve": lambda: factor.solve(white, transpose=True),
            "numbers, then a solve": drawn_before,
            "sample": lambda: q.sample((len(white),)),
            "torch.randn": lambda: torch.randn(white.shape, dtype=white.dtype, device=white.device),
        },
        "solve",
        {"sample": "≤ 1.3"} if problem.case.batch > 1 else {},
    )


def samples_of_one_factor(problem: Problem) -> Iterator[Group]:
    """Samples that share a factor, in one call and one by one."""
    factor, white = problem.factor, problem.white
    q = bg.GMRF(torch.zeros_like(factor.log_diag), factor, validate_args=False)
    one, count = white[:1].contiguous(), len(white)
    yield Group(
        f"{count} samples of one factor",
        {
            "1 solve": lambda: factor.solve(one, transpose=True),
            f"{count} solves, one by one": lambda: [factor.solve(one, transpose=True) for _ in range(count)],
            f"1 solve of {count} vectors": lambda: factor.solve(white, transpose=True),
            f"{count} samples": lambda: q.sample((count,)),
        },
        "1 solve",
        {f"{count} samples": f"well under {count}"},
    )


def low_rank_densities(problem: Problem) -> Iterator[Group]:
    """A field's log density, and its gradient, without and with factors of the whole grid."""
    stencil, x = problem.stencil, problem.x
    log_diag, off_diag = leaves = trained(problem)
    loc = torch.zeros_like(log_diag, requires_grad=False)
    generator = torch.Generator().manual_seed(1)
    ranks = sorted({min(rank, loc[0].numel()) for rank in _RANKS if rank * loc.nbytes <= _MOST_FACTOR_BYTES})
    most = 0.1 * torch.randn(len(loc), max(ranks, default=0), *loc.shape[1:], generator=generator)

    def field(*factors: torch.Tensor) -> bg.GMRF | bg.LowRankGMRF:
        factor = bg.StencilCholesky(log_diag, off_diag, stencil)
        return (bg.LowRankGMRF if factors else bg.GMRF)(loc, factor, *factors, validate_args=False)

    def value(*factors: torch.Tensor) -> object:
        with torch.no_grad():
            return field(*factors).log_prob(x)

    def gradients(*factors: torch.Tensor) -> object:
        return torch.autograd.grad(field(*factors).log_prob(x).sum(), (*leaves, *factors))

    kinds = {"GMRF": ()}
    for rank in ranks:
        factors = most[:, :rank].to(loc).contiguous()
        kinds[f"R = {rank}"] = (factors.requires_grad_(),)
    for title, call in (("log density", value), ("log density and its gradient", gradients)):
        calls = {name: partial(call, *factors) for name, factors in kinds.items()}
        yield Group(f"{title}, low rank", calls, "GMRF", {"R = 16": "≤ 3"})

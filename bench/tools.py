"""The tools of `banded_gmrf` that ``python -m bench toolbox`` measures: what each is given, and how it is called.

Small grids have the factors of `fields`: iterations of a solver depend on the covariance. Large grids have random ones.
One file because it is one table: a row for each tool, below what the rows share.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import banded_gmrf as bg
from banded_gmrf.diagnostics import energy_score, variogram_score

from . import raster
from .cases import Case, Problem
from .fields import Fields
from .raster import Raster

_NOISE = 25 / 127.5  # standard deviation for gray levels in [-1, 1]


@dataclass(frozen=True)
class Sizes:
    """How much is asked of the tools; the small grid is that of the fields.

    Attributes:
        large: pixels along each side of the large grid.
        batch: small images at once.
        sites: covariance columns.
        samples: for an estimate, of a variance or a factor.
        eigenpairs: of the covariance on the small grid.
        block: pixels along each side of what is to be inpainted.
        raster: sites along each side of the raster, of which a part is seen.
        sparse_raster: of one whose field has a sparse precision alone.
        posterior_samples: of the raster.
    """

    large: int = 512
    batch: int = 64
    sites: int = 64
    samples: int = 1000
    eigenpairs: int = 1000
    block: int = 24
    raster: int = 96
    sparse_raster: int = 344
    posterior_samples: int = 200


class Given:
    """What the tools work on, made in the process that calls them.

    Attributes:
        sizes: the numbers.
        stencil_size, stencil: of the fields' factors, and of the large one.
        priors: a GMRF of mean 0 for each of the fields' factors, batch (B,).
        prior: the first of them, without batch.
        residuals: (S, H, W).
        generator: for what is random, on the CPU.
    """

    def __init__(self, fields: Fields, sizes: Sizes, device: str):
        log_diag, off_diag, self.residuals = (
            torch.from_numpy(array).to(device) for array in (fields.log_diag, fields.off_diag, fields.residuals)
        )
        self.sizes, self.device = sizes, device
        self.stencil_size, self.stencil = fields.stencil_size, bg.Stencil.square(fields.stencil_size)
        self.loc = torch.zeros_like(log_diag[0])
        self.priors = bg.GMRF(self.loc, bg.StencilCholesky(log_diag, off_diag, self.stencil))
        self.prior = bg.GMRF(self.loc, bg.StencilCholesky(log_diag[0], off_diag[0], self.stencil))
        self.generator = torch.Generator().manual_seed(0)

    @functools.cached_property
    def batch(self) -> bg.GMRF:
        """As many small images as asked for, each with a copy of the first factor."""
        tensors = (t.expand(self.sizes.batch, *t.shape).contiguous() for t in (self.prior.log_diag, self.prior.off_diag))
        return bg.GMRF(self.loc, bg.StencilCholesky(*tensors, self.stencil))

    def large_factor(self, stencil_size: int) -> bg.StencilCholesky:
        """A random one for one large image."""
        grid = (self.sizes.large, self.sizes.large)
        factor = Problem(Case(str(stencil_size), grid, batch=1, device=self.device)).factor
        return bg.StencilCholesky(factor.log_diag[0], factor.off_diag[0], factor.stencil)

    @functools.cached_property
    def large_tensors(self) -> tuple[Tensor, Tensor]:
        """``log_diag`` and ``off_diag`` of one large image, leaves of autograd."""
        factor = self.large_factor(self.stencil_size)
        return factor.log_diag.requires_grad_(), factor.off_diag.requires_grad_()

    @functools.cached_property
    def raster(self) -> Raster:
        """The raster, always on the CPU."""
        return Raster(self.sizes.raster)

    @functools.cached_property
    def sparse_raster(self) -> Raster:
        """One with a `SparseGMRF`, always on the CPU."""
        return Raster(self.sizes.sparse_raster, sparse=True)

    @property
    def large(self) -> bg.GMRF:
        """The large image, of mean 0."""
        log_diag, off_diag = self.large_tensors
        return bg.GMRF(torch.zeros_like(log_diag), bg.StencilCholesky(log_diag, off_diag, self.stencil))


@dataclass(frozen=True)
class Tool:
    """One call to measure.

    Attributes:
        title: what is called.
        on: on which grid, in words for a table.
        prepare: everything that is not measured, and the call as a function without arguments.
        read: numbers from its result that say how well it did.
        aim: for the project, on a CPU with two cores; empty if none was stated.
        by_hand: another way to the same, prepared alike, which takes turns with the call; None if there is none.
        hand: that way in words.
    """

    title: str
    on: str
    prepare: Callable[[Given], Callable[[], Any]]
    read: Callable[[Any], dict[str, float]] = lambda result: {}
    aim: str = ""
    by_hand: Callable[[Given], Callable[[], Any]] | None = None
    hand: str = ""


# As for operations, the calls hold on to what they need and no more, so that their memory can be told.


def _variance(q: bg.GMRF, **options: Any) -> Callable[[], Any]:
    def run():
        with torch.no_grad():
            return q.marginal_variance(**options)

    return run


def _variance_gradient(given: Given) -> Callable[[], Any]:
    q, tensors = given.large, given.large_tensors
    return lambda: torch.autograd.grad(q.marginal_variance("exact").variance.sum(), tensors)


def _covariance_columns(given: Given) -> Callable[[], Any]:
    q, n = given.prior, given.loc.numel()
    sites = torch.arange(0, n, n // given.sizes.sites)[: given.sizes.sites]
    sites = torch.stack(torch.unravel_index(sites, given.loc.shape), -1)
    return lambda: q.covariance_columns(sites)


def _divergence(given: Given) -> Callable[[], Any]:
    q = given.prior
    p = bg.GMRF(given.loc, q.precision_cholesky.nearest(bg.Stencil.square(given.stencil_size - 2)))
    return lambda: torch.distributions.kl_divergence(q, p)


def _divergence_large(given: Given) -> Callable[[], Any]:
    factors = (given.large_factor(size) for size in (given.stencil_size, given.stencil_size - 2))
    q, p = (bg.GMRF(torch.zeros_like(factor.log_diag), factor) for factor in factors)
    return lambda: bg.kl_divergence(q, p, method="monte_carlo")


def _score(given: Given, score: Callable[[bg.GMRF, Tensor], Tensor]) -> Callable[[], Any]:
    return functools.partial(score, given.priors, given.residuals)


def _nearest(given: Given) -> Callable[[], Any]:
    factor, stencil = given.prior.precision_cholesky, bg.Stencil.square(given.stencil_size - 2)
    return lambda: factor.nearest(stencil)


def _from_precision(given: Given) -> Callable[[], Any]:
    precision = bg.matern_precision(given.loc.shape, 8, 1, device=given.device)
    return lambda: bg.StencilCholesky.from_precision(precision)


def _from_samples(given: Given) -> Callable[[], Any]:
    white = torch.randn(given.sizes.samples, *given.loc.shape, generator=given.generator).to(given.device)
    samples, stencil = given.prior.precision_cholesky.solve(white, transpose=True), given.stencil
    return lambda: bg.StencilCholesky.from_samples(samples, stencil)


def _factor_from(
    covariance: Callable[[Tensor, Tensor], Tensor], stencil: bg.Stencil, grid: torch.Size, device: str
) -> bg.StencilCholesky:
    with torch.device(device):  # on which a covariance function is given its sites
        return bg.StencilCholesky.from_covariance(covariance, stencil, grid)


def _from_covariance(given: Given) -> Callable[[], Any]:
    return functools.partial(_factor_from, _matern, given.stencil, given.loc.shape, given.device)


def _matern(a: Tensor, b: Tensor) -> Tensor:
    """Matérn covariance of smoothness 3/2, range 8 pixels and variance 1, with a nugget of 1 %."""
    distance = (a - b).float().norm(dim=-1) * 3**0.5 / 8
    return (1 + distance) * torch.exp(-distance) + 0.01 * (distance == 0)


def _project_on_leading(given: Given) -> Callable[[], Any]:
    q, x, k = given.priors, given.residuals, given.sizes.eigenpairs
    return lambda: q.project_on_leading(x, k)


def _observation(given: Given) -> Tensor:
    noise = torch.randn(given.residuals.shape, generator=given.generator).to(given.device)
    return given.residuals + _NOISE * noise


def _posterior(given: Given) -> Callable[[], Any]:
    priors, observation = given.priors, _observation(given)
    return lambda: _solved(priors.posterior(observation, _NOISE**2, method="iterative"))


def _posterior_gradient(given: Given) -> Callable[[], Any]:
    factor, observation = given.priors.precision_cholesky, _observation(given)
    tensors = [t.detach().clone().requires_grad_() for t in (factor.log_diag, factor.off_diag)]
    q = bg.GMRF(given.loc, bg.StencilCholesky(*tensors, given.stencil))
    return lambda: torch.autograd.grad(q.posterior(observation, _NOISE**2).mean.sum(), tensors)


def _posterior_correlated(given: Given) -> Callable[[], Any]:
    priors, observation = given.priors, _observation(given)

    def covariance(a: Tensor, b: Tensor) -> Tensor:
        return _NOISE**2 * torch.exp(-(a - b).float().norm(dim=-1) / 2)

    noise = bg.GMRF(given.loc, _factor_from(covariance, given.stencil, given.loc.shape, given.device))
    return lambda: _solved(priors.posterior(observation, noise=noise, method="iterative"))


def _posterior_samples(given: Given) -> Callable[[], Any]:
    priors, observation = given.priors, _observation(given)
    return lambda: priors.posterior(observation, _NOISE**2).sample((16,))


def _log_evidence(given: Given) -> Callable[[], Any]:
    priors, observation = given.priors, _observation(given)
    return lambda: priors.posterior(observation, _NOISE**2).log_evidence


def _condition(given: Given, known: Tensor) -> Callable[[], Any]:
    priors, residuals, known = given.priors, given.residuals, known.to(given.device)
    return lambda: _solved(priors.condition(known, residuals, method="iterative"))


def _solved(conditional: bg.ConditionalGMRF) -> tuple[Tensor, Any]:
    """Its mean, and how the solver came to it."""
    return conditional.mean, conditional.convergence


def _half(given: Given) -> Tensor:
    known = torch.ones(given.loc.shape, dtype=torch.bool)
    known[len(known) // 2 :] = False
    return known


def _scattered(given: Given) -> Tensor:
    return torch.rand(given.loc.shape, generator=given.generator) < 0.1


def _around_block(given: Given) -> Tensor:
    known = torch.ones(given.loc.shape, dtype=torch.bool)
    top, left = ((size - given.sizes.block) // 2 for size in known.shape)
    known[top : top + given.sizes.block, left : left + given.sizes.block] = False
    return known


def _standard_error(estimate: Any) -> dict[str, float]:
    return {"largest relative standard error": (estimate.standard_error / estimate.variance).max().item()}


def _eigenpair_residual(eigenpairs: Any) -> dict[str, float]:
    return {"largest residual norm / eigenvalue": eigenpairs.residuals.max().item()}


def _convergence(solved: tuple[Tensor, Any]) -> dict[str, float]:
    return {"iterations": solved[1].iterations, "relative residual": solved[1].residual}


def _raster_tools(sizes: Sizes) -> dict[str, Tool]:
    """Inference on a raster, each task beside the same by hand."""
    on, factor = f"raster, {sizes.raster} × {sizes.raster}", "a factor of SciPy's splu"
    count, block = sizes.posterior_samples, max(1, sizes.raster // 8)
    of = {"count": count, "block": block}

    def tool(title: str, name: str, hand: str, *arguments: str, aim: str = "") -> Tool:
        """The function of that name in `raster`, and the one that does it by hand."""
        values = [of[argument] for argument in arguments]
        return Tool(
            title,
            on,
            lambda given: getattr(raster, name)(given.raster, *values),
            aim=aim,
            by_hand=lambda given: getattr(raster, f"{name}_by_hand")(given.raster, *values),
            hand=hand,
        )

    return {
        "raster_mean": tool("posterior: factor and mean", "mean", factor),
        "raster_sparse_mean": Tool(
            "posterior of a sparse precision: factor and mean",
            f"raster, {sizes.sparse_raster} × {sizes.sparse_raster}",
            lambda given: raster.mean(given.sparse_raster),
            aim="under 5 s",
            by_hand=lambda given: raster.mean_by_hand(given.sparse_raster),
            hand=factor,
        ),
        "raster_variance": tool(
            "posterior: factor, mean and variances", "variance", "kriging with a dense factor", aim="under 1 s"
        ),
        "raster_samples": tool(
            f"posterior: factor and {count} samples", "samples", f"{factor}, {count} solves", "count", aim="under 3 s"
        ),
        "raster_evidence": tool(
            "evidence and its gradient in 3 parameters", "evidence_gradient", "8 factors of splu, and differences"
        ),
        "raster_fit": Tool(
            "3 parameters by maximum evidence",
            on,
            lambda given: raster.fit(given.raster),
            lambda fit: {"evaluations": fit.evaluations, "converged": float(fit.converged)},
            "under 20 s",
        ),
        "raster_counts": tool("Laplace for counts: mode and variances", "counts", "Newton with splu, the mode alone"),
        "raster_constrained": tool("posterior of sum 0: mean and variances", "constrained", f"{factor}, the mean alone"),
        "raster_blocks": tool(
            f"coverage of blocks of {block} × {block}", "blocks", f"{factor}, the blocks' variances", "block"
        ),
    }


def tools(sizes: Sizes, fields: Fields) -> dict[str, Tool]:
    """All that is measured, by name."""
    f, pixels = f"f = {fields.stencil_size}", " × ".join(map(str, fields.log_diag.shape[1:]))
    small, large = f"{f}, {pixels}", f"{f}, {sizes.large} × {sizes.large}"
    many, solved = f"{f}, {sizes.batch} × {pixels}", f"{f}, {len(fields.residuals)} × {pixels}"
    iterations = "under 100 iterations to 1e-6"
    return {
        "variance": Tool(
            "marginal variance, exact", small, lambda given: _variance(given.prior, method="exact"), aim="under 3 s"
        ),
        "variance_batch": Tool(
            "marginal variance, exact", many, lambda given: _variance(given.batch, method="exact"), aim="under 3 s"
        ),
        "variance_large": Tool(
            "marginal variance, exact", large, lambda given: _variance(given.large, method="exact"), aim="within 8 GiB"
        ),
        "variance_large_gradient": Tool("marginal variance, exact, and its gradient", large, _variance_gradient),
        "variance_monte_carlo": Tool(
            f"marginal variance, Monte Carlo, {sizes.samples} samples",
            large,
            lambda given: _variance(given.large, method="monte_carlo", num_samples=sizes.samples),
            _standard_error,
        ),
        "covariance_columns": Tool(f"covariances of {sizes.sites} sites with all", small, _covariance_columns),
        "divergence": Tool(
            f"Kullback-Leibler divergence from f = {fields.stencil_size - 2}, exact",
            small,
            _divergence,
            lambda nats: {"nats per pixel": nats.item() / fields.log_diag[0].size},
        ),
        "divergence_large": Tool(
            f"Kullback-Leibler divergence from f = {fields.stencil_size - 2}, Monte Carlo", large, _divergence_large
        ),
        "nearest": Tool(f"nearest factor with f = {fields.stencil_size - 2}", small, _nearest),
        "from_precision": Tool("exact factor of a Matérn precision", pixels, _from_precision),
        "from_samples": Tool(f"factor from {sizes.samples} samples", small, _from_samples),
        "from_covariance": Tool("factor from a Matérn covariance", small, _from_covariance),
        "leading_eigenpairs": Tool(
            f"{sizes.eigenpairs} leading eigenpairs",
            small,
            lambda given: functools.partial(given.prior.leading_eigenpairs, sizes.eigenpairs),
            _eigenpair_residual,
        ),
        "project_on_leading": Tool(f"projection on {sizes.eigenpairs} leading eigenvectors", solved, _project_on_leading),
        "posterior": Tool("posterior mean given noise of σ = 25/127.5", solved, _posterior, _convergence, iterations),
        "posterior_correlated": Tool(
            "the same, noise correlated over 2 pixels", solved, _posterior_correlated, _convergence, iterations
        ),
        "posterior_gradient": Tool("posterior mean and its gradient in the factors", solved, _posterior_gradient),
        "posterior_samples": Tool("16 samples of each posterior", solved, _posterior_samples),
        "log_evidence": Tool("log evidence of noisy observations", solved, _log_evidence),
        "condition_half": Tool(
            "mean given one half", solved, lambda given: _condition(given, _half(given)), _convergence, iterations
        ),
        "condition_scattered": Tool(
            "mean given 10 % of the pixels",
            solved,
            lambda given: _condition(given, _scattered(given)),
            _convergence,
            iterations,
        ),
        "condition_block": Tool(
            f"mean given all but a block of {sizes.block} × {sizes.block}",
            solved,
            lambda given: _condition(given, _around_block(given)),
            _convergence,
            iterations,
        ),
        **_raster_tools(sizes),
        "energy_score": Tool("energy score", solved, lambda given: _score(given, energy_score)),
        "variogram_score": Tool("variogram score", solved, lambda given: _score(given, variogram_score)),
    }

"""Laplace's approximation: the posterior of a field under a likelihood that is not Gaussian, at its mode.

The mode of log p(x) + log p(y | x) is found by Newton's method, each step of which is the mean of a Gaussian posterior. The
curvature at the mode makes the last of these the approximation (Rue, Martino & Chopin, Approximate Bayesian inference for
latent Gaussian models, JRSS B 2009; Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006, section 3.4). The
derivative of the mode is that of the implicit function theorem.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..operators.base import LinearOperator
from ..stencil import as_integer
from ..transformations import is_transforming
from .noise import IndependentNoise, ObservationModel
from .posterior import ConditionalGMRF
from .seen_through import SeenThrough
from .systems import PosteriorSystem

LogLikelihood = Callable[[Tensor], Tensor]

_MAX_HALVINGS = 40


class NewtonConvergence(NamedTuple):
    """How Newton's method ended: its ``iterations``, and the largest ``decrement``, by how many nats the last step promised to
    raise the log density."""

    iterations: int
    decrement: float


class LaplaceGMRF(ConditionalGMRF):
    """Laplace's approximation of a posterior, made by `GMRF.laplace`; a `ConditionalGMRF` around the mode.

    ``log_evidence`` is Laplace's approximation of it. Where the log likelihood is not concave its curvature may be negative at
    some sites; then samples need the method "direct".

    Attributes:
        newton: how the search for the mode ended.
    """

    newton: NewtonConvergence
    _own = (*ConditionalGMRF._own, "newton", "_center")

    def _mean(self, factor=None) -> Tensor:
        return self._center.expand(self._extended_shape())

    def _mean_and_logdet(self) -> tuple[Tensor, Tensor]:
        return self._mean(), self._system.logdet()


class _Expansion(IndependentNoise):
    """A log likelihood that is a sum over sites, to second order about ``center``; the curvature may have any sign."""

    def __init__(self, log_likelihood: LogLikelihood, center: Tensor, gradient: Tensor, curvature: Tensor, shape: torch.Size):
        super().__init__(curvature, shape)
        self._log_likelihood, self._center, self._gradient = log_likelihood, center, gradient

    def score(self, values: Tensor, x: Tensor) -> Tensor:
        return self._gradient + self.diagonal * (self._center - x)

    def root(self, z: Tensor) -> Tensor:
        if (self.diagonal < 0).any():
            raise ValueError("log_likelihood is not concave at the mode: samples need the method 'direct'")
        return super().root(z)

    def log_likelihood(self, values: Tensor, x: Tensor) -> Tensor:
        return self._log_likelihood(x).flatten(-len(self.event_shape)).sum(-1)


def laplace(
    prior,
    log_likelihood: LogLikelihood,
    operator: LinearOperator | None,
    tolerance: float,
    max_iterations: int,
    method: str,
    validate_args: bool | None,
) -> LaplaceGMRF:
    """See `GMRF.laplace`; the operator is on the prior's grid."""
    if not callable(log_likelihood):
        raise TypeError(f"log_likelihood is a {type(log_likelihood).__name__}, expected a function of the field")
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}, expected more than 0")
    if as_integer("max_iterations", max_iterations) < 1:
        raise ValueError(f"max_iterations is {max_iterations}, expected at least 1")
    if is_transforming():
        raise NotImplementedError("laplace takes no transformations of torch.func and no forward derivatives")
    search = _Search(prior, log_likelihood, operator, method, validate_args)
    mode, newton = search.run(tolerance, max_iterations)
    # One step more, from a constant mode: it adds nothing but the derivative of the mode. The curvature is that at the mode.
    expansion = search.expansion(mode, constant_curvature=True)
    if torch.is_grad_enabled():
        mode = mode + search.step(mode, expansion)
    model = search.expansion(mode)
    known = torch.zeros(prior.event_shape, dtype=torch.bool, device=prior.loc.device)
    shape = model.event_shape
    posterior = LaplaceGMRF(
        prior.expand(mode.shape[: mode.ndim - len(known.shape)]),
        known,
        prior.loc.new_zeros(prior.event_shape),
        prior.loc.new_zeros(shape),
        model,
        method=method,
        validate_args=validate_args,
    )
    posterior.newton, posterior._center = newton, mode
    return posterior


class _Search:
    """Newton's method for the mode, all of a batch at once, in float64."""

    def __init__(self, prior, log_likelihood: LogLikelihood, operator: LinearOperator | None, method: str, validate_args):
        self._operator, self._log_likelihood, self._method = operator, log_likelihood, method
        self._prior = prior.prior_in_double()
        self._grid, self._loc = prior.event_shape, prior.loc.double()
        self._shape = self._grid if operator is None else operator.output_shape
        self._known = torch.zeros(self._grid, dtype=torch.bool, device=prior.loc.device)
        with torch.no_grad():
            values = log_likelihood(self._seen(self._loc))
            if not isinstance(values, Tensor) or values.shape[max(0, values.ndim - len(self._shape)) :] != self._shape:
                came = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(
                    f"log_likelihood(x) is {came}, expected (*batch, {', '.join(map(str, self._shape))}): site by site"
                )
            if not values.isfinite().all():
                raise ValueError("log_likelihood has NaN or infinite entries at the prior's mean, expected finite ones")
            batch = torch.broadcast_shapes(values.shape[: values.ndim - len(self._shape)], self._loc.shape[: -len(self._grid)])
            self._start = self._loc.detach().expand(*batch, *self._grid)
        if validate_args:
            self._check_sites()

    def run(self, tolerance: float, max_iterations: int) -> tuple[Tensor, NewtonConvergence]:
        """The mode, a constant, and how it was found."""
        with torch.no_grad():
            x = self._start
            height, decrement = self._log_density(x), math.inf
            for iterations in range(1, max_iterations + 1):  # noqa: B007, told below
                step, slope = self._uphill(x)
                scale = torch.ones_like(slope)
                for _ in range(_MAX_HALVINGS):
                    ahead = x + scale.reshape(*scale.shape, *[1] * len(self._grid)) * step
                    new_height = self._log_density(ahead)
                    # Rounding of the height hides what the last steps gain.
                    enough = new_height >= height + 1e-4 * scale * slope - 1e-12 * height.abs()
                    if enough.all():
                        break
                    scale = scale.where(enough, 0.5 * scale)
                stuck = (~enough).reshape(*enough.shape, *[1] * len(self._grid))
                x, height = ahead.where(~stuck, x), new_height.where(enough, height)
                decrement = 0.5 * float(slope.max()) if slope.numel() else 0.0
                if decrement <= tolerance or stuck.all():
                    break
            if not decrement <= tolerance:
                warnings.warn(
                    f"Newton's method stopped after {iterations} iterations, where a step promises {decrement:.1e} nats, above "
                    f"the tolerance of {tolerance:.1e}",
                    RuntimeWarning,
                    stacklevel=4,
                )
            return x, NewtonConvergence(iterations, decrement)

    def expansion(self, x: Tensor, constant_curvature: bool = False, concave: bool = False) -> ObservationModel:
        """The likelihood to second order about x."""
        seen = self._seen(x)
        gradient, curvature = self._derivatives(seen)
        if constant_curvature:
            curvature = curvature.detach()
        model = _Expansion(self._log_likelihood, seen, gradient, curvature.clamp(min=0) if concave else curvature, self._shape)
        return model if self._operator is None else SeenThrough(self._operator, model)

    def step(self, x: Tensor, model: ObservationModel) -> Tensor:
        """Newton's step from x."""
        system = self._system(model)
        return system.solve(model.score(x, x) - system.prior_product(x - self._loc))

    def _uphill(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A step in which the log density rises, and its slope along it."""
        for concave in (False, True):  # where Λ + W has a negative eigenvalue, without the sites that curve the other way
            model = self.expansion(x, concave=concave)
            system = self._system(model)
            if not concave and not system.direct and not self._is_concave(model):
                continue
            uphill = model.score(x, x) - system.prior_product(x - self._loc)
            try:
                step = system.solve(uphill)
            except torch.linalg.LinAlgError:
                if concave:
                    raise
                continue
            break
        return step, (step * uphill).flatten(-len(self._grid)).sum(-1)

    def _is_concave(self, model: ObservationModel) -> bool:
        noise = model if self._operator is None else model.noise
        return bool((noise.diagonal >= 0).all())

    def _system(self, model: ObservationModel) -> PosteriorSystem:
        return PosteriorSystem(self._prior, self._known, model, self._method, 1e-8, 10_000)

    def _seen(self, x: Tensor) -> Tensor:
        return x if self._operator is None else self._operator(x)

    def _log_density(self, x: Tensor) -> Tensor:
        """log p(x) + log p(y | x) up to a constant, (*batch); -∞ where it is NaN."""
        deviation = x - self._loc
        prior = -0.5 * (deviation * self._prior.product(deviation)).flatten(-len(self._grid)).sum(-1)
        total = prior + self._log_likelihood(self._seen(x)).flatten(-len(self._shape)).sum(-1)
        return total.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)

    def _derivatives(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The log likelihood's first derivative, and its second with the other sign, both by site."""
        # Without what depends on the field alone: where nothing is differentiated, the result has no graph.
        graph = torch.is_grad_enabled() and (seen.requires_grad or self._log_likelihood(seen.detach()).requires_grad)
        with torch.enable_grad():
            at = seen if seen.requires_grad else seen.detach().requires_grad_()
            values = self._log_likelihood(at)
            gradient = torch.zeros_like(at)
            if values.requires_grad:
                (gradient,) = torch.autograd.grad(values.sum(), at, create_graph=True, materialize_grads=True)
            second = torch.zeros_like(at)
            if gradient.requires_grad:
                (second,) = torch.autograd.grad(gradient.sum(), at, create_graph=graph, materialize_grads=True)
        if not graph:
            gradient, second = gradient.detach(), second.detach()
        for name, derivative in (("first", gradient), ("second", second)):
            if derivative.isnan().any():
                site = tuple(derivative.isnan().nonzero()[0, -len(self._shape) :].tolist())
                raise ValueError(f"log_likelihood has a {name} derivative that is NaN at site {site}")
        return gradient, -second

    def _check_sites(self) -> None:
        """Raise ValueError where the log likelihood of one site depends on another."""
        seen = self._seen(self._start)
        signs = torch.randint(2, seen.shape, generator=torch.Generator().manual_seed(0)).to(seen) * 2 - 1
        with torch.enable_grad():
            at = seen.detach().requires_grad_()
            values = self._log_likelihood(at)
            if not values.requires_grad:
                return
            (plain,) = torch.autograd.grad(values.sum(), at, retain_graph=True, materialize_grads=True)
            (signed,) = torch.autograd.grad((values * signs).sum(), at, materialize_grads=True)
        if not ((signed - signs * plain).abs() <= 1e-6 * plain.abs()).all():
            raise ValueError("log_likelihood(x) at one site depends on x at others, expected a function of each site by itself")

"""`maximum_evidence`: parameters of a model from data, by the likelihood of the data with the field integrated out.

Also known as empirical Bayes, type-II maximum likelihood, or REML-like fitting (Rasmussen & Williams, Gaussian Processes for
Machine Learning, 2006, chapter 5).
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from ..stencil import as_integer

Parameters = dict[str, Tensor]

_STEP = 1e-4  # of the logarithms, for second derivatives: their relative errors are about its size, and 1e-12 / its size


@dataclass(frozen=True)
class EvidenceFit:
    """What `maximum_evidence` found.

    Attributes:
        parameters: by name, float64 tensors of the shapes that they started with.
        standard_errors: by name, of the same shapes: of the parameter's logarithm from the curvature of the log evidence,
            times the parameter. NaN where that curvature is not negative definite.
        log_evidence: at these parameters, summed over the batch, in nats.
        posterior: the model at these parameters.
        converged: the search ended at a maximum, and no parameter at a bound.
        evaluations: how often the evidence and its gradient were computed.
    """

    parameters: Parameters
    standard_errors: Parameters
    log_evidence: float
    posterior: Any
    converged: bool
    evaluations: int


def maximum_evidence(
    model: Callable[[Parameters], Any],
    start: Mapping[str, float | Tensor],
    *,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
    progress: Callable[[Parameters, float], None] | None = None,
) -> EvidenceFit:
    """Positive parameters that maximise the log evidence, by L-BFGS-B on their logarithms::

        def model(p):
            precision = bg.matern_precision(grid, p["range"], 1, p["variance"])
            return bg.SparseGMRF(torch.zeros(grid, dtype=torch.float64), precision).posterior(y, p["noise"])

        fit = bg.maximum_evidence(model, {"range": 10.0, "variance": 1.0, "noise": 0.1})

    SciPy's L-BFGS-B (Byrd, Lu, Nocedal & Zhu, SIAM J. Sci. Comput. 1995), gradients by autograd, second derivatives by
    differences of gradients, one more for each number.

    Args:
        model: from parameters by name, as float64 tensors, to a posterior, or anything else with a differentiable
            ``log_evidence`` (*batch), of which the sum counts.
        start: the parameters to start from, numbers or tensors, finite and positive.
        bounds: by name, the least and the largest value allowed; by default 10⁻⁴ and 10⁴ times the start.
        max_iterations: of the search; if they do not suffice, it warns.
        tolerance: the search ends where no derivative by a logarithm exceeds this many nats. A parameter is then about that
            many of its standard errors away from the maximum, times the standard error of its logarithm.
        progress: called after each iteration with the parameters and their log evidence.

    Returns:
        An `EvidenceFit`. A parameter that ran to a bound warns with its name (RuntimeWarning).

    Raises:
        TypeError: ``start`` is no mapping of names to numbers, or the model gives something without ``log_evidence``.
        ValueError: a parameter or bound that is not finite and positive, a start outside its bounds, bounds of what is no
            parameter; an evidence at the start that is not finite, or that does not depend on a parameter.
        torch.linalg.LinAlgError, ValueError: what the model raises at the start. Where it fails later, the search turns back.
    """
    problem = _Problem(model, start, bounds)
    if as_integer("max_iterations", max_iterations) < 1:
        raise ValueError(f"max_iterations is {max_iterations}, expected at least 1")
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}, expected more than 0")
    problem.check_start()

    def report(logs: np.ndarray) -> None:
        if progress is not None:
            progress(problem.unpack(logs), -problem(logs)[0])

    result = scipy.optimize.minimize(
        problem,
        problem.start,
        jac=True,
        method="L-BFGS-B",
        bounds=scipy.optimize.Bounds(*problem.limits),
        callback=report,
        options={"maxiter": max_iterations, "gtol": tolerance, "ftol": 1e-12},
    )
    logs = result.x
    stuck = problem.at_bound(logs)
    if stuck:
        warnings.warn(
            f"{' and '.join(stuck)} ran to a bound: the data may not determine it, or the bounds may be too narrow",
            RuntimeWarning,
            stacklevel=2,
        )
    if not result.success:
        warnings.warn(
            f"the search for the maximum did not converge: {result.message}. The model may not fit the data, as where they "
            "have a mean and it has none, or the start may be too far away",
            RuntimeWarning,
            stacklevel=2,
        )
    errors = problem.standard_errors(logs)
    with torch.no_grad():
        parameters = problem.unpack(logs)
        posterior = model(parameters)
        log_evidence = float(posterior.log_evidence.sum())
    return EvidenceFit(parameters, errors, log_evidence, posterior, bool(result.success) and not stuck, problem.evaluations)


class _Problem:
    """The negative log evidence as a function of the parameters' logarithms in one vector, with its gradient."""

    def __init__(self, model, start: Mapping[str, float | Tensor], bounds: Mapping[str, tuple[float, float]] | None):
        if not isinstance(start, Mapping) or not start:
            raise TypeError(f"start is {start!r}, expected parameters by name, at least one")
        bounds = bounds or {}
        for name in bounds:
            if name not in start:
                raise ValueError(f"bounds has {name!r}, which is not a parameter of start: {', '.join(map(repr, start))}")
        self._model, self._shapes, values, low, high = model, {}, [], [], []
        for name, value in start.items():
            try:
                value = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(f"start[{name!r}] is {value!r}, expected a number or a tensor") from None
            if not (value.isfinite() & (value > 0)).all():
                raise ValueError(f"start[{name!r}] is {value.tolist()}, expected finite and positive")
            least, largest = bounds.get(name, (1e-4 * value, 1e4 * value))
            least, largest = (torch.as_tensor(b, dtype=torch.float64).expand(value.shape) for b in (least, largest))
            if not ((least > 0) & (least <= value) & (value <= largest) & largest.isfinite()).all():
                raise ValueError(
                    f"bounds[{name!r}] is {least.tolist(), largest.tolist()}, expected finite and positive, around the start "
                    f"{value.tolist()}"
                )
            self._shapes[name] = value.shape
            for into, tensor in ((values, value), (low, least), (high, largest)):
                into.append(tensor.flatten().log())
        self.start = torch.cat(values).numpy()
        self.limits = torch.cat(low).numpy(), torch.cat(high).numpy()
        self.evaluations = 0
        self._last: tuple[np.ndarray, float, np.ndarray] | None = None
        self._best: tuple[np.ndarray, float] | None = None

    def unpack(self, logs: np.ndarray | Tensor) -> Parameters:
        """The parameters by name."""
        pieces = torch.as_tensor(logs).exp().split([shape.numel() for shape in self._shapes.values()])
        return {name: piece.reshape(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}

    def check_start(self) -> None:
        """Raise for what the model cannot do at the start."""
        value, gradient = self._evaluate(self.start)
        if not math.isfinite(value):
            raise ValueError(f"log_evidence is {-value} at the start, expected a finite number")
        if not np.isfinite(gradient).all():
            slopes = ", ".join(f"{name!r}: {slope.tolist()}" for name, slope in self._by_name(-gradient).items())
            raise ValueError(
                f"log_evidence has at the start the derivatives {slopes} in the parameters' logarithms, expected finite ones; "
                "torch.where, for one, passes gradients through what it leaves out: a division by zero there makes NaN"
            )
        self._last, self._best = (self.start.copy(), value, gradient), (self.start.copy(), value)

    def __call__(self, logs: np.ndarray) -> tuple[float, np.ndarray]:
        if self._last is not None and np.array_equal(self._last[0], logs):
            return self._last[1:]
        try:
            value, gradient = self._evaluate(logs)
            failed = not (math.isfinite(value) and np.isfinite(gradient).all())
        except (torch.linalg.LinAlgError, ValueError):
            failed = True
        if failed:  # far out a precision may be singular: a slope that leads back to the best point
            back = logs - self._best[0]
            value = self._best[1] + 1e3 * (1 + float(back @ back))
            gradient = 2e3 * back
        elif value < self._best[1]:
            self._best = logs.copy(), value
        self._last = logs.copy(), value, gradient
        return value, gradient

    def at_bound(self, logs: np.ndarray) -> list[str]:
        """The names of parameters that lie at a bound."""
        low, high = self.limits
        there = (np.abs(logs - low) < 1e-9) | (np.abs(logs - high) < 1e-9)
        return [repr(name) for name, values in self._by_name(there).items() if values.any()]

    def standard_errors(self, logs: np.ndarray) -> Parameters:
        """From the curvature of the log evidence in the parameters' logarithms."""
        size = len(logs)
        hessian = np.empty((size, size))
        try:
            here = self(logs)[1]
            for i in range(size):
                hessian[i] = (self._evaluate(logs + _STEP * np.eye(size)[i])[1] - here) / _STEP
            np.linalg.cholesky(hessian := 0.5 * (hessian + hessian.T))
            variance = np.linalg.inv(hessian).diagonal()
        except (torch.linalg.LinAlgError, ValueError, np.linalg.LinAlgError):
            variance = np.full(size, np.nan)
        return self._by_name(np.exp(logs) * np.sqrt(variance))

    def _by_name(self, vector: np.ndarray) -> Parameters:
        pieces = torch.from_numpy(np.asarray(vector)).split([shape.numel() for shape in self._shapes.values()])
        return {name: piece.reshape(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}

    def _evaluate(self, logs: np.ndarray) -> tuple[float, np.ndarray]:
        self.evaluations += 1
        with torch.enable_grad():
            pieces = torch.tensor(logs, dtype=torch.float64).split([shape.numel() for shape in self._shapes.values()])
            points = [piece.clone().requires_grad_() for piece in pieces]
            parameters = zip(self._shapes.items(), points, strict=True)
            posterior = self._model({name: point.exp().reshape(shape) for (name, shape), point in parameters})
            log_evidence = getattr(posterior, "log_evidence", None)
            if not isinstance(log_evidence, Tensor):
                raise TypeError(f"model gives a {type(posterior).__name__}, expected something with a tensor log_evidence")
            value = log_evidence.sum()
            gradients = torch.autograd.grad(value, points, allow_unused=True) if value.requires_grad else [None] * len(points)
        for name, gradient in zip(self._shapes, gradients, strict=True):
            if gradient is None:
                raise ValueError(f"log_evidence does not depend on {name!r}")
        return -float(value.detach()), -torch.cat(gradients).numpy()

"""Parameters from data, where the maximum is known or can be found by dense linear algebra."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import MultivariateNormal

import banded_gmrf as bg

GRID = (6, 5)


def white_noise(y):
    """A model whose maximum is known: the variance of independent normal numbers."""

    def model(p):
        v = p["variance"]
        return SimpleNamespace(
            log_evidence=-0.5 * (y.square() / v + (2 * math.pi * v).log()).flatten(y.ndim - v.ndim - 1).sum(-1)
        )

    return model


def matern(y, variance_of_noise=None):
    def model(p):
        factor = bg.StencilCholesky.from_precision(bg.matern_precision(GRID, p["range"], 1, p["variance"]))
        prior = bg.GMRF(torch.zeros(GRID, dtype=torch.float64), factor)
        return prior.posterior(y, p["noise"] if variance_of_noise is None else variance_of_noise)

    return model


def field():
    factor = bg.StencilCholesky.from_precision(bg.matern_precision(GRID, 3.0, 1, 2.0))
    x = bg.GMRF(torch.zeros(GRID, dtype=torch.float64), factor).sample((8,))
    return x + 0.3 * torch.randn_like(x)


def test_the_variance_of_white_noise_and_its_standard_error():
    y = 3 * torch.randn(500, dtype=torch.float64)
    seen = []
    fit = bg.maximum_evidence(white_noise(y), {"variance": 0.1}, progress=lambda p, value: seen.append((p, value)))
    expected = y.square().mean()
    torch.testing.assert_close(fit.parameters["variance"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(fit.standard_errors["variance"], expected * math.sqrt(2 / 500), rtol=1e-4, atol=0)
    assert fit.converged
    assert fit.log_evidence == pytest.approx(float(white_noise(y)({"variance": expected}).log_evidence))
    assert float(fit.posterior.log_evidence) == fit.log_evidence
    assert [value for _, value in seen] == sorted(value for _, value in seen)
    assert seen[-1][1] == pytest.approx(fit.log_evidence)
    assert seen[-1][0]["variance"] == pytest.approx(float(expected), rel=1e-5)


def test_parameters_that_are_tensors():
    y = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)[:, None] * torch.randn(3, 200, dtype=torch.float64)

    def model(p):
        v = p["variance"][:, None]
        return SimpleNamespace(log_evidence=-0.5 * (y.square() / v + (2 * math.pi * v).log()).sum(-1))

    fit = bg.maximum_evidence(model, {"variance": torch.ones(3)})
    torch.testing.assert_close(fit.parameters["variance"], y.square().mean(-1), rtol=1e-4, atol=0)
    torch.testing.assert_close(fit.standard_errors["variance"], y.square().mean(-1) / 10, rtol=1e-3, atol=0)


def test_a_matern_field_under_noise_against_dense_matrices():
    y = field()
    start = {"range": 6.0, "variance": 1.0, "noise": 0.5}
    fit = bg.maximum_evidence(matern(y), start, tolerance=1e-6)
    assert fit.converged
    assert isinstance(fit.posterior, bg.ConditionalGMRF)
    n = math.prod(GRID)

    def dense(logs):
        r, v, s = logs.exp()
        covariance = torch.linalg.inv(bg.matern_precision(GRID, r, 1, v).to_dense())
        covariance = covariance + s * torch.eye(n, dtype=torch.float64)
        return (
            MultivariateNormal(torch.zeros(n, dtype=torch.float64), covariance, validate_args=False)
            .log_prob(y.flatten(1))
            .sum()
        )

    logs = torch.stack([fit.parameters[name] for name in start]).log().requires_grad_()
    value = dense(logs)
    assert fit.log_evidence == pytest.approx(float(value.detach()))
    (gradient,) = torch.autograd.grad(value, logs, create_graph=True)
    assert gradient.abs().max() < 1e-3
    hessian = torch.stack([torch.autograd.grad(g, logs, retain_graph=True)[0] for g in gradient])
    errors = torch.linalg.inv(-hessian).diagonal().sqrt() * logs.exp()
    torch.testing.assert_close(torch.stack([fit.standard_errors[name] for name in start]), errors.detach(), rtol=1e-3, atol=0)


def test_a_parameter_that_runs_to_a_bound_is_named():
    y = torch.randn(50, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="'variance' ran to a bound"):
        fit = bg.maximum_evidence(white_noise(y), {"variance": 3.0}, bounds={"variance": (2.0, 10.0)})
    assert fit.parameters["variance"] == pytest.approx(2.0)
    assert not fit.converged


def test_too_few_iterations_are_told():
    y = field()
    with pytest.warns(RuntimeWarning, match="the search for the maximum did not converge"):
        fit = bg.maximum_evidence(matern(y), {"range": 30.0, "variance": 0.01, "noise": 5.0}, max_iterations=1)
    assert not fit.converged


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError("input is not positive-definite"), ValueError("too far"), None])
def test_a_search_turns_back_where_the_model_fails(error):
    y = 2 * torch.randn(300, dtype=torch.float64)
    failures = []

    def model(p):
        if p["variance"] > 4.5:
            failures.append(p)
            if error is not None:
                raise error
            return SimpleNamespace(log_evidence=p["variance"] * torch.nan)
        return white_noise(y)(p)

    fit = bg.maximum_evidence(model, {"variance": 0.01})
    assert failures
    assert fit.parameters["variance"] == pytest.approx(float(y.square().mean()), rel=1e-3)


def test_errors_without_curvature_are_nan():
    fit = bg.maximum_evidence(
        lambda p: SimpleNamespace(log_evidence=-(p["a"] * p["b"]).log().square()), {"a": 2.0, "b": 3.0}, tolerance=1e-8
    )
    assert all(error.isnan() or error > 1e3 for error in fit.standard_errors.values())


GOOD = {"variance": 1.0}


@pytest.mark.parametrize(
    ("model", "start", "options", "error", "message"),
    [
        (None, {}, {}, TypeError, "start is {}, expected parameters by name"),
        (None, [1.0], {}, TypeError, r"start is \[1.0\], expected parameters by name"),
        (None, {"variance": "one"}, {}, TypeError, r"start\['variance'\] is 'one', expected a number or a tensor"),
        (None, {"variance": -1.0}, {}, ValueError, r"start\['variance'\] is -1.0, expected finite and positive"),
        (None, {"variance": math.nan}, {}, ValueError, r"start\['variance'\] is nan, expected finite and positive"),
        (None, GOOD, {"bounds": {"range": (1, 2)}}, ValueError, "bounds has 'range', which is not a parameter of start"),
        (None, GOOD, {"bounds": {"variance": (2, 3)}}, ValueError, r"bounds\['variance'\] is .* around the start 1.0"),
        (None, GOOD, {"max_iterations": 0}, ValueError, "max_iterations is 0, expected at least 1"),
        (None, GOOD, {"tolerance": -1.0}, ValueError, "tolerance is -1.0, expected more than 0"),
        (None, {"variance": 1.0, "range": 2.0}, {}, ValueError, "log_evidence does not depend on 'range'"),
        (lambda p: p, GOOD, {}, TypeError, "model gives a dict, expected something with a tensor log_evidence"),
        (
            lambda p: SimpleNamespace(log_evidence=torch.zeros(())),
            GOOD,
            {},
            ValueError,
            "log_evidence does not depend on 'variance'",
        ),
        (lambda p: SimpleNamespace(log_evidence=p["variance"] / 0), GOOD, {}, ValueError, "log_evidence is inf at the start"),
        (
            lambda p: SimpleNamespace(log_evidence=torch.where(torch.tensor(True), p["variance"], p["variance"] / 0).sum()),
            GOOD,
            {},
            ValueError,
            "'variance': nan .*torch.where",
        ),
    ],
)
def test_bad_input(model, start, options, error, message):
    with pytest.raises(error, match=message):
        bg.maximum_evidence(model or white_noise(torch.ones(3).double()), start, **options)

"""The scalars of `signals` for which the rows of the truth and of the diagonal in the paper's tables come out.

``python -m experiments calibrate`` prints them; they are the defaults of `Splines` and `Ellipses`.
"""

import dataclasses
import math

import scipy.optimize
import torch
from torch import Tensor

from .paper import PAPER
from .signals import Signals


def expected_rows(signals: Signals, latents: Tensor) -> dict[str, float]:
    """Expectations, over the noise and the given latents, of the numbers that are calibrated.

    The best diagonal has the true variances. Returned are the negative log likelihood of both in nats, the divergence
    KL(N(0, diagonal) ‖ N(0, Σ)) in nats, and the Frobenius norm of their difference.
    """
    correlation = signals.correlation(latents)
    stddev = signals.stddev(signals.mean(latents)).flatten(1)
    n = stddev.shape[1]
    factor = torch.linalg.cholesky(correlation)
    information = -factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    diagonal = 0.5 * n * math.log(2 * math.pi * math.e) + stddev.log().sum(-1)
    trace = torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1).sum(-1)
    rest = correlation - torch.eye(n, dtype=correlation.dtype, device=correlation.device)
    rest = stddev[:, :, None] * rest * stddev[:, None, :]
    rows = {
        "truth nll": diagonal - information,
        "diagonal nll": diagonal,
        "diagonal kl": 0.5 * (trace - n) - information,
        "diagonal norm": torch.linalg.matrix_norm(rest),
    }
    return {name: value.mean().item() for name, value in rows.items()}


def paper_rows(name: str) -> dict[str, float]:
    """The same numbers as the paper has them."""
    truth, diagonal = PAPER[name]["truth"], PAPER[name]["diagonal"]
    return {
        "truth nll": truth["nll"],
        "diagonal nll": diagonal["nll"],
        "diagonal kl": diagonal["kl"],
        "diagonal norm": diagonal["norm"],
    }


def evenly_spread_latents(signals: Signals, count: int) -> Tensor:
    """Latents of a scrambled Sobol sequence: means over them are closer to the expectation than means over random ones."""
    engine = torch.quasirandom.SobolEngine(signals.num_latents, scramble=True, seed=0)
    return signals.latents(engine.draw(count, dtype=torch.float64))


def calibrate(name: str, signals: Signals, count: int) -> Signals:
    """Signals with the scalars that come closest to the paper's rows, in relative squares, on ``count`` means."""
    scalars = dataclasses.asdict(signals)
    latents = evenly_spread_latents(signals, count)
    target = paper_rows(name)

    def with_logs(logs):
        return dataclasses.replace(signals, **{key: math.exp(value) for key, value in zip(scalars, logs, strict=True)})

    def errors(logs):
        rows = expected_rows(with_logs(logs), latents)
        return [rows[key] / target[key] - 1 for key in target]

    start = [math.log(value) for value in scalars.values()]
    return with_logs(scipy.optimize.least_squares(errors, start, x_scale=0.1, xtol=1e-10).x)

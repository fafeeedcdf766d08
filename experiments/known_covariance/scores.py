"""How far a predicted covariance is from the true one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

import banded_gmrf as bg

from .signals import Signals

# Means (B, *grid) and true covariances (B, n, n) to a factor with batch shape (B,).
Predictor = Callable[[Tensor, Tensor], bg.StencilCholesky]


@dataclass(frozen=True)
class Scores:
    """For each of B signals; all (B,) but ``whitened`` (B, n).

    Args:
        nll: -log p(x | Σ̂) in nats.
        kl: KL(N(0, Σ̂) ‖ N(0, Σ)) in nats.
        norm: ‖Σ̂ - Σ‖, Frobenius.
        whitened: the residual whitened by the prediction, standard normal if Σ̂ = Σ.
    """

    nll: Tensor
    kl: Tensor
    norm: Tensor
    whitened: Tensor


@torch.no_grad()
def score(signals: Signals, latents: Tensor, means: Tensor, x: Tensor, predict: Predictor, batch: int = 100) -> Scores:
    """Compare a prediction with the truth in dense float64, ``batch`` signals at a time.

    Args:
        signals: what the signals are drawn from.
        latents: (B, P).
        means, x: (B, *grid).
        predict: the prediction.
        batch: signals at a time.
    """
    parts = []
    for latent, mean, signal in zip(latents.split(batch), means.split(batch), x.split(batch), strict=True):
        covariance = signals.covariance(latent)
        factor = predict(mean, covariance)
        dense = factor.to_dense().double()
        residual = (signal.double() - mean.double()).flatten(1)
        predicted = MultivariateNormal(torch.zeros_like(residual), torch.cholesky_inverse(dense))
        truth = MultivariateNormal(torch.zeros_like(residual), covariance)
        parts.append(
            (
                -predicted.log_prob(residual),
                kl_divergence(predicted, truth),
                torch.linalg.matrix_norm(predicted.covariance_matrix - covariance),
                (dense.mT @ residual[..., None])[..., 0],
            )
        )
    return Scores(*(torch.cat(values) for values in zip(*parts, strict=True)))

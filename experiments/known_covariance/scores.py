"""How far predicted covariances are from the true ones."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from .signals import Signals


@dataclass(frozen=True)
class Examples:
    """Signals to learn from or to be tested on: latents (B, P) in float64, means and signals (B, *grid) in float32."""

    latents: Tensor
    means: Tensor
    x: Tensor


@dataclass(frozen=True)
class Scores:
    """For each of B signals, all in float64 and (B,) but ``whitened``, (B, *grid).

    Args:
        nll: -log p(x | Σ̂) in nats.
        kl: KL(N(0, Σ̂) ‖ N(0, Σ)) in nats.
        norm: ‖Σ̂ - Σ‖, Frobenius.
        whitened: Lᵀ(x - μ), standard normal if Σ̂ = Σ.
    """

    nll: Tensor
    kl: Tensor
    norm: Tensor
    whitened: Tensor


@torch.no_grad()
def score(signals: Signals, examples: Examples, predict: Callable[[Tensor, Tensor], Tensor], batch: int = 100) -> Scores:
    """Compare a prediction with the truth in dense float64, ``batch`` signals at a time.

    Args:
        signals: what the examples are drawn from.
        examples: B of them.
        predict: means (b, *grid) and true covariances (b, n, n) to factors L (b, n, n) of predicted precisions L Lᵀ.
        batch: signals at a time.
    """
    parts = []
    columns = (examples.latents, examples.means, examples.x)
    for latents, means, x in zip(*(column.split(batch) for column in columns), strict=True):
        covariance = signals.covariance(latents)
        factor = predict(means, covariance).double()
        residual = (x - means).double().flatten(1)
        predicted = MultivariateNormal(torch.zeros_like(residual), torch.cholesky_inverse(factor))
        whitened = (factor.mT @ residual[..., None])[..., 0]
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        parts.append(
            (
                0.5 * (whitened.square().sum(-1) + residual.shape[1] * math.log(2 * math.pi)) - log_det,
                kl_divergence(predicted, MultivariateNormal(torch.zeros_like(residual), covariance)),
                torch.linalg.matrix_norm(predicted.covariance_matrix - covariance),
                whitened.reshape(x.shape),
            )
        )
    return Scores(*(torch.cat(values) for values in zip(*parts, strict=True)))


def factor_of_truth(covariance: Tensor) -> Tensor:
    """The lower-triangular L with (L Lᵀ)⁻¹ = Σ, sites in order: (B, n, n)."""
    # L⁻ᵀ is the upper triangular factor U of Σ = U Uᵀ: with the sites in reverse order, the usual lower one.
    reversed_factor = torch.linalg.cholesky(covariance.flip(-1, -2))
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.solve_triangular(reversed_factor, eye, upper=False).flip(-1, -2).mT

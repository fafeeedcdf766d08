"""
Fisher information by torch.func
================================

How well do data determine a parameter? The curvature of the expected log likelihood says so. Densities have derivatives of
any order, in both modes, and can be mapped over: here over ranges of a Matérn field, each with its own second derivatives.
"""

import matplotlib.pyplot as plt
import torch
from torch.func import hessian, vmap

import banded_gmrf as bg

grid = (24, 24)
loc = torch.zeros(grid, dtype=torch.float64)


def field(logs):
    """The field of (log range, log variance)."""
    correlation_range, variance = logs.exp()
    precision = bg.matern_precision(grid, correlation_range, 1, variance)
    return bg.GMRF(loc, bg.StencilCholesky.from_precision(precision))


# %%
# The Fisher information is the second derivative of the divergence from the truth, at the truth. ``vmap`` of ``hessian`` of a
# function that builds a precision, factorises it and compares two distributions:


def divergence(logs, truth):
    return bg.kl_divergence(field(truth), field(logs))


ranges = torch.tensor([2.0, 3.0, 5.0, 8.0, 12.0, 18.0], dtype=torch.float64)
logs = torch.stack([ranges.log(), torch.zeros_like(ranges)], -1)
information = vmap(hessian(divergence))(logs, logs)
print(information.shape)

# %%
# Its inverse bounds the variance of any unbiased estimate. Range and variance by themselves become uncertain as the range
# grows beyond what the grid holds, while their combination variance / range² stays known: what decides is the roughness.

covariance = torch.linalg.inv(information)
stderr = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
direction = torch.tensor([-2.0, 1.0], dtype=torch.float64)
combined = (direction @ covariance @ direction).sqrt()

figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
axis.plot(ranges, stderr[:, 0], "o-", label="range")
axis.plot(ranges, stderr[:, 1], "s-", label="variance")
axis.plot(ranges, combined, "^-", label="variance / range²")
axis.set_xlabel("correlation range, pixels; the grid has 24 x 24")
axis.set_ylabel("smallest relative standard error")
axis.set_ylim(bottom=0)
axis.legend()
plt.show()

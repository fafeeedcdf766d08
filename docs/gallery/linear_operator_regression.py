"""
A covariance for linear_operator
================================

Elevations along roads, and a map from them: Gaussian process regression as gpytorch users write it, with the algebra
of linear_operator. The covariance of 6,000 sites is an operator, of which no entry is ever formed.
"""

import linear_operator
import matplotlib.pyplot as plt
import torch
from matplotlib.cbook import get_sample_data

import banded_gmrf as bg
from banded_gmrf.linear_operator import CovarianceOperator

elevation = torch.from_numpy(get_sample_data("jacksboro_fault_dem.npz")["elevation"][:240:4, :400:4] / 1.0)
grid = tuple(elevation.shape)
roads = torch.zeros(grid, dtype=torch.bool)
roads[10::20] = True
roads[:, 12::25] = True

# %%
# A Matérn field of the elevations' mean and variance, and its covariance Σ.

precision = bg.matern_precision(grid, 25.0, smoothness=1, variance=float(elevation.var()))
factor = bg.StencilCholesky.from_precision(precision, bg.Stencil.square(7))
field = bg.GMRF(elevation[roads].mean().expand(grid), factor)
covariance = CovarianceOperator.of(field)
print(type(covariance).__name__, tuple(covariance.shape))

# %%
# With S the rows of the sites on roads, the mean is Σ Sᵀ (S Σ Sᵀ + σ² I)⁻¹ (y - loc). A product with Σ is two triangular
# solves; linear_operator's conjugate gradients do the rest.

sites = roads.flatten().nonzero()[:, 0]
selection = torch.nn.functional.one_hot(sites, roads.numel()).double()
y = elevation[roads] - field.loc[roads]
seen = selection @ (covariance @ selection.T)
weights = torch.linalg.solve(linear_operator.to_linear_operator(seen).add_jitter(25.0), y)
kriged = field.loc + (covariance @ (selection.T @ weights)).reshape(grid)

# %%
# `GMRF.posterior` has the same mean without the matrix of the roads, and standard deviations.

variance = torch.full(grid, torch.inf, dtype=torch.float64).masked_fill(roads, 25.0)
posterior = field.posterior(elevation, noise_variance=variance)
print(f"largest difference {(kriged - posterior.mean).abs().max():.2e} m")

metres = {"cmap": "cividis", "vmin": float(elevation.min()), "vmax": float(elevation.max())}
panels = [
    ("elevation, m", elevation, metres),
    ("on roads", elevation.where(roads, torch.nan), metres),
    ("mean given the roads", kriged, metres),
    ("standard deviation, m", posterior.stddev, {"cmap": "viridis", "vmin": 0}),
]
figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), layout="constrained")
for axis, (title, image, scale) in zip(axes.flat, panels, strict=True):
    figure.colorbar(axis.imshow(image, **scale), ax=axis)
    axis.set_title(title)
    axis.set_axis_off()
plt.show()

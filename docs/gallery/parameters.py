"""
Range, variance and noise from data
===================================

Terrain is known at a few places, and measured with errors. Three numbers describe a model of it: how far heights are
correlated, how much they vary, how large the errors are. The data say which: the evidence is their likelihood with the field
integrated out.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.cbook import get_sample_data

import banded_gmrf as bg

torch.manual_seed(0)
with np.load(get_sample_data("jacksboro_fault_dem.npz", asfileobj=False)) as file:
    terrain = torch.from_numpy(file["elevation"][100:148, 150:206].astype(np.float64))
seen = torch.rand(terrain.shape) < 0.3
level, spread = terrain[seen].mean(), terrain[seen].std()
height = (terrain - level) / spread
measured = height + 0.2 * torch.randn_like(height)

# %%
# A model is a function of the parameters that gives a posterior. `maximum_evidence` climbs on their logarithms, with
# gradients, and takes standard errors from the curvature at the top. They take the model for true. This terrain is no Matérn
# field, and the noise comes out further from what was added than its standard error says.


def model(parameters):
    precision = bg.matern_precision(terrain.shape, parameters["range"], 1, parameters["variance"])
    prior = bg.GMRF(torch.zeros_like(height), bg.StencilCholesky.from_precision(precision))
    return prior.posterior(measured, parameters["noise"].expand(terrain.shape).where(seen, torch.inf))


fit = bg.maximum_evidence(model, {"range": 5.0, "variance": 0.5, "noise": 0.1})
for name, value in fit.parameters.items():
    print(f"{name}: {value:.4g} ± {fit.standard_errors[name]:.2g}")
print(f"noise that was added: 0.04; log evidence {fit.log_evidence:.1f} nats after {fit.evaluations} evaluations")

# %%
# The posterior at these parameters is an ordinary distribution.

mean, stddev = fit.posterior.mean, fit.posterior.stddev
error = (mean - height)[~seen]
inside = (error.abs() < 1.645 * stddev[~seen]).double().mean()
print(f"error where nothing was measured {spread * error.square().mean().sqrt():.1f} m; 90 % intervals hold {inside:.1%}")

# %%
# Other ranges, with the variance and the noise held: the evidence falls off faster than the standard error (shaded) would have
# it. A longer range with a larger variance fits nearly as well, and the standard error counts that.

ranges = fit.parameters["range"] * torch.logspace(-0.25, 0.25, 13, dtype=torch.float64)
with torch.no_grad():
    evidence = [float(model(fit.parameters | {"range": r}).log_evidence) - fit.log_evidence for r in ranges]

figure, axes = plt.subplots(2, 2, figsize=(8.6, 7.4), layout="constrained")
meters = {"cmap": "cividis", "vmin": float(terrain.min()), "vmax": float(terrain.max())}
panels = (
    ("measured", (level + spread * measured).where(seen, torch.nan), meters),
    ("posterior mean", level + spread * mean, meters),
    ("standard deviation", spread * stddev, {"cmap": "viridis", "vmin": 0}),
)
for axis, (title, image, scale) in zip(axes.flat, panels, strict=False):
    picture = axis.imshow(image, **scale)
    axis.set_title(title)
    axis.set_axis_off()
    figure.colorbar(picture, ax=axis, label="m", shrink=0.9)
axes[1, 1].plot(ranges, evidence, "o-")
axes[1, 1].axvspan(*(float(fit.parameters["range"] + sign * fit.standard_errors["range"]) for sign in (-1, 1)), alpha=0.2)
axes[1, 1].set(xlabel="range in pixels", ylabel="log evidence from the top, nats", title="how well the range is known")
plt.show()

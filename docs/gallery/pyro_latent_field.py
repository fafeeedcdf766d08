"""
A latent field with NUTS, in Pyro
=================================

Counts on a small grid, whose logarithmic rate is a field: a posterior without a formula. Pyro's No-U-Turn Sampler draws
from it, over the whitened field, and Laplace's approximation is compared with it.
"""

import matplotlib.pyplot as plt
import pyro
import torch
from matplotlib.cbook import get_sample_data
from pyro.infer import MCMC, NUTS

import banded_gmrf as bg
import banded_gmrf.pyro

pyro.set_rng_seed(0)

# %%
# The rate follows real terrain: one of matplotlib's rasters, thinned and scaled. What is observed are counts.

terrain = torch.from_numpy(get_sample_data("jacksboro_fault_dem.npz")["elevation"][:330:15, :390:15] / 1.0)
truth = (terrain - terrain.mean()) / terrain.std()
grid = tuple(truth.shape)
counts = torch.poisson((truth + 0.5).exp())

precision = bg.matern_precision(grid, correlation_range=8.0, smoothness=1)
factor = bg.StencilCholesky.from_precision(precision)
loc = torch.full(grid, 0.5, dtype=torch.float64)
prior = banded_gmrf.pyro.GMRF(loc, factor)

# %%
# The field is x = loc + L⁻ᵀu with independent u: a posterior over u is far rounder than one over x, and the sampler needs
# fewer steps. `StencilCholesky.solve` is differentiable, which is all that the sampler asks.


def model(counts):
    u = pyro.sample("u", pyro.distributions.Normal(torch.zeros_like(loc), 1).to_event(2))
    rate = (loc + factor.solve(u, transpose=True)).exp()
    pyro.sample("counts", pyro.distributions.Poisson(rate).to_event(2), obs=counts)


sampler = MCMC(NUTS(model, max_tree_depth=6), num_samples=150, warmup_steps=100, disable_progbar=True)
sampler.run(counts)
drawn = loc + factor.solve(sampler.get_samples()["u"], transpose=True)

# %%
# Laplace's approximation takes a moment. It is a normal distribution around the mode.

approximation = prior.laplace(lambda x: torch.distributions.Poisson(x.exp()).log_prob(counts))
mode, stddev = approximation.mode.detach(), approximation.stddev.detach()

signed = {"cmap": "RdBu_r", "vmin": -2.5, "vmax": 2.5}
spread = {"cmap": "viridis", "vmin": 0, "vmax": float(stddev.max())}
about, of = "log rate, from its mean", "of the log rate"
panels = [
    ("counts", counts, {"cmap": "magma", "vmin": 0}, "in a pixel"),
    ("mean, NUTS", drawn.mean(0) - 0.5, signed, about),
    ("mode, Laplace", mode - 0.5, signed, about),
    ("the truth", truth, signed, about),
    ("standard deviation, NUTS", drawn.std(0), spread, of),
    ("standard deviation, Laplace", stddev, spread, of),
]
figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
for axis, (title, image, scale, label) in zip(axes.flat, panels, strict=True):
    figure.colorbar(axis.imshow(image, **scale), ax=axis, label=label, shrink=0.8)
    axis.set_title(title)
    axis.set_axis_off()
plt.show()

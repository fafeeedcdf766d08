"""
A volume between thin slices
============================

A field on three axes is sliced as a microscope would: a few slices are seen, with noise, and the volume between them is
inferred, with how sure that is. The voxels are longer along the first axis, so the correlation range there is shorter.
"""

import matplotlib.pyplot as plt
import torch

import banded_gmrf as bg

torch.manual_seed(2)
grid = (25, 20, 20)  # slices, rows, columns

# %%
# A Matérn field with a range for each axis. On three axes its smoothness is ½, 1½, ...

precision = bg.matern_precision(grid, (8.0, 12.0, 12.0), smoothness=1.5)
factor = bg.StencilCholesky.from_precision(precision, bg.Stencil.box((1, 2, 2)))
field = bg.GMRF(torch.zeros(grid, dtype=torch.float64), factor)
truth = field.sample()

# %%
# Every sixth slice is measured. Where nothing is seen the variance of the noise is infinite.

variance = torch.full(grid, torch.inf, dtype=torch.float64)
variance[::6] = 0.05**2
posterior = field.posterior(truth + 0.05 * torch.randn(grid), variance)
mean, stddev = posterior.mean, posterior.stddev
between = variance.isinf()
error = (mean - truth)[between].square().mean().sqrt()
print(f"root mean square error between slices {error:.3f}")
print(f"expected {stddev[between].square().mean().sqrt():.3f}")

# %%
# A cut across the slices: sure at those that were measured (ticks), less in between.

row = grid[1] // 2
signed = {"cmap": "RdBu_r", "vmin": -2.5, "vmax": 2.5}
panels = [
    ("the truth", truth, signed),
    ("mean given five slices", mean, signed),
    ("standard deviation", stddev, {"cmap": "viridis", "vmin": 0}),
]
figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
for axis, (title, volume, scale) in zip(axes, panels, strict=True):
    figure.colorbar(axis.imshow(volume[:, row], **scale), ax=axis)
    axis.set_title(title)
    axis.set_yticks(range(0, grid[0], 6))
    axis.set_ylabel("slice")
    axis.set_xticks([])
plt.show()

"""
A first field
=============

A Matérn field is a good first model of a surface: smooth over a correlation range, with a given variance. Its precision
is sparse, the Cholesky factor of the precision has the shape of a small stencil, and from the factor all else follows.
"""

import matplotlib.pyplot as plt
import torch

import banded_gmrf as bg

torch.manual_seed(0)

# %%
# The precision of a field whose correlation has fallen to 0.13 at 16 pixels, and the factor nearest to it in which each
# pixel is tied to its 24 forward neighbours in a patch of 7 x 7.

grid = (128, 192)
precision = bg.matern_precision(grid, correlation_range=16.0, smoothness=1)
factor = bg.StencilCholesky.from_precision(precision, bg.Stencil.square(7))
field = bg.GMRF(torch.zeros(grid, dtype=torch.float64), factor)
sample = field.sample()
print(f"{len(factor.stencil) + 1} numbers for each pixel")
print(f"log p(x) = {field.log_prob(sample):.0f} nats")

# %%
# A sample; the standard deviation of every pixel, which rises towards the edges, where a pixel has fewer neighbours; and
# the correlation of one pixel with all others.

figure, axes = plt.subplots(3, 1, figsize=(5, 9.6), layout="constrained")
panels = [
    ("a sample", sample, {"cmap": "RdBu_r", "vmin": -3, "vmax": 3}),
    ("standard deviation", field.stddev, {"cmap": "viridis", "vmin": 0}),
    ("correlation with one pixel", field.correlation_with((64, 60)), {"vmin": 0, "vmax": 1}),
]
for axis, (title, image, scale) in zip(axes, panels, strict=True):
    figure.colorbar(axis.imshow(image, **scale), ax=axis)
    axis.set_title(title)
    axis.set_axis_off()
plt.show()

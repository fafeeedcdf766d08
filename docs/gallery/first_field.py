"""
A first field
=============

A Matérn field is a good first model of a surface: smooth over a correlation range, of a given variance. Its sparse precision
has a Cholesky factor with the shape of a small stencil, and from the factor everything else follows.
"""

import matplotlib.pyplot as plt
import torch

import banded_gmrf as bg

torch.manual_seed(0)

# %%
# The precision of a field whose correlation has fallen to about 0.13 at 16 pixels, and the factor nearest to it in which
# each pixel is tied to its 24 forward neighbours in a patch of 7 x 7.

grid = (128, 192)
precision = bg.matern_precision(grid, correlation_range=16.0, smoothness=1, variance=1.0)
factor = bg.StencilCholesky.from_precision(precision, bg.Stencil.square(7))
field = bg.GMRF(torch.zeros(grid, dtype=torch.float64), factor)
sample = field.sample()
print(f"{len(factor.stencil) + 1} numbers per pixel, log p(x) = {field.log_prob(sample):.0f} nats")

# %%
# A sample; the standard deviation of every pixel, which rises towards the edges, where a pixel has fewer neighbours; and how
# one pixel is correlated with all others.

figure, axes = plt.subplots(3, 1, figsize=(5, 9.6), layout="constrained")
shown = {"a sample": sample, "standard deviation": field.stddev, "correlation with one pixel": field.correlation_with((64, 60))}
for axis, (title, image) in zip(axes, shown.items(), strict=True):
    symmetric = {"cmap": "RdBu_r", "vmin": -3, "vmax": 3} if title == "a sample" else {"cmap": "viridis", "vmin": 0}
    picture = axis.imshow(image, **symmetric)
    axis.set_title(title)
    axis.set_axis_off()
    figure.colorbar(picture, ax=axis)
plt.show()

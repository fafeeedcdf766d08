"""
Filling in a photograph
=======================

A model is fitted to one half of a photograph. Of the other half it sees a tenth of the pixels, and fills in the rest: the
mean, how sure it is, and samples that all agree with what was seen.
"""

import matplotlib.pyplot as plt
import skimage.data
import torch

import banded_gmrf as bg

torch.manual_seed(0)
photograph = torch.from_numpy(skimage.data.camera()[::2, ::2] / 255)
learn_from, to_fill = photograph[:, :128], photograph[:, 128:]

# %%
# All sites share their coefficients, so one image is enough. `StencilCholesky.from_samples` finds the maximum of the
# likelihood in closed form.

stencil = bg.Stencil.square(5)
factor = bg.StencilCholesky.from_samples(learn_from[None], stencil, stationary=True)
field = bg.GMRF(learn_from.mean().expand(256, 128), factor)

# %%
# `GMRF.condition` gives a distribution again.

seen = torch.rand(to_fill.shape) < 0.1
filled = field.condition(seen, to_fill)
mean, stddev, sample = filled.mean, filled.stddev, filled.sample()
error = (to_fill - mean)[~seen].square().mean().sqrt()
inside = ((to_fill - mean).abs() < 1.645 * stddev)[~seen].double().mean()
print(f"root mean square error {error:.3f}, expected {stddev[~seen].square().mean().sqrt():.3f}")
print(f"the 90 % intervals hold {inside:.1%} of the unseen pixels")

# %%
# The standard deviation is that of an average place in the photograph: this model does not know edges from sky. A network
# that predicts the coefficients does.

gray = {"cmap": "gray", "vmin": 0, "vmax": 1}
panels = [
    ("the truth", to_fill, gray),
    ("what was seen", to_fill.where(seen, torch.nan), gray),
    ("mean", mean, gray),
    ("a sample", sample, gray),
    ("standard deviation", stddev, {"cmap": "viridis", "vmin": 0}),
]
figure, axes = plt.subplots(1, 5, figsize=(11, 4.6), layout="constrained")
for axis, (title, image, scale) in zip(axes, panels, strict=True):
    picture = axis.imshow(image, **scale)
    axis.set_title(title)
    axis.set_axis_off()
figure.colorbar(picture, ax=axes[-1], label="gray values, black 0 and white 1")
plt.show()

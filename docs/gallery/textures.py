"""
Textures: what a stencil keeps of a photograph
==============================================

A factor that is fitted to a photograph of a texture has its second moments at the lags of the stencil. Samples show what
that is, and what it leaves out: everything that is not normal, and everything longer than chains of neighbours carry.
"""

import matplotlib.pyplot as plt
import skimage.data
import torch

import banded_gmrf as bg

torch.manual_seed(0)
photographs = {
    "grass": skimage.data.grass(),
    "brick": skimage.data.brick(),
    "gravel": skimage.data.gravel(),
}

# %%
# The most likely factor may not be stable: its samples may grow from edge to edge. ``stable="project"`` damps it by as little
# as mends that.

figure, axes = plt.subplots(3, 3, figsize=(8, 8.4), layout="constrained")
for row, (name, photograph) in zip(axes, photographs.items(), strict=True):
    image = torch.from_numpy(photograph[:256, :256] / 255.0)
    panels = {name: image}
    for size in (3, 9):
        stencil = bg.Stencil.square(size)
        factor = bg.StencilCholesky.from_samples(image[None], stencil, stationary=True, stable="project")
        field = bg.GMRF(image.mean().expand(image.shape), factor)
        panels[f"a sample, {size} x {size}"] = field.sample()
        print(f"{name}, {size} x {size}: growth {bg.diagnostics.sample_growth(field):.1f}")
    for axis, (title, shown) in zip(row, panels.items(), strict=True):
        axis.imshow(shown, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title)
        axis.set_axis_off()
plt.show()

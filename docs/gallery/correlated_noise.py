"""
Noise that is correlated
========================

A filter that takes stripes for independent noise keeps them. Told how the noise is correlated, as a field of its own, it
takes them out.
"""

import matplotlib.pyplot as plt
import skimage.data
import torch

import banded_gmrf as bg

torch.manual_seed(0)
photograph = torch.from_numpy(skimage.data.camera()[::2, ::2][:192, 60:220] / 255)
grid = tuple(photograph.shape)

# %%
# The noise is a Matérn field that is long along rows and short across them; the prior was fitted to another photograph.

stripes = bg.matern_precision(grid, (1.0, 60.0), smoothness=1, variance=0.02)
stencil = bg.Stencil.square(5)
along_rows = bg.StencilCholesky.from_precision(stripes, stencil)
noise = bg.GMRF(torch.zeros(grid, dtype=torch.float64), along_rows)
other = torch.from_numpy(skimage.data.coffee()[::2, ::2][:192, :160].mean(-1) / 255)
factor = bg.StencilCholesky.from_samples(other[None], stencil, stationary=True)
prior = bg.GMRF(photograph.mean().expand(grid), factor)

observation = photograph + noise.sample()
variance = float(noise.variance.mean())

# %%
# The same posterior, once with the noise's variance alone, once with the noise as it is.

results = {
    "observed": observation,
    "taken for independent": prior.posterior(observation, noise_variance=variance).mean,
    "as it is": prior.posterior(observation, noise=noise).mean,
}
figure, axes = plt.subplots(1, 4, figsize=(11, 3.9), layout="constrained")
for axis, (title, image) in zip(axes, {"the truth": photograph, **results}.items(), strict=True):
    error = (image - photograph).square().mean().sqrt()
    axis.imshow(image, cmap="gray", vmin=0, vmax=1)
    axis.set_title(title if title == "the truth" else f"{title}\nroot mean square error {error:.3f}")
    axis.set_axis_off()
plt.show()

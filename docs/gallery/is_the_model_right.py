"""
Is the model right?
===================

What a model leaves of data that follow it is white: uncorrelated from pixel to pixel, and normal. Three models of a photograph
of gravel, fitted to a part of it, are asked about another part: what they leave correlated, and whether what they leave is
normal.
"""

import matplotlib.pyplot as plt
import skimage.data
import torch

import banded_gmrf as bg

image = torch.from_numpy(skimage.data.gravel() / 255.0)
left, right = image[:160, :160], image[:160, 256:416]
stencils = {
    "independent": bg.Stencil.square(1),
    "3 x 3": bg.Stencil.square(3),
    "7 x 7": bg.Stencil.square(7),
}

# %%
# `autocorrelation` of the whitened residual tells what the stencil has not caught; `quantiles` compares it with a normal
# distribution. `marginal_coverage` looks at single pixels, which say nothing about correlations: all three models pass.

lags, tails = {}, {}
for name, stencil in stencils.items():
    factor = bg.StencilCholesky.from_samples(left[None], stencil, stationary=True)
    field = bg.GMRF(left.mean().expand(right.shape), factor)
    white = field.whiten(right)
    lags[name] = bg.diagnostics.autocorrelation(white, max_lag=8)
    tails[name] = bg.diagnostics.quantiles(white)
    half, most = bg.diagnostics.marginal_coverage(field, right, (0.5, 0.9))
    print(f"{name}: variance {white.var():.2f}, in the 50 % interval {half:.1%}, 90 % {most:.1%}")

# %%
# The larger stencil leaves next to nothing that is correlated. What it leaves has heavier tails than a normal distribution,
# which no stencil mends: a photograph is no Gaussian field, and its edges are where it is not.

figure, axes = plt.subplots(2, 2, figsize=(8.5, 7.6), layout="constrained")
for axis, (name, correlation) in zip(axes.flat[:3], lags.items(), strict=True):
    picture = axis.imshow(correlation, cmap="RdBu_r", vmin=-0.5, vmax=0.5, extent=(-8.5, 8.5, 8.5, -8.5))
    axis.set_title(f"correlation left by {name}")
    axis.set_xlabel("lag along the row, pixels")
    axis.set_ylabel("lag along the column, pixels")
    axis.set_xticks(range(-8, 9, 4))
    axis.set_yticks(range(-8, 9, 4))
figure.colorbar(picture, ax=axes[0], shrink=0.8)
for marker, (name, (normal, data)) in zip("os^", tails.items(), strict=True):
    axes[1, 1].plot(normal, data, marker, markersize=3, label=name)
axes[1, 1].axline((0, 0), slope=1, color="gray", linewidth=0.8)
axes[1, 1].set_xlabel("quantiles of the standard normal distribution")
axes[1, 1].set_ylabel("of the whitened other part")
axes[1, 1].legend()
plt.show()

"""
Deconvolution under Poisson noise
=================================

A microscope blurs and counts photons. Laplace's approximation takes the blur as an operator and the counts as they are; its
result is an image with a standard deviation for every pixel.
"""

import matplotlib.pyplot as plt
import torch
from skimage import data

import banded_gmrf as bg

torch.manual_seed(0)

# %%
# A cell of scikit-image, every fifth pixel around it, as a rate of at most 61 photons per pixel. A Gaussian blur of 1.5
# pixels, then Poisson noise.

rate = torch.from_numpy(data.cell()[270:470:5, 320:520:5].copy()).double() * 60 / 255 + 1
axis = torch.arange(-4, 5).double()
profile = torch.exp(-0.5 * (axis / 1.5) ** 2)
kernel = profile[:, None] * profile / profile.sum() ** 2
blur = bg.operators.Convolution(kernel, boundary="reflect", grid=rate.shape)
counts = torch.poisson(blur(rate))

# %%
# The prior is a Matérn field about the mean rate. Rates are positive: the link from field to rate is a softplus, which
# is nearly the identity where a pixel has several photons.

prior = bg.GMRF(
    counts.mean().expand(rate.shape),
    bg.StencilCholesky.from_precision(bg.matern_precision(rate.shape, 15.0, 1, counts.var())),
)


def log_likelihood(blurred):
    """Of the counts, in nats, up to a constant."""
    expected = torch.nn.functional.softplus(blurred)
    return counts * expected.log() - expected


p = prior.laplace(log_likelihood, operator=blur)
estimate = p.variance.sqrt()
for name, image in {"counts": counts, "posterior mode": p.mode}.items():
    print(f"{name}: root mean square error {float((image - rate).square().mean().sqrt()):.2f} photons")
inside = ((p.mode - rate).abs() < 1.96 * estimate).double().mean()
print(f"{float(inside):.0%} of the rates lie in their 95 % intervals; Newton took {p.newton.iterations} iterations")

# %%
# Edges are sharper than what was counted, and the standard deviation is larger where more photons arrive.

figure, axes = plt.subplots(2, 2, figsize=(6.4, 5.6), layout="constrained")
images = {"true rate": rate, "counts": counts, "posterior mode": p.mode, "standard deviation": estimate}
for panel, (title, image) in zip(axes.flat, images.items(), strict=True):
    options = {"cmap": "magma", "vmin": 0} if title == "standard deviation" else {"cmap": "gray", "vmin": 0, "vmax": 70}
    picture = panel.imshow(image, **options)
    panel.set(title=title, xticks=[], yticks=[])
    figure.colorbar(picture, ax=panel, label="photons")
plt.show()

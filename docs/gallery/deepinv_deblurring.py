"""
Deblurring with deepinv's solvers, and at once
==============================================

A field as a prior of deepinv has an exact proximal operator, so its solvers converge to the posterior mean. The same
mean is the solution of one linear system, which `GMRF.posterior` solves; with it come standard deviations.
"""

import deepinv
import matplotlib.pyplot as plt
import skimage.data
import torch

import banded_gmrf as bg
from banded_gmrf.deepinv import GMRFNoise, GMRFPrior

torch.manual_seed(0)
photograph = torch.from_numpy(skimage.data.camera()[::4, ::4][10:90, 20:120] / 255)
grid = tuple(photograph.shape)

# %%
# deepinv's blur is the physics. `GMRFNoise` could draw correlated noise; here it is independent.

sigma = 0.01
blur = deepinv.physics.functional.gaussian_blur(sigma=(1.2, 1.2)).double()
physics = deepinv.physics.Blur(blur, padding="circular")
white = bg.StencilCholesky(
    torch.full(grid, -torch.tensor(sigma).log()).double(),
    torch.zeros(0, *grid).double(),
    bg.Stencil.square(1),
)
noise = GMRFNoise(bg.GMRF(torch.zeros(grid).double(), white))
physics.noise_model = noise
y = physics(photograph[None, None])

# %%
# The prior is fitted to another photograph.

other = torch.from_numpy(skimage.data.astronaut()[::4, ::4].mean(-1)[:80, :100] / 255)
factor = bg.StencilCholesky.from_samples(other[None], bg.Stencil.square(5), stationary=True, stable="project")
field = bg.GMRF(y.mean().expand(grid), factor)

# %%
# Accelerated proximal gradient descent: steps of the fidelity, and the exact proximal operator of the prior.

start = [deepinv.optim.L2(sigma=sigma), GMRFPrior(field)]
distances, error = [], []
mean = field.posterior(y[:, 0], noise_variance=sigma**2, operator=physics).mean[0]
for iterations in (1, 3, 10, 30, 100):
    solver = deepinv.optim.FISTA(*start, stepsize=sigma**2, lambda_reg=1.0, max_iter=iterations)
    x = solver(y, physics)[0, 0]
    distances.append(float((x - mean).square().mean().sqrt()))
    error.append(float((x - photograph).square().mean().sqrt()))
print(f"root mean square error of the posterior mean {(mean - photograph).square().mean().sqrt():.4f}")

# %%
gray = {"cmap": "gray", "vmin": 0, "vmax": 1}
figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
panels = {"the truth": photograph, "blurred, with noise": y[0, 0], "posterior mean": mean}
for axis, (title, image) in zip(axes.flat[:3], panels.items(), strict=True):
    axis.imshow(image, **gray)
    axis.set_title(title)
    axis.set_axis_off()
axes[1, 1].loglog((1, 3, 10, 30, 100), distances, "o-", label="from the posterior mean")
axes[1, 1].loglog((1, 3, 10, 30, 100), error, "s--", label="from the truth")
axes[1, 1].set_xlabel("iterations of deepinv's FISTA")
axes[1, 1].set_ylabel("root mean square distance, gray values")
axes[1, 1].legend()
plt.show()

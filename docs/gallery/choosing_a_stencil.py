"""
Which stencil does a photograph need?
=====================================

More neighbours model more and cost more. Each stencil is fitted to the left half of a photograph and judged on the right
half: by its likelihood, and by how white it leaves what it has not seen.
"""

import matplotlib.pyplot as plt
import skimage.data
import torch

import banded_gmrf as bg

photographs = {
    "grass": skimage.data.grass(),
    "brick": skimage.data.brick(),
    "camera": skimage.data.camera(),
}
stencils = {
    "1 x 1": bg.Stencil.square(1),
    "cross of 2": bg.Stencil.cross(2),
    "3 x 3": bg.Stencil.square(3),
    "5 x 5": bg.Stencil.square(5),
    "7 x 7": bg.Stencil.square(7),
    "9 x 9": bg.Stencil.square(9),
}

# %%
# `GMRF.whiten` leaves independent standard normal numbers if the model is right. The correlation of neighbours says how
# far it is from that.

nats, whiteness = {}, {}
for name, photograph in photographs.items():
    image = torch.from_numpy(photograph / 255.0)
    left, right = image[:256, :256], image[:256, 256:]
    for size, stencil in stencils.items():
        factor = bg.StencilCholesky.from_samples(left[None], stencil, stationary=True, stable="project")
        field = bg.GMRF(left.mean().expand(right.shape), factor)
        white = field.whiten(right)
        beside = torch.corrcoef(torch.stack([white[:, 1:].flatten(), white[:, :-1].flatten()]))
        nats[name, size] = float(-field.log_prob(right) / right.numel())
        whiteness[name, size] = float(beside[0, 1])

# %%
# Each step gains less than the one before, while the cost grows with the number of coefficients. The two halves of the
# camera show different things: there the larger stencils have learned what holds on the left only. A cross with as many
# coefficients as 3 x 3 does worse.

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
markers = {"grass": "o", "brick": "s", "camera": "^"}
numbers = [len(stencil) + 1 for stencil in stencils.values()]
squares = [i for i, size in enumerate(stencils) if size != "cross of 2"]
for name, marker in markers.items():
    for axis, values in ((left, nats), (right, whiteness)):
        y = [values[name, size] for size in stencils]
        line = axis.plot([numbers[i] for i in squares], [y[i] for i in squares], marker=marker, label=name)
        axis.plot(numbers[1], y[1], marker=marker, color=line[0].get_color(), fillstyle="none")
left.set_ylabel("nats per pixel of the right half (lower is better)")
right.set_ylabel("correlation of neighbours, whitened (0 is best)")
right.axhline(0, color="gray", linewidth=0.8)
for axis in (left, right):
    axis.set_xscale("log", base=2)
    sizes = list(stencils)
    axis.set_xticks([numbers[i] for i in squares], [f"{numbers[i]}\n{sizes[i]}" for i in squares])
    axis.minorticks_off()
    axis.set_xlabel("coefficients for each pixel, and the stencil")
left.legend(title="hollow: cross of 2")
plt.show()

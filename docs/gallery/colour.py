"""
Colours that belong together
============================

Channels are one more axis of the grid. A stencil that reaches along it ties the colours of a pixel, and of its neighbours,
to each other; one that does not leaves them independent, and its samples and repairs show it.
"""

import matplotlib.pyplot as plt
import skimage.data
import torch

import banded_gmrf as bg

torch.manual_seed(0)
photograph = torch.from_numpy(skimage.data.chelsea()[::2, ::2][20:116, 50:178] / 255)
print(photograph.shape)

# %%
# (H, W, C) keeps rows short: 128 · 3 sites. With the channels first a row would be a whole channel.

stencils = {
    "channels independent": bg.Stencil.box((1, 1, 0)),
    "channels correlated": bg.Stencil.box((1, 1, 2)),
}
seen = (torch.rand(photograph.shape[:2]) < 0.15)[..., None].expand(photograph.shape).clone()
channel = torch.randint(3, photograph.shape[:2])
seen &= torch.nn.functional.one_hot(channel, 3).bool()  # one colour at each place

# %%
# At 15 % of the pixels one of the three colours is seen, as through a sparse mosaic of filters.

results = {}
loc = photograph.mean((0, 1)).expand(photograph.shape)
for name, stencil in stencils.items():
    factor = bg.StencilCholesky.from_samples(photograph[None], stencil, stationary=True)
    field = bg.GMRF(loc, factor)
    results[name] = field.condition(seen, photograph).mean
    error = (results[name] - photograph).square().mean().sqrt()
    nats = -field.log_prob(photograph) / photograph.numel()
    print(f"{name}: {nats:.3f} nats per number, root mean square error {error:.4f}")

# %%
# Both models were fitted to the photograph itself: this compares what they can say, not how they generalise.

panels = {"the truth": photograph, "seen": photograph * seen, **results}
figure, axes = plt.subplots(2, 2, figsize=(9, 7.4), layout="constrained")
for axis, (title, image) in zip(axes.flat, panels.items(), strict=True):
    axis.imshow(image.clamp(0, 1))
    axis.set_title(title)
    axis.set_axis_off()
plt.show()

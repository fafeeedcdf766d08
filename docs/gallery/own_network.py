"""
A likelihood for your own network: doubling the resolution of photographs
=========================================================================

A small network doubles the resolution of photographs. With a head beside its mean it also says how its errors hang together:
it is trained, sampled, checked on a photograph that it never saw, saved, and exported. Steps and learning rates were chosen
with that photograph in view: a demonstration, not a benchmark.
"""

import io
import math

import matplotlib.pyplot as plt
import skimage.color
import skimage.data
import skimage.util
import torch
from torch import nn

import banded_gmrf as bg
from supn_models import StencilCholeskyHead

torch.manual_seed(0)
stencil = bg.Stencil.square(5)

# %%
# The ten lines that a network needs: from its last features a mean, as ever, and a factor. ``initial_stddev`` is about the
# size of a residual, in the units of the image.


class Doubler(nn.Module):
    def __init__(self, width: int = 24):
        super().__init__()
        layers = [nn.Conv2d(1, width, 3, padding=1), nn.SiLU()]
        for dilation in (1, 2, 4):
            layers += [nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.mean = nn.Conv2d(width, 1, 1)
        self.factor = StencilCholeskyHead(width, stencil, initial_stddev=0.05)

    def forward(self, coarse):
        start = nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear")
        features = self.body(start)
        return bg.GMRF((start + self.mean(features))[:, 0], self.factor(features), validate_args=False)


# %%
# Patches of 32 x 32 pixels. Gray values have 256 levels; noise within a level keeps a density from growing without bound where
# a region is flat.


def patches(*names: str) -> torch.Tensor:
    found = []
    for name in names:
        image = skimage.util.img_as_float32(getattr(skimage.data, name)())
        image = torch.from_numpy(skimage.color.rgb2gray(image) if image.ndim == 3 else image).float()
        image = nn.functional.avg_pool2d(image[None, None], 2)[0, 0]  # of the size at which edges are sharp
        found.append(image.unfold(0, 32, 32).unfold(1, 32, 32).reshape(-1, 1, 32, 32))
    fine = torch.cat(found)
    return fine + (torch.rand(fine.shape) - 0.5) / 255


train = patches("astronaut", "coffee", "rocket", "coins", "brick", "gravel")
validation, test = patches("chelsea"), patches("camera")
network = Doubler()
print(f"{len(train)} patches to train on, {len(validation)} to calibrate with, {len(test)} to test with")


def train_for(steps: int, learning_rate: float, loss_of) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        fine = train[torch.randint(len(train), (16,))].rot90(int(torch.randint(4, ())), (2, 3))
        loss = loss_of(network(nn.functional.avg_pool2d(fine, 2)), fine[:, 0])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
        schedule.step()


def predicted(fine: torch.Tensor) -> bg.GMRF:
    with torch.no_grad():
        return network(nn.functional.avg_pool2d(fine, 2))


# %%
# First the squared error, then the likelihood: a network that starts with the likelihood may explain hard images by a large
# variance. For comparison, the best that a squared error can say: independent errors, all of one size.

train_for(300, 2e-3, lambda q, fine: (q.mean - fine).square().mean())
error = (predicted(train).mean - train[:, 0]).square().mean()
test_error = (predicted(test).mean - test[:, 0]).square().mean()
independent = 0.5 * (math.log(2 * math.pi * error) + test_error / error)
train_for(500, 3e-3, lambda q, fine: -q.log_prob(fine).mean() / 32**2)

q = predicted(test)
structured = -q.log_prob(test[:, 0]).mean() / 32**2
print(f"root mean squared error {test_error.sqrt():.4f} before, {(q.mean - test[:, 0]).square().mean().sqrt():.4f} after")
print(f"-log p in nats per pixel: independent {independent:.3f}, structured {structured:.3f}")

# %%
# Is the network right about its errors? The whitened residual should have the variance 1 and no correlation between
# neighbours; intervals of 90 % should hold 90 %, also those of means over blocks, which the correlations decide. One scale,
# found on another photograph, repairs what is missing.

variance = bg.diagnostics.whitened_moments(q, test[:, 0]).mean_square.mean()
whitened = bg.diagnostics.autocorrelation(q.whiten(test[:, 0]), max_lag=1)
residual = bg.diagnostics.autocorrelation(test[:, 0] - q.mean, max_lag=1)
print(
    f"whitened residual: variance {variance:.2f}, correlation of neighbours {whitened[1, 2]:.2f}, before {residual[1, 2]:.2f}"
)
for block in (1, 8):
    coverage = bg.diagnostics.block_coverage(q, test[:, 0], block, levels=(0.9,))
    print(f"intervals of 90 % for means over {block} x {block} pixels hold {100 * float(coverage):.0f} %")
scale = bg.diagnostics.conformal_scale(predicted(validation), validation[:, 0], level=0.9)
inside = ((test[:, 0] - q.mean).abs() < float(scale) * 1.645 * q.stddev).float().mean()
print(f"widened by {float(scale):.2f}, as chelsea's photograph says, those of pixels hold {100 * float(inside):.0f} %")

# %%
# A file with the weights alone is read with torch's default, which runs no code from it. The exported program takes batches
# of any size and gives a distribution.

file = io.BytesIO()
torch.save({"width": 24, "state": network.state_dict()}, file)
file.seek(0)
saved = torch.load(file)
again = Doubler(saved["width"])
again.load_state_dict(saved["state"])

batch = torch.export.Dim("batch", min=1, max=1024)
program = torch.export.export(again, (test[:2, :, ::2, ::2],), dynamic_shapes=({0: batch},))
served = program.module()(nn.functional.avg_pool2d(test[:5], 2))
difference = (served.mean - q.mean[:5]).abs().max()
print(f"exported: {type(served).__name__} of batch {tuple(served.batch_shape)}, differs by {difference:.1e}")

# %%
# The head is convolutional: a prediction of a whole region is one of its patches, made larger. Each sample has edges and
# texture that the mean lacks. In the flat sky they are too grainy, as the variance below 1 says: the network is unsure.

camera = torch.from_numpy(skimage.util.img_as_float32(skimage.data.camera()))[None, None]
fine = nn.functional.avg_pool2d(camera, 2)[:, :, 20:84, 80:176]
q = predicted(fine)
samples = q.sample((2,))
stddev = q.stddev[0]
shown = {
    "given": nn.functional.avg_pool2d(fine, 2)[0, 0],
    "mean": q.mean[0],
    "a sample": samples[0, 0],
    "another sample": samples[1, 0],
    "truth": fine[0, 0],
}
figure, axes = plt.subplots(3, 2, figsize=(7, 7.4), layout="constrained")
for axis, (title, image) in zip(axes.flat, shown.items(), strict=False):
    axis.imshow(image, cmap="gray", vmin=0, vmax=1)
    axis.set_title(title)
picture = axes[2, 1].imshow(stddev, cmap="viridis", vmin=0)
axes[2, 1].set_title("standard deviation (white is 1)")
figure.colorbar(picture, ax=axes[2, 1], shrink=0.7)
for axis in axes.flat:
    axis.set_axis_off()
plt.show()

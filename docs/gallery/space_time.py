"""
Frames in time
==============

A film is a grid (T, H, W), and a separable prior for it is a Kronecker product: an autoregression in time, a Matérn field in
space. It fills in frames that are missing, and says how well it knows them.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import skimage
import torch
from PIL import Image, ImageSequence

import banded_gmrf as bg

torch.manual_seed(0)

# %%
# A tiny film that comes with scikit-image: 24 frames of 25 x 14 pixels, 70 ms apart. The field is what changes: each
# pixel less its mean over the frames that are there. Five are not.

file = Path(skimage.__file__).parent / "data" / "no_time_for_that_tiny.gif"
frames = [np.asarray(frame.convert("L"), dtype=float) for frame in ImageSequence.Iterator(Image.open(file))]
film = torch.from_numpy(np.stack(frames))
there = torch.ones(len(film), dtype=torch.bool)
there[[5, 11, 12, 13, 20]] = False
still = film[there].mean(0)
changes = film - still

# %%
# Variance and correlation in time are those of the frames that are there; the range in space is the one with the largest
# evidence.

observed = there[:, None, None].expand(film.shape)
variance = changes[there].square().mean()
pairs = there[1:] & there[:-1]
correlation = (changes[1:] * changes[:-1])[pairs].mean() / variance
time = bg.ar1_precision(len(film), correlation)


def given_the_frames(correlation_range):
    """The posterior of the changes; one gray level of noise, which covers rounding."""
    prior = bg.separable_precision(time, bg.matern_precision(film.shape[1:], correlation_range, 1, variance))
    field = bg.GMRF(torch.zeros_like(film), bg.StencilCholesky.from_precision(prior))
    return field.posterior(changes, torch.where(observed, 1.0, torch.inf).double())


posteriors = {correlation_range: given_the_frames(correlation_range) for correlation_range in (0.6, 1.0, 1.5)}
print(f"standard deviation {float(variance.sqrt()):.1f} gray levels, correlation of successive frames {float(correlation):.2f}")
for correlation_range, posterior in posteriors.items():
    print(f"range {correlation_range} pixels: log evidence {float(posterior.log_evidence):.0f} nats")
p = max(posteriors.values(), key=lambda posterior: posterior.log_evidence)

# %%
# The missing frames, against linear interpolation between the neighbours that are there.

known = there.nonzero().flatten().numpy()
linear = np.stack([[np.interp(range(len(film)), known, film[known, i, j]) for j in range(14)] for i in range(25)])
linear = torch.from_numpy(linear).movedim(-1, 0)
missing = ~there
for name, guess in {"separable prior": still + p.mean, "linear": linear, "mean frame": still.expand_as(film)}.items():
    print(f"{name}: root mean square error {float((guess - film)[missing].square().mean().sqrt()):.2f} gray levels")
deviation = (p.variance + 1).sqrt()  # of a gray level that would be observed
inside = ((still + p.mean - film).abs() < 1.96 * deviation)[missing].double().mean()
print(f"{float(inside):.0%} of the missing pixels lie in their 95 % intervals")

# %%
# The middle of the gap of three frames is the least certain; frames next to a missing one are hardly worse than others.

shown = [10, 11, 12, 13, 14]
figure, axes = plt.subplots(3, len(shown), figsize=(6, 6.6), layout="constrained")
rows = {
    "film": (changes, {"cmap": "RdBu_r", "vmin": -20, "vmax": 20}),
    "posterior mean": (p.mean, {"cmap": "RdBu_r", "vmin": -20, "vmax": 20}),
    "standard deviation": (p.stddev, {"cmap": "magma", "vmin": 0}),
}
for line, (title, (images, options)) in zip(axes, rows.items(), strict=True):
    options = {**options, "vmax": options.get("vmax", float(images.max()))}
    for axis, t in zip(line, shown, strict=True):
        picture = axis.imshow(images[t], **options)
        axis.set(xticks=[], yticks=[], title=f"frame {t}" + ("" if there[t] else "\n(missing)"))
    line[0].set_ylabel(title)
    figure.colorbar(picture, ax=line, label="gray levels")
plt.show()

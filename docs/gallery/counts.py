"""
A map of counts
===============

Cases are counted in the cells of a map, where few people live in some cells and many in others. Rates of cells with few people
are mostly chance. A field behind the counts, whose sum is 0, says where the risk is really higher than on average, and how sure
that is.
"""

import matplotlib.pyplot as plt
import torch

import banded_gmrf as bg

torch.manual_seed(0)
grid = (40, 50)
rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
town = (-((rows - 25) ** 2 + (columns - 15) ** 2) / 60).exp()
people = 20 + 2000 * town + 300 * torch.rand(grid, dtype=torch.float64) ** 4
prior = bg.GMRF(
    torch.zeros(grid, dtype=torch.float64), bg.StencilCholesky.from_precision(bg.matern_precision(grid, 12.0, 1, 0.3))
)
effect = prior.sample()
effect = effect - effect.mean()
cases = torch.poisson(0.02 * people * effect.exp())

# %%
# Given the effect, the counts are Poisson numbers around people · rate · exp(effect). `GMRF.laplace` finds the mode and a
# normal distribution around it. Rate and effect could trade places, so the effect is constrained to sum to 0. The rate is then
# the one at which as many cases are expected as there were.

rate = cases.sum() / people.sum()
for _ in range(5):
    at_risk = rate * people
    model = prior.laplace(lambda field, at=at_risk: torch.distributions.Poisson(at * field.exp()).log_prob(cases))
    model = model.constrain(torch.ones(1, *grid, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    rate = cases.sum() / (people * model.mean.exp()).sum()
mean, stddev = model.mean, model.stddev
higher = torch.special.ndtr(mean / stddev)  # the probability of a risk above the average
inside = ((effect - mean).abs() < 1.645 * stddev).double().mean()
raw = cases / (rate * people)
print(f"rate {rate:.4f}, with which the counts were made 0.0200")
print(f"{int(cases.sum())} cases among {int(people.sum())} people; the effect's sum is {float(mean.sum()):.1e}")
print(f"root mean square error of log risk {(mean - effect).square().mean().sqrt():.3f}, of no map {effect.std():.3f}")
print(f"the 90 % intervals hold {inside:.1%} of the cells")

# %%
# Raw rates in empty country jump between nothing and several times the average. The map of the risk keeps what the counts can
# tell, and the last map says where that is certain.

risk = {"cmap": "PuOr_r", "vmin": -1.5, "vmax": 1.5}
panels = [
    ("people", people, {"cmap": "cividis", "vmin": 0}, "in a cell"),
    ("raw rates", raw.clamp(min=0.05).log(), risk, "log risk, 0 is the average"),
    ("the truth", effect, risk, "log risk, 0 is the average"),
    ("posterior mean", mean, risk, "log risk, 0 is the average"),
    ("standard deviation", stddev, {"cmap": "viridis", "vmin": 0}, "of the log risk"),
    ("risk is above the average", higher, {"cmap": "PuOr_r", "vmin": 0, "vmax": 1}, "probability"),
]
figure, axes = plt.subplots(2, 3, figsize=(9.5, 7), layout="constrained")
for axis, (title, image, scale, label) in zip(axes.flat, panels, strict=True):
    picture = axis.imshow(image, **scale)
    axis.set_title(title)
    axis.set_axis_off()
    extend = "both" if scale is risk else "neither"
    figure.colorbar(picture, ax=axis, label=label, orientation="horizontal", shrink=0.9, extend=extend)
plt.show()

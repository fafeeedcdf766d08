"""
A map of heights, with its uncertainty
======================================

Heights of a mountain side are known at three pixels of ten, some of them badly. Kriging fills in the rest: a Matérn field,
given by its sparse precision, is conditioned on what was measured, on all 138,632 pixels at once.
"""

import time

import matplotlib.pyplot as plt
import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from matplotlib.cbook import get_sample_data
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern

import banded_gmrf as bg

torch.manual_seed(0)
with np.load(get_sample_data("jacksboro_fault_dem.npz", asfileobj=False)) as file:
    terrain = torch.from_numpy(file["elevation"].astype(np.float64))
grid = terrain.shape
seen, poor = torch.rand(grid) < 0.3, torch.rand(grid) < 0.2
level, spread = terrain[seen].mean(), terrain[seen].std()
height = (terrain - level) / spread

# A good instrument errs by a metre, a poor one by twenty.
error = torch.where(poor, 20.0, 1.0).double() / spread
measured = height + error * torch.randn_like(height)
noise_variance = error.square().where(seen, torch.inf)

# %%
# Range and variance by the evidence of a window of 96 x 96 pixels; a precision alone needs no band. A plane is added to the
# field as a linear trend, whose slopes are unknown.

window = (slice(150, 246), slice(150, 246))


def prior(parameters, shape):
    precision = bg.matern_precision(shape, parameters["range"], 1, parameters["variance"])
    return bg.SparseGMRF(torch.zeros(shape, dtype=torch.float64), precision)


fit = bg.maximum_evidence(
    lambda parameters: prior(parameters, (96, 96)).posterior(measured[window], noise_variance[window]),
    {"range": 20.0, "variance": 1.0},
)
for name, value in fit.parameters.items():
    print(f"{name}: {value:.4g} ± {fit.standard_errors[name]:.2g}")

# %%
# The whole raster: mean, exact standard deviations and samples come from one factorisation, by nested dissection. SciPy's
# sparse LU of the same matrix, without the trend, stands beside it for its time.

rows, columns = (torch.linspace(-1, 1, size).double() for size in grid)
plane = torch.stack([rows[:, None].expand(grid), columns.expand(grid)])
field = prior(fit.parameters, grid)


def timed(what, function):
    begin = time.perf_counter()
    result = function()
    print(f"{what}: {time.perf_counter() - begin:.1f} s")
    return result


def by_sparse_lu():
    k, below, column = field.precision.stencil.entries(grid)
    entries = field.precision.off_diag.flatten(1)[k, column].numpy()
    lower = scipy.sparse.coo_array((entries, (below.numpy(), column.numpy())), shape=[grid.numel()] * 2)
    diagonal = field.precision.diag + 1 / noise_variance
    matrix = (lower + lower.T + scipy.sparse.diags_array(diagonal.flatten().numpy())).tocsc()
    symmetric = {"diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
    factor = scipy.sparse.linalg.splu(matrix, permc_spec="MMD_AT_PLUS_A", **symmetric)
    return factor.solve((measured / noise_variance).nan_to_num().flatten().numpy())


def kriged():
    given = field.posterior(measured, noise_variance, covariates=plane, covariate_variance=1.0)
    return given, given.mean


p, mean = timed("factor and mean", kriged)
stddev = timed("exact standard deviations", lambda: p.stddev)
samples = timed("10 samples", lambda: p.sample((10,)))
timed("factor and mean by SciPy's splu", by_sparse_lu)
slopes = spread * p.coefficients.mean
print(f"the plane rises by {slopes[0]:.0f} m from the middle to the lower edge, {slopes[1]:.0f} m to the right one")

# %%
# Were the intervals right? Pixels that nobody measured are the judge. Intervals hold more than they say: the window is rougher
# than most of the map, and one range and one variance stand for all of it.

missing = ~seen
z = ((height - mean) / stddev)[missing].abs()
for level_of, radius in ((0.5, 0.674), (0.9, 1.645), (0.99, 2.576)):
    print(f"intervals of {level_of:.0%} hold {float((z < radius).double().mean()):.1%}")
print(f"root mean square error where nothing was measured: {spread * (mean - height)[missing].square().mean().sqrt():.1f} m")

# %%
# A Gaussian process of scikit-learn takes a matrix of all pairs of measurements: here of a third of those in the window, with
# the same range and variance. (Its length scale is half of what is a range here, whatever the smoothness.)

inside = torch.zeros(grid, dtype=torch.bool)
inside[window] = True
places = (inside & seen).nonzero()
places = places[torch.randperm(len(places))[: len(places) // 3]]
asked = (inside & missing).nonzero()
length, variance = float(fit.parameters["range"]) / 2, float(fit.parameters["variance"])
process = GaussianProcessRegressor(
    variance * Matern(length, nu=1.0), alpha=noise_variance[tuple(places.T)].numpy(), optimizer=None
)
process.fit(places.numpy(), measured[tuple(places.T)].numpy())
predicted = torch.from_numpy(process.predict(asked.numpy()))
truth, ours = height[tuple(asked.T)], mean[tuple(asked.T)]
print(
    f"in the window: {spread * (ours - truth).square().mean().sqrt():.1f} m from all measurements, "
    f"{spread * (predicted - truth).square().mean().sqrt():.1f} m by scikit-learn from {len(places)}"
)

figure, axes = plt.subplots(2, 3, figsize=(10.5, 5.8), layout="constrained")
meters = {"cmap": "cividis", "vmin": float(terrain.min()), "vmax": float(terrain.max())}
for axis, (title, image, scale) in zip(
    axes.flat,
    (
        ("measured", (level + spread * measured).where(seen, torch.nan), meters),
        ("posterior mean", level + spread * mean, meters),
        ("a sample", level + spread * samples[0], meters),
        ("truth", terrain, meters),
        ("standard deviation", spread * stddev, {"cmap": "viridis", "vmin": 0}),
        ("error of the mean", spread * (mean - height), {"cmap": "RdBu_r", "vmin": -40, "vmax": 40}),
    ),
    strict=True,
):
    picture = axis.imshow(image, **scale)
    axis.set_title(title)
    axis.set_axis_off()
    figure.colorbar(picture, ax=axis, label="m", shrink=0.8)
plt.show()

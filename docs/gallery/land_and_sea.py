"""
Land and sea
============

Two shores of an island are near each other on the map, and far apart by water. A mask keeps a Matérn field from being
correlated across what is not there. Whether that is right for the data at hand, their evidence says.
"""

import matplotlib.cbook
import matplotlib.pyplot as plt
import torch

import banded_gmrf as bg

torch.manual_seed(0)

# %%
# Real topography and bathymetry of Vancouver Island and the straits around it, in pixels of about 2 km, north at the top. The
# sea is where the height is below zero.

data = matplotlib.cbook.get_sample_data("topobathy.npz")
height = torch.from_numpy(data["topo"][:, 20:]).double().flip(0)
extent = (*data["longitude"][[20, -1]] - 360, *data["latitude"][[0, -1]])
grid, sea = height.shape, height < 0

# %%
# One place in the Strait of Georgia, and its correlation with all others. Without a mask it crosses the island; with one it
# goes around. Pixels of land are then independent of everything.

site, fields = (34, 52), {}
for name, mask in {"no mask": None, "mask": sea}.items():
    precision = bg.matern_precision(grid, correlation_range=60.0, smoothness=1, mask=mask)
    fields[name] = bg.GMRF(torch.zeros(grid, dtype=torch.float64), bg.StencilCholesky.from_precision(precision))
correlations = {name: field.correlation_with(site) for name, field in fields.items()}
ocean = (60, 3)
print(", ".join(f"{name}: {float(image[ocean]):.2f} with a place in the ocean" for name, image in correlations.items()))

# %%
# Depths at 4 % of the sea's pixels, with an error of 10 m. Range and variance of both models have their largest evidence; the
# pixels that were not sounded are the judge.

sounded = sea & (torch.rand(grid) < 0.04)
depth = -height / 100  # in hundreds of metres
soundings = depth + 0.1 * torch.randn_like(depth)
noise_variance = torch.where(sounded, 0.01, torch.inf).double()
mean = soundings[sounded].mean().expand(grid)


def kriging(mask):
    """The model of the soundings: from parameters to the posterior of the depth."""

    def model(parameters):
        precision = bg.matern_precision(grid, parameters["range"], 1, parameters["variance"], mask=mask)
        prior = bg.GMRF(mean, bg.StencilCholesky.from_precision(precision))
        return prior.posterior(soundings, noise_variance)

    return model


unseen = sea & ~sounded
fits = {}
for name, mask in {"no mask": None, "mask": sea}.items():
    fit = bg.maximum_evidence(kriging(mask), {"range": 12.0, "variance": 5.0}, tolerance=1.0)
    error = (fit.posterior.mean - depth)[unseen]
    inside = (error.abs() < 1.96 * fit.posterior.stddev[unseen]).double().mean()
    print(
        f"{name}: log evidence {fit.log_evidence:.1f} nats, range {float(fit.parameters['range']):.1f} pixels, "
        f"root mean square error {100 * float(error.square().mean().sqrt()):.0f} m, "
        f"{float(inside):.0%} of the 95 % intervals hold"
    )
    fits[name] = fit

# %%
# The depth is a case without barriers: it goes to zero on both shores of a strip of land, and the land's own slope goes on
# below the water. What water carries, salt or plankton, is a case with them.

figure, axes = plt.subplots(4, 1, figsize=(5, 12.5), layout="constrained")
pictures = {
    "correlation with +, no mask": (correlations["no mask"], {"cmap": "viridis", "vmin": 0, "vmax": 1}),
    "correlation with +, mask": (correlations["mask"], {"cmap": "viridis", "vmin": 0, "vmax": 1}),
    "depth given the soundings, no mask (m)": (100 * fits["no mask"].posterior.mean, {"cmap": "cividis_r", "vmin": 0}),
    "its standard deviation, and soundings (m)": (100 * fits["no mask"].posterior.stddev, {"cmap": "magma", "vmin": 0}),
}
for axis, (title, (image, options)) in zip(axes, pictures.items(), strict=True):
    shown = image if title.endswith("no mask") else torch.where(sea, image, torch.nan)
    picture = axis.imshow(shown, extent=extent, aspect=1.5, **options)
    axis.contour(sea.flip(0), levels=[0.5], colors="0.4", linewidths=0.6, extent=extent)
    axis.set(title=title, xlabel="longitude (°)", ylabel="latitude (°)", facecolor="0.8")
    figure.colorbar(picture, ax=axis)


def place(row, column):
    """Longitude and latitude of pixels."""
    west, east, south, north = extent
    return west + (column + 0.5) * (east - west) / grid[1], north - (row + 0.5) * (north - south) / grid[0]


for axis in axes[:2]:
    axis.plot(*place(*site), "k+", ms=10, mew=2)
axes[3].plot(*place(*sounded.nonzero().T), "w.", ms=2)
plt.show()

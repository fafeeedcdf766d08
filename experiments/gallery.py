"""Random fields from each way to construct a factor, and what a small stencil makes of them.

* Precisions (``StencilCholesky.from_precision``): a Matérn field, a conditional autoregression, a thin plate. The exact factor
  exists too, so that the cost of a small stencil is a divergence in nats.
* A covariance function (``StencilCholesky.from_covariance``) that is not stationary: the swirl, whose correlations run around
  the centre of the image. The nearest to an exact factor is a large stencil.
* A photograph of a texture (``StencilCholesky.from_samples``), a single sample of a stationary field.

All samples come from the same white noise.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from rich.console import Console
from torch import Tensor

import banded_gmrf as bg
from programs.tables import markdown_table

from . import photographs
from .figures import Column, image_grid
from .results import environment, where_text, write_results
from .training import seeded_generator

TEXTURES = ("grass", "brick")
STENCIL_SIZES = (3, 5, 7)
REFERENCE_SIZE = 11  # of the stencil that stands for the exact factor of the swirl


@dataclass(frozen=True)
class GalleryConfig:
    """What a run depends on: the seed, and the height and width of the images in pixels, at most 256."""

    seed: int = 0
    size: int = 256


@dataclass
class Field:
    """One column of the figure: what the samples are compared with, one sample for each stencil, and numbers for the table."""

    name: str
    reference: Tensor
    reference_name: str
    samples: list[Tensor]
    nats_per_pixel: list[float]


def run_gallery(config: GalleryConfig, folder: Path, console: Console) -> dict[str, Any]:
    """Construct, sample and write everything into ``folder``; return what results.json holds."""
    start = time.perf_counter()
    grid = (config.size, config.size)
    noise = torch.randn(grid, dtype=torch.float64, generator=seeded_generator(config.seed, "gallery"))
    precisions = {
        "Matérn": bg.matern_precision(grid, correlation_range=40.0, smoothness=1.0),
        "autoregression": bg.car_precision(grid, dependence=0.995),
        "thin plate": bg.thin_plate_precision(grid, bending=1.0, ridge=1e-5),
    }
    fields = {"divergence": [], "likelihood": []}
    for name, precision in precisions.items():
        console.print(f"{name} ...")
        fields["divergence"].append(precision_field(name, precision, noise))
    console.print("swirl ...")
    fields["likelihood"].append(swirl_field(grid, noise))
    for name in TEXTURES:
        console.print(f"{name} ...")
        fields["likelihood"].append(texture_field(name, config.size, noise))
    draw(folder / "samples.png", [*fields["divergence"], *fields["likelihood"]])
    results = {
        "definition": {
            "divergence": "KL(N(0, Λ⁻¹) ‖ N(0, (L Lᵀ)⁻¹)) / n of the factor with each stencil",
            "likelihood": "-log p / n, ½ and constant included: its expectation for the swirl, that of the texture itself",
        },
        "nats_per_pixel": {
            kind: {field.name: dict(zip(STENCIL_SIZES, field.nats_per_pixel, strict=True)) for field in members}
            for kind, members in fields.items()
        },
        "config": asdict(config),
        **environment("cpu"),
        "device": "cpu",
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_results(folder, results, markdown_report(results), console)
    return results


def precision_field(name: str, precision: bg.StencilPrecision, noise: Tensor) -> Field:
    """The exact factor of a precision beside the nearest ones with small stencils."""
    exact = bg.StencilCholesky.from_precision(precision)
    factors = [exact.nearest(bg.Stencil.square(size)) for size in STENCIL_SIZES]
    # Of KL = ½ (tr(L̂ᵀΣL̂) - n) + log|L| - log|L̂| the trace of the nearest factor is n.
    divergences = [((exact.logdet() - factor.logdet()) / noise.numel()).item() for factor in factors]
    return Field(name, *sample_each([exact], noise), "exact", sample_each(factors, noise), divergences)


def swirl_field(grid: tuple[int, int], noise: Tensor) -> Field:
    """Factors of the swirl's covariance function; the reference is the sample with the large stencil."""
    covariance = swirl_covariance(grid)
    sizes = (REFERENCE_SIZE, *STENCIL_SIZES)
    reference, *factors = [bg.StencilCholesky.from_covariance(covariance, bg.Stencil.square(size), grid) for size in sizes]
    expected = [0.5 * (1 + math.log(2 * math.pi)) - factor.logdet().item() / noise.numel() for factor in factors]
    name_of_reference = f"{REFERENCE_SIZE} x {REFERENCE_SIZE}"
    return Field("swirl", *sample_each([reference], noise), name_of_reference, sample_each(factors, noise), expected)


def swirl_covariance(grid: tuple[int, int], along: float = 24.0, across: float = 3.0) -> Callable[[Tensor, Tensor], Tensor]:
    """A covariance of variance 1 whose ranges, in pixels, are larger along circles around the centre than across them.

    Paciorek and Schervish, Spatial modelling using a new class of nonstationary covariance functions, Environmetrics 2006: with
    a matrix M of squared ranges at each site, |M_a|^¼ |M_b|^¼ |M|^-½ exp(-√(hᵀM⁻¹h)), M = (M_a + M_b) / 2 and h = a - b.
    """
    centre = torch.tensor([(n - 1) / 2 for n in grid], dtype=torch.float64)

    def squared_ranges(sites: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The entries (yy, xx, yx) of M."""
        y, x = (sites - centre).unbind(-1)
        radius2 = y.square() + x.square() + 1  # round where there is no direction
        squeeze = (along**2 - across**2) / radius2
        return across**2 + squeeze * (x.square() + 0.5), across**2 + squeeze * (y.square() + 0.5), -squeeze * x * y

    def determinant(yy: Tensor, xx: Tensor, yx: Tensor) -> Tensor:
        return yy * xx - yx.square()

    def covariance(a: Tensor, b: Tensor) -> Tensor:
        at_a, at_b = squared_ranges(a), squared_ranges(b)
        yy, xx, yx = mean = [(m + n) / 2 for m, n in zip(at_a, at_b, strict=True)]
        y, x = (a - b).to(torch.float64).unbind(-1)
        distance2 = (xx * y.square() - 2 * yx * x * y + yy * x.square()) / determinant(*mean)
        scale = (determinant(*at_a) * determinant(*at_b)).pow(0.25) / determinant(*mean).sqrt()
        return scale * torch.exp(-distance2.sqrt())

    return covariance


def texture_field(name: str, size: int, noise: Tensor) -> Field:
    """Stationary factors estimated from a photograph, half its size and cropped."""
    photograph = photographs.load_photograph(name, shrink=2)[:size, :size].to(torch.float64)
    factors = [
        bg.StencilCholesky.from_samples(photograph[None], bg.Stencil.square(s), stationary=True, stable="project")
        for s in STENCIL_SIZES
    ]
    centred = photograph - photograph.mean()
    nats = [
        bg.negative_log_likelihood(centred, factor.log_diag, factor.off_diag, factor.stencil).item() / noise.numel()
        for factor in factors
    ]
    return Field(name, centred, "photograph", sample_each(factors, noise), nats)


def sample_each(factors: list[bg.StencilCholesky], noise: Tensor) -> list[Tensor]:
    return [factor.solve(noise, transpose=True) for factor in factors]


def draw(path: Path, fields: list[Field]) -> None:
    """Each field in standard deviations of its reference, about the reference's mean."""
    columns = []
    for field in fields:
        images = torch.stack([field.reference, *field.samples])
        images = (images - field.reference.mean()) / field.reference.std()
        columns.append(Column(f"{field.name}\n(reference: {field.reference_name})", images, "field"))
    labels = ["reference", *(f"{size} x {size}" for size in STENCIL_SIZES)]
    image_grid(path, columns, {"field": ("standard deviations of the reference", "gray", -3.0, 3.0)}, labels, size=1.9)
    PIL.Image.open(path).convert("L").save(path)  # noise hardly compresses: one channel is half the size of four


def markdown_report(results: dict[str, Any]) -> str:
    """Both tables, with what is needed to read them."""
    header = ["field", *(f"{size} x {size}" for size in STENCIL_SIZES)]

    def table(kind: str) -> str:
        rows = results["nats_per_pixel"][kind]
        return markdown_table(header, [[name, *(f"{value:.4f}" for value in row.values())] for name, row in rows.items()])

    size = results["config"]["size"]
    return (
        f"# Random fields of {size} x {size} pixels\n\n"
        "Divergence of the nearest factor with each stencil from the exact distribution, nats per pixel:\n\n"
        + table("divergence")
        + "\n-log p / n, nats per pixel: its expectation for the swirl; for a texture that of the photograph from which the "
        "factor was estimated (gray values in [0, 1]):\n\n"
        + table("likelihood")
        + f"\nSeed {results['config']['seed']}; `{results['command']}`, {results['seconds']} s on {where_text(results)}.\n"
    )

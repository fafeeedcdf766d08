"""Structured uncertainty on real photographs, in a few minutes on a CPU.

An autoencoder is trained on gray patches of photographs by mean squared error and frozen. What it cannot reconstruct, the
residual, is far from white: neighbouring pixels err together. Three models of the residual are trained by maximum likelihood
and compared on photographs that no stage of training has seen: isotropic (one variance for a patch), diagonal (a network
predicts a variance per pixel), and structured (the same network predicts the Cholesky factor of a precision matrix, with a
5 x 5 stencil), as in Dorta et al., Structured Uncertainty Prediction Networks, CVPR 2018.

How rough a patch is, its reconstruction does not tell: it is as smooth for grass as for a face. One number more is therefore
added to its code, the root mean square by which neighbouring pixels of its residual differ, and all three models are given it.

The photographs ship inside scikit-image: `photographs.TRAIN` and `photographs.TEST`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import banded_gmrf as bg
from programs.commands import InterruptedRunError
from programs.tables import markdown_table
from supn_models import ConvAutoencoder, CovarianceNetwork

from . import photographs
from .checkpoints import CHECKPOINT, save_checkpoint
from .figures import Column, correlation_figure, image_grid, loss_figure
from .page import write_page
from .results import environment, write_results
from .training import fit, seeded_generator, warmup_cosine, with_replacement
from .whiteness import lag_autocorrelation

# Predicts from means (B, 1, H, W) and levels (B,).
CovarianceModel = Callable[[Tensor, Tensor], bg.StencilCholesky]

# Of the figures, in the order in which the page shows them.
CAPTIONS = {
    "samples.png": "Held-out patches, what the autoencoder makes of them, its residual, and a sample and the standard "
    "deviation of the structured and of the diagonal model, drawn from the same white noise.",
    "correlations.png": "Held-out patches, and the correlations of three marked pixels with all others under the "
    "structured model.",
    "training.png": "Training losses, lower is better: mean squared error of the autoencoder, then nats per pixel of the "
    "models of its residual.",
}

# The values that a level may have, evenly spaced in its logarithm: 20 to a decade, from less than a gray value of 255 to white.
LEVELS = torch.logspace(-3, 0, 61)


@dataclass(frozen=True)
class DemoConfig:
    """What a run depends on. Sizes are in pixels, ``patches`` counts training patches."""

    seed: int = 0
    stencil_size: int = 5
    patch_size: int = 32
    patches: int = 24_000
    autoencoder_steps: int = 700
    covariance_steps: int = 700
    autoencoder_batch: int = 64
    covariance_batch: int = 32
    latent_size: int = 64
    channels: int = 16
    learning_rate: float = 3e-3
    train_shrinks: tuple[int, ...] = (1, 2, 3)
    test_shrink: int = 2


def run_demo(config: DemoConfig, folder: Path, console: Console) -> dict[str, Any]:
    """Train, evaluate and write everything into ``folder``; return what results.json holds.

    Raises:
        InterruptedRunError: on Ctrl-C, after the networks trained so far were written to ``folder``.
    """
    networks: dict[str, nn.Module] = {}
    try:
        return _train_and_evaluate(config, folder, console, networks)
    except KeyboardInterrupt:
        if not networks:
            raise InterruptedRunError(f"nothing was trained yet; {folder} is empty") from None
        path = folder / CHECKPOINT
        save_checkpoint(path, networks, {"config": asdict(config), "interrupted": True})
        raise InterruptedRunError(f"{', '.join(networks)} as trained so far: {path}") from None


def _train_and_evaluate(config: DemoConfig, folder: Path, console: Console, networks: dict[str, nn.Module]) -> dict[str, Any]:
    start = time.perf_counter()
    train, test, names = load_patches(config)
    console.print(f"train on {', '.join(photographs.TRAIN)}: {len(train)} patches of {config.patch_size} x {config.patch_size}")
    console.print(f"test on  {', '.join(photographs.TEST)}: {len(test)} patches")

    torch.manual_seed(config.seed)
    autoencoder = networks["autoencoder"] = _for_cpu(
        ConvAutoencoder((config.patch_size, config.patch_size), latent_size=config.latent_size)
    )
    losses = {}
    losses["autoencoder"] = fit(
        autoencoder,
        lambda images: (images - autoencoder(images)).square().mean(),
        (train,),
        steps=config.autoencoder_steps,
        rows=with_replacement(len(train), config.autoencoder_batch, seeded_generator(config.seed, "autoencoder batches")),
        learning_rate=warmup_cosine(config.learning_rate, config.autoencoder_steps),
        title="autoencoder (MSE)",
        console=console,
    )
    autoencoder.requires_grad_(False)
    train_means = torch.cat([autoencoder(batch) for batch in train.split(256)])
    train_residuals = (train - train_means)[:, 0]
    train_levels = levels_of(train_residuals)

    ratio = (train_residuals / train_levels[:, None, None]).square().mean().sqrt().item()

    models: dict[str, CovarianceModel] = {"isotropic": isotropic_model(ratio)}
    for name, size in (("diagonal", 1), ("structured", config.stencil_size)):
        torch.manual_seed(config.seed)
        network = networks[name] = _for_cpu(
            CovarianceNetwork(2, bg.Stencil.square(size), channels=config.channels, initial_stddev=ratio)
        )
        models[name] = model = at_level(network)
        losses[name] = fit(
            network,
            lambda means, levels, residuals, model=model: nats_per_pixel(model(means, levels), residuals).mean(),
            (train_means, train_levels, train_residuals),
            steps=config.covariance_steps,
            rows=with_replacement(len(train), config.covariance_batch, seeded_generator(config.seed, "covariance batches")),
            learning_rate=warmup_cosine(config.learning_rate, config.covariance_steps),
            title=f"{name} (nats per pixel)",
            console=console,
        )
    save_checkpoint(folder / CHECKPOINT, networks, {"config": asdict(config), "interrupted": False})

    with torch.no_grad():
        test_means = autoencoder(test)
        test_residuals = (test - test_means)[:, 0]
        test_levels = levels_of(test_residuals)
        scores = {name: evaluate(model(test_means, test_levels), test_residuals, names) for name, model in models.items()}
        console.print("figures ...")
        loss_figure(
            folder / "training.png",
            [
                ("mean squared error", {"autoencoder": losses["autoencoder"]}),
                ("nats per pixel", {name: losses[name] for name in ("diagonal", "structured")}),
            ],
            smooth=min(20, config.autoencoder_steps, config.covariance_steps),
        )
        rows = pick_patches(test, names, per_photograph=2)
        shown, shown_means = test[rows], test_means[rows]
        factors = {name: model(shown_means, test_levels[rows]) for name, model in models.items()}
        draw_samples(folder / "samples.png", config, factors, shown, shown_means, [names[row] for row in rows])
        draw_correlations(folder / "correlations.png", factors["structured"], shown, shown_means)

    results = {
        "definition": "nats_per_pixel is -log p / n given a patch's mean and level, ½ and constant included, plus what the "
        f"level costs, log {len(LEVELS)} / n: mean and standard error over held-out patches",
        "scores": scores,
        "structured_gain_over_diagonal": scores["diagonal"]["nats_per_pixel"] - scores["structured"]["nats_per_pixel"],
        "residual_rms": {
            name: part.square().mean().sqrt().item() for name, part in (("train", train_residuals), ("test", test_residuals))
        },
        "config": asdict(config),
        "photographs": {
            "source": "skimage.data",
            "train": photographs.TRAIN,
            "test": {name: names.count(name) for name in photographs.TEST},
        },
        **environment("cpu"),
        "seconds": round(time.perf_counter() - start, 1),
    }
    report = markdown_report(results)
    write_page(folder, results, report, CAPTIONS)
    write_results(folder, results, report, console)
    return results


def load_patches(config: DemoConfig) -> tuple[Tensor, Tensor, list[str]]:
    """Training patches, test patches, both (count, 1, size, size), and the photograph of each test patch.

    Training patches come from several resolutions: only then is there more than one sharpness and noise level to learn from.
    """
    generator = seeded_generator(config.seed, "patches")
    sources = [photographs.load_photograph(name, s) for s in config.train_shrinks for name in photographs.TRAIN]
    count = -(-config.patches // len(sources))
    train = torch.cat([photographs.random_patches(source, config.patch_size, count, generator) for source in sources])
    test, names = [], []
    for name in photographs.TEST:
        test.append(photographs.tile_patches(photographs.load_photograph(name, config.test_shrink), config.patch_size))
        names += [name] * len(test[-1])
    return photographs.dequantise(train, generator), photographs.dequantise(torch.cat(test), generator), names


def levels_of(residuals: Tensor) -> Tensor:
    """How rough each residual (B, H, W) is: the root mean square of neighbours' differences, the nearest of `LEVELS`, (B,)."""
    squares = [residuals.diff(dim=dim).square().mean((1, 2)) for dim in (1, 2)]
    rms = torch.stack(squares).mean(0).sqrt()
    return LEVELS[(rms.log()[:, None] - LEVELS.log()).abs().argmin(1)]


def isotropic_model(ratio: float) -> CovarianceModel:
    """Predicts white noise with a standard deviation of ``ratio`` levels."""
    diagonal = bg.Stencil.square(1)

    def predict(means: Tensor, levels: Tensor) -> bg.StencilCholesky:
        log_diag = -(ratio * levels).log()[:, None, None].expand_as(means[:, 0])
        return bg.StencilCholesky(log_diag, means[:, :0], diagonal)

    return predict


def at_level(network: CovarianceNetwork) -> CovarianceModel:
    """What a network of two channels predicts, in units of the level, from a mean and a plane that holds the level."""

    def predict(means: Tensor, levels: Tensor) -> bg.StencilCholesky:
        place = levels.log() - LEVELS.log().mean()
        factor = network(torch.cat((means, place[:, None, None, None].expand_as(means)), 1))
        scale = levels[:, None, None]
        return bg.StencilCholesky(factor.log_diag - scale.log(), factor.off_diag / scale[:, None], factor.stencil)

    return predict


def nats_per_pixel(factor: bg.StencilCholesky, residuals: Tensor) -> Tensor:
    """-log p / n of residuals (B, *grid), one value for each: (B,)."""
    nats = bg.negative_log_likelihood(residuals, factor.log_diag, factor.off_diag, factor.stencil)
    return nats / factor.grid.numel()


def evaluate(factor: bg.StencilCholesky, residuals: Tensor, names: list[str]) -> dict[str, Any]:
    """Likelihood of held-out residuals (B, H, W) with what their levels cost, and how white they are after whitening."""
    nats = nats_per_pixel(factor, residuals) + math.log(len(LEVELS)) / factor.grid.numel()
    white = factor.matvec(residuals, transpose=True)
    own = {photograph: [name == photograph for name in names] for photograph in photographs.TEST}
    return {
        "nats_per_pixel": nats.mean().item(),
        "standard_error": (nats.std() / math.sqrt(len(nats))).item(),
        "by_photograph": {photograph: nats[rows].mean().item() for photograph, rows in own.items()},
        "whitened_autocorrelation": lag_autocorrelation(white),
        "whitened_variance": white.var().item(),
        "whitened_variance_by_photograph": {photograph: white[rows].var().item() for photograph, rows in own.items()},
    }


def markdown_report(results: dict[str, Any]) -> str:
    """The table of results, with what is needed to read it."""
    header = ["residual model", "nats per pixel", "± s.e.", *photographs.TEST, "lag-1"]
    header += ["variance", *(f"of {photograph}" for photograph in photographs.TEST)]
    rows = [
        [
            name,
            f"{score['nats_per_pixel']:.3f}",
            f"{score['standard_error']:.3f}",
            *(f"{value:.3f}" for value in score["by_photograph"].values()),
            f"{score['whitened_autocorrelation']:.3f}",
            f"{score['whitened_variance']:.2f}",
            *(f"{value:.2f}" for value in score["whitened_variance_by_photograph"].values()),
        ]
        for name, score in results["scores"].items()
    ]
    shown = results["photographs"]
    return (
        "# Residuals of an autoencoder on held-out photographs\n\n"
        + markdown_table(header, rows)
        + f"\nNats per pixel are -log p / n (lower is better), the mean over {sum(shown['test'].values())} patches of "
        f"{results['config']['patch_size']} x {results['config']['patch_size']} pixels, with its standard error, and over each "
        "photograph's. Lag-1 is the correlation of neighbouring pixels of the whitened residual (0 for a perfect model), "
        "variance is that of the whitened residual, over all patches and over each photograph's (1 for a perfect model; below, "
        "the model is too unsure, above, too sure). "
        f"Structured gains {results['structured_gain_over_diagonal']:.3f} nats per pixel over diagonal.\n\n"
        "A reconstruction does not tell how rough its patch was. All models are therefore given one number more of the patch, "
        "the root mean square by which neighbouring pixels of its residual differ, rounded to one of "
        f"{len(LEVELS)} values from {LEVELS[0]:g} to {LEVELS[-1]:g}; what it costs to tell it is part of the nats.\n\n"
        f"RMS residual: {results['residual_rms']['train']:.4f} on training patches, "
        f"{results['residual_rms']['test']:.4f} on test patches (gray values in [0, 1]).\n\n"
        f"Photographs of scikit-image: trained on {', '.join(shown['train'])}; tested on {', '.join(shown['test'])}. "
        f"Seed {results['config']['seed']}, {results['seconds']} s.\n"
    )


def pick_patches(test: Tensor, names: list[str], per_photograph: int) -> list[int]:
    """The patches with most contrast of each test photograph, in the order of the tiling."""
    picked = []
    for photograph in photographs.TEST:
        own = [i for i, name in enumerate(names) if name == photograph]
        contrast = test[own].flatten(1).std(1)
        best = contrast.topk(min(per_photograph, len(own))).indices.sort().values
        picked += [own[i] for i in best.tolist()]
    return picked


def draw_samples(
    path: Path, config: DemoConfig, factors: dict[str, bg.StencilCholesky], images: Tensor, means: Tensor, names: list[str]
) -> None:
    """Held-out patches beside samples of both predicted residuals, drawn from the same white noise."""
    noise = torch.randn(images[:, 0].shape, generator=seeded_generator(config.seed, "figure"))
    samples, stddevs = {}, {}
    for name in ("structured", "diagonal"):
        samples[name] = factors[name].solve(noise, transpose=True)
        stddevs[name] = bg.GMRF(means[:, 0], factors[name]).stddev
    residuals, means = (images - means)[:, 0], means[:, 0]
    reach = residuals.abs().quantile(0.99).item()
    columns = [
        Column("input", images[:, 0], "gray"),
        Column("reconstruction", means, "gray"),
        Column("reconstruction\n+ structured", means + samples["structured"], "gray"),
        Column("reconstruction\n+ diagonal", means + samples["diagonal"], "gray"),
        Column("residual", residuals, "residual"),
        Column("structured\nsample", samples["structured"], "residual"),
        Column("diagonal\nsample", samples["diagonal"], "residual"),
        Column("structured\nst. dev.", stddevs["structured"], "stddev"),
        Column("diagonal\nst. dev.", stddevs["diagonal"], "stddev"),
    ]
    scales = {
        "gray": ("gray value", "gray", 0.0, 1.0),
        "residual": ("residual", "RdBu_r", -reach, reach),
        "stddev": ("standard deviation", "magma", 0.0, reach),
    }
    image_grid(path, columns, scales, names)


def draw_correlations(path: Path, factor: bg.StencilCholesky, images: Tensor, means: Tensor) -> None:
    """Correlations of three pixels with all others."""
    q = bg.GMRF(means[:, 0], factor)
    height, width = q.event_shape
    sites = [(height // 4, width // 4), (height // 2, width // 2), (3 * height // 4, 3 * width // 4)]
    correlations = q.correlation_with(sites)  # (sites, patches, H, W)
    correlation_figure(path, images[:, 0], correlations.transpose(0, 1), [sites] * len(images))


def _for_cpu(network: nn.Module) -> nn.Module:
    """Convolutions on a CPU are about 1.5 times as fast on this layout."""
    return network.to(memory_format=torch.channels_last)

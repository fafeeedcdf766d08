"""Structured uncertainty on real photographs, in a few minutes on a CPU.

An autoencoder is trained on gray patches of photographs by mean squared error and frozen. What it cannot reconstruct, the
residual, is far from white: neighbouring pixels err together. Three models of the residual are trained by maximum likelihood
and compared on photographs that no stage of training has seen: isotropic (all pixels alike), diagonal (a network predicts a
variance per pixel), and structured (the same network predicts the Cholesky factor of a precision matrix, with a 5 x 5
stencil), as in Dorta et al., Structured Uncertainty Prediction Networks, CVPR 2018.

How rough a patch is, its reconstruction does not tell: it is as smooth for grass as for a face. One number more is therefore
added to its code, the level by which the standard deviations that a model predicts are multiplied: the one of `LEVELS` under
which the patch is most likely. It is chosen for each model, in training too, and what it costs is part of the likelihood.

The photographs ship inside scikit-image: `photographs.TRAIN` and `photographs.TEST`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import scipy.special
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

CovarianceModel = Callable[[Tensor], bg.StencilCholesky]

# Of the figures, in the order in which the page shows them.
CAPTIONS = {
    "samples.png": "Held-out patches, what the autoencoder makes of them, its residual, and a sample and the standard "
    "deviation of the structured and of the diagonal model, drawn from the same white noise.",
    "correlations.png": "Held-out patches, and the correlations of three marked pixels with all others under the "
    "structured model.",
    "training.png": "Training losses, lower is better: mean squared error of the autoencoder, then nats per pixel of the "
    "models of its residual.",
}

# The values that a level may have, evenly spaced in its logarithm: 20 to a decade.
LEVELS = torch.logspace(-2, 2, 81)

# Between minus and plus this lie 90 % of a standard normal's values.
NORMAL_90 = scipy.special.ndtri(0.95)


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
    stddev = train_residuals.square().mean().sqrt().item()

    models: dict[str, CovarianceModel] = {"isotropic": isotropic_model(stddev)}
    for name, size in (("diagonal", 1), ("structured", config.stencil_size)):
        torch.manual_seed(config.seed)
        network = networks[name] = models[name] = _for_cpu(
            CovarianceNetwork(1, bg.Stencil.square(size), channels=config.channels, initial_stddev=stddev)
        )
        losses[name] = fit(
            network,
            lambda means, residuals, network=network: nats_per_pixel(
                at_best_level(network(means), residuals), residuals
            ).mean(),
            (train_means, train_residuals),
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
        factors = {name: at_best_level(model(test_means), test_residuals) for name, model in models.items()}
        scores = {name: evaluate(factor, test_residuals, names) for name, factor in factors.items()}
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
        shown, shown_means, shown_names = test[rows], test_means[rows], [names[row] for row in rows]
        draw_samples(folder / "samples.png", config, {n: f[rows] for n, f in factors.items()}, shown, shown_means, shown_names)
        draw_correlations(folder / "correlations.png", factors["structured"][rows], shown, shown_means)

    results = {
        "definition": "nats_per_pixel is -log p / n given a patch's mean and level, ½ and constant included, with what the "
        f"level costs, log {len(LEVELS)} / n: mean and standard error over held-out patches",
        "scores": scores,
        "structured_gain_over_diagonal": scores["diagonal"]["nats_per_pixel"] - scores["structured"]["nats_per_pixel"],
        "residual_rms": {"train": stddev, "test": test_residuals.square().mean().sqrt().item()},
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


def nats_per_pixel(factor: bg.StencilCholesky, residuals: Tensor) -> Tensor:
    """-log p / n of residuals (B, *grid) with what a level costs, one value for each: (B,)."""
    nats = bg.negative_log_likelihood(residuals, factor.log_diag, factor.off_diag, factor.stencil)
    return (nats + math.log(len(LEVELS))) / factor.grid.numel()


def at_best_level(factor: bg.StencilCholesky, residuals: Tensor) -> bg.StencilCholesky:
    """Factors (B,) with standard deviations times the one of `LEVELS` under which each residual (B, H, W) is most likely."""
    # Which one it is changes in steps: no derivative goes through it.
    with torch.no_grad():
        variance = factor.matvec(residuals, transpose=True).square().mean((1, 2))
        nats = LEVELS.log() + 0.5 * variance[:, None] / LEVELS.square()
        level = LEVELS[nats.argmin(1)][:, None, None]
    return bg.StencilCholesky(factor.log_diag - level.log(), factor.off_diag / level[:, None], factor.stencil)


def isotropic_model(stddev: float) -> CovarianceModel:
    """Predicts white noise of one standard deviation, whatever the image."""
    diagonal = bg.Stencil.square(1)

    def predict(means: Tensor) -> bg.StencilCholesky:
        log_diag = torch.full_like(means[:, 0], -math.log(stddev))
        return bg.StencilCholesky(log_diag, means[:, :0], diagonal)

    return predict


def evaluate(factor: bg.StencilCholesky, residuals: Tensor, names: list[str]) -> dict[str, Any]:
    """Likelihood of held-out residuals (B, H, W), how white they are after whitening, and how many are within 90 %."""
    nats = nats_per_pixel(factor, residuals)
    white = factor.matvec(residuals, transpose=True)
    within = (white.abs() < NORMAL_90).float()
    own = {photograph: [name == photograph for name in names] for photograph in photographs.TEST}
    return {
        "nats_per_pixel": nats.mean().item(),
        "standard_error": (nats.std() / math.sqrt(len(nats))).item(),
        "by_photograph": {photograph: nats[rows].mean().item() for photograph, rows in own.items()},
        "whitened_autocorrelation": lag_autocorrelation(white),
        "whitened_variance": white.var().item(),
        "within_90": within.mean().item(),
        "within_90_by_photograph": {photograph: within[rows].mean().item() for photograph, rows in own.items()},
    }


def markdown_report(results: dict[str, Any]) -> str:
    """The table of results, with what is needed to read it."""
    header = ["residual model", "nats per pixel", "± s.e.", *photographs.TEST, "lag-1"]
    header += ["within 90 %", *(f"of {photograph}" for photograph in photographs.TEST)]
    rows = [
        [
            name,
            f"{score['nats_per_pixel']:.3f}",
            f"{score['standard_error']:.3f}",
            *(f"{value:.3f}" for value in score["by_photograph"].values()),
            f"{score['whitened_autocorrelation']:.3f}",
            *(f"{100 * value:.1f}" for value in (score["within_90"], *score["within_90_by_photograph"].values())),
        ]
        for name, score in results["scores"].items()
    ]
    shown = results["photographs"]
    return (
        "# Residuals of an autoencoder on held-out photographs\n\n"
        + markdown_table(header, rows)
        + f"\nNats per pixel are -log p / n (lower is better), the mean over {sum(shown['test'].values())} patches of "
        f"{results['config']['patch_size']} x {results['config']['patch_size']} pixels, with its standard error, and over each "
        "photograph's. Lag-1 is the correlation of neighbouring pixels of the whitened residual (0 for a perfect model). "
        "Within 90 % are the percents of its pixels that lie where 90 % of a standard normal's do, of all patches and of each "
        "photograph's (fewer: the model is too sure; more: too unsure). "
        f"Structured gains {results['structured_gain_over_diagonal']:.3f} nats per pixel over diagonal.\n\n"
        "A reconstruction does not tell how rough its patch was. Each model is therefore given one number more of a patch, the "
        f"level by which its standard deviations are multiplied: of {len(LEVELS)} values from {LEVELS[0]:g} to {LEVELS[-1]:g}, "
        "the one under which the patch is most likely. What it costs to tell it is part of the nats. It makes the variance of "
        "a whitened patch 1, so that this says nothing of a model; how its pixels are distributed does.\n\n"
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

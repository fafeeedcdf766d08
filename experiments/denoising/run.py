"""Train what is missing, denoise and inpaint test images, and write tables and figures."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Subset

from programs.files import write_json
from supn_models import ConvAutoencoder, StructuredLikelihood

from ..checkpoints import CHECKPOINT, load_checkpoint, save_checkpoint
from ..datasets import ImageData, stack
from ..faces.images import TrainingImages, images_for_training
from ..faces.networks import MEMORY_FORMAT, Options, build_base, fit_on_images, stopping_by, train_all
from ..figures import loss_figure
from ..results import STATES, Stopwatch, device_name, environment, numbered_states, write_results
from ..training import seeded_generator
from . import figures, inpainting
from .estimators import BM3D, INFERRED_POSTERIOR, Estimator, bm3d_estimates, estimator, inferred_estimates
from .noise import Noise, Sampler
from .presets import BASE, DIAGONAL, STRUCTURED, Config
from .report import markdown_report, table_rows

_BATCH = 10  # few enough for the coefficients to stay in a cache
_SHOWN = 4


def run_denoising(
    config: Config, data: ImageData, trained: Path | None, folder: Path, device: torch.device, console: Console
) -> dict[str, Any]:
    """Train, evaluate and write everything into ``folder``; return what results.json holds.

    The run starts from the beginning after `results.begin_run`, and from a recent state after an interruption: both are in
    ``folder``.

    Args:
        config: from `presets.config_for` for ``data``.
        data: the images.
        trained: the folder of the finished run of faces that ``config`` is of; None to train the networks.
        folder: where to.
        device: where to compute.
        console: where progress is shown.
    """
    (folder / STATES).mkdir(exist_ok=True)
    resumed = any((folder / STATES).iterdir())
    stopwatch, about = Stopwatch(folder), environment(device)
    faces = config.faces
    console.print(data.summary())
    images = images_for_training(faces, data, device, workers=0, console=console)
    states = numbered_states(folder)

    def options(name: str) -> dict[str, Any]:
        return {"state": next(states), "console": console, "on_state": partial(stopwatch.save_time, "training")}

    if trained is None:
        networks = train_all(faces, images, device, options)
        named = networks.modules()
    else:
        named, _ = load_checkpoint(trained / CHECKPOINT)
        for network in named.values():
            network.requires_grad_(False).to(device, memory_format=MEMORY_FORMAT)
    diagonal, structured = (StructuredLikelihood(named[BASE], named[of.name]).eval() for of in (DIAGONAL, STRUCTURED))
    samplers = {noise.name: Sampler(noise, faces.size, device) for noise in config.noises}
    denoisers: dict[str, ConvAutoencoder] = {}
    losses = {}
    for name, sampler in samplers.items():
        denoisers[name] = build_base(faces, "AE").to(device, memory_format=MEMORY_FORMAT)
        losses[name] = train_denoiser(config, denoisers[name], sampler, images, options)
    if denoisers:
        save_checkpoint(folder / CHECKPOINT, denoisers, {"config": config.as_dict()})
        steps = len(next(iter(losses.values())))
        loss_figure(folder / "training.png", [("mean squared error", losses)], smooth=max(1, steps // 100))
    stopwatch.save_time("training")

    test = stack(Subset(data.test, range(config.images)), title="reading test images", console=console).to(device)
    rows, shown = {}, {}
    for number, (name, sampler) in enumerate(samplers.items()):
        estimates = estimator(config, denoisers[name], diagonal, structured, sampler)
        noisy = test + sampler(_standard_normal(config, sampler.noise, device))
        kept = folder / STATES / f"noise {number}.json"
        if not kept.exists():
            write_json(kept, _rows(config, test, noisy, structured, sampler, estimates, console))
            stopwatch.save_time("evaluation")
        rows[name] = json.loads(kept.read_text(encoding="utf-8"))
        few = slice(0, _SHOWN)
        shown[name] = {"image": test[few], "noisy": noisy[few], **estimates(noisy[few])}
        shown[name][INFERRED_POSTERIOR], _ = inferred_estimates(noisy[few], structured, sampler)
        if BM3D in rows[name]:
            shown[name][BM3D] = bm3d_estimates(noisy[few], sampler)
    inpainted = _inpaint(config, structured, images.base[0], test[: config.inpainted], folder, console)
    stopwatch.add_time("evaluation")
    results = {
        "definition": "mse is the mean squared error per pixel, black 0 and white 1, mean over images; ratio that of its mean "
        "to the denoising autoencoder's on the same images; psnr in dB; inpainting: mse of the unknown pixels",
        "denoising": rows,
        "inpainting": inpainted,
        "left_out": list(data.left_out),
        "warnings": list(data.warnings),
        "config": config.as_dict(),
        "networks": None if trained is None else str(trained),
        **about,
        "device": device_name(device),
        "resumed": resumed,
        "seconds": stopwatch.seconds(),
    }
    if shown:
        _draw(folder, shown)
    write_results(folder, results, markdown_report(config, results), console)
    return results


def train_denoiser(
    config: Config, network: ConvAutoencoder, sampler: Sampler, images: TrainingImages, options: Options
) -> list[float]:
    """Minimise the mean squared error of images from images with noise; return the loss of every step.

    Args:
        config: the run's.
        network: what is trained, in place.
        sampler: the noise, drawn anew at each step.
        images: of the run, in memory.
        options: of `training.fit`.
    """
    faces, name = config.faces, f"denoise {sampler.noise.name}"
    epochs, stopping = config.denoiser_epochs, None

    def prepare(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x + sampler(torch.randn(x.shape).to(x))

    def loss(x: Tensor, noisy: Tensor) -> Tensor:
        return (x - network(noisy)).square().mean()

    if epochs is None:
        epochs = faces.base_epochs
        u = torch.randn(images.validation.shape, generator=seeded_generator(faces.seed, f"{name} validation noise"))
        stopping = stopping_by(faces, images, lambda x, rows: loss(x, x + sampler(u[rows].to(x))))
    losses = fit_on_images(faces, network, loss, images.base, name, epochs, prepare=prepare, stopping=stopping, **options(name))
    network.requires_grad_(False)
    return losses


def _standard_normal(config: Config, noise: Noise, device: torch.device) -> Tensor:
    size = config.faces.size
    generator = seeded_generator(config.faces.seed, f"test noise {noise.name}")
    return torch.randn(config.images, 1, size, size, generator=generator).to(device)


def _rows(
    config: Config,
    test: Tensor,
    noisy: Tensor,
    structured: StructuredLikelihood,
    sampler: Sampler,
    estimates: Estimator,
    console: Console,
) -> dict[str, dict[str, float]]:
    slow, few = {}, noisy[: config.slow_images].split(_BATCH)
    inferring = track(few, f"codes, {sampler.noise.name}", console=console)
    means, converged = zip(*(inferred_estimates(batch, structured, sampler) for batch in inferring), strict=True)
    slow[INFERRED_POSTERIOR] = torch.cat(means)
    try:
        filtering = track(few, f"{BM3D}, {sampler.noise.name}", console=console)
        slow[BM3D] = torch.cat([bm3d_estimates(batch, sampler) for batch in filtering])
    except ImportError:
        console.print(f"{BM3D} is left out: it needs the package bm3d (pip install bm3d)")
    parts = [estimates(batch) for batch in track(noisy.split(_BATCH), sampler.noise.name, console=console)]
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    rows = table_rows(test, found | slow)
    rows[INFERRED_POSTERIOR]["not_converged"] = int((~torch.cat(converged)).sum())
    return rows


def _inpaint(
    config: Config, structured: StructuredLikelihood, train: Tensor, images: Tensor, folder: Path, console: Console
) -> dict[str, dict[str, dict[str, float]]]:
    """Inpaint and draw; the scores of each completion of each mask."""
    average = train.mean(0)[0]
    known = {name: mask.to(images.device).expand(len(images), -1, -1) for name, mask in inpainting.masks(config).items()}
    found = {}
    for name, mask in track(known.items(), "inpainting", console=console):
        torch.manual_seed(config.faces.seed)
        found[name] = inpainting.inpaint(config, structured, average, images, mask)
    few = slice(0, 2)
    figures.draw_inpainting(
        folder / "inpainting.png",
        images[few],
        {name: mask[few] for name, mask in known.items()},
        {name: (vae[few], {method: of[few] for method, of in completed.items()}) for name, (vae, completed) in found.items()},
    )
    return {name: inpainting.scores(images, known[name], average, *completed) for name, completed in found.items()}


def _draw(folder: Path, shown: dict[str, dict[str, Tensor]]) -> None:
    """Figure 11: several images with the second noise, and one image with all."""
    several = list(shown)[min(1, len(shown) - 1)]
    figures.draw_estimates(folder / "figure11.png", {several.replace(", ", "\n"): shown[several]})
    one = {name.replace(", ", "\n"): {key: images[:1] for key, images in of.items()} for name, of in shown.items()}
    figures.draw_estimates(folder / "noises.png", one)

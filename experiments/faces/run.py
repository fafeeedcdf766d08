"""Train base models and covariance networks, score them on test images, and write tables and figures."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from supn_models import ConvVAE

from .. import distributed
from ..checkpoints import CHECKPOINT, save_checkpoint
from ..datasets import ImageData
from ..figures import loss_figure, normal_plot
from ..results import STATES, Stopwatch, device_name, environment, numbered_states, peak_memory, write_results
from . import figures
from .bases import BASES, load_bases, save_bases
from .images import images_for_testing, images_for_training
from .networks import Networks, given_bases, residual_stddev, train_bases, train_covariances
from .presets import BETAS, ERRORS, Config
from .report import compare_sources, markdown_report, summarise
from .scores import score

_LOGS = "tensorboard"


def run_faces(
    config: Config,
    data: ImageData,
    folder: Path,
    device: torch.device,
    console: Console,
    workers: int = 0,
    tensorboard: bool = False,
    given: Path | None = None,
) -> dict[str, Any]:
    """Train, evaluate and write everything into ``folder``; return what results.json holds.

    Training starts from the beginning after `results.begin_run`, and from a recent state after an interruption: both are in
    ``folder``. In the processes of torchrun, the first one writes.

    Args:
        config: from `presets.config_for` for ``data``.
        data: the images.
        folder: where to.
        device: where to compute; of `distributed.processes`.
        console: where progress is shown.
        workers: processes that read training images during training; 0 reads all of them into memory before.
        tensorboard: write logs into a folder of that name.
        given: the file of `bases.with_bases`, if ``config`` is of one.
    """
    (folder / STATES).mkdir(exist_ok=True)
    distributed.barrier()
    resumed = any((folder / STATES).iterdir())
    stopwatch, about = Stopwatch(folder), environment(device)
    console.print(data.summary())
    images = images_for_training(config, data, device, workers, console)
    states = numbered_states(folder)

    def options(name: str) -> dict[str, Any]:
        log = folder / _LOGS / name if tensorboard else None
        on_state = partial(stopwatch.save_time, "training")
        return {"state": next(states), "console": console, "workers": workers, "log": log, "on_state": on_state}

    if given is None:
        networks = train_bases(config, images, device, options)
        if distributed.rank() == 0:
            save_bases(folder / BASES, config, networks.bases, networks.curves)
    else:
        found, of_bases = load_bases(given)
        networks = given_bases(config, found, of_bases["curves"], device)
    train_covariances(config, networks, images, device, options)
    bases, likelihoods = networks.bases, networks.likelihoods
    stopwatch.save_time("training")

    console.print("scores of test images ...")
    test = images_for_testing(config, data, device, workers, console)
    scores = {}
    for name, base in bases.items():
        if isinstance(base, ConvVAE):
            scores[name] = score(config, base, base.likelihood, test, name, console)
        for covariance in config.covariances:
            if covariance.base == name:
                likelihood = likelihoods[covariance.name]
                scores[covariance.name] = score(config, base, likelihood, test, covariance.name, console)
    rows = summarise(config, scores)
    parameters = {
        name: sum(parameter.numel() for parameter in likelihood.covariance.parameters())
        for name, likelihood in likelihoods.items()
    }
    residual_rms = {
        name: {"base_images": residual_stddev(base, images.base), "test": residual_stddev(base, (test,))}
        for name, base in bases.items()
    }
    stopwatch.add_time("scores")
    results = {
        "definition": "nats is -log p(x | z), z the mean of the encoder; bound is an upper bound of -log p(x) by importance "
        "sampling: nats per image, ½ and constant included, pixels in [-1, 1], over test images; gains are nats per pixel over "
        "the VAE's own diagonal likelihood, of an autoencoder over its diagonal network; residual_rms is that of a sample; "
        "cost: images, samples of each, and seconds by the clock",
        "rows": rows,
        "sources": compare_sources(config, scores, parameters),
        "residual_rms": residual_rms,
        "curves": networks.curves,
        "cost": {name: of_images.cost for name, of_images in scores.items()},
        "left_out": list(data.left_out),
        "warnings": list(data.warnings),
        "config": config.as_dict(),
        **about,
        "device": device_name(device),
        "processes": distributed.world_size(),
        "resumed": resumed,
        "peak_memory": peak_memory(device),
        "seconds": stopwatch.seconds(),
    }
    used = ", ".join(f"{size / 2**30:.1f} GiB {where}" for where, size in results["peak_memory"].items())
    console.print(f"memory so far, at most: {used}")
    if distributed.rank() == 0:
        console.print("figures ...")
        figures.draw(config, folder, bases, likelihoods, test)
        draw_losses(folder / "training.png", networks)
        normal_plot(folder / "whitened.png", {name: row["whitened_quantiles"] for name, row in rows.items()})
        if results["curves"]:
            draw_curves(folder / "validation.png", results["curves"])
        save_checkpoint(folder / CHECKPOINT, networks.modules(), {"config": config.as_dict()})
        write_results(folder, results, markdown_report(config, results), console)
    distributed.barrier()
    return results


def draw_curves(path: Path, curves: dict[str, dict[str, Any]]) -> None:
    """Loss of training and of validation images after each pass, a panel for each base model."""
    panels = []
    for name, curve in curves.items():
        unit = ERRORS.get(name, "nats per pixel")
        panels.append((f"{name},\n{unit}", {part: curve[part] for part in ("training", "validation")}))
    loss_figure(path, panels, smooth=1, unit="pass")


def draw_losses(path: Path, networks: Networks) -> None:
    """Training curves of autoencoders, of variational ones, and of the covariance networks of each base model."""
    base = networks.base_losses
    panels = {
        **{error: {name: base[name]} for name, error in ERRORS.items() if name in base},
        "nats per pixel with β KL": {name: curve for name, curve in base.items() if BETAS[name] is not None},
    }
    for owner in networks.bases:
        of_owner = {name: curve for name, curve in networks.covariance_losses.items() if name.startswith(f"{owner}, ")}
        panels[f"nats per pixel\ngiven z, {owner}"] = {
            name.removeprefix(f"{owner}, "): curve for name, curve in of_owner.items()
        }
    shortest = min(len(curve) for curves in panels.values() for curve in curves.values())
    loss_figure(path, [panel for panel in panels.items() if panel[1]], smooth=max(1, shortest // 100))

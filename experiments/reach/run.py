"""Train the networks of all rows, measure them on test images, and write the tables."""

import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import banded_gmrf as bg
from programs.files import write_json

from ..checkpoints import CHECKPOINT, save_checkpoint
from ..datasets import ImageData
from ..faces.bases import load_bases
from ..faces.images import images_for_testing, images_for_training
from ..faces.networks import MEMORY_FORMAT
from ..figures import loss_figure
from ..results import STATES, Stopwatch, device_name, environment, finished_results, numbered_states, write_results
from ..training import derived_seed
from .earlier import Measured, load_measured, runs_of_table, save_measured
from .figures import draw_rows
from .measures import measure, principal_gains
from .networks import stencils, train_row
from .presets import BASE, ROWS, Config, Row
from .report import markdown_report, summarise


def run_reach(
    config: Config,
    data: ImageData,
    file: Path,
    folder: Path,
    device: torch.device,
    console: Console,
    earlier: Path | None = None,
) -> dict[str, Any]:
    """Train, measure and write everything into ``folder``; return what results.json holds.

    The run starts from the beginning after `results.begin_run`, and from a recent state after an interruption: both are in
    ``folder``.

    Args:
        config: from `presets.config_for` for ``data``.
        data: the images.
        file: of base models that ``config`` is of.
        folder: where to.
        device: where to compute.
        console: where progress is shown.
        earlier: the folder of the run whose table ``config`` adds to, if there is one.
    """
    (folder / STATES).mkdir(exist_ok=True)
    resumed = any((folder / STATES).iterdir())
    stopwatch, about = Stopwatch(folder), environment(device)
    faces = config.faces
    console.print(data.summary())
    images = images_for_training(faces, data, device, workers=0, console=console)
    test = images_for_testing(faces, data, device, workers=0, console=console)
    vae = load_bases(file)[0][BASE].requires_grad_(False).to(device, memory_format=MEMORY_FORMAT)
    stencil, states = stencils(config, vae, images), numbered_states(folder)
    measured: Measured = {}
    principal: dict[str, float] = {}
    runs: list[dict[str, Any]] = []
    if earlier is not None:
        there, measured, runs = finished_results(earlier), load_measured(earlier), runs_of_table(earlier)
        principal = there["principal"]
        # One row, one stencil: chosen again elsewhere, a greedy one might be another.
        stencil |= {name: bg.Stencil([tuple(o) for o in offsets], ndim=2) for name, offsets in there["stencils"].items()}
    losses, likelihoods, trained = {}, {}, {}
    for seed in range(config.seeds):
        dense = None
        new = [row for row in config.rows if seed == len(measured.setdefault(row.name, []))]
        for row in _to_train(config, new):
            state, name = next(states), f"{row.name}, seed {seed}"
            options = {"state": state, "console": console, "on_state": partial(stopwatch.save_time, "training")}
            likelihood, curve = train_row(config, row, seed, stencil[row.offsets], vae, images, dense, **options)
            stopwatch.save_time("training")
            if row.name == "dense":
                dense = likelihood
            if row not in new:
                continue
            trained.setdefault(row.name, []).append(seed)
            if row.name == "dense" and seed == 0 and len(images.validation):
                shown = likelihood, images.covariance[0], images.validation, test
                gains = partial(principal_gains, *shown, derived_seed(faces.seed, "principal components"))
                principal = _kept(state.with_name("principal.json"), gains, stopwatch)
            if len(trained[row.name]) == 1:
                label = row.name if seed == 0 else name
                losses[label], likelihoods[label] = curve, likelihood
            scores = partial(measure, faces, likelihood, test, config.measured, name, console)
            measured[row.name].append(_kept(state.with_suffix(".json"), scores, stopwatch))
    results = {
        "definition": "nats per image, ½ and constant included, pixels in [-1, 1]; means over seeds, and over test images; "
        "differences from the first row, image by image, of the seeds that both have",
        "rows": summarise(measured),
        "principal": principal,
        "stencils": {name: of.offsets for name, of in stencil.items()},
        "left_out": list(data.left_out),
        "warnings": list(data.warnings),
        "config": config.as_dict(),
        "networks": str(file),
        "earlier": runs,
        "trained": trained,
        **about,
        "device": device_name(device),
        "resumed": resumed,
        "seconds": stopwatch.seconds(),
    }
    smooth = max(1, min(len(curve) for curve in losses.values()) // 100)
    loss_figure(folder / "training.png", [("nats per pixel", losses)], smooth=smooth)
    draw_rows(folder / "samples.png", vae, likelihoods, test, faces.seed)
    save_measured(folder, measured)
    networks = {label: likelihood.covariance for label, likelihood in likelihoods.items()}
    networks |= {f"{label}: VAE": of.autoencoder for label, of in likelihoods.items() if of.autoencoder is not vae}
    save_checkpoint(folder / CHECKPOINT, networks, {"config": config.as_dict()})
    write_results(folder, results, markdown_report(config, results), console)
    return results


def _kept(path: Path, compute: Callable[[], dict[str, Any]], stopwatch: Stopwatch) -> dict[str, Any]:
    """What ``compute`` measures, from a file among the states if an interrupted run has measured it before."""
    if not path.exists():
        write_json(path, compute())
        stopwatch.save_time("measures")
    return json.loads(path.read_text(encoding="utf-8"))


def _to_train(config: Config, new: Collection[Row]) -> list[Row]:
    """Of a seed: the new rows, and before them the one that fine-tuning begins with."""
    begun_with = ROWS["dense"] if any(row.training == "fine-tuned" for row in new) else None
    return [row for row in config.rows if row in new or row == begun_with]

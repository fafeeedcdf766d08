"""Train the networks of a synthetic experiment, compare what they predict with the truth, and write tables and figures."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import banded_gmrf as bg
from supn_models import CovarianceMLP

from ..checkpoints import CHECKPOINT, checkpoint_of_run, load_checkpoint, save_checkpoint
from ..figures import loss_figure
from ..results import STATES, Stopwatch, device_name, environment, finished_results, write_results
from ..training import ShuffledEpochs, derived_seed, fit
from . import figures
from .presets import Config, Model, layout
from .report import floor_name, markdown_report, summarise
from .scores import Examples, Scores, factor_of_truth, score


def run_known_covariance(config: Config, folder: Path, device: torch.device, console: Console) -> dict[str, Any]:
    """Train, evaluate and write everything into ``folder``; return what results.json holds.

    Training starts from the beginning after `results.begin_run`, and from a recent state after an interruption: both are in
    ``folder``.
    """
    (folder / STATES).mkdir(exist_ok=True)
    resumed = any((folder / STATES).iterdir())
    stopwatch, about = Stopwatch(folder), environment(device)
    on_state = partial(stopwatch.save_time, "training")
    train, test = (examples(config, purpose, device) for purpose in ("train", "test"))
    console.print(f"{config.experiment}: {config.train} signals to train on, {config.test} to test on, on {device}")
    initial_stddev = (train.x - train.means).square().mean().sqrt().item()
    networks: dict[str, CovarianceMLP] = {}
    losses: dict[str, list[float]] = {}
    for number, model in enumerate(config.models):
        for seed in range(model.seeds):
            name = model.network_name(seed)
            networks[name] = build(config, model, seed, initial_stddev).to(device)
            state = folder / STATES / f"{number}-{seed}.pt"
            losses[name] = train_network(config, model, seed, networks[name], train, state, console, on_state)
    stopwatch.save_time("training")

    console.print("comparing with the truth ...")
    scores = compare(config, networks, test)
    rows = summarise(config, scores)
    results: dict[str, Any] = {
        "definition": "nll is -log p(x) in nats, ½ and constant included; kl is KL(N(0, Σ̂) ‖ N(0, Σ)) in nats; norm is "
        "‖Σ̂ - Σ‖, Frobenius: means over test signals and seeds, and standard errors over test signals of the means over seeds",
        "rows": rows,
        "config": config.as_dict(),
        **about,
        "device": device_name(device),
        "resumed": resumed,
    }
    console.print("figures ...")
    for network in networks.values():
        network.cpu()
    figures.draw(config, networks, test, rows, folder)
    per_curve = max(1, min(len(curve) for curve in losses.values()) // 100)
    first = {model.name: losses[model.network_name(0)] for model in config.models}
    loss_figure(folder / "training.png", [("nats per site", first)], smooth=per_curve)
    save_checkpoint(folder / CHECKPOINT, networks, {"config": config.as_dict()})
    stopwatch.add_time("evaluation")
    seconds = stopwatch.seconds()
    results["seconds"] = {**seconds, "all": round(sum(seconds.values()), 1)}
    write_results(folder, results, markdown_report(config, results), console)
    return results


def write_report_again(folder: Path) -> None:
    """Write the table and the figures of a finished run again, but for the curves of its training.

    Raises:
        ValueError: ``folder`` holds no finished run of these experiments, or not its networks.
    """
    results = finished_results(folder)
    try:
        config = Config.from_dict(results["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds no finished run of splines or ellipses: {error}") from error
    networks, _ = load_checkpoint(checkpoint_of_run(folder, results))
    test = examples(config, "test", torch.device("cpu"))
    figures.draw(config, networks, test, results["rows"], folder)
    (folder / "results.md").write_text(markdown_report(config, results), encoding="utf-8")


def examples(config: Config, purpose: str, device: torch.device) -> Examples:
    """The "train" or "test" signals, drawn on the device from the seed alone."""
    generator = torch.Generator(device).manual_seed(derived_seed(config.seed, f"{config.experiment} {purpose}"))
    return Examples(*config.signals.draw(getattr(config, purpose), generator))


def build(config: Config, model: Model, seed: int, initial_stddev: float) -> CovarianceMLP:
    """A network as it is before training."""
    stencil, grid = layout(model.stencil, config.signals.grid)
    torch.manual_seed(derived_seed(config.seed, f"{model.name} weights {seed}"))
    return CovarianceMLP(
        math.prod(grid), grid, stencil, model.hidden, model.bottleneck, initial_stddev, standardise=model.standardise
    )


def train_network(
    config: Config,
    model: Model,
    seed: int,
    network: CovarianceMLP,
    train: Examples,
    state: Path,
    console: Console,
    on_state: Callable[[], None],
) -> list[float]:
    """Maximise log p(x | Σ̂(μ)), which never sees Σ; return the loss of every step in nats per site."""
    residuals = (train.x - train.means).reshape(-1, *network.grid)
    rows = ShuffledEpochs(config.train, model.batch_size, derived_seed(config.seed, f"{model.name} order {seed}"))
    steps = model.epochs * rows.steps_per_epoch

    def nats_per_site(means: Tensor, residuals: Tensor) -> Tensor:
        factor = network(means)
        nats = bg.negative_log_likelihood(residuals, factor.log_diag, factor.off_diag, factor.stencil)
        return nats.mean() / factor.grid.numel()

    return fit(
        network,
        nats_per_site,
        (train.means, residuals),
        steps=steps,
        rows=rows,
        learning_rate=model.learning_rate_at(steps),
        title=model.network_name(seed),
        console=console,
        state=state,
        on_state=on_state,
    )


def compare(config: Config, networks: dict[str, CovarianceMLP], test: Examples) -> dict[str, list[Scores]]:
    """Scores on the test signals of the truth, of each stencil's floor, and of each model's networks, one for each seed.

    The floor is the factor nearest to the truth: none with that stencil has a higher expected likelihood. That of a dense
    factor is the truth.
    """
    signals = config.signals

    def floor(stencil: str | int) -> Scores:
        own, grid = layout(stencil, signals.grid)
        return score(
            signals, test, lambda means, covariance: bg.StencilCholesky.from_covariance(covariance, own, grid).to_dense()
        )

    def of_network(network: CovarianceMLP) -> Scores:
        return score(signals, test, lambda means, covariance: network(means).to_dense())

    scores = {"truth": [score(signals, test, lambda means, covariance: factor_of_truth(covariance))]}
    for stencil in dict.fromkeys(model.stencil for model in config.models if model.stencil != "dense"):
        scores[floor_name(stencil)] = [floor(stencil)]
    for model in config.models:
        scores[model.name] = [of_network(networks[model.network_name(seed)]) for seed in range(model.seeds)]
    return scores

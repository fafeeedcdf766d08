"""What a run of the synthetic experiments depends on: sizes, networks and schedules, by preset."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import banded_gmrf as bg

from ..training import warmup_cosine
from .signals import Ellipses, Signals, Splines

SIGNALS: dict[str, type[Signals]] = {"splines": Splines, "ellipses": Ellipses}


@dataclass(frozen=True)
class Model:
    """One row of a table: a `supn_models.CovarianceMLP` and how it is trained.

    Args:
        name: its row's name.
        stencil: "diagonal", "dense" (the whole lower triangle) or the size f of an f x f patch.
        hidden, bottleneck, standardise: of the network.
        learning_rate: the highest one.
        schedule: "constant", or "cosine" after a warm-up.
        epochs: passes over the training data.
        seeds: networks trained, alike but for initial weights and the order of the data.
        batch_size: examples per step; the paper does not state it.
    """

    name: str
    stencil: str | int
    hidden: tuple[int, ...]
    bottleneck: int | None
    standardise: bool
    learning_rate: float
    schedule: str
    epochs: int
    seeds: int
    batch_size: int = 256

    def network_name(self, seed: int) -> str:
        """What the network with this seed is called in checkpoints and progress bars."""
        return f"{self.name}, seed {seed}"

    def learning_rate_at(self, steps: int) -> Callable[[int], float]:
        """The learning rate as a function of the step."""
        return warmup_cosine(self.learning_rate, steps) if self.schedule == "cosine" else lambda step: self.learning_rate


@dataclass(frozen=True)
class Config:
    """All that the numbers of a run depend on, besides the machine and the versions of the libraries.

    The first model is the diagonal one, from which the others' gains are measured.
    """

    experiment: str
    preset: str
    seed: int
    train: int
    test: int
    models: tuple[Model, ...]

    @property
    def signals(self) -> Signals:
        return SIGNALS[self.experiment]()

    def as_dict(self) -> dict[str, Any]:
        """As values that JSON can hold."""
        return {**asdict(self), "signals": asdict(self.signals)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """What `as_dict` was made of.

        Raises:
            ValueError: the signals had other scalars then.
        """
        values = dict(values)
        scalars = values.pop("signals")
        models = tuple(Model(**{**model, "hidden": tuple(model["hidden"])}) for model in values.pop("models"))
        config = cls(**values, models=models)
        if asdict(config.signals) != scalars:
            raise ValueError(f"signals is {scalars}, expected {asdict(config.signals)}")
        return config


def layout(stencil: str | int, grid: tuple[int, ...]) -> tuple[bg.Stencil, tuple[int, ...]]:
    """The stencil of a `Model` and the grid of its factor: of a dense one the sites in raster order, on one axis."""
    n = math.prod(grid)
    if stencil == "dense":
        return bg.Stencil.box((n - 1,)), (n,)
    if stencil == "diagonal":
        return bg.Stencil([], ndim=len(grid)), grid
    return bg.Stencil.square(stencil), grid


def _splines(paper_epochs: int, own_epochs: int, seeds: int) -> tuple[Model, ...]:
    paper = Model("paper's network", "dense", (100, 100), None, False, 1e-4, "constant", paper_epochs, seeds)
    return (
        replace(paper, name="diagonal", stencil="diagonal"),
        paper,
        Model("bottleneck network", "dense", (100, 100), 8, True, 3e-3, "cosine", own_epochs, seeds),
    )


def _ellipses(paper_epochs: int, own_epochs: int, seeds: int, stencils: tuple[str | int, ...]) -> tuple[Model, ...]:
    paper = Model("paper's schedule, f = 5", 5, (100, 100), None, False, 1e-3, "constant", paper_epochs, seeds)
    own = Model("bottleneck network, f = 5", 5, (300, 300), 32, True, 3e-3, "cosine", own_epochs, seeds)
    others = (
        replace(own, name=f"bottleneck network, {s if s == 'dense' else f'f = {s}'}", stencil=s, seeds=1) for s in stencils
    )
    return replace(paper, name="diagonal", stencil="diagonal"), paper, own, *others


PRESETS = {
    "splines": {
        "quick": Config("splines", "quick", 0, 35_000, 1_000, _splines(10, 20, 1)),
        "paper": Config("splines", "paper", 0, 35_000, 1_000, _splines(200, 60, 3)),
    },
    "ellipses": {
        "quick": Config("ellipses", "quick", 0, 10_000, 300, _ellipses(10, 10, 1, (3,))),
        "paper": Config("ellipses", "paper", 0, 35_000, 1_000, _ellipses(200, 30, 3, (3, 7, "dense"))),
    },
}


def config_for(
    experiment: str,
    preset: str,
    *,
    seed: int | None = None,
    train: int | None = None,
    test: int | None = None,
    epochs: int | None = None,
    seeds: int | None = None,
) -> Config:
    """A preset with some of its sizes replaced: ``epochs`` and ``seeds`` those of every network.

    Raises:
        ValueError: fewer training examples than a batch has.
    """
    config = PRESETS[experiment][preset]
    of_models = {key: value for key, value in (("epochs", epochs), ("seeds", seeds)) if value is not None}
    models = tuple(replace(model, **of_models) for model in config.models)
    of_config = {key: value for key, value in (("seed", seed), ("train", train), ("test", test)) if value is not None}
    config = replace(config, models=models, **of_config)
    for model in models:
        if config.train < model.batch_size:
            raise ValueError(f"train is {config.train}, expected at least {model.batch_size}, the batch of {model.name!r}")
    return config

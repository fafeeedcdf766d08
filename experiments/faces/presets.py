"""What a run of the experiment depends on: networks, schedules and sizes, by preset."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import distributed
from ..checkpoints import checkpoint_of_run
from ..datasets import ImageData, Levels
from ..results import finished_results
from ..stopping import Patience

# The weight β of the divergence in the loss; None for an autoencoder, trained by one of `ERRORS`.
BETAS = {"AE": None, "VAE": 1.0, "β-VAE": 5.0, "AE-L1": None, "AE-gradient": None}
ERRORS = {"AE": "mean squared error", "AE-L1": "mean absolute error", "AE-gradient": "absolute and gradient error"}
SOURCES = ("z", "μ", "both")

# Fields of `Config` that finished runs may lack.
_LATER = ("levels", "given_bases")


@dataclass(frozen=True)
class Covariance:
    """A covariance network.

    Args:
        base: the frozen model whose residual it explains, of `BETAS`.
        stencil_size: f of an f x f patch; 1 for a diagonal covariance.
        source: what it predicts from, of `SOURCES`.
    """

    base: str
    stencil_size: int
    source: str = "z"

    @property
    def name(self) -> str:
        """Its row in the tables."""
        return f"{self.base}, {'diagonal' if self.stencil_size == 1 else f'f = {self.stencil_size}'} from {self.source}"


@dataclass(frozen=True)
class Config:
    """All that the numbers of a run depend on, besides the machine and the versions of the libraries.

    Args:
        experiment, preset: names.
        size: pixels along each side of an image.
        latent_size: numbers in a code.
        channels: of the base models' convolutions and of the covariance networks' decoders, the finest resolution first.
        features: channels at full resolution in the covariance networks.
        covariances: the covariance networks.
        base_epochs, covariance_epochs: passes over the training images and their mirror images; two of the paper's make one.
        samples: codes per image for the bound of log p(x).
        bound_images: test images for the bound, the first ones; None for all.
        pairs_at_once: pairs of an image and a code whose likelihood is computed at one time.
        train, test: most images used; None for all.
        held_out: share of the training images that the base models do not see and the covariance networks alone are trained
            on; 0 to train all of them on all images, as the paper does. Residuals of images that a base model was trained on
            are smaller than those of new ones, the more so the fewer images there are.
        validation: share of the training images that no network is trained on: they say when a base model has learned enough.
        patience: how long a base model waits for a better score of them, its own loss; ``base_epochs`` then is the most. None
            to train for ``base_epochs``.
        batch_size: images per step.
        learning_rate: the highest one.
        seed: the same seed gives the same numbers.
        bfloat16, compiled: how the networks are trained.
        data, note: name and origin of the images.
        levels: the values of files that became black and white; None for all that 8 or 16 bits can hold.
        given_bases: SHA-256 of the file that the base models are from; None if the run trains them.
    """

    experiment: str
    preset: str
    size: int
    latent_size: int
    channels: tuple[int, ...]
    features: int
    covariances: tuple[Covariance, ...]
    base_epochs: int
    covariance_epochs: int
    samples: int
    bound_images: int | None
    pairs_at_once: int
    train: int | None = None
    test: int | None = None
    held_out: float = 0.0
    validation: float = 0.0
    patience: Patience | None = None
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0
    bfloat16: bool = False
    compiled: bool = False
    data: str = ""
    note: str = ""
    levels: Levels | None = None
    given_bases: str | None = None

    @property
    def bases(self) -> tuple[str, ...]:
        """The base models, each of which some covariance network explains."""
        return tuple(dict.fromkeys(covariance.base for covariance in self.covariances))

    @property
    def base_images(self) -> int:
        """How many training images the base models see."""
        return self.train - round(self.held_out * self.train) - self.validation_images

    @property
    def covariance_images(self) -> int:
        """How many training images the covariance networks see."""
        return self.train - self.validation_images - self.base_images if self.held_out else self.base_images

    @property
    def validation_images(self) -> int:
        """How many training images no network sees."""
        return round(self.validation * self.train)

    def shown(self, base: str) -> tuple[Covariance, Covariance]:
        """The diagonal and the structured network of a base model that figures show: of the largest stencil, from z."""
        from_code = [covariance for covariance in self.covariances if covariance.base == base and covariance.source == "z"]
        by_size = sorted(from_code, key=lambda covariance: covariance.stencil_size)
        return by_size[0], by_size[-1]

    def as_dict(self) -> dict[str, Any]:
        """As values that JSON can hold; without what was not given of `_LATER`, as before there was such a choice."""
        return {name: value for name, value in asdict(self).items() if name not in _LATER or value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """From `as_dict`, also by way of JSON."""
        covariances = tuple(Covariance(**covariance) for covariance in values["covariances"])
        levels = Levels(*values["levels"]) if values.get("levels") else None
        patience = Patience(**values["patience"]) if values.get("patience") else None
        return cls(
            **{
                **values,
                "covariances": covariances,
                "channels": tuple(values["channels"]),
                "levels": levels,
                "patience": patience,
            }
        )


def _networks(base: str, sizes: Sequence[int], sources: Sequence[str] = ("z",)) -> tuple[Covariance, ...]:
    """From z with stencils of all sizes, the largest one from all sources."""
    return tuple(
        Covariance(base, size, source) for size in sizes for source in (sources if size == max(sizes) else sources[:1])
    )


_FEW = (*_networks("AE", (1, 7)), *_networks("VAE", (1, 7), SOURCES), *_networks("β-VAE", (1, 7)))
_MORE = (*_networks("AE", (1, 3, 5, 7)), *_networks("VAE", (1, 3, 5, 7), SOURCES), *_networks("β-VAE", (1, 7)))
_ALL = (
    *_networks("AE", (1, 3, 5, 7), SOURCES),
    *_networks("VAE", (1, 3, 5, 7), SOURCES),
    *_networks("β-VAE", (1, 7)),
)

_QUICK = Config(
    experiment="faces",
    preset="quick",
    size=64,
    latent_size=32,
    channels=(8, 16, 32, 64),
    features=8,
    covariances=_FEW,
    base_epochs=2,
    covariance_epochs=2,
    samples=10,
    bound_images=16,
    pairs_at_once=64,
    train=2_000,
    test=200,
    learning_rate=3e-3,
)
_CPU = replace(
    _QUICK,
    preset="cpu",
    latent_size=64,
    channels=(16, 32, 64, 128),
    features=16,
    covariances=_MORE,
    base_epochs=6,
    samples=50,
    bound_images=64,
    pairs_at_once=128,
    train=8_000,
    test=1_000,
    batch_size=32,
)
_LONG = replace(
    _CPU,
    preset="long",
    base_epochs=200,
    covariance_epochs=8,
    bound_images=128,
    train=None,
    held_out=0.25,
    validation=0.05,
    patience=Patience(),
)
_PAPER = replace(
    _QUICK,
    preset="paper",
    latent_size=128,
    channels=(32, 64, 128, 256, 512),
    features=32,
    covariances=_ALL,
    base_epochs=25,
    covariance_epochs=25,
    samples=500,
    bound_images=None,
    pairs_at_once=1024,
    train=None,
    test=None,
    learning_rate=1e-3,
)


def _cifar10(config: Config) -> Config:
    """The same for 32 x 32 pixels, with one resolution less."""
    return replace(config, experiment="cifar10", size=32, channels=config.channels[:-1])


PRESETS = {
    "faces": {config.preset: config for config in (_QUICK, _CPU, _LONG, _PAPER)},
    "cifar10": {config.preset: _cifar10(config) for config in (_QUICK, _CPU, _LONG, _PAPER)},
}


def config_for(
    experiment: str,
    preset: str,
    data: ImageData,
    epochs: int | None = None,
    models: Sequence[str] | None = None,
    stencils: Sequence[int] | None = None,
    **replaced: Any,
) -> Config:
    """A preset for a data set.

    Args:
        experiment, preset: names of `PRESETS`.
        data: the images.
        epochs: of all networks; None for the preset's, as below.
        models: the only base models, of `BETAS`. Those that the preset does not have get a diagonal network and one with its
            largest stencil.
        stencils: sizes f of f x f patches, for covariance networks from z beside the diagonal ones, in place of the preset's.
        replaced: fields of `Config`.

    Raises:
        ValueError: models that there are not, sizes that no stencil has, shares outside [0, 1), fewer training
            images than a batch has, or a batch that the number of processes does not divide.
    """
    config = PRESETS[experiment][preset]
    if models is not None:
        unknown = [name for name in models if name not in BETAS]
        if unknown or not models:
            raise ValueError(f"models is {','.join(models)}, expected some of {', '.join(BETAS)}")
        largest = max(covariance.stencil_size for covariance in config.covariances)
        others = [c for name in models if name not in config.bases for c in _networks(name, (1, largest))]
        replaced |= {"covariances": (*(c for c in config.covariances if c.base in models), *others)}
    if stencils is not None:
        if not stencils or any(size < 3 or size % 2 == 0 for size in stencils):
            raise ValueError(f"stencils is {','.join(map(str, stencils))}, expected odd sizes of at least 3")
        bases = replace(config, **replaced).bases
        replaced |= {"covariances": tuple(c for base in bases for c in _networks(base, sorted({1, *stencils})))}
    if epochs is not None:
        replaced |= {"base_epochs": epochs, "covariance_epochs": epochs}
    config = replace(config, **{key: value for key, value in replaced.items() if value is not None})
    if config.batch_size % distributed.world_size():
        raise ValueError(f"batch_size is {config.batch_size}, expected a multiple of {distributed.world_size()}, the processes")
    for name in ("held_out", "validation"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}, expected a share of at least 0 and below 1")
    if config.held_out + config.validation >= 1:
        raise ValueError(
            f"held_out and validation are {config.held_out} and {config.validation}, expected less than 1 together"
        )
    train, test = (
        len(part) if most is None else min(most, len(part))
        for part, most in ((data.train, config.train), (data.test, config.test))
    )
    bound_images = test if config.bound_images is None else min(config.bound_images, test)
    config = replace(
        config, train=train, test=test, bound_images=bound_images, data=data.name, note=data.note, levels=data.levels
    )
    for purpose, count in (("base models", config.base_images), ("covariance networks", config.covariance_images)):
        # A training example is an image or its mirror image.
        if 2 * count < config.batch_size:
            raise ValueError(f"{count} images to train the {purpose}, expected at least {config.batch_size // 2}, half a batch")
    if config.patience is not None and config.validation_images < 1:
        raise ValueError(f"validation is {config.validation}, which leaves no image of {config.train} to end the trainings by")
    return config


def finished_run(folder: Path) -> Config:
    """The configuration of a finished run of faces or cifar10 that still has its networks.

    Raises:
        ValueError: no such run in ``folder``.
    """
    results = finished_results(folder)
    values = results["config"]
    if values.get("experiment") not in PRESETS:
        raise ValueError(f"{folder} holds a run of {values.get('experiment')}, expected one of {' or '.join(PRESETS)}")
    checkpoint_of_run(folder, results)
    return Config.from_dict(values)


def check_same_data(config: Config, data: ImageData) -> None:
    """Raise ValueError unless ``data`` is what the networks of a finished run were trained on."""
    if config.data != data.name:
        raise ValueError(f"the networks were trained on {config.data}, the data is {data.name}")
    if config.levels != data.levels:
        there, here = (levels or "no --range" for levels in (config.levels, data.levels))
        raise ValueError(f"the networks were trained on images with {there}, the data has {here}")

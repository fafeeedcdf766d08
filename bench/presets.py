"""What a run measures: sweeps over stencils, resolutions and so on, by name for the command line."""

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from .cases import DTYPES, Case, fits, parse_resolution, parse_stencil
from .implementations import BACKENDS, IMPLEMENTATIONS, default_backend
from .operations import OPERATIONS
from .peers import PEERS

Names = tuple[str, ...]

_TRAINING = ("log_prob", "log_prob_grad", "sample", "rsample_grad")


@dataclass(frozen=True)
class Sweep:
    """Every combination of these. The backend ``default`` is the one that the library chooses for the device."""

    stencils: Names = ("3", "5", "7")
    resolutions: Names = ("64",)
    batches: tuple[int, ...] = (16,)
    samples: tuple[int, ...] = (1,)
    operations: Names = _TRAINING
    dtypes: Names = ("float32",)
    backends: Names = ("default",)
    peers: Names = ()

    def cases(self, device: str) -> Iterable[Case]:
        for resolution, batch, samples, dtype, stencil in itertools.product(
            self.resolutions, self.batches, self.samples, self.dtypes, self.stencils
        ):
            grid = parse_resolution(resolution)
            if fits(stencil, len(grid)):
                yield Case(stencil, grid, batch, samples, dtype, device)


def override(sweep: Sweep, given: dict[str, str | None]) -> Sweep:
    """The sweep with values from the command line, separated by commas, in place of its own where they are given.

    Raises:
        ValueError: a value that does not exist; it names the option.
    """
    return dataclasses.replace(sweep, **{field: _parse(field, text) for field, text in given.items() if text is not None})


def _parse(field: str, text: str) -> tuple:
    if text == "all" and field in ("operations", "peers"):
        return tuple(_CHOICES[field])
    if text == "none" and field == "peers":
        return ()
    values = [value.strip() for value in text.split(",")]
    option = _OPTIONS.get(field, f"--{field}")
    if field in ("batches", "samples"):
        for value in values:
            if not value.isdecimal() or int(value) == 0:
                raise ValueError(f"{option} has {value!r}, expected positive integers")
        return tuple(map(int, values))
    for value in values:
        if field == "stencils":
            parse_stencil(value)
        elif field == "resolutions":
            parse_resolution(value)
        elif value not in _CHOICES[field]:
            raise ValueError(f"{option} has {value!r}, expected some of {', '.join(_CHOICES[field])}")
    return tuple(values)


_OPTIONS = {"batches": "--batch", "operations": "--ops", "dtypes": "--dtype"}

_CHOICES = {"operations": OPERATIONS, "dtypes": DTYPES, "backends": ("default", *BACKENDS), "peers": PEERS}


@dataclass(frozen=True)
class Work:
    """One operation on one case, and the implementations that do it side by side, the library's first."""

    case: Case
    operation: str
    implementations: Names


def plan(sweeps: Iterable[Sweep], device: str) -> list[Work]:
    """The work of all sweeps, each operation on each case once.

    Raises:
        ValueError: there is none.
    """
    wanted: dict[Case, dict[str, dict[str, None]]] = {}
    for sweep in sweeps:
        backends = [default_backend(device) if name == "default" else name for name in sweep.backends]
        for case, operation in itertools.product(sweep.cases(device), sweep.operations):
            names = [name for name in (*backends, *sweep.peers) if IMPLEMENTATIONS[name].has(operation)]
            wanted.setdefault(case, {}).setdefault(operation, {}).update(dict.fromkeys(names))
    if not wanted:
        raise ValueError("nothing to measure: no stencil has as many axes as any of the resolutions")
    return [
        Work(case, operation, tuple(names)) for case, operations in wanted.items() for operation, names in operations.items()
    ]


@dataclass(frozen=True)
class Preset:
    """Sweeps, and the seconds for which each implementation is timed on each of them."""

    sweeps: tuple[Sweep, ...]
    seconds: float
    device: str = "cpu"


_ALL_OPERATIONS = (*_TRAINING, "solve", "precision_solve")
_CPU_PEERS = ("scipy", "band", "cholespy", "torchsparsegradutils", "csr", "dense", "normal", "shifts")
_GPU_PEERS = ("cholespy", "torchsparsegradutils", "csr", "cupy", "dense", "normal", "shifts")

# The cases on which the library's targets are stated: on a CPU as ratios to reading and to copying the coefficients.
_TARGETS = (
    Sweep(resolutions=("1024",), batches=(8, 1), operations=_TRAINING[:3]),
    Sweep(resolutions=("64",), batches=(64, 1), operations=_TRAINING[:3]),
    Sweep(stencils=("3",), resolutions=("3x256",), batches=(8, 1), operations=_TRAINING[:3]),
    Sweep(stencils=("7",), resolutions=("1024",), batches=(1,), samples=(1, 16), operations=("sample", "rsample_grad")),
)

# On a GPU they are stated as fractions of the bandwidth of a copy, and as ratios to the reference, which launches kernels of
# torch for every wavefront.
_GPU_TARGETS = (
    Sweep(batches=(256,), operations=_TRAINING[:2]),
    Sweep(resolutions=("1024",), operations=_TRAINING[:3]),
    Sweep(stencils=("7",), batches=(2048,), operations=("sample",)),
    Sweep(stencils=("7",), resolutions=("64", "1024"), batches=(1,), operations=("sample",)),
    Sweep(stencils=("7",), batches=(1,), samples=(64,), operations=("sample",)),
    Sweep(stencils=("7",), batches=(256,), operations=_TRAINING[:3], dtypes=("float32", "bfloat16")),
    Sweep(stencils=("7",), batches=(64,), operations=("sample",), backends=("default", "reference")),
)

PRESETS = {
    "quick": Preset(
        sweeps=(
            Sweep(stencils=("3", "5", "7", "cross2"), resolutions=("64", "256")),
            Sweep(stencils=("5",), operations=("log_prob_grad", "sample"), peers=("scipy", "csr", "shifts")),
        ),
        seconds=0.15,
    ),
    "full": Preset(
        sweeps=(
            Sweep(stencils=("3", "5", "7", "cross2"), resolutions=("64", "128", "256", "512")),
            *_TARGETS,
            Sweep(stencils=("7",), resolutions=("256",), dtypes=("bfloat16", "float64")),
            Sweep(stencils=("7",), backends=("default", "reference")),
        ),
        seconds=0.4,
    ),
    "peers": Preset(
        sweeps=(
            Sweep(resolutions=("32", "64"), batches=(1,), operations=_ALL_OPERATIONS, peers=_CPU_PEERS),
            Sweep(stencils=("5",), resolutions=("32",), operations=_ALL_OPERATIONS, peers=_CPU_PEERS),
            Sweep(stencils=("7",), batches=(64,), operations=_ALL_OPERATIONS, peers=_CPU_PEERS),
            Sweep(stencils=("3", "5"), batches=(64,), operations=("log_prob_grad", "sample"), peers=_CPU_PEERS),
            Sweep(stencils=("7",), resolutions=("256",), operations=("log_prob_grad", "sample"), peers=_CPU_PEERS),
        ),
        seconds=0.5,
    ),
    "gpu": Preset(
        sweeps=(
            Sweep(stencils=("3", "5", "7", "cross2"), resolutions=("64", "128", "256", "512", "1024")),
            *_TARGETS,
            *_GPU_TARGETS,
            Sweep(stencils=("7",), resolutions=("256",), dtypes=("bfloat16", "float64")),
            Sweep(stencils=("7",), batches=(64,), operations=_ALL_OPERATIONS, peers=_GPU_PEERS),
            Sweep(stencils=("7",), resolutions=("256",), operations=_ALL_OPERATIONS, peers=_GPU_PEERS),
            Sweep(stencils=("5",), resolutions=("32",), operations=_ALL_OPERATIONS, peers=_GPU_PEERS),
        ),
        seconds=0.3,
        device="cuda",
    ),
}

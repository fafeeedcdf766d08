"""Everything that can do an operation: the library's backends and, from `peers`, other software."""

import torch

import banded_gmrf as bg
from gmrf_kernels import backends

from .cases import Case, Problem
from .measure import PeakMemory, synchronize
from .operations import OPERATIONS, Prepared
from .peers import PEERS, Peer

BACKENDS = tuple(backends.BACKENDS)


class Backend:
    """The library on one of its backends."""

    allocates_with_torch = True

    def __init__(self, name: str):
        self.name = name
        self.title = f"banded-gmrf, {name}"

    def has(self, operation: str) -> bool:
        return operation in OPERATIONS

    def why_not(self, case: Case) -> str | None:
        """Why it does not run on this case; None if it does."""
        try:
            with bg.use_backend(self.name):
                backends.backend_for(torch.device(case.device))
        except ValueError as error:
            return str(error)
        return None

    def prepare(self, problem: Problem, operation: str) -> Prepared:
        call = OPERATIONS[operation].prepare(problem)

        def run():
            with bg.use_backend(self.name):
                return call()

        return Prepared(run)


IMPLEMENTATIONS: dict[str, Backend | Peer] = {name: Backend(name) for name in BACKENDS} | PEERS


def default_backend(device: str) -> str:
    """The backend that the library chooses for tensors on ``device``."""
    return backends.default_backend(torch.device(device))


def first_call(case: Case, operation: str, name: str) -> int | None:
    """Build the case, convert it and call the operation once: the peak memory of the call in bytes, its own inputs included.

    None where it cannot be known.
    """
    implementation = IMPLEMENTATIONS[name]
    # On few pixels first: it loads, and if need be compiles, code that stays in memory.
    small = Case(case.stencil, (4,) * len(case.grid), case.batch, case.samples, case.dtype, case.device)
    implementation.prepare(Problem(small), operation).run()
    peak = PeakMemory(case.device)
    run = implementation.prepare(Problem(case), operation).run  # what only the conversion needed is free again
    peak.start()
    run()
    synchronize(case.device)
    on_gpu = torch.device(case.device).type == "cuda"
    return peak.bytes() if implementation.allocates_with_torch or not on_gpu else None

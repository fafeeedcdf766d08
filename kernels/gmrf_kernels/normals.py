"""Standard normal numbers: from counters, in threads, on a CPU; torch's elsewhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import backend_for


def standard_normal(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Tensor:
    """Independent numbers from N(0, 1), as ``torch.randn`` gives, but faster on a CPU.

    On the CPU backend float32 and float64 numbers come from a counter-based generator, Philox 4x32-10, that runs in as many
    threads as torch has. Its key is one draw from ``generator``, so that a seed gives the same numbers whatever the number of
    threads. They are other numbers than ``torch.randn`` gives from that seed. The numbers of a seed are one stream: a smaller
    shape gets the beginning of what a larger one gets.

    ``torch.randn`` itself gives the numbers for other dtypes, devices and backends, and wherever torch compiles, traces or
    transforms the caller.

    Args:
        shape: of the result.
        dtype, device: of the result.
        generator: gives the key; torch's default generator of the device if None.

    Returns:
        ``shape``, contiguous.
    """
    if dtype in (torch.float32, torch.float64) and _runs_eagerly():
        draw = getattr(backend_for(torch.device(device)), "standard_normal", None)
        if draw is not None:
            return draw(shape, dtype, stream_key(generator))
    # The overload with a generator takes no sizes that torch.export leaves open.
    chosen = {} if generator is None else {"generator": generator}
    return torch.randn(shape, dtype=dtype, device=device, **chosen)


def stream_key(generator: torch.Generator | None = None) -> int:
    """The key of a stream of the CPU backend: one draw from torch's generator."""
    return torch.randint(2**63 - 1, (), generator=generator).item()


def _runs_eagerly() -> bool:
    """Nothing compiles, traces or transforms the caller, for which its noise must come from an operator of torch."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    )

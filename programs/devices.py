"""The device that a command computes on."""

import torch


def usable_device(name: str | None = None) -> torch.device:
    """The device of this name, on which tensors can be made.

    Args:
        name: as torch names it; None for "cuda" if there is such a GPU, else "cpu".

    Raises:
        ValueError: no such device here, or neither a CPU nor a CUDA device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} cannot be used: {name} is not a CPU or CUDA device")
    return device

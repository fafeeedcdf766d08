"""Checkpoints of several networks in one safetensors file, written whole or not at all."""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

import supn_models
from programs.files import written_whole

# The file of a run that holds all its networks.
CHECKPOINT = "checkpoint.safetensors"
_SEPARATOR = "/"


def save_checkpoint(path: Path, networks: dict[str, nn.Module], about: dict[str, Any], half: bool = False) -> None:
    """Write the parameters of ``networks`` with what is needed to build them again, replacing ``path`` in one step.

    Args:
        path: the file.
        networks: networks of `supn_models` that have a ``config``, by name.
        about: anything that JSON can hold, kept beside them.
        half: round weights, of which most of a file is, to float16.
    """
    tensors = {
        f"{name}{_SEPARATOR}{key}": _rounded(tensor.detach().cpu().contiguous(), half)
        for name, network in networks.items()
        for key, tensor in network.state_dict().items()
    }
    specs = {name: {"class": type(network).__name__, "config": network.config} for name, network in networks.items()}
    metadata = {"networks": json.dumps(specs), "about": json.dumps(about)}
    with written_whole(path) as partial:
        safetensors.torch.save_file(tensors, partial, metadata)


def _rounded(tensor: Tensor, half: bool) -> Tensor:
    """``tensor``, in float16 if ``half`` and it is a matrix or a kernel; biases and statistics stay as they are."""
    return tensor.half() if half and tensor.ndim > 1 else tensor


def checkpoint_of_run(folder: Path, results: dict[str, Any]) -> Path:
    """The networks of a finished run, a file for `load_checkpoint`.

    Args:
        folder: of the run.
        results: what its results.json holds.

    Raises:
        ValueError: they are not there. They are left out of the repository, which keeps numbers and figures.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        again = f", as this command did: {results['command']}" if "command" in results else ""
        raise ValueError(f"{folder} has no {CHECKPOINT}, the networks of its run: train them again, into a new folder{again}")
    return path


def load_checkpoint(path: Path) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The networks of `save_checkpoint`, in evaluation mode, and ``about``.

    Raises:
        ValueError: a broken file, or one that `save_checkpoint` did not write.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not {"networks", "about"} <= metadata.keys():
        raise ValueError(f"{path} has no metadata of this library's checkpoints")
    tensors = safetensors.torch.load_file(path)
    networks = {}
    for name, spec in json.loads(metadata["networks"]).items():
        network = getattr(supn_models, spec["class"]).from_config(spec["config"])
        prefix = name + _SEPARATOR
        network.load_state_dict({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
        networks[name] = network.eval()
    return networks, json.loads(metadata["about"])

"""Networks to and from a folder: ``config.json`` and ``model.safetensors``, as Hugging Face's libraries lay them out."""

import json
from pathlib import Path

from torch import nn

from .autoencoder import ConvAutoencoder
from .covariance import CovarianceNetwork, LatentCovarianceNetwork
from .mlp import CovarianceMLP
from .vae import ConvVAE

_NETWORKS = {
    network.__name__: network
    for network in (ConvAutoencoder, ConvVAE, CovarianceMLP, CovarianceNetwork, LatentCovarianceNetwork)
}
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def save_pretrained(network: nn.Module, folder: str | Path) -> None:
    """Write a network's arguments and parameters, in their own dtype, into a folder, which is made if it is not there.

    Needs safetensors, which is not among this package's requirements.

    Args:
        network: a `ConvAutoencoder`, `ConvVAE`, `CovarianceMLP`, `CovarianceNetwork` or `LatentCovarianceNetwork`.
        folder: where; files of an earlier call are replaced.

    Raises:
        TypeError: another module, a subclass included: it could not be built again.
    """
    from safetensors.torch import save_file

    name = type(network).__name__
    if _NETWORKS.get(name) is not type(network):
        raise TypeError(f"network is a {name}, expected one of {', '.join(_NETWORKS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    save_file(state, folder / _WEIGHTS, {"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps({"class": name, "config": network.config}, indent=2), encoding="utf-8")


def from_pretrained(folder: str | Path) -> nn.Module:
    """The network that `save_pretrained` wrote into a folder: on the CPU, and in evaluation mode.

    Its parameters have the dtype that they were saved in, and the same bits. Nothing in the folder is executed.

    Args:
        folder: a local folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are not those of `save_pretrained`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        about = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        network = _NETWORKS[about["class"]].from_config(about["config"])
        # Assigned, in whatever precision they were saved; and copied, as they may be mapped from a file that is yet to change.
        state = {key: value.clone() for key, value in load_file(folder / _WEIGHTS).items()}
        network.load_state_dict(state, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a folder of save_pretrained: {type(error).__name__}: {error}") from error
    return network.eval()

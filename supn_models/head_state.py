"""What the weights of a head mean, as its state says it."""

import json
import math
from typing import Any

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """A module whose state says what its weights mean. Those that meant something else may have the same shapes: refused.

    The ``_extra_state`` of its state_dict is JSON, byte by byte: a tensor, as files of safetensors hold nothing else, and of
    small integers, which rounding a state to half precision leaves as they are.
    """

    def _meaning(self) -> dict[str, Any]:
        """What the meaning depends on, by name, as values that JSON can hold; first "head", the kind of head."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """uint8: what the weights mean."""
        # On the CPU, so that it has values where torch.device("meta") is the default, too.
        return torch.tensor(list(json.dumps(self._meaning()).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse weights that meant something else.

        Raises:
            TypeError: ``state`` is not a tensor.
            ValueError: it is that of another head, or of none.
        """
        here = json.loads(json.dumps(self._meaning()))
        if isinstance(state, Tensor) and state.is_meta:
            return  # Like the weights beside it, it has no values.
        there = _read(state, here["head"])
        if there.get("head") != here["head"]:
            raise ValueError(f"the weights are of a {there.get('head')}, this is a {here['head']}")
        for name, ours in here.items():
            theirs = there.get(name)
            # An initial standard deviation, which may have been measured, need not be the same to the last bit.
            close = isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-6)
            if not close and ours != theirs:
                raise ValueError(f"the weights are of a {here['head']} with {name} {theirs}, this one has {ours}")


def _read(state: Tensor, head: str) -> dict[str, Any]:
    expected = f"expected what the state_dict of a {head} holds"
    if not isinstance(state, Tensor):
        raise TypeError(f"_extra_state is a {type(state).__name__}, {expected}")
    try:
        meaning = json.loads(bytes(state.to(torch.uint8).tolist()))
    except (TypeError, ValueError):
        meaning = None
    if not isinstance(meaning, dict):
        raise ValueError(f"_extra_state is {state.dtype} of shape {tuple(state.shape)}, {expected}")
    return meaning

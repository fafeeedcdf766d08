"""What a transformation of torch would refuse or get wrong, made right or refused by name."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transforming() -> bool:
    """Whether code runs inside a transformation of `torch.func`, or in forward mode."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transformation maps over a tensor or differentiates by it."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context in which torch's autocast rounds no product of tensors that are where this one is."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def inspect(look: Callable[..., None], *tensors: Tensor) -> None:
    """Call ``look(*tensors)``, which raises where their values are bad, with plain tensors whatever the transformation.

    Under `torch.vmap` the mapped axis is the first of each tensor, before what was its batch: ``look`` must broadcast.
    """
    tensors = [t.detach() for t in tensors]
    if torch.compiler.is_compiling() or is_transforming():
        _Inspect.apply(look, *tensors)
    else:  # the same, in a tenth of the time
        look(*tensors)


def require(condition: Tensor, message: str) -> None:
    """Raise ValueError with this message unless the condition holds everywhere; RuntimeError in a compiled function."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition.all(), message)
    else:
        inspect(functools.partial(_raise_unless, message), condition)


def _raise_unless(message: str, condition: Tensor) -> None:
    if not condition.all():
        raise ValueError(message)


class _Inspect(torch.autograd.Function):
    @staticmethod
    def forward(look: Callable[..., None], *tensors: Tensor) -> Tensor:
        with torch.no_grad():
            look(*tensors)
        return tensors[0].new_zeros(())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx, _):
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx, *_):
        return None

    @staticmethod
    def vmap(info, in_dims, look, *tensors):
        mapped = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        return _Inspect.apply(look, *mapped), None


def once_differentiable(tensor: Tensor, name: str) -> Tensor:
    """The same values. Second derivatives, in whatever mode, raise RuntimeError with this name.

    Put around what goes into a computation and what comes out, where something in between is held constant that first
    derivatives do not need.
    """
    return _Once.apply(tensor, name)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor, name: str) -> Tensor:
        return tensor.clone()  # forward mode refuses a view

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx, bar: Tensor):
        return _Last.apply(bar, ctx.name), None

    @staticmethod
    def jvp(ctx, dot: Tensor, _: Any) -> Tensor:
        return _Last.apply(dot, ctx.name)

    @staticmethod
    def vmap(info, in_dims, tensor, name):
        return _Once.apply(tensor, name), in_dims[0]


class _Last(torch.autograd.Function):
    """A first derivative, which has no derivative."""

    @staticmethod
    def forward(tensor: Tensor, name: str) -> Tensor:
        return tensor.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(f"{ctx.name} has first derivatives only")

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(f"{ctx.name} has first derivatives only")

    @staticmethod
    def vmap(info, in_dims, tensor, name):
        return _Last.apply(tensor, name), in_dims[0]

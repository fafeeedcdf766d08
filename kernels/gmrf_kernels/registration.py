"""How an operation becomes an operator of torch, and when a call may do without torch.

An `Operator` is one entry of ``torch.ops.gmrf_kernels``. Its Autograd kernel runs a `Derivatives`, so it is differentiable in
both modes, to every order, under ``torch.func`` and inside compiled graphs alike. While nothing traces, compiles, transforms or
profiles, the dispatcher would do nothing but find the kernel and take as long as a small one: then the kernel is called here.
"""

import functools
import operator
import re
from collections.abc import Callable, Sequence

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .checks import accumulate_dtype
from .stencils import flatten, unflatten

_library = torch.library.Library("gmrf_kernels", "DEF")

# Looked up once: together they run at every call.
_dispatch_keys = _C._dispatch_keys
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_profiler_enabled = torch.autograd._profiler_enabled
_frame_callback = _C._dynamo.eval_frame.get_eval_frame_callback
_dispatch_modes, _function_modes = _C._len_torch_dispatch_stack, _C._len_torch_function_stack
_transforms_active, _tracing_state = _C._are_functorch_transforms_active, _C._get_tracing_state

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _key_set(*names: str) -> int:
    """A set of dispatch keys, as its bits."""
    keys = (_C.DispatchKeySet(getattr(_C.DispatchKey, name)) for name in names)
    return functools.reduce(operator.or_, keys).raw_repr()


# Of tensors that own plain memory on a device, in and out of inference mode: no wrapper, no lazy conjugate, not sparse.
_PLAIN_KEYS = frozenset(
    _key_set(device, f"Autocast{device}", *autograd)
    for device in ("CPU", "CUDA")
    for autograd in ((), ("ADInplaceOrView", f"Autograd{device}"))
)


class Derivatives(torch.autograd.Function):
    """Reverse and forward rules of an operation, written with operators, hence differentiable themselves.

    The last argument of ``apply`` is the function that computes the values. Gradients that are not given are None.
    """

    @staticmethod
    def forward(*args):
        return args[-1](*args[:-1])

    @staticmethod
    def keep(ctx, *tensors: Tensor) -> None:
        """Save tensors for both modes: the rules find them in ``ctx.saved_tensors``."""
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @classmethod
    def jvp(cls, ctx, *dots):
        """The tangents of the results by the forward rule, given the saved tensors and the tangents of the inputs.

        Torch calls it with forward mode turned off, lest tangents of the saved tensors enter. That would lose those of
        transformations further out, so it is turned on, and the saved tensors are taken without their tangents of this level.
        """
        with forward_ad._set_fwd_grad_enabled(True):
            return cls.forward_rule(ctx, [forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors], *dots)


class Operator:
    """An operation as users and derivatives call it: ``operator(*tensors, offsets, *options)``.

    Args:
        schema: its name, arguments and results, as torch writes them; the offsets are a flat list there.
        kernel: computes the values, of the arguments as given.
        fake: makes empty results, of the arguments in the schema.
        derivatives: its rules.
        vector: the number of an argument that is of vectors (S, B, *grid).
        batch_axes: the B axis of each tensor that goes in.
        factors: the tensors that are a factor's, which have no S axis.
        out_axes: the B axis of each result.
    """

    def __init__(
        self,
        schema: str,
        kernel: Callable,
        fake: Callable,
        derivatives: type[Derivatives],
        *,
        vector: int,
        batch_axes: Sequence[int],
        factors: Sequence[int],
        out_axes: Sequence[int],
    ):
        name = schema.partition("(")[0]
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        self.op = getattr(torch.ops.gmrf_kernels, name).default
        self._kernel, self._vector = kernel, vector
        self._names = re.findall(r"Tensor (\w+)", schema)
        self._count = len(batch_axes)
        self._batch_axes, self._factors, self._out_axes = batch_axes, factors, out_axes
        # Not `derivatives.apply`, which looks up signatures at every call and takes `torch.func` for its own to handle.
        self._differentiable = super(torch.autograd.Function, derivatives).apply
        # Dynamo looks into what the dispatcher calls, where it could not trace the caller.
        values = torch._disable_dynamo(lambda *args: kernel(*self._with_offsets(args)))
        autograd = torch._disable_dynamo(lambda keyset, *args: self._autograd(keyset, *args))
        _library.impl(name, values, "CompositeExplicitAutograd")
        _library.impl(name, autograd, "Autograd", with_keyset=True)
        torch.library.register_fake(f"gmrf_kernels::{name}", fake, lib=_library)
        torch.library.register_vmap(f"gmrf_kernels::{name}", self._vmap, lib=_library)

    def __call__(self, *args):
        tensors = args[: self._count]
        if nothing_intervenes(tensors):
            return self.direct(*args)
        return self.op(*tensors, flatten(args[self._count]), *args[self._count + 1 :])

    def direct(self, *args):
        """The same where nothing intervenes."""
        if requires_grad(args[: self._count]):
            return self._differentiable(*args, self._kernel)
        return self._kernel(*args)

    def _with_offsets(self, args: Sequence) -> list:
        """The arguments of the schema as those of the kernel.

        Raises:
            TypeError: tensors of several dtypes, or of 16 bits, which only off-diagonals may have beside float32.
        """
        args = list(args)
        expected = accumulate_dtype(args[self._vector].dtype)
        for name, tensor in zip(self._names, args, strict=False):
            if (accumulate_dtype(tensor.dtype) if name == "off_diag" else tensor.dtype) != expected:
                raise TypeError(f"{name} is {tensor.dtype}, expected {expected}")
        args[self._count] = unflatten(args[self._count], args[self._vector].ndim - 2)
        return args

    def _autograd(self, keyset, *args):
        """Below autograd, the dispatcher goes on: to the next transformation, or to the kernel."""
        below = keyset & _C._after_autograd_keyset
        transformed = forward_ad._current_level >= 0 or _C._are_functorch_transforms_active()
        if not transformed and not requires_grad(args[: self._count]):
            with _C._AutoDispatchBelowAutograd():
                return self.op.redispatch(below, *args)

        def values(*_):
            # Both modes are off inside of an autograd function and of its rules; transformations further out need them on.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _C._AutoDispatchBelowAutograd():
                return self.op.redispatch(below, *args)

        with enable_single_level_autograd_function():
            return self._differentiable(*self._with_offsets(args), values)

    def _vmap(self, info, in_dims, *args):
        """Items that have a factor each become more of the B axis; items that share one become more of the S axis.

        An operator without factors among its tensors gives factors: each item its own.
        """
        factor_each = not self._factors or any(in_dims[i] is not None for i in self._factors)
        merged = list(args)
        for i, axis in enumerate(self._batch_axes):
            if factor_each or i not in self._factors:
                merged[i] = _into_axis(args[i], in_dims[i], info.batch_size, axis if factor_each else 0)
        outputs = self.op(*merged)
        axes = tuple(axis if factor_each else 0 for axis in self._out_axes)
        if isinstance(outputs, Tensor):
            return outputs.unflatten(axes[0], (info.batch_size, -1)), axes[0]
        return tuple(t.unflatten(axis, (info.batch_size, -1)) for t, axis in zip(outputs, axes, strict=True)), axes


def _into_axis(tensor: Tensor, in_dim: int | None, size: int, axis: int) -> Tensor:
    """Merge the mapped axis (or ``size`` repetitions, where there is none) into ``axis``, before what is there."""
    if in_dim is None:
        tensor = tensor.unsqueeze(axis).expand(*tensor.shape[:axis], size, *tensor.shape[axis:])
    else:
        tensor = tensor.movedim(in_dim, axis)
    return tensor.flatten(axis, axis + 1)


def requires_grad(tensors: Sequence[Tensor]) -> bool:
    """Autograd in reverse mode records what is done with these tensors."""
    if _is_grad_enabled():
        for t in tensors:
            if t.requires_grad:
                return True
    return False


def nothing_intervenes(tensors: Sequence[Tensor], saved: Sequence[Tensor] = ()) -> bool:
    """Nothing but autograd in reverse mode would see a call of torch's dispatcher with these tensors.

    ``saved`` were among such tensors when autograd saved them; a hook may have put a tensor of another class in their place.
    """
    if _is_compiling():
        return False
    for t in tensors:
        if type(t) not in _PLAIN_TYPES or _dispatch_keys(t).raw_repr() not in _PLAIN_KEYS:
            return False
    for t in saved:
        if type(t) not in _PLAIN_TYPES:
            return False
    return (
        forward_ad._current_level < 0
        and _frame_callback() is None
        and not _dispatch_modes()
        and not _function_modes()
        and not _transforms_active()
        and _tracing_state() is None
        and not _profiler_enabled()
    )

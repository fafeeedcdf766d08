"""`Batched`, the base of objects that hold tensors: ``to``, ``detach``, indexing of the batch axes, and pytrees."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gmrf_kernels.checks import check_tensor


class Batched:
    """Base of objects made of tensors with common batch axes.

    A subclass says in `_parts` what it holds and in `_static` what else it consists of; `_from_parts` makes one of both.
    `register_pytree` makes it a node of pytrees, for `torch.vmap`, `torch.export` and others. FSDP2 and DDP find tensors in the
    fields of dataclasses instead, hook them, and may make a new object of them: a subclass is a dataclass, too, its fields
    are the arguments of its constructor, and where nothing is expanded a field is the very tensor that is stored.
    """

    @property
    def batch_shape(self) -> torch.Size:
        """The broadcast of all parts' batch axes."""
        raise NotImplementedError

    def _parts(self) -> "dict[str, tuple[Tensor | Batched, int]]":
        """By name, the tensors and objects of tensors as they are stored, each with the number of axes behind its batch."""
        raise NotImplementedError

    def _static(self) -> Any:
        """Everything but the tensors; can be compared and hashed."""
        raise NotImplementedError

    @classmethod
    def _from_parts(cls, static: Any, parts: Sequence[Any], batch_shape: torch.Size | None = None) -> Self:
        """The object with these parts, in the order of `_parts`; its batch is theirs, or an expansion of it.

        Nothing is checked: transformations of torch put in tensors of other shapes, None, and objects that only hold a place.
        """
        raise NotImplementedError

    def to(self, *args, **kwargs) -> Self:
        """With all tensors moved or converted; arguments as for `torch.Tensor.to`: a dtype, a device, both, or a tensor.

        What was expanded is not copied for each repetition.

        Raises:
            TypeError: a dtype other than float16, bfloat16, float32 or float64.
        """
        parts = []
        for name, (part, _) in self._parts().items():
            parts.append(part.to(*args, **kwargs))
            if isinstance(part, Tensor):
                check_tensor(name, parts[-1])
        return self._from_parts(self._static(), parts, self.batch_shape)

    def detach(self) -> Self:
        """The same values, without a gradient."""
        return self._from_parts(self._static(), [part.detach() for part, _ in self._parts().values()], self.batch_shape)

    def __getitem__(self, index) -> Self:
        """Some of the batch, indexed as a tensor of shape ``batch_shape``: integers, slices, None, ``...``, tensors.

        The axes of the grid cannot be indexed. Integers, slices and None copy nothing.

        Raises:
            IndexError: more indices than batch axes, or one out of range.
        """
        batch, name = self.batch_shape, type(self).__name__
        index = index if isinstance(index, tuple) else (index,)
        try:
            shape = torch.zeros(()).expand(batch)[index].shape
        except IndexError as error:
            raise IndexError(f"{name} has batch shape {tuple(batch)}, and only the batch can be indexed: {error}") from None
        parts = [_indexed(part, axes, batch, index) for part, axes in self._parts().values()]
        return self._from_parts(self._static(), parts, shape)

    def __iter__(self) -> Iterator[Self]:
        """Along the first batch axis.

        Raises:
            TypeError: there is no batch axis.
        """
        if not self.batch_shape:
            raise TypeError(f"{type(self).__name__} has no batch axes to iterate over")
        return (self[i] for i in range(self.batch_shape[0]))


def _indexed(part: Tensor | Batched, axes: int, batch: torch.Size, index: tuple) -> Tensor | Batched:
    """A part, with ``axes`` axes behind its batch, indexed along the batch axes to which it may have to be expanded."""
    if isinstance(part, Batched):
        return part.expand(batch)[index]
    rest = [slice(None)] * (len(batch) - sum(map(_axes_indexed, index)))
    position = next((at for at, i in enumerate(index) if i is Ellipsis), len(index))
    full = [*index[:position], *rest, *index[position + 1 :]]  # ``...`` itself would stand for axes of the grid as well
    if not all(i is None or isinstance(i, slice) or _is_integer(i) for i in full):
        return part.expand(*batch, *part.shape[part.ndim - axes :])[tuple(full)]
    part = part.reshape(*[1] * (len(batch) - part.ndim + axes), *part.shape)
    # An axis that is only expanded stays so: its gradient is not written for each repetition.
    for at, axis in enumerate(at for at, i in enumerate(full) if i is not None):
        if part.shape[at] == 1 and batch[at] != 1:
            full[axis] = slice(None) if isinstance(full[axis], slice) else 0
    return part[tuple(full)]


def _axes_indexed(index: Any) -> int:
    """How many axes one index takes: as many as a mask has, none for None and a bool."""
    if index is None or index is Ellipsis or isinstance(index, bool):
        return 0
    if isinstance(index, slice) or _is_integer(index):
        return 1
    index = torch.as_tensor(index)
    return index.ndim if index.dtype == torch.bool else 1


def _is_integer(index: Any) -> bool:
    if isinstance(index, bool | Tensor):
        return False
    try:
        operator.index(index)
    except TypeError:
        return False
    return True


def register_pytree(
    name: str, dump: Callable[[Any], Any] = lambda static: static, load: Callable[[Any], Any] = lambda dumped: dumped
) -> Callable[[type[Batched]], type[Batched]]:
    """Decorator that makes a class of `Batched` objects a pytree node.

    The children are the stored tensors themselves where they have the whole batch, and expanded where they share some of it:
    whatever maps over an axis finds it in every child.

    Args:
        name: the class's public name, under which `torch.export` saves it.
        dump, load: from what `_static` gives to what JSON can hold, and back.
    """

    def flatten(node: Batched) -> tuple[list[Any], Any]:
        return [part for _, part in _children(node)], node._static()

    def flatten_with_keys(node: Batched):
        return [(pytree.GetAttrKey(key), part) for key, part in _children(node)], node._static()

    def register(cls: type[Batched]) -> type[Batched]:
        pytree.register_pytree_node(
            cls,
            flatten,
            lambda children, static: cls._from_parts(static, list(children)),
            serialized_type_name=name,
            to_dumpable_context=dump,
            from_dumpable_context=load,
            flatten_with_keys_fn=flatten_with_keys,
        )
        return cls

    return register


def _children(node: Batched) -> list[tuple[str, Any]]:
    parts = node._parts()
    try:
        batch = node.batch_shape
        return [(name, expanded(part, axes, batch)) for name, (part, axes) in parts.items()]
    except (AttributeError, RuntimeError, ValueError):  # what only holds the place of a tensor is passed on as it is
        return [(name, part) for name, (part, _) in parts.items()]


def expanded(part: Tensor | Batched, axes: int, batch: torch.Size) -> Tensor | Batched:
    """A part, with ``axes`` axes behind its batch, expanded to a batch; the part itself where it has that batch."""
    if isinstance(part, Batched):
        return part if part.batch_shape == batch else part.expand(batch)
    shape = (*batch, *part.shape[part.ndim - axes :])
    return part if part.shape == shape else part.expand(shape)

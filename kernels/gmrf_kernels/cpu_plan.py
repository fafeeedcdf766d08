"""Calls of a compiled CPU kernel: its arguments in memory, all but the tensors' addresses prepared once."""

from array import array
from collections.abc import Callable, Sequence

from torch import Tensor

from .cpu_source import FIRST_ARGUMENT
from .threads import run_in_threads

_CACHE_LINE = 64


class Plan:
    """A kernel with its arguments for tensors of one layout: a call only has to fill in the tensors' addresses.

    Args:
        kernel: the compiled kernel.
        arguments: its arguments, with None for what each call gives, and tensors for their addresses.
        items: work items, which threads take in spans of a multiple of ``multiple``.
        threads: how many take part, at most.
        scratch: bytes of zeroed memory that the kernel works in.
    """

    def __init__(
        self,
        kernel: Callable,
        arguments: Sequence[Tensor | int | None],
        items: int,
        threads: int,
        multiple: int = 1,
        scratch: int = 0,
    ):
        # A few spans a thread, so that one held up by other work of the machine does not hold up the rest.
        span = -(-items // (4 * threads * multiple)) * multiple if threads > 1 else items
        self._kernel, self._threads = kernel, threads
        self._places = [place for place, a in enumerate(arguments, FIRST_ARGUMENT) if a is None]
        self._constants = [a for a in arguments if isinstance(a, Tensor)]
        self._numbers = array("q", [0, 0, 0, 0, items, span, *(_address(0 if a is None else a) for a in arguments)])
        # Scratch lies behind the arguments, from the next multiple of a cache line on.
        self._scratch = -(-scratch // 8) * 8 + _CACHE_LINE if scratch else 0

    def __call__(self, *arguments: Tensor | int) -> None:
        """Run the kernel with the arguments that were left out, tensors and integers."""
        numbers = self._numbers[:]
        for place, argument in zip(self._places, arguments, strict=True):
            numbers[place] = argument if type(argument) is int else argument.data_ptr()
        if self._scratch:
            arguments_end = 8 * len(numbers)
            numbers.frombytes(bytes(self._scratch))
        address = numbers.buffer_info()[0]
        if self._scratch:
            numbers[3] = -(-(address + arguments_end) // _CACHE_LINE) * _CACHE_LINE
        run_in_threads(self._kernel, address, self._threads, owners=(numbers, *arguments, *self._constants))


def _address(argument: Tensor | int) -> int:
    return argument if type(argument) is int else argument.data_ptr()

"""Data-parallel training and evaluation in the processes that torchrun starts; in a single process nothing to be done.

Each process has a copy of the networks, and its part of every batch. Gradients are averaged over the processes, and batch
normalisation takes its statistics over the whole batch, so that N processes compute what one would, up to rounding. All
processes draw the same random numbers for a batch, and each takes its part of them.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Value = TypeVar("Value")


@contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes if torchrun started this one: by NCCL on CUDA devices, by Gloo on others.

    Args:
        device: where to compute. On "cuda" each process takes the GPU with its local rank.

    Yields:
        This process's device.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield device
        # All leave together: processes that left while others still worked have ended with an abort.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is. The process of rank 0 writes the results."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def from_first(value: Value) -> Value:
    """The value that the process of rank 0 has given: anything that can be pickled."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def from_all(value: Value) -> list[Value]:
    """The values that the processes have given, by rank: anything that can be pickled."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def own_part(batch: Tensor) -> Tensor:
    """This process's part of a batch (B, ...): (B / world_size(), ...).

    Raises:
        ValueError: B is not a multiple of the number of processes.
    """
    if len(batch) % world_size():
        raise ValueError(f"a batch has {len(batch)} examples, expected a multiple of {world_size()}, the number of processes")
    return batch.chunk(world_size())[rank()]


def own_batches(total: int, batch_size: int) -> Iterator[tuple[int, slice]]:
    """Number and rows of each batch that this process evaluates, of ``total`` rows in all.

    The batches themselves are the same for any number of processes.
    """
    for batch in range(rank(), -(-total // batch_size), world_size()):
        yield batch, slice(batch * batch_size, min((batch + 1) * batch_size, total))


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of what the processes hold, in each of them; differentiable."""
    return _Sum.apply(tensor) if world_size() > 1 else tensor


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their means over the processes, in one message."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Gradients in memory format channels_last cannot be viewed as vectors, only flattened.
    flat = sum_over_processes(torch.cat([gradient.flatten() for gradient in gradients])) / world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def synchronise_batch_norm(module: nn.Module) -> None:
    """Make the layers of ``module`` that normalise over a batch do so over the whole batch, not this process's part.

    Parameters and buffers keep their names. torch's own SyncBatchNorm refuses tensors on a CPU.
    """
    if world_size() == 1:
        return
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            synchronised = _SynchronisedBatchNorm(child.num_features, child.eps, child.momentum)
            synchronised.weight, synchronised.bias = child.weight, child.bias
            for buffer, value in child.named_buffers():
                setattr(synchronised, buffer, value)
            setattr(module, name, synchronised)
        else:
            synchronise_batch_norm(child)


class _Sum(torch.autograd.Function):
    """The derivative of a sum over processes is the sum over processes of the cotangents."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Sum.apply(grad)


class _SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of (B, C, ...) with mean and variance over the parts of all processes, which have one size."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes will do."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        axes = (0, *range(2, input.ndim))
        x = input.to(self.weight.dtype)
        mean = sum_over_processes(x.mean(axes, keepdim=True)) / world_size()
        centred = x - mean
        variance = sum_over_processes(centred.square().mean(axes, keepdim=True)) / world_size()
        with torch.no_grad():
            values = world_size() * x.numel() // x.shape[1]
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * values / (values - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        weight, bias = (parameter.view_as(mean[0]) for parameter in (self.weight, self.bias))
        return (centred * (variance + self.eps).rsqrt() * weight + bias).to(input.dtype)

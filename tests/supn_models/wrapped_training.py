"""Training of networks that are wrapped for several processes; run by torchrun it writes what the processes together found.

torchrun --nproc-per-node 2 -m tests.supn_models.wrapped_training FILE
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import banded_gmrf as bg
from supn_models import ConvAutoencoder, CovarianceNetwork, StructuredLikelihood

STENCIL, GRID = bg.Stencil.square(3), (5, 6)


def network() -> tuple[nn.Module, torch.Tensor]:
    """A network whose output is a factor, and its inputs, in float64: processes differ by rounding alone."""
    torch.manual_seed(0)
    return CovarianceNetwork(1, STENCIL, channels=4, num_levels=2).double(), torch.rand(4, 1, *GRID).double()


def likelihood() -> tuple[nn.Module, torch.Tensor]:
    """A module whose output is a distribution, and which leaves the parameters of its encoder unused."""
    torch.manual_seed(0)
    autoencoder = ConvAutoencoder(GRID, latent_size=3, channels=(4,))
    module = StructuredLikelihood(autoencoder, CovarianceNetwork(1, STENCIL, channels=4, num_levels=1))
    return module.double(), torch.rand(4, 3).double()


MODULES = {"network": network, "likelihood": likelihood}


def train(make, wrap=lambda module: module, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Losses of three steps, the mean over all processes, and the parameters after them; ``dtype`` is that of the outputs."""
    module, inputs = make()
    residual = torch.randn(4, *GRID, dtype=torch.float64).to(dtype)
    wrapped = wrap(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        output = wrapped(inputs.chunk(world_size)[rank])
        q = output if isinstance(output, bg.GMRF) else bg.GMRF(residual.new_zeros(GRID), output)
        loss = -q.log_prob(residual.chunk(world_size)[rank]).mean()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / world_size
        if dist.is_initialized():
            dist.all_reduce(mean)
        losses.append(mean)
    found = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in module.named_parameters()}
    return {"losses": torch.stack(losses), **{name: tensor.detach() for name, tensor in found.items()}}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))

    def shard_parts(module: nn.Module) -> nn.Module:
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.GroupNorm):
                fully_shard(part, mesh=mesh)
        return fully_shard(module, mesh=mesh)

    wrappers = {
        "ddp, unused": lambda module: DistributedDataParallel(module, find_unused_parameters=True),
        "ddp, static": lambda module: DistributedDataParallel(module, static_graph=True),
        "fsdp": lambda module: fully_shard(module, mesh=mesh),
        "fsdp, parts": shard_parts,
    }
    found = {f"{name}, {how}": train(make, wrap) for name, make in MODULES.items() for how, wrap in wrappers.items()}
    to_float32 = MixedPrecisionPolicy(output_dtype=torch.float32)
    for name, make in MODULES.items():
        found[f"{name}, float32"] = train(make, lambda m: fully_shard(m, mesh=mesh, mp_policy=to_float32), torch.float32)
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
    # Gloo's threads may outlive the group, and one that asks for Python while the interpreter ends aborts the process
    # ("terminate called without an active exception"): all that is to be judged has been written, so it ends here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

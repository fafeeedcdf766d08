"""Machine code of Triton kernels for GPUs that are not there, and what it uses of them.

`compile_launches` runs host code on meta tensors, which have shapes and strides but no memory, and compiles each kernel that
the code launches, exactly as a launch on the target would. A host synchronisation would fail on such tensors.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Machine:
    """One kernel's machine code.

    Args:
        name: of the kernel.
        warps: per program.
        registers: per thread; vector registers on AMD.
        spilled: bytes of local memory per thread on NVIDIA, spilled vector registers on AMD.
        shared: bytes of shared memory per program.
        assembly: PTX or AMD's assembly.
        ttgir: Triton's last representation, where layouts and their conversions show.
    """

    name: str
    warps: int
    registers: int
    spilled: int
    shared: int
    assembly: str
    ttgir: str


def compile_launches(function: Callable[..., object], *args, target: str) -> list[Machine]:
    """The kernels that ``function(*args)`` launches, in their order, compiled for one of `TARGETS`."""
    kernels = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    # All that Triton asks of a driver when it compiles; it keeps the kernels of each device apart.
    pretended = SimpleNamespace(
        get_current_target=lambda: TARGETS[target], get_current_device=lambda: target, get_current_stream=lambda device: 0
    )
    with patch.object(driver, "_active", pretended), patch.object(JITFunction, "run", compile_only):
        function(*args)
    return [_machine(kernel) for kernel in kernels]


def _machine(kernel) -> Machine:
    if "cubin" in kernel.asm:
        assembly = kernel.asm["ptx"]
        usage = _resource_usage(kernel.asm["cubin"])
        registers, spilled = usage["REG"], usage["STACK"] + usage["LOCAL"]
    else:
        assembly = kernel.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{key}: +(\d+)", assembly)[1]) for key in ("vgpr_count", "vgpr_spill_count"))
    metadata = kernel.metadata
    return Machine(kernel.src.name, metadata.num_warps, registers, spilled, metadata.shared, assembly, str(kernel.asm["ttgir"]))


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack, shared and local memory per thread, from the machine code."""
    program = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([program, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}

"""Machine code of the kernels without recursion, as the schedule launches them: registers, and how coefficients are moved."""

import re

import pytest
import torch

from gmrf_kernels.checks import accumulate_dtype
from tests.cases import STENCILS

pytest.importorskip("triton")

from gmrf_kernels import triton_kernels
from tests.gmrf_kernels.triton_compilation import TARGETS, compile_launches

IMAGE = (64, 64)
SEVEN = tuple((i, j) for i in range(4) for j in range(-3, 4) if (i, j) > (0, 0))
ELEVEN = tuple((i, j) for i in range(6) for j in range(-5, 6) if (i, j) > (0, 0))
CASES = {  # coefficients, offsets, grid, samples
    "float32": (torch.float32, SEVEN, IMAGE, 1),
    "float32, 64 samples": (torch.float32, SEVEN, IMAGE, 64),
    "float32, 5x5": (torch.float32, STENCILS["5x5"].offsets, IMAGE, 1),
    "float32, 3x3, odd sizes": (torch.float32, STENCILS["3x3"].offsets, (63, 65), 1),
    "float32, 7x7, odd sizes": (torch.float32, SEVEN, (63, 65), 1),
    "float32, 7x7, odd sizes, 64 samples": (torch.float32, SEVEN, (63, 65), 64),
    "float32, 11x11": (torch.float32, ELEVEN, IMAGE, 1),
    "float32, volume": (torch.float32, STENCILS["bands of a box"].offsets, (32, 32, 32), 1),
    "bfloat16": (torch.bfloat16, SEVEN, IMAGE, 1),
    "bfloat16, 64 samples": (torch.bfloat16, SEVEN, IMAGE, 64),
    "float64": (torch.float64, SEVEN, IMAGE, 1),
    "float64, 64 samples": (torch.float64, SEVEN, IMAGE, 64),
}
OPERATIONS = ("matvec", "nll", "nll_factor_grad")


def machines(operation, dtype, offsets, grid, samples, target):
    """The kernels of an operation on meta tensors of 4 images; a product with Lᵀ is the kernel of the likelihood."""
    with torch.device("meta"):
        diag = torch.empty(4, *grid, dtype=accumulate_dtype(dtype))
        off_diag = torch.empty(4, len(offsets), *grid, dtype=dtype)
        x = torch.empty(samples, 4, *grid, dtype=diag.dtype)
        scale = torch.empty(samples, 4, dtype=diag.dtype)
    arguments = {
        "matvec": (diag, off_diag, x, offsets, False, True),
        "nll": (x, diag, off_diag, offsets),
        "nll_factor_grad": (scale, x, x, diag, offsets, dtype),
    }
    return compile_launches(getattr(triton_kernels, operation), *arguments[operation], target=target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", CASES)
def test_no_register_is_spilled(case, operation, target):
    for machine in machines(operation, *CASES[case], target):
        assert machine.spilled == 0, machine.name
        # Two programs of 256 threads and more fit the 65536 registers of a multiprocessor, whose loads overlap.
        assert machine.registers * machine.warps * 32 * 2 <= 65536


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_likelihood_loads_each_coefficient_once_in_vectors(dtype):
    kernel, _ = machines("nll", dtype, SEVEN, IMAGE, 1, "sm_90")
    # Coefficients are what is evicted first: PTX names the number and the bits of what a load moves.
    loads = re.findall(r"ld\.global\S*evict_first\S*?(?:\.v(\d))?\.b(\d+)", kernel.assembly)
    bits = {torch.float32: ("4", "32"), torch.float64: ("2", "64"), torch.bfloat16: ("2", "32")}[dtype]
    assert loads == [bits] * len(SEVEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_gradient_stores_each_entry_once_in_vectors(dtype):
    (kernel,) = machines("nll_factor_grad", dtype, SEVEN, IMAGE, 1, "sm_90")
    stores = re.findall(r"st\.global\S*?(?:\.v(\d))?\.b(\d+)", kernel.assembly)
    bits = {torch.float32: ("4", "32"), torch.float64: ("2", "64"), torch.bfloat16: ("2", "32")}[dtype]
    assert sorted(stores[-len(SEVEN) :]) == [bits] * len(SEVEN)
    assert len(stores) == len(SEVEN) + 1
    assert "evict_first" not in kernel.assembly  # it loads no coefficient


def test_strides_do_not_change_the_arithmetic():
    """What makes results equal bit by bit whatever the strides: sums over tiles are by pairs, products are fused explicitly."""
    with torch.device("meta"):
        diag, off_diag, x = torch.empty(4, *IMAGE), torch.empty(4, len(SEVEN), *IMAGE), torch.empty(1, 4, *IMAGE)
        mixed = [torch.empty(*t.shape[:-2], *IMAGE).mT for t in (x, diag, off_diag)]

    def arithmetic(*tensors):
        kernel, _ = compile_launches(triton_kernels.nll, *tensors, SEVEN, target="sm_90")
        return sorted(set(re.findall(r"\b(?:fma|add|mul|sub)\.(?:rn\.)?f(?:32|64)\b", kernel.assembly)))

    assert arithmetic(x, diag, off_diag) == arithmetic(*mixed)

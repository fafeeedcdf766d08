"""Which backend runs an operation, and what is said where none can."""

import importlib.util
import subprocess
import sys

import pytest
import torch

import gmrf_kernels
from gmrf_kernels import backends, cpu
from tests.gmrf_kernels.operators import OFFSETS, OPERATORS, arguments, call, tensors, with_tensors

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def test_backends_nest_and_are_restored_after_an_exception():
    def chosen():
        return backends.backend_for(CPU).__name__.split(".")[-1]

    assert chosen() == "cpu"
    with gmrf_kernels.use_backend("reference"):
        with gmrf_kernels.use_backend("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
        with pytest.raises(ZeroDivisionError), gmrf_kernels.use_backend("cpu"):
            raise ZeroDivisionError
        assert chosen() == "reference"
    assert chosen() == "cpu"


def test_an_unknown_backend_is_named():
    expected = r"name is 'numpy', expected one of 'reference', 'cpu', 'triton'"
    with pytest.raises(ValueError, match=expected), gmrf_kernels.use_backend("numpy"):
        pass


def test_the_cpu_backend_takes_cpu_tensors_only():
    with gmrf_kernels.use_backend("cpu"), pytest.raises(ValueError, match=r"takes CPU tensors, got tensors on cuda:1"):
        backends.backend_for(CUDA)


def test_a_backward_pass_runs_on_the_chosen_backend(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the CPU backend was called")

    for function in ("matvec", "solve", "outer", "nll", "nll_factor_grad"):
        monkeypatch.setattr(cpu, function, never)
    with gmrf_kernels.use_backend("reference"):
        for name in OPERATORS:
            args = arguments(name, OFFSETS["volume"], (2, 2, 3), nan_outside=False)
            inputs = [t.requires_grad_() for t in tensors(args)]
            sum(r.sum() for r in call(name, with_tensors(args, inputs))).backward()


@needs_triton
def test_cuda_tensors_go_to_triton():
    assert backends.backend_for(CUDA).__name__ == "gmrf_kernels.triton_kernels"
    with gmrf_kernels.use_backend("reference"):
        assert backends.backend_for(CUDA).__name__ == "gmrf_kernels.reference"


def test_tensors_of_other_devices_go_to_the_reference():
    assert backends.backend_for(torch.device("mps")).__name__ == "gmrf_kernels.reference"


@needs_triton
@pytest.mark.parametrize(("device", "instead"), [("cpu", "use 'cpu' or 'reference' there"), ("mps", "use 'reference' there")])
def test_the_triton_backend_takes_cuda_tensors_only(device, instead):
    expected = f"backend 'triton' takes CUDA tensors, got tensors on {device}; {instead}"
    with gmrf_kernels.use_backend("triton"), pytest.raises(ValueError, match=expected):
        backends.backend_for(torch.device(device))


@needs_triton
def test_cpu_tensors_on_the_triton_backend():
    args = arguments("nll", OFFSETS["5x5"], (3, 4))
    with gmrf_kernels.use_backend("triton"), pytest.raises(ValueError, match="takes CUDA tensors, got tensors on cpu"):
        call("nll", args)


def test_without_triton_the_other_backends_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"needs the package triton, which is not installed; use 'reference' on cuda:1"):
        backends.backend_for(CUDA)
    with (
        gmrf_kernels.use_backend("triton"),
        pytest.raises(ValueError, match=r"is not installed; use 'cpu' or 'reference' on cpu"),
    ):
        backends.backend_for(CPU)


def test_triton_is_imported_at_its_first_use_only():
    code = """
import sys, torch, gmrf_kernels
ones = torch.ones(1, 5)
gmrf_kernels.matvec(ones, ones[:, None], ones, ((1,),), 1)
assert "gmrf_kernels.triton_kernels" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)

"""The share of the library's operators in a training step: of made events, and of a tiny network."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console
from torch.autograd import DeviceType
from typer.testing import CliRunner

from bench import training_step
from bench.__main__ import app
from bench.training_step import Kernel, Setting, kernels, profile_training

TINY = Setting(batch=2, pixels=16, stencil_size=3, latent_size=4, decoder_channels=(4, 4), channels=4)


def gpu_event(name, microseconds, annotation=False):
    elapsed = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, device_type=DeviceType.CUDA, is_user_annotation=annotation, time_range=elapsed)


def cpu_event(name, microseconds, parent=None):
    return SimpleNamespace(name=name, device_type=DeviceType.CPU, self_cpu_time_total=microseconds, cpu_parent=parent)


def test_kernels_on_a_gpu_are_known_by_their_names():
    pytest.importorskip("triton")
    events = [
        cpu_event("gmrf_kernels::nll", 1e6),
        gpu_event("_gather", 30),
        gpu_event("_finish_nll", 1),
        gpu_event("_outer", 20),
        gpu_event("_gather", 10),
        gpu_event("sm90_xmma_fprop_implicit_gemm_outer_tilesize128", 50),
        gpu_event("triton_poi_fused_gather_0", 5),
        gpu_event("Memset (Device)", 2),
        gpu_event("Optimizer.step#Adam.step", 1e6, annotation=True),
    ]
    assert kernels(events, "cuda") == [
        Kernel("sm90_xmma_fprop_implicit_gemm_outer_tilesize128", False, pytest.approx(50e-6), 1),
        Kernel("_gather", True, pytest.approx(40e-6), 2),
        Kernel("_outer", True, pytest.approx(20e-6), 1),
        Kernel("triton_poi_fused_gather_0", False, pytest.approx(5e-6), 1),
        Kernel("Memset (Device)", False, pytest.approx(2e-6), 1),
        Kernel("_finish_nll", True, pytest.approx(1e-6), 1),
    ]


def test_operators_on_a_cpu_are_known_by_what_calls_them():
    backward = cpu_event("autograd::engine::evaluate_function: GeneratedBackwardFor_gmrf_kernels_nllBackward", 1)
    events = [
        backward,
        cpu_event("aten::exp", 3, parent=cpu_event("gmrf_kernels::nll_factor_grad", 5, parent=backward)),
        cpu_event("aten::exp", 7, parent=cpu_event("aten::sigmoid", 0)),
        gpu_event("_gather", 30),
    ]
    assert kernels(events, "cpu") == [
        Kernel("aten::exp", False, pytest.approx(7e-6), 1),
        Kernel("aten::exp", True, pytest.approx(3e-6), 1),
        Kernel(backward.name, True, pytest.approx(1e-6), 1),
    ]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_step_of_a_tiny_network(tmp_path, bfloat16):
    output = io.StringIO()
    setting = replace(TINY, bfloat16=bfloat16)
    results = profile_training(setting, 2, "cpu", tmp_path, Console(file=output, width=200))
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(results))
    calls = {kernel["name"]: kernel["calls"] for kernel in results["kernels"] if kernel["ours"]}
    assert calls["gmrf_kernels::nll"] >= 2
    assert calls["gmrf_kernels::nll_factor_grad"] >= 2
    assert 0 < results["share_of_operators"] < 1
    assert results["seconds_per_step"] > 0
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert f"# A training step of a covariance network: {setting}\n" in text
    assert "| network |" in text
    assert "(aim: at most 15 % on a GPU" in output.getvalue()


def test_a_profile_without_kernels_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(training_step, "kernels", lambda events, device: [])
    with pytest.raises(RuntimeError, match="saw nothing run on cpu"):
        profile_training(TINY, 1, "cpu", tmp_path, Console(file=io.StringIO()))


def test_options_reach_the_measurement(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(training_step, "profile_training", lambda *arguments: given.append(arguments))
    arguments = ["--batch", "3", "--compile", "--bfloat16", "--steps", "4", "--out", str(tmp_path / "new")]
    outcome = CliRunner().invoke(app, ["training-step", *arguments])
    assert outcome.exit_code == 0, outcome.output
    assert given[0][:4] == (Setting(batch=3, compiled=True, bfloat16=True), 4, "cpu", tmp_path / "new")

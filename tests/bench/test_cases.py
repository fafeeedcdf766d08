"""Names of stencils and resolutions, the plan that they make, and the bytes that operations must move."""

import pytest
import torch

import banded_gmrf as bg
from bench.cases import Case, Problem, fits, parse_resolution, parse_stencil
from bench.operations import OPERATIONS
from bench.presets import PRESETS, Sweep, override, plan


@pytest.mark.parametrize(
    ("text", "ndim", "stencil"),
    [
        ("7", 2, bg.Stencil.square(7)),
        ("1", None, bg.Stencil.square(1)),
        ("3", 3, bg.Stencil.box((1, 1, 1))),
        ("3x7x7", None, bg.Stencil.box((1, 3, 3))),
        ("1x5", 2, bg.Stencil.box((0, 2))),
        ("cross2", None, bg.Stencil.cross(2)),
        ("cross1", 3, bg.Stencil.cross(1, ndim=3)),
    ],
)
def test_stencil_names(text, ndim, stencil):
    assert parse_stencil(text, ndim) == stencil


@pytest.mark.parametrize(
    ("text", "ndim", "message"),
    [
        ("seven", 2, "'seven': expected an odd size as 7"),
        ("-3", 2, "'-3': expected an odd size"),
        ("4", 2, "'4': sizes are odd"),
        ("3x4", 2, "'3x4': sizes are odd"),
        ("3x3x3", 2, "'3x3x3' has 3 axes, the grid has 2"),
    ],
)
def test_bad_stencil_names(text, ndim, message):
    with pytest.raises(ValueError, match=message):
        parse_stencil(text, ndim)


@pytest.mark.parametrize(("text", "grid"), [("64", (64, 64)), ("3x256", (3, 256, 256)), ("8x64x48", (8, 64, 48))])
def test_resolution_names(text, grid):
    assert parse_resolution(text) == grid


@pytest.mark.parametrize(("text", "message"), [("big", "expected pixels as 64"), ("2x3x4x5", "expected"), ("0", "one pixel")])
def test_bad_resolution_names(text, message):
    with pytest.raises(ValueError, match=message):
        parse_resolution(text)


def test_stencils_meet_only_grids_of_their_axes():
    assert fits("5", 2)
    assert fits("5", 3)
    assert fits("cross1", 3)
    assert not fits("3x3x3", 2)
    cases = list(Sweep(stencils=("3x3x3", "5"), resolutions=("8", "2x8")).cases("cpu"))
    assert [(case.stencil, case.grid) for case in cases] == [("5", (8, 8)), ("3x3x3", (2, 8, 8)), ("5", (2, 8, 8))]


def test_plan_has_each_operation_of_a_case_once_with_all_its_implementations():
    sweeps = [
        Sweep(stencils=("3",), operations=("sample", "log_prob")),
        Sweep(stencils=("3",), operations=("sample",), backends=("default", "reference"), peers=("scipy", "shifts")),
    ]
    works = plan(sweeps, "cpu")
    assert [(work.operation, work.implementations) for work in works] == [
        ("sample", ("cpu", "reference", "scipy")),  # shifts have no sample
        ("log_prob", ("cpu",)),
    ]
    with pytest.raises(ValueError, match="nothing to measure"):
        plan([Sweep(stencils=("3x3x3",))], "cpu")


def test_options_take_the_place_of_a_preset():
    sweep = override(Sweep(), {"stencils": "5, cross1", "batches": "2,1", "peers": "all", "operations": None})
    assert sweep.stencils == ("5", "cross1")
    assert sweep.batches == (2, 1)
    assert "scipy" in sweep.peers
    assert sweep.operations == Sweep().operations
    assert override(sweep, {"peers": "none"}).peers == ()


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("stencils", "3,4", "'4': sizes are odd"),
        ("stencils", "", "stencil ''"),
        ("resolutions", "64,x", "resolution 'x'"),
        ("batches", "0", "--batch has '0', expected positive integers"),
        ("samples", "two", "--samples has 'two'"),
        ("operations", "sing", "--ops has 'sing', expected some of log_prob"),
        ("dtypes", "int8", "--dtype has 'int8'"),
        ("backends", "cuda", "--backends has 'cuda', expected some of default"),
        ("peers", "numpy", "--peers has 'numpy'"),
    ],
)
def test_bad_options_are_named(field, text, message):
    with pytest.raises(ValueError, match=message):
        override(Sweep(), {field: text})


def test_presets_are_plans():
    assert set(PRESETS) == {"quick", "full", "peers", "gpu"}
    for preset in PRESETS.values():
        assert plan(preset.sweeps, preset.device)


def test_bytes_that_must_move():
    # 2 images of 3 x 5 pixels: 30 pixels, K = 13 coefficients of 4 bytes each, 4 vectors for each factor.
    case = Case("5", (3, 5), batch=2, samples=4)
    coefficients, vectors = 13 * 30 * 4, 4 * 30 * 4
    assert OPERATIONS["log_prob"].bytes(case) == coefficients + vectors
    assert OPERATIONS["log_prob_grad"].bytes(case) == 2 * coefficients + vectors
    assert OPERATIONS["sample"].bytes(case) == coefficients + 2 * vectors
    assert OPERATIONS["rsample_grad"].bytes(case) == 3 * coefficients + 4 * vectors
    assert OPERATIONS["solve"].bytes(case) == coefficients + 2 * vectors
    assert OPERATIONS["precision_solve"].bytes(case) == 2 * coefficients + 4 * vectors


def test_bytes_of_16_bit_coefficients_beside_float32_vectors():
    case = Case("3", (4, 4), batch=1, dtype="bfloat16")
    assert (case.coefficient_bytes, case.vector_bytes) == (5 * 16 * 2, 16 * 4)


def test_problem_is_the_same_every_time_and_differs_between_images():
    case = Case("3", (6, 7), batch=3, samples=2, dtype="float64")
    problem, again = Problem(case), Problem(case)
    assert torch.equal(problem.coefficients, again.coefficients)
    assert problem.coefficients.shape == (3, 5, 6, 7)
    assert problem.x.shape == problem.white.shape == problem.cotangent.shape == (2, 3, 6, 7)
    assert not torch.equal(problem.coefficients[0], problem.coefficients[1])

"""Measures of whiteness on processes whose values are known."""

import pytest
import torch

from experiments.whiteness import chi_square_coverage, lag_one_autocorrelation


def test_lag_one_autocorrelation_of_a_known_process():
    white = torch.randn(40, 65, 65)
    assert abs(lag_one_autocorrelation(white)) < 0.01
    # ½ along the rows, 0 along the columns.
    assert lag_one_autocorrelation(white[:, 1:] + white[:, :-1]) == pytest.approx(0.25, abs=0.01)
    assert lag_one_autocorrelation((white[:, 1:] + white[:, :-1]).mT.flatten(0, 1)) == pytest.approx(0.5, abs=0.01)


def test_coverage_of_white_noise_and_of_errors_in_its_scale():
    levels = [0.1, 0.5, 0.9]
    white = torch.randn(20_000, 3, 4)
    # The standard error of a share of 20,000 is at most 0.0035.
    assert chi_square_coverage(white, levels) == pytest.approx(levels, abs=0.015)
    assert all(share < level - 0.03 for share, level in zip(chi_square_coverage(1.2 * white, levels), levels, strict=True))
    assert all(share > level + 0.03 for share, level in zip(chi_square_coverage(white / 1.2, levels), levels, strict=True))

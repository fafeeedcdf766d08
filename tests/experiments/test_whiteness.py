"""The measure of whiteness on processes whose value is known."""

import pytest
import torch

from experiments.whiteness import lag_one_autocorrelation


def test_lag_one_autocorrelation_of_a_known_process():
    white = torch.randn(40, 65, 65)
    # The standard error of a correlation of 169,000 sites is 0.0024.
    assert abs(lag_one_autocorrelation(white)) < 0.01
    # ½ along the rows, 0 along the columns.
    assert lag_one_autocorrelation(white[:, 1:] + white[:, :-1]) == pytest.approx(0.25, abs=0.01)
    assert lag_one_autocorrelation((white[:, 1:] + white[:, :-1]).mT.flatten(0, 1)) == pytest.approx(0.5, abs=0.01)

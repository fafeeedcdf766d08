"""The measure of whiteness on processes whose value is known."""

import pytest
import torch

from experiments.whiteness import excess_kurtosis, lag_autocorrelation


def test_lag_one_autocorrelation_of_a_known_process():
    white = torch.randn(40, 65, 65)
    # The standard error of a correlation of 169,000 sites is 0.0024.
    assert abs(lag_autocorrelation(white)) < 0.01
    # ½ along the rows, 0 along the columns.
    assert lag_autocorrelation(white[:, 1:] + white[:, :-1]) == pytest.approx(0.25, abs=0.01)
    assert lag_autocorrelation((white[:, 1:] + white[:, :-1]).mT.flatten(0, 1)) == pytest.approx(0.5, abs=0.01)
    # Of sites that are three apart, which share half of what they are made of, along one axis of two.
    assert lag_autocorrelation(white[:, 3:] + white[:, :-3], lag=3) == pytest.approx(0.25, abs=0.01)


def test_kurtosis_of_known_distributions():
    uniform = torch.linspace(-1, 1, 10001)[None]
    assert excess_kurtosis(uniform) == pytest.approx(-1.2, abs=1e-3)
    # Four standard errors of the kurtosis of 160,000 normal numbers.
    assert excess_kurtosis(torch.randn(10, 16000)) == pytest.approx(0, abs=4 * (24 / 160000) ** 0.5)

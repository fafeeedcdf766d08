"""Derivatives through the kernels in Triton's interpreter; `test_triton_interpreter` runs this file in a process of its own."""

import pytest

from tests.gmrf_kernels.operators import OPERATORS
from tests.gmrf_kernels.test_transformations import DERIVATIVES, assert_near, case, dense_gradient, directions, pytestmark

pytestmark = [pytestmark, pytest.mark.usefixtures("backend")]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("transformation", ["jvp", "forward_ad"])
def test_directional_derivatives(name, transformation):
    f, by_dense, point = case(name, "cpu", "3x3", (2, 3))
    tangents = directions(point, nan_outside=True)
    expected = sum((g * d.nan_to_num()).sum() for g, d in zip(dense_gradient(by_dense, point), tangents, strict=True))
    assert_near([DERIVATIVES[transformation](f, point, tangents)], [expected])

"""Roots of many increasing functions at once, where an evaluation is costly."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def bracketed_secant(
    function: Callable[[Tensor, Tensor], Tensor], start: Tensor, resolution: float, max_evaluations: int
) -> tuple[Tensor, Tensor]:
    """Zeros of increasing functions, one for each element, by the secant method within the interval that is left.

    Args:
        function: takes the numbers (m,) of some elements and a point (m,) for each; returns the values (m,) there.
        start: (N,), the first points.
        resolution: an element ends where its value is 0, or its interval is at most this long.
        max_evaluations: of each function.

    Returns:
        The last points (N,), and the numbers of the elements that did not end.
    """
    point = start.clone()
    low, high = torch.full_like(point, -math.inf), torch.full_like(point, math.inf)
    slope, last_point, last_value = torch.ones_like(point), point.clone(), torch.zeros_like(point)
    active = torch.arange(len(point), device=point.device)
    for _ in range(max_evaluations):
        if not len(active):
            break
        here = point[active]
        value = function(active, here)
        low[active] = here.where(value <= 0, low[active])
        high[active] = here.where(value >= 0, high[active])
        secant = (value - last_value[active]) / (here - last_point[active])
        slope[active] = secant.where(secant.isfinite() & (secant > 0), slope[active])
        last_point[active], last_value[active] = here, value
        guess = here - value / slope[active]
        inside = (guess > low[active]) & (guess < high[active])
        middle = 0.5 * (low[active] + high[active])
        point[active] = guess.where(inside | (value == 0), middle.where(middle.isfinite(), here - value.sign()))
        active = active[(value != 0) & (high[active] - low[active] > resolution)]
    return point, active

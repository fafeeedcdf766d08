"""What is raised where a matrix of numbers is not what the mathematics needs."""

import torch


class NotPositiveDefiniteError(torch.linalg.LinAlgError, ValueError):
    """A precision or a covariance is singular, or has a negative direction, up to rounding."""


def of_batch(element: torch.Tensor) -> str:
    """How an error names a batch element, given by its index (axes,); empty where there is no batch."""
    return f" of batch element {tuple(element.tolist())}" if len(element) else ""

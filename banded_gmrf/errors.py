"""What is raised where a matrix of numbers is not what the mathematics needs."""

import torch


class NotPositiveDefiniteError(torch.linalg.LinAlgError, ValueError):
    """A precision or a covariance is singular, or has a negative direction, up to rounding."""

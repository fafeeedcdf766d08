"""Fields for deepinv's solvers: as a prior, as correlated noise, and as a data fidelity. Nothing else imports this module.

deepinv's images are (N, C, H, W), its volumes (N, C, D, H, W). The last axes of a tensor are the field's grid, and what stands
before them must broadcast with the field's batch: channels are independent under a field on (H, W), and correlated under one
on (C, H, W). The other way round, `banded_gmrf.GMRF.posterior` takes a physics of deepinv as its ``operator``.
"""

import torch
from deepinv.optim import DataFidelity, Distance, Prior
from deepinv.physics import Denoising, NoiseModel, Physics
from torch import Tensor
from torch.utils import _pytree as pytree

from .gmrf import GMRF


class _OfField(torch.nn.Module):
    """A module that holds a distribution, and moves it as it would move its own tensors."""

    distribution: GMRF

    def _hold(self, distribution: GMRF) -> None:
        if not isinstance(distribution, GMRF):
            raise TypeError(f"distribution is a {type(distribution).__name__}, expected a GMRF")
        self.distribution = distribution

    def _apply(self, fn, recurse=True):
        self.distribution = pytree.tree_map(fn, self.distribution)
        return super()._apply(fn, recurse)

    def _of_each_image(self, values: Tensor) -> Tensor:
        """Sums over everything but the first axis, of values of each field: (N, *channels) to (N,)."""
        return values.flatten(1).sum(1) if values.ndim > 1 else values

    def _check(self, name: str, image: Tensor) -> None:
        grid = self.distribution.event_shape
        if image.ndim <= len(grid):
            raise ValueError(f"{name} has shape {tuple(image.shape)}, expected (N, ..., {', '.join(map(str, grid))})")

    def _shrink(self, x: Tensor, gamma: float | Tensor) -> Tensor:
        """(I + γΛ)⁻¹ x, which is the posterior's covariance under noise of variance γ, times x / γ.

        The posterior, and with it its factorisation, is kept from one iteration to the next while nothing has changed.
        """
        field = self.distribution
        step = torch.as_tensor(gamma, dtype=torch.float64, device=field.loc.device)
        if not (step > 0).all():
            raise ValueError(f"gamma is {gamma}, expected more than 0")
        coefficients = (field.log_diag, field.off_diag)
        if step.numel() > 1 or any(t.requires_grad for t in (step, *coefficients)):
            posterior = field.posterior(field.loc, noise_variance=step)
        else:
            key = (float(step), *((t.data_ptr(), t._version) for t in coefficients))
            if getattr(self, "_kept", (None,))[0] != key:
                self._kept = key, field.posterior(field.loc.detach(), noise_variance=float(step))
            posterior = self._kept[1]
        return (posterior.covariance_times(x.double()) / step).to(x.dtype)


class GMRFPrior(Prior, _OfField):
    """The negative log density of a GMRF as a deepinv prior, with its exact gradient and proximal operator.

    With deepinv's weight λ = 1 and a fidelity that is a negative log likelihood, a solver's fixed point is the posterior mean.

    Args:
        distribution: a `GMRF`.

    Raises:
        TypeError: not a `GMRF`.
    """

    def __init__(self, distribution: GMRF):
        super().__init__()
        self._hold(distribution)
        self.explicit_prior = True

    def fn(self, x: Tensor, *args, **kwargs) -> Tensor:
        """-log p(x) in nats, the constant included: (N, ..., *grid) to (N,), channels added.

        Raises:
            TypeError, ValueError: as for `GMRF.log_prob`; no axis before the grid.
        """
        self._check("x", x)
        return self._of_each_image(-self.distribution.log_prob(x))

    def grad(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Λ (x - loc), of the shape of x."""
        self._check("x", x)
        return self.distribution.precision_cholesky.matvec(self.distribution.whiten(x))

    def prox(self, x: Tensor, *args, gamma: float | Tensor = 1.0, **kwargs) -> Tensor:
        """The minimiser of γ fn(u) + ½ ‖u - x‖², which is the mean of ``distribution.posterior(x, noise_variance=gamma)``.

        Args:
            x: (N, ..., *grid).
            gamma: more than 0; a number, or a tensor that broadcasts with x.

        Raises:
            ValueError: gamma not more than 0, no axis before the grid, or shapes as for `GMRF.posterior`.
        """
        self._check("x", x)
        self.distribution.check_field("x", x)
        loc = self.distribution.loc
        return loc + self._shrink(x - loc, gamma)


class GMRFNoise(NoiseModel, _OfField):
    """Additive noise that is correlated from pixel to pixel, a sample of a GMRF, as a deepinv noise model.

    Args:
        distribution: a `GMRF` on the grid of the measurements, its mean included.
        rng: generator of the noise; None takes torch's own.

    Raises:
        TypeError: not a `GMRF`.
    """

    def __init__(self, distribution: GMRF, rng: torch.Generator | None = None):
        super().__init__(rng=rng)
        self._hold(distribution)

    def forward(self, x: Tensor, seed: int | None = None, **kwargs) -> Tensor:
        """The measurement (N, ..., *grid) with noise; ``seed`` is that of ``rng``."""
        self._check("x", x)
        self.distribution.check_field("x", x)
        u = self.randn_like(x, seed=seed)
        return x + self.distribution.loc + self.distribution.precision_cholesky.solve(u, transpose=True)


class _WhitenedDistance(Distance, _OfField):
    """½ ‖Lᵀ(y - x - loc)‖² for each image, and its derivatives in x."""

    def __init__(self, distribution: GMRF):
        super().__init__()
        self._hold(distribution)

    def fn(self, x: Tensor, y: Tensor, *args, **kwargs) -> Tensor:
        self._check("y - x", y - x)
        squares = self.distribution.whiten(y - x).square().flatten(-len(self.distribution.event_shape)).sum(-1)
        return self._of_each_image(0.5 * squares)

    def grad(self, x: Tensor, y: Tensor, *args, **kwargs) -> Tensor:
        self._check("y - x", y - x)
        return -self.distribution.precision_cholesky.matvec(self.distribution.whiten(y - x))

    def prox(self, x: Tensor, y: Tensor, *args, gamma: float | Tensor = 1.0, **kwargs) -> Tensor:
        self._check("y - x", y - x)
        centre = y - self.distribution.loc
        return centre + self._shrink(x - centre, gamma)


class GMRFFidelity(DataFidelity):
    """½ ‖Lᵀ(y - A x - loc)‖²: the fidelity to measurements y whose noise is a GMRF, which `GMRFNoise` draws.

    It is deepinv's ``L2`` of whitened residuals, and the negative log likelihood up to a constant.

    Args:
        distribution: a `GMRF`, the noise, on the grid of the measurements.

    Raises:
        TypeError: not a `GMRF`.
    """

    def __init__(self, distribution: GMRF):
        super().__init__()
        self.d = _WhitenedDistance(distribution)

    def prox(self, x: Tensor, y: Tensor, physics: Physics, *args, gamma: float | Tensor = 1.0, **kwargs) -> Tensor:
        """As deepinv's, which descends along gradients; exact where the physics is a denoising one, A = I."""
        if isinstance(physics, Denoising):
            return self.d.prox(x, y, gamma=gamma)
        return super().prox(x, y, physics, *args, gamma=gamma, **kwargs)

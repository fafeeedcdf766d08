"""The distribution for Pyro models. Nothing else imports this module, so Pyro is needed only where it is used."""

from pyro.distributions.torch_distribution import TorchDistributionMixin

from . import gmrf
from .batched import register_pytree


@register_pytree("banded_gmrf.pyro.GMRF")
class GMRF(gmrf.GMRF, TorchDistributionMixin):
    """`banded_gmrf.GMRF` with what `pyro.sample` asks of a distribution: ``mask``, ``to_event``, ``expand_by``, and so on.

    Arguments, shapes and errors are those of `banded_gmrf.GMRF`; event shape = grid, batch axes are independent in plates::

        with pyro.plate("images", len(images)):
            pyro.sample("x", GMRF(mean, cholesky), obs=images)
    """

"""What networks return: a factor, which says so where its graph was lost."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

import banded_gmrf as bg


def predicted_factor(log_diag: Tensor, off_diag: Tensor, stencil: bg.Stencil) -> bg.StencilCholesky:
    """The factor that a network returns; arguments as for `banded_gmrf.StencilCholesky`.

    A `torch.autograd.Function`, as which ``torch.utils.checkpoint`` runs its argument with ``use_reentrant=True``, links to the
    graph the tensors that it returns, alone or in a tuple, and nothing inside of any other object. A factor that it returns
    would be a constant, and the network would not train, without a word: such a factor refuses to be used.
    """
    # Compiled code never runs as part of one. A Function's forward pass is where both modes of differentiation are off.
    inside_function = not (torch.compiler.is_compiling() or torch.is_grad_enabled() or forward_ad._is_fwd_grad_enabled())
    kind = _WithoutGraph if inside_function and not torch.is_inference_mode_enabled() else bg.StencilCholesky
    return kind(log_diag, off_diag, stencil)


def _coefficient(name: str) -> property:
    def get(factor: bg.StencilCholesky) -> Tensor:
        if torch.is_grad_enabled() and forward_ad._is_fwd_grad_enabled():
            raise RuntimeError(
                "a network's factor left the autograd Function that computed it, such as a checkpoint with use_reentrant=True, "
                "and so has no gradient: checkpoint with use_reentrant=False, or return the factor's log_diag and off_diag"
            )
        return factor.__dict__[name]

    return property(get, lambda factor, tensor: factor.__dict__.__setitem__(name, tensor))


class _WithoutGraph(bg.StencilCholesky):
    """Of use inside of the Function that made it, and where no gradient is asked for."""

    _log_diag, _off_diag = _coefficient("_log_diag"), _coefficient("_off_diag")

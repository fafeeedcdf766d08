"""Segmentation with a distribution of whole images of logits: its head, and its likelihood."""

import math

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import banded_gmrf as bg
from banded_gmrf.transformations import require
from gmrf_kernels.checks import accumulate_dtype

from .head import StencilCholeskyHead
from .layers import check_int, check_positive_int, check_stddev, check_stencil, conv, in_own_precision
from .low_rank import LowRankHead


class SegmentationHead(nn.Module):
    """Features (B, C, *grid) to a distribution of logits (*grid, num_classes), which are drawn as whole images.

    Each class has a local field of its own. All share the weights of the low-rank part, which moves whole regions from one
    class to another. With ``num_factors=0`` the distribution is a `banded_gmrf.GMRF`, else a `banded_gmrf.LowRankGMRF`. It is
    trained by `categorical_log_likelihood`, and has the precision of the head's weights, whatever that of the features.

    Source: Monteiro et al., Stochastic Segmentation Networks, NeurIPS 2020, whose covariance is diagonal plus low-rank.

    Args:
        in_channels: the number of channels, C.
        num_classes: at least 2.
        stencil: of the local fields, with as many axes as the grid, 1 or 2.
        num_factors: the number of factors, R.
        initial_stddev: standard deviation of the first logits.

    Raises:
        ValueError: an argument out of range, or features of another shape.
    """

    def __init__(
        self, in_channels: int, num_classes: int, stencil: bg.Stencil, num_factors: int = 8, initial_stddev: float = 1.0
    ):
        super().__init__()
        check_positive_int("in_channels", in_channels)
        check_int("num_classes", num_classes, 2)
        check_stencil(stencil)
        if stencil.ndim > 2:
            raise ValueError("stencil has 3 axes, expected 1 or 2: the classes are an axis of the logits' grid")
        check_int("num_factors", num_factors, 0)
        check_stddev("initial_stddev", initial_stddev)
        ndim = stencil.ndim
        of_classes = bg.Stencil([(*offset, 0) for offset in stencil.offsets], ndim=ndim + 1)
        self.mean = conv(ndim, in_channels, num_classes, kernel_size=1)
        self.local = StencilCholeskyHead(in_channels, of_classes, initial_stddev, out_channels=num_classes)
        self.low_rank = None
        if num_factors:
            self.low_rank = LowRankHead(in_channels, num_factors, ndim, initial_stddev, out_channels=num_classes)

    def forward(self, features: Tensor) -> bg.GMRF | bg.LowRankGMRF:
        """The logits of features (B, C, *grid): batch (B,), events (*grid, num_classes)."""
        factor = self.local(features)
        mean = in_own_precision(self.mean, features).movedim(1, -1)
        # Not validated, as in `StructuredLikelihood`.
        if self.low_rank is None:
            return bg.GMRF(mean, factor, validate_args=False)
        return bg.LowRankGMRF(mean, factor, self.low_rank(features), validate_args=False)


def categorical_log_likelihood(logits: Distribution, labels: Tensor, num_samples: int = 16) -> Tensor:
    """An estimate of log p(labels) = log E Π_i softmax(logits[i])[labels[i]] in nats: log of the mean over samples.

    A lower bound in expectation over the samples, the tighter the more of them. Differentiable in the distribution, by
    reparameterised samples: minus its mean is a loss.

    Source: Monteiro et al., Stochastic Segmentation Networks, NeurIPS 2020, equation 5.

    Args:
        logits: batch (*batch,), events (*grid, num_classes) with at least one grid axis; from a `SegmentationHead`.
        labels: (*batch, *grid), int64, each at least 0 and less than num_classes; negative where there is none.
        num_samples: of the logits.

    Returns:
        (*batch,), in the precision of the samples; float32 if that is float16 or bfloat16.

    Raises:
        TypeError: logits that are not a distribution, or labels that are not int64.
        ValueError: events without a grid axis, labels of another shape, or out of range; ``num_samples`` less than 1.
    """
    check_positive_int("num_samples", num_samples)
    if not isinstance(logits, Distribution):
        raise TypeError(f"logits is a {type(logits).__name__}, expected a distribution of logits")
    if len(logits.event_shape) < 2:
        raise ValueError(
            f"logits has events {tuple(logits.event_shape)}, expected (*grid, num_classes) with at least one grid axis"
        )
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        came = labels.dtype if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise TypeError(f"labels is {came}, expected torch.int64")
    *grid, num_classes = logits.event_shape
    if labels.shape != (*logits.batch_shape, *grid):
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {(*logits.batch_shape, *grid)}")
    require(labels < num_classes, f"labels has entries that are {num_classes} or more, expected classes below that")
    samples = logits.rsample((num_samples,))
    log_probs = samples.to(accumulate_dtype(samples.dtype)).log_softmax(-1)
    index = labels.clamp(min=0).unsqueeze(-1).expand(num_samples, *labels.shape, 1)
    sites = log_probs.gather(-1, index).squeeze(-1).masked_fill(labels < 0, 0)
    return sites.flatten(-len(grid)).sum(-1).logsumexp(0) - math.log(num_samples)

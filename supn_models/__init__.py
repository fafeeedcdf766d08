"""Networks that predict the Cholesky factor of a precision, and the autoencoders whose residuals they explain.

Their output, a factor or a distribution, is seen by what torch wraps around modules and functions: DDP and FSDP2, `torch.vmap`
and ``functional_call``, checkpoints with ``use_reentrant=False``, `torch.compile`, and `torch.export` with a dynamic batch; a
`CovarianceNetwork` also with a dynamic grid, whose coarsest level must keep two sites along each axis. A reentrant checkpoint
of a network is refused where its factor is used. `torch.nn.DataParallel`, `torch.jit` and a backward hook of a whole network
take tensors only, and say so.
"""

from .autoencoder import ConvAutoencoder, ConvDecoder, ConvEncoder
from .codes import InferredCode, infer_code
from .covariance import CovarianceNetwork, LatentCovarianceNetwork
from .head import StencilCholeskyHead
from .likelihood import StructuredLikelihood, importance_log_likelihood, importance_log_weights
from .low_rank import LowRankHead
from .mlp import CovarianceMLP
from .pretrained import from_pretrained, save_pretrained
from .segmentation import SegmentationHead, categorical_log_likelihood
from .vae import ConvVAE

__all__ = [
    "ConvAutoencoder",
    "ConvDecoder",
    "ConvEncoder",
    "ConvVAE",
    "CovarianceMLP",
    "CovarianceNetwork",
    "InferredCode",
    "LatentCovarianceNetwork",
    "LowRankHead",
    "SegmentationHead",
    "StencilCholeskyHead",
    "StructuredLikelihood",
    "categorical_log_likelihood",
    "from_pretrained",
    "importance_log_likelihood",
    "importance_log_weights",
    "infer_code",
    "save_pretrained",
]

"""Networks that predict the Cholesky factor of a precision, and the autoencoders whose residuals they explain."""

from .autoencoder import ConvAutoencoder, ConvDecoder, ConvEncoder
from .covariance import CovarianceNetwork, LatentCovarianceNetwork
from .head import StencilCholeskyHead
from .likelihood import StructuredLikelihood, importance_log_likelihood, importance_log_weights
from .mlp import CovarianceMLP
from .vae import ConvVAE

__all__ = [
    "ConvAutoencoder",
    "ConvDecoder",
    "ConvEncoder",
    "ConvVAE",
    "CovarianceMLP",
    "CovarianceNetwork",
    "LatentCovarianceNetwork",
    "StencilCholeskyHead",
    "StructuredLikelihood",
    "importance_log_likelihood",
    "importance_log_weights",
]

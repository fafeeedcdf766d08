"""Networks that predict the Cholesky factor of a precision, and the autoencoders whose residuals they explain."""

from .autoencoder import ConvAutoencoder, ConvDecoder, ConvEncoder
from .covariance import CovarianceNetwork
from .head import StencilCholeskyHead
from .mlp import CovarianceMLP

__all__ = ["ConvAutoencoder", "ConvDecoder", "ConvEncoder", "CovarianceMLP", "CovarianceNetwork", "StencilCholeskyHead"]

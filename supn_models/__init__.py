"""Networks that predict the Cholesky factor of a precision, and the autoencoders whose residuals they explain."""

from .autoencoder import ConvAutoencoder, ConvDecoder, ConvEncoder
from .covariance import CovarianceNetwork
from .head import StencilCholeskyHead

__all__ = ["ConvAutoencoder", "ConvDecoder", "ConvEncoder", "CovarianceNetwork", "StencilCholeskyHead"]

"""How a field is looked at: marginal variances, the covariance's spectrum, the divergence from another field."""

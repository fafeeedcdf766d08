"""How a factor is built: from covariances, from samples, from a sparse precision, from another factor."""

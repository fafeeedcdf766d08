"""What reaches further than a dense stencil: factors, offsets apart, and a mean that is trained with its covariance."""

"""What is inferred with a field: posteriors given observations, the models of these observations, and the solver."""

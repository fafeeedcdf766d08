"""What Tables 1 and 2 of the SUPN paper report."""

# Means over the paper's test sets: negative log likelihood and KL divergence in nats, Frobenius norm.
PAPER = {
    "splines": {
        "truth": {"nll": 18.65},
        "diagonal": {"nll": 42.64, "kl": 72.06, "norm": 3.81},
        "structured": {"nll": 21.12, "kl": 3.56, "norm": 1.26},
    },
    "ellipses": {
        "truth": {"nll": -286.0},
        "diagonal": {"nll": -149.0, "kl": 707.0, "norm": 1.80},
        "structured": {"nll": -259.0, "kl": 113.0, "norm": 1.06},
    },
}

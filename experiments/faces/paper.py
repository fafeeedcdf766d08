"""What Table 3 of the SUPN paper reports for CelebA, 64 x 64 pixels: mean and deviation over images, in nats."""

PAPER = {
    "VAE": {"bound": (-5378, 931), "nats": (-6079, 936)},
    "AE with structured residual": {"nats": (-8242, 433)},
    "VAE with structured residual": {"bound": (-7753, 1323), "nats": (-8386, 1339)},
}
PIXELS = 64 * 64


def paper_gain(metric: str) -> float:
    """Nats per pixel that the structured residual gained over the diagonal VAE."""
    return (PAPER["VAE"][metric][0] - PAPER["VAE with structured residual"][metric][0]) / PIXELS

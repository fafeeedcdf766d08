"""The real-image experiment of the SUPN paper, section 5.2: structured residuals of autoencoders, on faces or on CIFAR10."""

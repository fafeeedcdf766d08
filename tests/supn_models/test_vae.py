"""The variational autoencoder: shapes, its loss against the densities written out, gradients, and what stays finite."""

import math

import pytest
import torch

from supn_models import ConvVAE

SMALL = {"latent_size": 3, "channels": (4, 6), "kernel_size": 3, "norm": "group"}


@pytest.mark.parametrize(("in_channels", "grid"), [(1, (21,)), (1, (16, 16)), (3, (9, 14)), (1, (1, 1)), (1, (5, 4, 3))])
def test_shapes_and_gradients_on_any_grid(in_channels, grid):
    vae = ConvVAE(grid, in_channels, **SMALL)
    images = torch.rand(2, in_channels, *grid)
    q = vae.posterior(images)
    assert (q.batch_shape, q.event_shape) == ((2,), (3,))
    p = vae.likelihood(q.mean)
    assert (p.batch_shape, p.event_shape) == ((2,), images.shape[1:])
    assert torch.equal(vae.encode(images), q.mean)
    assert torch.equal(vae.decode(q.mean), p.mean)
    assert torch.equal(vae(images), p.mean)
    loss = vae.loss(images)
    assert loss.shape == (2,)
    loss.sum().backward()
    for name, parameter in vae.named_parameters():
        assert torch.count_nonzero(parameter.grad) > 0, name


def test_loss_is_the_negative_bound_with_all_constants():
    vae = ConvVAE((5, 7), **SMALL).double()
    images = torch.rand(4, 1, 5, 7, dtype=torch.float64)
    q = vae.posterior(images)
    noise = torch.randn(4, 3, dtype=torch.float64)
    code = q.mean + q.stddev * noise
    p = vae.likelihood(code)
    reconstruction = 0.5 * ((images - p.mean) ** 2 / p.variance + p.variance.log() + math.log(2 * math.pi)).flatten(1).sum(1)
    divergence = 0.5 * (q.mean**2 + q.variance - 1 - q.variance.log()).sum(1)
    for beta in (0.0, 1.0, 5.0):
        loss = vae.loss(images, beta, noise)
        torch.testing.assert_close(loss, reconstruction + beta * divergence)


@pytest.mark.parametrize("grid", [(64, 64), (32, 32)])
def test_default_layers_are_for_these_sizes(grid):
    vae = ConvVAE(grid)
    widths = [layer.out_channels for layer in vae.encoder.layers if isinstance(layer, torch.nn.Conv2d)]
    assert widths == [32, 64, 128, 256, 512]
    assert vae.encoder.layers[0].kernel_size == (5, 5)
    assert vae.encode(torch.zeros(2, 1, *grid)).shape == (2, 128)
    assert vae.decode(torch.zeros(2, 128)).shape == (2, 1, *grid)


def test_batch_normalisation_of_evaluation_treats_each_image_alone():
    vae = ConvVAE((8, 8), **{**SMALL, "norm": "batch"})
    images = torch.rand(5, 1, 8, 8)
    for _ in range(3):
        vae.loss(images)
    vae.eval()
    # Convolutions of another batch size may add in another order: rounding of float32, a few units of 1e-7.
    torch.testing.assert_close(vae(images)[:1], vae(images[:1]), rtol=1e-5, atol=1e-6)


def test_densities_stay_finite_far_from_training():
    vae = ConvVAE((4, 4), **SMALL)
    images = torch.full((1, 1, 4, 4), 1e6)
    for parameter in vae.decoder.to_image.parameters():
        torch.nn.init.constant_(parameter, -1e6)
    assert torch.isfinite(vae.posterior(images).stddev).all()
    stddev = vae.likelihood(vae.encode(images)).stddev
    assert torch.isfinite(stddev).all()
    assert (stddev > 0).all()


def test_a_bfloat16_network_has_a_float32_likelihood():
    vae = ConvVAE((8, 8), **SMALL)
    images = torch.rand(2, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = vae.loss(images)
    assert loss.dtype == torch.float32
    loss.sum().backward()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ConvVAE((8, 8), in_channels=-1), "in_channels is -1"),
        (lambda: ConvVAE((8, 8), latent_size=-1), "latent_size is -1"),
        (lambda: ConvVAE((8, 8), kernel_size=4), "kernel_size is 4, expected an odd"),
        (lambda: ConvVAE((8, 8), norm="layer"), "norm is 'layer'"),
        (lambda: ConvVAE((8, 8), **SMALL).loss(torch.rand(1, 1, 8, 9)), r"images has grid \(8, 9\)"),
        (lambda: ConvVAE((8, 8), **SMALL).loss(torch.rand(1, 1, 8, 8), noise=torch.zeros(2, 3)), r"noise has shape \(2, 3\)"),
        (lambda: ConvVAE((8, 8), **SMALL).likelihood(torch.rand(1, 4)), r"code has shape \(1, 4\)"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()

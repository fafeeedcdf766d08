"""Networks whose output is a factor or a distribution, inside what torch wraps around modules and functions."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import banded_gmrf as bg
from supn_models import (
    ConvAutoencoder,
    CovarianceMLP,
    CovarianceNetwork,
    LatentCovarianceNetwork,
    LowRankHead,
    SegmentationHead,
    StencilCholeskyHead,
    StructuredLikelihood,
)
from tests.marks import needs_inductor

STENCIL, GRID = bg.Stencil.square(3), (9, 7)
AUTO = torch.export.Dim.AUTO


def covariance_network() -> CovarianceNetwork:
    """A network that has left its first prediction, so that every layer has a gradient."""
    network = CovarianceNetwork(1, STENCIL, channels=4, num_levels=2)
    nn.init.normal_(network.head.conv.weight, std=0.1)
    return network


def structured_likelihood() -> StructuredLikelihood:
    return StructuredLikelihood(ConvAutoencoder(GRID, latent_size=3, channels=(4,)), covariance_network())


def nll(output: bg.StencilCholesky | bg.GMRF, residual: torch.Tensor) -> torch.Tensor:
    q = output if isinstance(output, bg.GMRF) else bg.GMRF(torch.zeros(output.grid), output)
    return -q.log_prob(residual).mean()


def gradients(module: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert all("encoder" in name for name, _ in module.named_parameters() if name not in gradients)  # unused by a likelihood
    return gradients


@pytest.mark.parametrize(("make", "shape"), [(covariance_network, (2, 1, *GRID)), (structured_likelihood, (2, 3))])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_has_the_gradient_of_no_checkpoint(make, shape, use_reentrant):
    """Where it is reentrant, the checkpointed function must end in a tensor."""
    module, inputs, residual = make(), torch.rand(shape, requires_grad=True), torch.randn(2, *GRID)
    expected = gradients(module, nll(module(inputs), residual))
    if use_reentrant:
        loss = checkpoint(lambda x: nll(module(x), residual), inputs, use_reentrant=True)
    else:
        loss = nll(checkpoint(module, inputs, use_reentrant=False), residual)
    actual = gradients(module, loss)
    assert all(torch.count_nonzero(gradient) for gradient in actual.values())
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_reentrant_checkpoint_may_return_the_factors_tensors():
    network, image, residual = covariance_network(), torch.rand(2, 1, *GRID, requires_grad=True), torch.randn(2, *GRID)
    expected = gradients(network, nll(network(image), residual))
    tensors = checkpoint(lambda x: tuple(network(x).coefficients[:2]), image, use_reentrant=True)
    actual = gradients(network, nll(bg.StencilCholesky(*tensors, STENCIL), residual))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_factor_out_of_a_reentrant_checkpoint_is_refused():
    """Its tensors have no graph: the mean would train, the covariance would not, without a word."""
    image = torch.rand(2, 1, *GRID, requires_grad=True)
    mlp = CovarianceMLP(63, GRID, STENCIL)
    for network, inputs in ((covariance_network(), image), (mlp, image), (structured_likelihood(), torch.rand(2, 3))):
        inputs.requires_grad_()
        output = checkpoint(network, inputs, use_reentrant=True)
        for use in (lambda o: nll(o, image[:, 0]), lambda o: o.log_diag, lambda o: o.expand((3, 2)).off_diag):
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                use(output)
        with torch.no_grad():
            assert torch.isfinite(nll(output, image[:, 0]))
    network = covariance_network()
    for mode in (torch.no_grad, torch.inference_mode):  # a factor made without a gradient, as ever
        with mode():
            L = network(image)
        assert type(L) is bg.StencilCholesky
        assert torch.isfinite(L.logdet()).all()


def test_vmap_gives_a_factor_with_the_batch_in_front():
    network, images = covariance_network(), torch.rand(3, 2, 1, *GRID)
    L = torch.vmap(network)(images)
    assert isinstance(L, bg.StencilCholesky)
    assert L.batch_shape == (3, 2)
    together = network(images.flatten(0, 1))
    torch.testing.assert_close(L.log_diag.flatten(0, 1), together.log_diag)
    torch.testing.assert_close(L.off_diag.flatten(0, 1), together.off_diag)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (covariance_network, (2, 1, *GRID)),
        (lambda: CovarianceMLP(63, GRID, STENCIL).eval(), (2, 63)),
        (lambda: LatentCovarianceNetwork(GRID, 3, STENCIL, decoder_channels=(4, 6), channels=4).eval(), (2, 3)),
        (structured_likelihood, (2, 3)),
    ],
)
def test_ensemble_is_one_functional_call(make, shape):
    networks, inputs, residual = [make() for _ in range(3)], torch.rand(shape), torch.randn(2, *GRID)
    parameters, buffers = stack_module_state(networks)

    def one(parameters, buffers):
        return functional_call(networks[0], (parameters, buffers), (inputs,))

    ensemble = torch.vmap(one)(parameters, buffers)
    assert ensemble.batch_shape == (3, 2)
    expected = torch.stack([nll(network(inputs), residual) for network in networks])
    torch.testing.assert_close(torch.vmap(lambda *state: nll(one(*state), residual))(parameters, buffers), expected)
    nll(ensemble, residual).backward()
    nll_of_first = nll(networks[0](inputs), residual) / 3
    for name, gradient in gradients(networks[0], nll_of_first).items():
        torch.testing.assert_close(parameters[name].grad[0], gradient)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_network_takes_another_batch_and_grid(strict):
    network, dynamic_shapes = covariance_network(), ({0: AUTO, 2: AUTO, 3: AUTO},)
    program = torch.export.export(network, (torch.rand(2, 1, *GRID),), dynamic_shapes=dynamic_shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for shape in ((2, 1, *GRID), (1, 1, 16, 12), (5, 1, 3, 32)):
        image = torch.rand(shape)
        actual, expected = loaded(image), network(image)
        assert isinstance(actual, bg.StencilCholesky)
        assert (actual.stencil, actual.batch_shape, actual.grid) == (STENCIL, shape[:1], shape[2:])
        torch.testing.assert_close(actual.log_diag, expected.log_diag)
        torch.testing.assert_close(actual.off_diag, expected.off_diag)
        torch.testing.assert_close(actual.solve(image[:, 0]), expected.solve(image[:, 0]))


@pytest.mark.parametrize(("num_factors", "strict"), [(0, False), (0, True), (2, False), (2, True)])
def test_exported_segmentation_takes_another_batch_and_grid(num_factors, strict):
    head, dynamic_shapes = SegmentationHead(4, 3, STENCIL, num_factors), ({0: AUTO, 2: AUTO, 3: AUTO},)
    program = torch.export.export(head, (torch.rand(2, 4, *GRID),), dynamic_shapes=dynamic_shapes, strict=strict)
    for shape in ((2, 4, *GRID), (1, 4, 16, 12)):
        features = torch.rand(shape)
        actual, expected = program.module()(features), head(features)
        assert type(actual) is type(expected)
        x = torch.randn(shape[0], *shape[2:], 3)
        torch.testing.assert_close(actual.log_prob(x), expected.log_prob(x))


@pytest.mark.parametrize(
    ("make", "channels"),
    [
        (covariance_network, 1),
        (lambda: StencilCholeskyHead(4, STENCIL), 4),
        (lambda: LowRankHead(4, 2), 4),
        (lambda: SegmentationHead(4, 3, STENCIL, 2), 4),
    ],
)
def test_a_network_without_storage_has_shapes_and_takes_weights(make, channels):
    """On the device "meta": what a forward pass gives is known before there is memory for the weights."""
    network, features = make(), torch.rand(2, channels, *GRID)
    with torch.device("meta"):
        empty = make()
        known = tree_leaves(empty(torch.rand(2, channels, *GRID)))
        make().load_state_dict(empty.state_dict())
    make().to("meta").load_state_dict({name: tensor.to("meta") for name, tensor in network.state_dict().items()})
    expected = tree_leaves(network(features))
    assert [(tensor.shape, tensor.dtype, tensor.is_meta) for tensor in known] == [(t.shape, t.dtype, True) for t in expected]
    empty.load_state_dict(network.state_dict(), assign=True)
    torch.testing.assert_close(tree_leaves(empty(features)), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: CovarianceMLP(63, GRID, STENCIL).eval(), (2, 63)),
        (lambda: LatentCovarianceNetwork(GRID, 3, STENCIL, decoder_channels=(4, 6), channels=4).eval(), (2, 3)),
        (structured_likelihood, (2, 3)),
    ],
)
def test_exported_networks_of_one_grid_take_another_batch(make, shape):
    module = make()
    program = torch.export.export(module, (torch.rand(shape),), dynamic_shapes=({0: AUTO},))
    inputs, x = torch.rand(5, *shape[1:]), torch.randn(5, *GRID)
    torch.testing.assert_close(nll(program.module()(inputs), x), nll(module(inputs), x))


def test_compiled_network_gives_a_factor(keep_torch_defaults):
    network, image, residual = covariance_network(), torch.rand(2, 1, *GRID), torch.randn(2, *GRID)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    expected = gradients(network, nll(network(image), residual))
    torch.testing.assert_close(gradients(network, nll(compiled(image), residual)), expected)
    with torch.no_grad():
        assert type(compiled(image)) is bg.StencilCholesky


@needs_inductor
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, when inductor is first imported
def test_every_layer_of_a_network_compiled_by_inductor_has_its_gradient(keep_torch_defaults):
    """Of torch's own interpolation, layers below it got a gradient of 0: see `supn_models.upsampling`."""
    network, image, weights = covariance_network(), torch.rand(2, 1, 16, 16), torch.randn(2, 16, 16)
    expected, actual = (
        gradients(network, (forward(image).log_diag * weights).sum()) for forward in (network, torch.compile(network))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # float32, and gradients of up to 10


@pytest.mark.parametrize("grids", [((5,), (3,)), ((7, 1), (4, 1)), ((3, 6, 5), (2, 3, 3))])
def test_interpolation_of_compiled_code_is_torchs(grids):
    fine, coarse = grids
    x = torch.rand(2, 3, *coarse, dtype=torch.float64, requires_grad=True)
    upsample, adjoint = torch.ops.supn_models.upsample.default, torch.ops.supn_models.upsample_adjoint.default
    mode = ("linear", "bilinear", "trilinear")[len(fine) - 1]
    assert torch.equal(upsample(x, fine), nn.functional.interpolate(x, size=fine, mode=mode))
    torch.autograd.gradcheck(lambda x: upsample(x, fine), x)
    torch.autograd.gradgradcheck(lambda x: upsample(x, fine), x)
    torch.library.opcheck(upsample, (x, fine))
    torch.library.opcheck(adjoint, (upsample(x, fine).detach().requires_grad_(), coarse))
    many = torch.rand(2, 4, 3, *coarse)
    torch.testing.assert_close(
        torch.vmap(lambda x: upsample(x, fine), 1, 1)(many), torch.stack([upsample(x, fine) for x in many.unbind(1)], 1)
    )


def test_backward_hook_of_a_module_warns_that_it_is_not_called():
    network, called = covariance_network(), []
    network.register_full_backward_hook(lambda *_: called.append("network"))
    network.head.conv.register_full_backward_hook(lambda *_: called.append("head.conv"))
    with pytest.warns(UserWarning, match="module output should be a Tensor or a tuple of Tensors"):
        L = network(torch.rand(1, 1, *GRID))
    nll(L, torch.randn(1, *GRID)).backward()
    assert called == ["head.conv"]


def test_forward_hook_sees_and_replaces_the_factor():
    network, image = covariance_network(), torch.rand(2, 1, *GRID)
    network.register_forward_hook(lambda module, args, L: L.to(torch.float64))
    assert network(image).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_trace_refuses():
    with pytest.raises(RuntimeError, match="Only tensors"):
        torch.jit.trace(covariance_network(), torch.rand(1, 1, *GRID))


def test_copies_and_files_are_the_network():
    network, image, file = covariance_network(), torch.rand(1, 1, *GRID), io.BytesIO()
    L = network(image).detach()
    torch.save({"config": network.config, "state": network.state_dict(), "factor": L}, file)
    file.seek(0)
    saved = torch.load(file)  # weights_only=True is its default
    loaded = CovarianceNetwork.from_config(saved["config"])
    loaded.load_state_dict(saved["state"])
    for factor in (copy.deepcopy(network)(image), loaded(image), saved["factor"]):
        assert factor.stencil == STENCIL
        assert torch.equal(factor.log_diag, L.log_diag)
        assert torch.equal(factor.off_diag, L.off_diag)

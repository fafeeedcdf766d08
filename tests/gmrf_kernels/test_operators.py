"""One suite for every backend: values, derivatives of every order, vmap, fake tensors and compilation of the operators."""

import itertools
import math

import numpy as np
import pytest
import torch

import gmrf_kernels
from tests.dense import exists, random_factor
from tests.gmrf_kernels.operators import (
    CASES,
    HALF,
    NDIM,
    OFFSETS,
    OPERATORS,
    SMALL,
    arguments,
    assert_close,
    assert_same,
    assert_same_when_expanded,
    assert_small_backward_error,
    backward_error,
    call,
    dense,
    operator,
    sliced,
    strided,
    tensors,
    with_tensors,
)
from tests.marks import needs_inductor

# Samples, images: one; several; an odd number, which a backend that takes images in pairs must not trip over.
SIZES = [(1, 1), (3, 2), (1, 3)]


def named(value):
    """The name of a dtype or a grid in the name of a test."""
    return str(value).removeprefix("torch.")


# --- values ---


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("dtype", "stencil", "grid"), CASES, ids=named)
def test_values_equal_dense_linear_algebra(name, dtype, stencil, grid, device, poisoned_memory):
    for samples, batch in SIZES:
        args = arguments(name, OFFSETS[stencil], grid, samples, batch, dtype, device)
        for actual, expected in zip(call(name, args), dense(name, args), strict=True):
            assert actual.device.type == device
            assert_close(actual, expected)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", HALF, ids=named)
def test_dtypes_of_results(name, dtype, device):
    args = arguments(name, OFFSETS["3x3"], (2, 3), dtype=dtype, device=device)
    expected = {"outer": [torch.float32, dtype], "nll": [torch.float32] * 2, "nll_factor_grad": [torch.float32, dtype]}
    assert [r.dtype for r in call(name, args)] == expected.get(name, [torch.float32])


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("samples", "batch"), [(0, 2), (2, 0), (0, 0)])
def test_empty_batches_and_no_samples(name, samples, batch, device, poisoned_memory):
    for stencil, grid in SMALL:
        args = arguments(name, OFFSETS[stencil], grid, samples, batch, device=device)
        inputs = [t.requires_grad_() for t in tensors(args)]
        results = call(name, args)
        # Sums over no samples are 0, not missing.
        for actual, expected in zip(results, dense(name, args), strict=True):
            assert torch.equal(actual.cpu(), expected)
        gradients = torch.autograd.grad(sum(r.sum() for r in results), inputs, allow_unused=True)
        for gradient, tensor in zip(gradients, inputs, strict=True):
            assert gradient is None or torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("stencil", ["far line", "5x5", "volume"])
def test_random_cases_equal_dense_likelihoods_and_gradients(stencil, device):
    """Value and gradients within 1e-10 of the largest entry, on 167 random grids and batches for each of three stencils."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(167):
        grid = [
            int(torch.randint(1, {1: 30, 2: 8, 3: 5}[NDIM[stencil]], (), generator=generator)) for _ in range(NDIM[stencil])
        ]
        samples, batch = torch.randint(1, 3, (2,), generator=generator).tolist()
        args = arguments("nll", OFFSETS[stencil], grid, samples, batch, device=device, nan_outside=False)
        inputs = [t.requires_grad_() for t in tensors(args)]
        value, whitened = call("nll", args)
        residual, log_diag, off_diag = (t.detach().cpu() for t in inputs)
        expected_value, expected_whitened = dense("nll", args)
        ones = torch.ones(samples, batch, dtype=torch.float64)
        factor = dense("nll_factor_grad", [ones, residual, expected_whitened, log_diag, args[3], torch.float64])
        (towards_residual,) = dense("matvec", [log_diag, off_diag, expected_whitened, args[3], False, True])
        actual = (value, whitened, *torch.autograd.grad(value.sum(), inputs))
        for a, e in zip(actual, (expected_value, expected_whitened, towards_residual, *factor), strict=True):
            assert (a.detach().cpu() - e).abs().max() <= 1e-10 * e.abs().max() if e.numel() else a.numel() == 0


# --- entries that do not exist ---


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("stencil", "grid"), [*SMALL, ("5x5", (3, 70)), ("far line", (3,))], ids=named)
def test_entries_that_do_not_exist_are_zero_in_results_and_gradients(name, stencil, grid, device, poisoned_memory):
    offsets = OFFSETS[stencil]
    outside = ~exists(offsets, grid)
    args = arguments(name, offsets, grid, device=device)
    inputs = [t.requires_grad_() for t in tensors(args)]
    results = call(name, args)
    gradients = torch.autograd.grad([r.square().sum() for r in results], inputs)
    factor_shaped = [t for t in (*results, *gradients) if t.shape == (2, len(offsets), *grid)]
    assert factor_shaped
    for t in factor_shaped:
        assert (t.cpu()[:, outside] == 0).all()
        assert (t.cpu()[:, ~outside] != 0).all()
    assert all(t.isfinite().all() for t in (*results, *gradients))


# --- strides ---


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("layout", [strided, sliced])
@pytest.mark.parametrize(("stencil", "grid"), [*SMALL, ("5x5", (3, 40))], ids=named)
def test_strides_do_not_matter(name, layout, stencil, grid, device):
    args = arguments(name, OFFSETS[stencil], grid, device=device)
    # A gradient of a result may come in any strides, too.
    contiguous = [t.requires_grad_() for t in tensors(args)]
    strided = [layout(t.detach()).requires_grad_() for t in contiguous]
    expected, actual = call(name, args), call(name, with_tensors(args, strided))
    assert_same(actual, expected)
    cotangents = [torch.randn_like(r) for r in expected]
    # Torch's own sums add in an order that depends on the strides.
    torch.testing.assert_close(
        torch.autograd.grad(actual, strided, [layout(c) for c in cotangents]),
        torch.autograd.grad(expected, contiguous, cotangents),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_expanded_arguments(name, device):
    """Strides of 0: one sample for several, one image for several, one number for a grid."""
    args = arguments(name, OFFSETS["5x5"], (3, 5), samples=4, batch=3, device=device, nan_outside=False)
    for axis in (0, 1, -1):
        assert_same_when_expanded(name, args, axis)


def test_public_functions_take_slices_of_a_network_and_transposed_grids(device):
    offsets = OFFSETS["5x5"]
    head = (0.2 * torch.randn(2, 2 + len(offsets), 7, 5, dtype=torch.float64)).to(device).requires_grad_()
    image = torch.randn(2, 7, 5, dtype=torch.float64).to(device).requires_grad_()

    def score(head, image, copy):
        log_diag, off_diag, x = head[:, 1].mT, head[:, 2:].mT, image.mT
        if copy:
            log_diag, off_diag, x = log_diag.contiguous(), off_diag.contiguous(), x.contiguous()
        diag = log_diag.exp()
        y = gmrf_kernels.solve(diag, off_diag, x, offsets, 2, transpose=True)
        z = gmrf_kernels.matvec(diag, off_diag, x, offsets, 2)
        o = gmrf_kernels.outer(x, y, offsets, 2)
        nll = gmrf_kernels.negative_log_likelihood(x, log_diag, off_diag, offsets, 2)
        return sum((t.square().sum() for t in (y, z, *o)), nll.sum())

    scores = [score(head, image, copy) for copy in (False, True)]
    assert_same(scores[:1], scores[1:])
    assert_same(*(torch.autograd.grad(s, (head, image)) for s in scores))


@pytest.mark.parametrize("dtype", HALF, ids=named)
def test_half_off_diagonals_beside_a_float32_diagonal(dtype, device):
    """What networks give under autocast where the log-diagonal is kept accurate. Each gradient has its tensor's dtype."""
    offsets = OFFSETS["3x3"]
    _, log_diag, off_diag, _ = arguments("nll", offsets, (3, 4), dtype=dtype, device=device)
    x = torch.randn(3, 2, 3, 4).to(device)

    def everything(off_diag):
        inputs = [t.detach().clone().requires_grad_() for t in (log_diag, off_diag)]
        results = (
            gmrf_kernels.matvec(*inputs, x, offsets, 2, log=True),
            gmrf_kernels.solve(*inputs, x, offsets, 2, log=True),
            gmrf_kernels.solve(inputs[0].exp(), inputs[1], x, offsets, 2, transpose=True),
            gmrf_kernels.negative_log_likelihood(x, *inputs, offsets, 2),
        )
        return results, torch.autograd.grad(results[-1].sum(), inputs)

    results, gradients = everything(off_diag)
    expected, expected_gradients = everything(off_diag.float())
    torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-6)
    assert [g.dtype for g in gradients] == [torch.float32, dtype]
    torch.testing.assert_close(gradients[0], expected_gradients[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[1], expected_gradients[1].to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


# --- derivatives ---


def _differentiable(name, stencil, grid, device):
    """The operator as a function of its tensors alone, and these."""
    batch = 1 if stencil == "5x5" else 2  # the checks step along every coefficient, and this one has many
    args = arguments(name, OFFSETS[stencil], grid, samples=2, batch=batch, device=device)
    inputs = tuple(t.requires_grad_() for t in tensors(args))
    return lambda *new: call(name, with_tensors(args, new)), inputs


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("stencil", "grid"), SMALL, ids=named)
def test_gradcheck(name, stencil, grid, device):
    function, inputs = _differentiable(name, stencil, grid, device)
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    ("stencil", "grid"), [("far line", (7,)), ("diagonal", (1, 2)), ("5x5", (2, 3)), ("volume", (1, 2, 2))], ids=named
)
def test_gradgradcheck(name, stencil, grid, device):
    function, inputs = _differentiable(name, stencil, grid, device)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in forward mode
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("stencil", "grid"), SMALL, ids=named)
def test_gradcheck_in_forward_mode(name, stencil, grid, device):
    """Along random directions: `test_transformations` compares every entry with dense linear algebra."""
    function, inputs = _differentiable(name, stencil, grid, device)
    assert torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_batched_forward_grad=True, check_backward_ad=False, fast_mode=True
    )
    options = {"check_rev_over_rev": False, "check_undefined_grad": False}  # `test_gradgradcheck` has these
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True, **options)


@pytest.mark.parametrize("name", OPERATORS)
def test_gradient_of_each_input_alone(name, device):
    """A backward that skips what is not asked for gives the same bits as the one that computes everything."""
    function, inputs = _differentiable(name, "5x5", (3, 4), device)
    results = function(*inputs)
    cotangents = [torch.randn_like(r) for r in results]
    everything = torch.autograd.grad(results, inputs, cotangents)
    for i, expected in enumerate(everything):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
        assert_same(torch.autograd.grad(function(*alone), alone[i], cotangents), [expected])


@pytest.mark.parametrize("name", OPERATORS)
def test_third_derivatives(name, device):
    """The derivative of a Hessian-vector product along a direction, against a central difference of it."""
    function, inputs = _differentiable(name, "far line", (8,), device)
    # The derivative at a NaN is a NaN, by the difference.
    inputs = [torch.nan_to_num(t.detach(), nan=0.1) for t in inputs]
    directions = [torch.randn_like(t) for t in inputs]

    def along(f):
        """The derivative of the scalar f along the directions, as a scalar function."""

        def derivative(*point):
            point = [p if p.requires_grad else p.detach().requires_grad_() for p in point]
            gradients = torch.autograd.grad(f(*point), point, create_graph=True)
            return sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

        return derivative

    second = along(along(lambda *point: sum(r.pow(3).sum() for r in function(*point))))
    step = 1e-5
    moved = [[(t + sign * step * d) for t, d in zip(inputs, directions, strict=True)] for sign in (1, -1)]
    difference = (second(*moved[0]) - second(*moved[1])) / (2 * step)
    # The difference is exact to step² times a fifth derivative.
    torch.testing.assert_close(along(second)(*inputs), difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_batched_cotangents(name, device):
    function, inputs = _differentiable(name, "5x5", (3, 4), device)
    results = function(*inputs)
    cotangents = [torch.randn(5, *r.shape, dtype=r.dtype).to(device) for r in results]
    batched = torch.autograd.grad(results, inputs, cotangents, is_grads_batched=True, retain_graph=True)
    for i in range(5):
        one = torch.autograd.grad(results, inputs, [c[i] for c in cotangents], retain_graph=True)
        torch.testing.assert_close([b[i] for b in batched], list(one), rtol=1e-13, atol=1e-13)


# --- vmap ---


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("samples", "batch"), [(2, 3), (1, 1), (0, 2), (2, 0)])
def test_vmap_over_every_combination_of_operands(name, samples, batch, device):
    size = 4
    runs = [arguments(name, OFFSETS["5x5"], (3, 4), samples, batch, device=device, nan_outside=False) for _ in range(size)]
    count = len(tensors(runs[0]))
    for mapped in itertools.product([False, True], repeat=count):
        if not any(mapped):
            continue
        # Every operand is mapped along an axis of its own choice, the last of some among them.
        in_dims = tuple((i + 1) % (runs[0][i].ndim + 1) if m else None for i, m in enumerate(mapped))
        operands = [
            torch.stack([run[i] for run in runs], dim) if dim is not None else runs[0][i] for i, dim in enumerate(in_dims)
        ]
        actual = torch.vmap(lambda *new: call(name, with_tensors(runs[0], new)), in_dims)(*operands)
        loop = [call(name, with_tensors(runs[0], [(run if m else runs[0])[i] for i, m in enumerate(mapped)])) for run in runs]
        for a, *expected in zip(actual, *loop, strict=True):
            torch.testing.assert_close(a, torch.stack(expected), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", OPERATORS)
def test_nested_vmap(name, device):
    args = arguments(name, OFFSETS["volume"], (2, 2, 3), device=device, nan_outside=False)
    first, *rest = tensors(args)
    stacked = torch.stack([torch.stack([first * (i + 1) + j for j in range(3)]) for i in range(2)])
    pairs = [torch.stack([t, t + 1]) for t in rest]

    def function(*new):
        return call(name, with_tensors(args, new))

    inner = torch.vmap(function, (0, *[None] * len(rest)))
    actual = torch.vmap(inner)(stacked, *pairs)
    for i, j in itertools.product(range(2), range(3)):
        expected = function(stacked[i, j], *(p[i] for p in pairs))
        torch.testing.assert_close([a[i, j] for a in actual], list(expected), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_through_vmap(name, device):
    """Of everything, twice: the backward operators meet mapped tensors, too."""
    function, inputs = _differentiable(name, "5x5", (3, 4), device)
    stacked = [torch.stack([t.detach().nan_to_num(), t.detach().nan_to_num(), 1 - t.detach().nan_to_num()]) for t in inputs]

    def twice(f):
        point = [s.clone().requires_grad_() for s in stacked]
        first = torch.autograd.grad(sum(r.pow(3).sum() for r in f(*point)), point, create_graph=True)
        return first, torch.autograd.grad(sum(g.pow(2).sum() for g in first), point)

    def loop(*point):
        return [torch.stack(r) for r in zip(*(function(*(p[i] for p in point)) for i in range(3)), strict=True)]

    torch.testing.assert_close(twice(torch.vmap(function)), twice(loop), rtol=1e-11, atol=1e-11)


# --- registration and compilation ---


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    ("dtype", "stencil", "grid"),
    [(torch.float64, "5x5", (3, 4)), (torch.float64, "diagonal", (2, 3)), (torch.bfloat16, "3x3", (2, 3))],
    ids=named,
)
def test_opcheck(name, dtype, stencil, grid, device):
    args = arguments(name, OFFSETS[stencil], grid, dtype=dtype, device=device, nan_outside=False)
    for t in tensors(args):
        t.requires_grad_()
    torch.library.opcheck(operator(name), args)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("dtype", "stencil"), [(torch.float64, "5x5"), (torch.float16, "3x3")], ids=named)
def test_fake_results_have_the_layout_of_real_ones(name, dtype, stencil, device):
    for samples, batch in [(3, 2), (0, 2), (2, 0)]:
        args = arguments(name, OFFSETS[stencil], (3, 4), samples, batch, dtype, device)
        meta = [strided(t).to("meta") for t in tensors(args)]
        for real, fake in zip(call(name, args), call(name, with_tensors(args, meta)), strict=True):
            assert fake.device.type == "meta"
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
            assert fake.stride() == real.stride() or real.numel() == 0


def _everything(log_diag, off_diag, x):
    """Every public function, vectors that share a factor and vectors that do not."""
    offsets, ndim, diag = OFFSETS["5x5"], 2, log_diag.exp()
    y = gmrf_kernels.solve(diag, off_diag, x, offsets, ndim)
    z = gmrf_kernels.solve(diag, off_diag, x[0], offsets, ndim, transpose=True)
    return (
        y,
        z,
        gmrf_kernels.matvec(diag, off_diag, x, offsets, ndim),
        gmrf_kernels.matvec(diag, off_diag, z, offsets, ndim, transpose=True),
        *gmrf_kernels.outer(x, y, offsets, ndim, sample_ndim=1),
        gmrf_kernels.negative_log_likelihood(x, log_diag, off_diag, offsets, ndim),
    )


PUBLIC = {
    "matvec": lambda d, o, x: gmrf_kernels.matvec(d.exp(), o, x, OFFSETS["5x5"], 2),
    "matvec transposed": lambda d, o, x: gmrf_kernels.matvec(d.exp(), o, x, OFFSETS["5x5"], 2, transpose=True),
    "solve": lambda d, o, x: gmrf_kernels.solve(d.exp(), o, x, OFFSETS["5x5"], 2),
    "solve transposed": lambda d, o, x: gmrf_kernels.solve(d.exp(), o, x, OFFSETS["5x5"], 2, transpose=True),
    "outer": lambda d, o, x: gmrf_kernels.outer(x, x * d, OFFSETS["5x5"], 2, sample_ndim=1),
    "nll": lambda d, o, x: gmrf_kernels.negative_log_likelihood(x, d, o, OFFSETS["5x5"], 2),
}


def _assert_compiled_equals_eager(function, device, grids=((3, 4),), **options):
    compiled = torch.compile(function, fullgraph=True, **options)
    for grid in grids:
        _, log_diag, off_diag, _ = arguments("nll", OFFSETS["5x5"], grid, device=device, nan_outside=False)
        x = torch.randn(3, 2, *grid, dtype=torch.float64).to(device)
        inputs = [t.requires_grad_() for t in (log_diag, off_diag, x)]

        def values_and_gradients(function, inputs=inputs):
            values = function(*inputs)
            values = (values,) if isinstance(values, torch.Tensor) else values
            return values, torch.autograd.grad(sum(v.square().sum() for v in values), inputs, allow_unused=True)

        # The code around the operators may be fused, which rounds otherwise.
        torch.testing.assert_close(values_and_gradients(compiled), values_and_gradients(function), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PUBLIC)
def test_compiled(name, device, keep_torch_defaults):
    _assert_compiled_equals_eager(PUBLIC[name], device, backend="aot_eager")


def test_compiled_for_any_grid(device, keep_torch_defaults):
    _assert_compiled_equals_eager(_everything, device, [(3, 4), (5, 3), (2, 7)], backend="aot_eager", dynamic=True)


@needs_inductor
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, when inductor is first imported
def test_compiled_by_inductor(device, keep_torch_defaults):
    _assert_compiled_equals_eager(_everything, device)


# --- accuracy ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=named)
@pytest.mark.parametrize("operation", ["nll", "matvec", "solve", "gradient"])
def test_the_exponential_of_the_diagonal_in_its_whole_range(operation, dtype, device):
    """With no neighbours, ones are multiplied by exp(log_diag), or divided, wherever the result is in the normal range."""
    finfo = torch.finfo(dtype)
    log_diag = torch.linspace(math.log(finfo.tiny), math.log(finfo.max), 2000, dtype=torch.float64)
    # One step from the ends, where the rounding of the logarithm itself decides.
    log_diag = log_diag[1:-1].to(dtype).reshape(1, 37, 54)
    if operation == "solve":  # 1 / exp(log_diag) is to be in the range, too
        log_diag = log_diag.clamp(-math.log(finfo.max) + 1, -math.log(finfo.tiny) - 1)
    ones, none = torch.ones_like(log_diag)[None].to(device), log_diag.new_empty(1, 0, 37, 54).to(device)
    given = log_diag.to(device)
    if operation == "nll":
        actual = torch.ops.gmrf_kernels.nll(ones, given, none, [])[1]
    elif operation == "gradient":
        # exp(log_diag) - 1, whose second term vanishes where the exponential is large.
        actual, _ = torch.ops.gmrf_kernels.nll_factor_grad(ones[:, :, 0, 0], ones, ones, given, [], dtype)
        actual, log_diag = actual[given > 40], log_diag[log_diag > 40]
    else:
        actual = getattr(torch.ops.gmrf_kernels, operation)(given, none, ones, [], False, True)
    # Correctly rounded by numpy's wider type; torch's own functions lose several roundings at the ends.
    exact = np.exp(log_diag.numpy().astype(np.longdouble) * (-1 if operation == "solve" else 1))
    expected = torch.from_numpy(exact.astype(log_diag.numpy().dtype))
    # Two roundings: of the exponential in half an ulp, and of what a library's function may lose beyond it; then of a quotient.
    rtol = (3 if operation == "solve" else 2) * finfo.eps
    torch.testing.assert_close(actual.cpu().reshape(expected.shape), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=named)
def test_the_exponential_of_the_diagonal_beyond_its_range(dtype, device):
    """Gradual underflow to 0, and overflow to infinity."""
    finfo = torch.finfo(dtype)
    low, high = math.log(finfo.smallest_normal * finfo.eps), math.log(finfo.max)
    log_diag = torch.tensor([low - 2, low - 40, -1e4, high + 0.01, high + 40, 1e4], dtype=dtype)
    below = torch.linspace(low, math.log(finfo.tiny), 200, dtype=torch.float64).to(dtype)
    log_diag = torch.cat([log_diag, below]).reshape(1, -1)
    ones, none = torch.ones_like(log_diag)[None], log_diag.new_empty(1, 0, log_diag.shape[-1])
    product = torch.ops.gmrf_kernels.matvec(log_diag.to(device), none.to(device), ones.to(device), [], False, True)
    product = product.cpu().flatten()
    assert (product[:3] == 0).all()
    assert product[3:6].isposinf().all()
    # A denormal number is a multiple of the smallest.
    exact = np.exp(below.numpy().astype(np.longdouble))
    expected = torch.from_numpy(exact.astype(below.numpy().dtype))
    torch.testing.assert_close(product[6:], expected, rtol=0, atol=2 * finfo.smallest_normal * finfo.eps)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("dtype", "stencil", "grid"),
    [
        *((torch.float64, name, grid) for name, grid in (("far line", (70,)), ("5x5", (6, 40)), ("volume", (3, 4, 30)))),
        *((torch.float32, name, grid) for name, grid in (("far line", (45,)), ("5x5", (4, 40)), ("volume", (2, 3, 40)))),
        (torch.float16, "3x3", (3, 40)),
        (torch.bfloat16, "3x3", (3, 40)),
    ],
    ids=named,
)
def test_backward_error_of_a_solve_whatever_the_condition(transpose, dtype, stencil, grid, device):
    assert_small_backward_error(OFFSETS[stencil], grid, dtype, transpose, device)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("dtype", "stencil", "grid", "k"), [(torch.float32, "5x5", (3, 40), 0), (torch.float64, "far line", (70,), 1)]
)
@pytest.mark.parametrize(
    ("diag_power", "entry_power", "other_power", "b"),
    [(83, -66, 100, 0.0), (-83, 66, -100, 0.0), (-33, 0, 100, 1.0)],
    ids=["entry / diagonal underflows", "entry / diagonal overflows", "b / diagonal overflows"],
)
def test_backward_error_of_a_solve_whose_quotients_leave_the_range(
    transpose, dtype, stencil, grid, k, diag_power, entry_power, other_power, b, device
):
    """One site has a diagonal and an entry whose solution is in range while a quotient of the two, or of b, is not.

    Powers of two are given for float32 and scaled to the exponents of float64.
    """
    offsets = OFFSETS[stencil]
    scale = round(math.log2(math.log2(torch.finfo(dtype).max)) - 7)
    diag_value, entry, other = (2.0 ** (power << scale) for power in (diag_power, entry_power, other_power))
    entry *= 1 if b else 4 / 3  # a quotient that underflows then loses digits
    log_diag, off_diag = random_factor(offsets, grid, (2,), dtype, nan_outside=False)
    diag, rhs = log_diag.exp(), torch.randn(1, 2, *grid, dtype=dtype)
    # In the second image one site depends on nothing but its neighbour, whose solution is `other`.
    here = (*(n // 2 for n in grid[:-1]), 20)
    there = tuple(i + o for i, o in zip(here, offsets[k], strict=True))
    site, neighbour = (here, there) if transpose else (there, here)
    diag[1], off_diag[1] = 1, 0
    diag[1][site], off_diag[1, k][here] = diag_value, entry
    rhs[0, 1][neighbour] = other
    rhs[0, 1][site] = b * other * (1 + 2 * torch.finfo(dtype).eps)
    diag, off_diag, rhs = diag.to(device), off_diag.to(device), rhs.to(device)
    flat = [component for offset in offsets for component in offset]
    x = torch.ops.gmrf_kernels.solve(diag, off_diag, rhs, flat, transpose, False)
    assert x.isfinite().all()
    assert x[0, 1][site] != 0
    limit = (len(offsets) + 3) * torch.finfo(dtype).eps
    for i in range(2):
        assert backward_error(diag[i], off_diag[i], x[0, i], rhs[0, i], offsets, transpose) <= limit

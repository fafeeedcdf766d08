"""Every transformation of torch through every operator, on every backend, against dense linear algebra differentiated by torch.

`test_operators` has the checks by finite differences.
"""

import functools
import gc
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import gmrf_kernels
from tests.dense import exists
from tests.gmrf_kernels.operators import (
    OFFSETS,
    OPERATORS,
    arguments,
    assert_close,
    assert_same,
    call,
    dense_function,
    tensors,
    with_tensors,
)

# Torch's own: the first time that it differentiates in forward mode, and in `linearize`.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning", "ignore:Attempted to insert a get_attr Node:UserWarning"
)

GRID = (2, 3)


def case(name, device, stencil="5x5", grid=GRID, **options):
    """A scalar function of an operator's tensors, the same by dense linear algebra, and the tensors.

    Entries that do not exist are NaN: no derivative may see them.
    """
    args = arguments(name, OFFSETS[stencil], grid, samples=2, device=device, **options)

    def score(results):
        return sum((r.pow(3) + r).sum() for r in results)

    by_dense = dense_function(name, args)
    return (
        lambda *new: score(call(name, with_tensors(args, new))),
        lambda *new: score(by_dense(*new)),
        tuple(tensors(args)),
    )


def directions(point, nan_outside=False):
    """Random tangents. The entries of a factor that do not exist have them, too: NaN, with ``nan_outside``."""
    tangents = tuple(torch.randn(t.shape, dtype=torch.float64).to(t) for t in point)
    if nan_outside:
        tangents = tuple(torch.where(t.isnan(), t, d) for t, d in zip(point, tangents, strict=True))
    return tangents


def dense_gradient(f, point):
    point = [t.detach().cpu().double().requires_grad_() for t in point]
    return torch.autograd.grad(f(*point), point)


def assert_near(actual, expected):
    """Sums of hundreds of terms that reach some hundreds, in float64."""
    torch.testing.assert_close([a.detach().cpu() for a in actual], [e.detach() for e in expected], rtol=1e-10, atol=1e-9)


# --- first derivatives ---


def _gradients(f, point):
    argnums = tuple(range(len(point)))
    unit = functools.partial(torch.ones, (), dtype=torch.float64, device=point[0].device)
    return {
        "grad": lambda: grad(f, argnums)(*point),
        "vjp": lambda: vjp(f, *point)[1](unit()),
        "vjp of one and constants": lambda: [
            vjp(lambda t, i=i: f(*point[:i], t, *point[i + 1 :]), point[i])[1](unit())[0] for i in argnums
        ],
        "jacrev": lambda: jacrev(f, argnums)(*point),
        "jacfwd": lambda: jacfwd(f, argnums)(*point),
        "jacobian": lambda: torch.autograd.functional.jacobian(f, point, strategy="forward-mode", vectorize=True),
        "is_grads_batched": lambda: _batched_gradients(f, point),
    }


def _batched_gradients(f, point):
    point = [t.clone().requires_grad_() for t in point]
    ones = torch.ones(2, dtype=torch.float64, device=point[0].device)
    return [g[1] for g in torch.autograd.grad(f(*point), point, ones, is_grads_batched=True)]


@pytest.mark.parametrize(
    "transformation", ["grad", "vjp", "vjp of one and constants", "jacrev", "jacfwd", "jacobian", "is_grads_batched"]
)
@pytest.mark.parametrize("name", OPERATORS)
def test_gradients(name, transformation, device):
    f, by_dense, point = case(name, device)
    assert_near(_gradients(f, point)[transformation](), dense_gradient(by_dense, point))


def _forward_ad(f, point, tangents):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*map(forward_ad.make_dual, point, tangents))).tangent


DERIVATIVES = {
    "jvp": lambda f, point, tangents: jvp(f, point, tangents)[1],
    "linearize": lambda f, point, tangents: linearize(f, *point)[1](*tangents),
    "forward_ad": _forward_ad,
    "forward_ad of what requires grad": lambda f, point, tangents: _forward_ad(
        f, [t.clone().requires_grad_() for t in point], tangents
    ),
}


@pytest.mark.parametrize("transformation", DERIVATIVES)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("stencil", "grid"), [("5x5", (3, 4)), ("far line", (8,)), ("volume", (2, 2, 3))], ids=str)
def test_directional_derivatives(name, stencil, grid, transformation, device):
    """Where an entry does not exist, its tangent is ignored, NaN included."""
    f, by_dense, point = case(name, device, stencil, grid)
    tangents = directions(point, nan_outside=True)
    expected = sum((g * d.cpu().nan_to_num()).sum() for g, d in zip(dense_gradient(by_dense, point), tangents, strict=True))
    assert_near([DERIVATIVES[transformation](f, point, tangents)], [expected])


@pytest.mark.parametrize("name", OPERATORS)
def test_a_tangent_of_one_input_alone(name, device):
    """A rule that skips what has no tangent gives what it gives for tangents of 0."""
    f, by_dense, point = case(name, device)
    tangents, gradients = directions(point), dense_gradient(by_dense, point)
    for i in range(len(point)):
        actual = jvp(lambda t, i=i: f(*point[:i], t, *point[i + 1 :]), (point[i],), (tangents[i],))[1]
        assert_near([actual], [(gradients[i] * tangents[i].cpu()).sum()])


@pytest.mark.parametrize("name", OPERATORS)
def test_tangents_of_entries_that_do_not_exist_are_zero(name, device):
    args = arguments(name, OFFSETS["5x5"], (3, 4), device=device)
    point, outside = tuple(tensors(args)), ~exists(OFFSETS["5x5"], (3, 4))
    _, results = jvp(lambda *new: call(name, with_tensors(args, new)), point, directions(point, nan_outside=True))
    assert all(r.isfinite().all() for r in results)
    for r in results:
        if r.shape[1:] == outside.shape:
            assert (r.cpu()[:, outside] == 0).all()
            assert (r.cpu()[:, ~outside] != 0).all()


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("samples", "batch"), [(0, 2), (2, 0), (0, 0)])
def test_tangents_of_empty_batches_and_no_samples(name, samples, batch, device):
    args = arguments(name, OFFSETS["5x5"], GRID, samples, batch, device=device)
    point = tuple(tensors(args))
    results, tangents = jvp(lambda *new: call(name, with_tensors(args, new)), point, directions(point, nan_outside=True))
    for r, t in zip(results, tangents, strict=True):
        assert t.shape == r.shape
        assert t.isfinite().all()
        assert samples > 0 or t.eq(0).all()  # sums over no samples


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_tangents_in_lower_precision(name, dtype, device):
    """Tangents have the dtypes of what they are tangents of, and sums of them one rounding to it."""
    args = arguments(name, OFFSETS["3x3"], (5, 7), dtype=dtype, device=device)
    point = tuple(tensors(args))
    tangents = tuple(0.5 * d for d in directions(point, nan_outside=True))
    results, actual = jvp(lambda *new: call(name, with_tensors(args, new)), point, tangents)
    exact = [t.detach().cpu().double() for t in (*point, *tangents)]
    function = dense_function(name, args)
    _, expected = torch.autograd.functional.jvp(
        function, tuple(exact[: len(point)]), tuple(t.nan_to_num() for t in exact[len(point) :]), strict=False
    )
    for r, a, e in zip(results, actual, expected, strict=True):
        assert a.dtype == r.dtype
        assert_close(a.contiguous(), e)


# --- second derivatives ---


HESSIANS = {
    "hessian": hessian,
    "jacrev of jacrev": lambda f, argnums: jacrev(jacrev(f, argnums), argnums),
    "jacfwd of jacfwd": lambda f, argnums: jacfwd(jacfwd(f, argnums), argnums),
    "jacrev of jacfwd": lambda f, argnums: jacrev(jacfwd(f, argnums), argnums),
}


@pytest.mark.parametrize("transformation", HESSIANS)
@pytest.mark.parametrize("name", OPERATORS)
def test_hessians(name, transformation, device):
    f, by_dense, point = case(name, device)
    actual = HESSIANS[transformation](f, tuple(range(len(point))))(*point)
    expected = torch.autograd.functional.hessian(by_dense, tuple(t.cpu() for t in point))
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e)


@pytest.mark.parametrize("name", OPERATORS)
def test_forward_over_reverse_without_functional_transformations(name, device):
    """Dual tensors through a double backward: a Hessian-vector product."""
    f, by_dense, point = case(name, device)
    tangents = directions(point, nan_outside=True)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.clone().requires_grad_(), d) for t, d in zip(point, tangents, strict=True)]
        gradients = torch.autograd.grad(f(*duals), duals)
        actual = [forward_ad.unpack_dual(g).tangent for g in gradients]
    _, expected = torch.autograd.functional.hvp(
        by_dense, tuple(t.cpu() for t in point), tuple(t.cpu().nan_to_num() for t in tangents)
    )
    assert_near(actual, expected)


# --- vmap ---


VMAPPED = {
    "grad": grad,
    "jacfwd": jacfwd,
    "hessian": lambda f, argnums: lambda *point: sum(hessian(f, argnums)(*point), ()),
    "jvp": lambda f, argnums: lambda *point: (jvp(f, point, tuple(t.sin() for t in point))[1],),
    "vjp": lambda f, argnums: lambda *point: vjp(f, *point)[1](torch.ones_like(f(*point))),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    ("transformation", "mapped"), [*((name, "all") for name in VMAPPED), ("hessian", "first"), ("hessian", "last")]
)
def test_vmap_of_transformations(name, transformation, mapped, device):
    f, _, point = case(name, device, grid=(2, 2), nan_outside=False)
    which = {"all": range(len(point)), "first": [0], "last": [len(point) - 1]}[mapped]
    stacked = [torch.stack([t, 1.5 * t, t - 0.1]) if i in which else t for i, t in enumerate(point)]
    transformed = VMAPPED[transformation](f, tuple(range(len(point))))
    actual = vmap(transformed, tuple(0 if i in which else None for i in range(len(point))))(*stacked)
    loop = [transformed(*(t[j] if i in which else t for i, t in enumerate(stacked))) for j in range(3)]
    assert_near(actual, [torch.stack(r).cpu() for r in zip(*loop, strict=True)])


@pytest.mark.parametrize("name", OPERATORS)
def test_grad_of_vmap(name, device):
    f, by_dense, point = case(name, device)
    stacked = tuple(torch.stack([t, 1.5 * t]) for t in point)
    actual = grad(lambda *s: vmap(f)(*s).sum(), tuple(range(len(point))))(*stacked)
    assert_near(actual, dense_gradient(lambda *s: sum(by_dense(*(t[i] for t in s)) for i in range(2)), stacked))


# --- compiled and exported ---


def _scores(offsets, ndim):
    """Scalar functions of (log_diag, off_diag, x) with every public function in them."""

    def score(log_diag, off_diag, x):
        y = gmrf_kernels.solve(log_diag, off_diag, x, offsets, ndim, log=True)
        z = gmrf_kernels.matvec(log_diag.exp(), off_diag, y.sin(), offsets, ndim, transpose=True)
        diag, below = gmrf_kernels.outer(x, z, offsets, ndim, sample_ndim=1)
        value = gmrf_kernels.negative_log_likelihood(z, log_diag, off_diag, offsets, ndim)
        return diag.pow(2).sum() + below.pow(2).sum() + value.sum()

    return score


COMPILED = {
    "grad": lambda f: grad(f, (0, 1, 2)),
    "jacfwd": lambda f: jacfwd(f, (0, 1, 2)),
    "jvp": lambda f: lambda *point: (jvp(f, point, tuple(t.sin() for t in point))[1],),
    "vjp": lambda f: lambda *point: vjp(f, *point)[1](torch.ones_like(f(*point))),
    "hessian": lambda f: hessian(f, 0),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "vmap of grad": lambda f: lambda *point: vmap(grad(f, (0, 1, 2)))(*(torch.stack([t, 2 * t]) for t in point)),
}


@pytest.mark.parametrize("transformation", COMPILED)
def test_compiled_transformations(transformation, device, keep_torch_defaults):
    """A transformation inside of a compiled function is what it is outside."""
    function = COMPILED[transformation](_scores(OFFSETS["5x5"], 2))
    _, log_diag, off_diag, _ = arguments("nll", OFFSETS["5x5"], GRID, device=device, nan_outside=False)
    x = torch.randn(2, 2, *GRID, dtype=torch.float64).to(device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    # The graph of the transformation may add in another order.
    torch.testing.assert_close(compiled(log_diag, off_diag, x), function(log_diag, off_diag, x), rtol=1e-11, atol=1e-11)


def test_transformations_of_a_compiled_function(device, keep_torch_defaults):
    """Torch refuses forward mode there, or is right."""
    score = _scores(OFFSETS["5x5"], 2)
    _, log_diag, off_diag, _ = arguments("nll", OFFSETS["5x5"], GRID, device=device, nan_outside=False)
    point = (log_diag, off_diag, torch.randn(2, 2, *GRID, dtype=torch.float64).to(device))
    compiled = torch.compile(score, backend="aot_eager")
    for transformation in (lambda f: grad(f, (0, 1, 2)), lambda f: jacfwd(f, (0, 1, 2)), lambda f: hessian(f, 0)):
        expected = transformation(score)(*point)
        try:
            actual = transformation(compiled)(*point)
        except (RuntimeError, NotImplementedError):
            continue
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, device, keep_torch_defaults):
    score = _scores(OFFSETS["5x5"], 2)

    class Score(torch.nn.Module):
        def forward(self, log_diag, off_diag, x):
            return score(log_diag, off_diag, x)

    _, log_diag, off_diag, _ = arguments("nll", OFFSETS["5x5"], GRID, device=device, nan_outside=False)
    point = (log_diag, off_diag, torch.randn(2, 2, *GRID, dtype=torch.float64).to(device))
    program = torch.export.export(Score(), point, strict=strict)
    names = {str(node.target) for node in program.graph.nodes}
    assert {f"gmrf_kernels.{name}.default" for name in ("matvec", "solve", "outer", "nll")} <= names
    inputs = [t.clone().requires_grad_() for t in point]
    exported = program.module()
    assert_same([exported(*inputs)], [score(*inputs)])
    assert_same(torch.autograd.grad(exported(*inputs), inputs), torch.autograd.grad(score(*inputs), inputs))


# --- what is kept ---


@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_is_kept_in_a_cycle(name, device):
    """A result that is no longer used is freed at once, with all that was saved for its derivatives."""
    args = arguments(name, OFFSETS["5x5"], GRID, device=device)
    gc.collect()
    gc.disable()
    try:
        for through in ("operator", "forward mode"):
            inputs = [t.clone().requires_grad_() for t in tensors(args)]
            if through == "operator":
                results = call(name, with_tensors(args, inputs))
            else:
                with forward_ad.dual_level():
                    results = call(name, with_tensors(args, [forward_ad.make_dual(t, torch.ones_like(t)) for t in inputs]))
            references = [weakref.ref(r) for r in results]
            del results, inputs
            assert all(r() is None for r in references)
    finally:
        gc.enable()

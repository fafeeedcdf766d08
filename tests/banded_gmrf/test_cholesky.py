import copy
import math
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import banded_gmrf as bg
from tests.cases import FACTORS, STENCILS, dense, random_cholesky
from tests.dense import exists, random_factor

# Sums of at most K = 25 terms of order 1, in another order than the dense product's: a few hundred roundings at most.
TOLERANCE = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}

# The diagonal's exp differs from torch's by a rounding or two; zeros are exact.
EXP = {"rtol": 1e-15, "atol": 0}

BATCHES = [  # of the factor, of the vector
    ((), (3,)),
    ((3,), ()),
    ((2,), (3, 2)),
    ((2,), (3, 1)),
    ((3, 1), (2,)),
    ((3, 1), (5, 1, 2)),
    ((2, 1, 3), (4, 1)),
    ((1,), (4, 2)),
    ((0,), ()),
    ((0,), (3, 1)),
    ((), (0,)),
    ((2, 1), (0,)),
]


def dense_matvec(L, x, transpose=False):
    """The float64 product with the matrix of ``L``, broadcast by torch's own matmul."""
    A = dense(L).mT if transpose else dense(L)
    y = A @ x.double().flatten(-L.stencil.ndim).unsqueeze(-1)
    return y.reshape(*y.shape[:-2], *L.grid)


def dense_solve(L, b, transpose=False):
    A = dense(L).mT if transpose else dense(L)
    b = b.double().flatten(-L.stencil.ndim).unsqueeze(-1)
    x = torch.linalg.solve_triangular(A, b, upper=transpose)
    return x.reshape(*x.shape[:-2], *L.grid)


OPERATIONS = [
    pytest.param(operation, expected, transpose, id=operation + (" transposed" if transpose else ""))
    for operation, expected in (("matvec", dense_matvec), ("solve", dense_solve))
    for transpose in (False, True)
]


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected.to(actual.dtype), **TOLERANCE[actual.dtype])


@pytest.mark.parametrize(("name", "grid"), FACTORS)
@pytest.mark.parametrize(("operation", "expected", "transpose"), OPERATIONS)
def test_operations_equal_the_dense_ones(operation, expected, transpose, name, grid):
    L = random_cholesky(STENCILS[name], grid, batch=(2,))
    x = torch.randn(3, 2, *grid, dtype=torch.float64)
    assert_close(getattr(L, operation)(x, transpose=transpose), expected(L, x, transpose))


@pytest.mark.parametrize(("name", "grid"), FACTORS)
def test_dense_scipy_and_logdet(name, grid):
    L = random_cholesky(STENCILS[name], grid)
    torch.testing.assert_close(L.to_dense(), dense(L), **EXP)
    assert torch.equal(torch.from_numpy(L.to_scipy().todense()), dense(L))
    assert_close(L.logdet(), torch.linalg.slogdet(dense(L)).logabsdet)
    if len(L.stencil):
        assert L.to_scipy().nnz == L.grid.numel() + int(exists(L.stencil.offsets, grid).sum())


@pytest.mark.parametrize(("factor_batch", "vector_batch"), BATCHES)
@pytest.mark.parametrize(("operation", "expected", "transpose"), OPERATIONS)
def test_batches_broadcast_as_in_torch(operation, expected, transpose, factor_batch, vector_batch):
    L = random_cholesky(STENCILS["3x3"], (3, 2), factor_batch)
    x = torch.randn(*vector_batch, 3, 2, dtype=torch.float64)
    y = getattr(L, operation)(x, transpose)
    assert y.shape == (*torch.broadcast_shapes(factor_batch, vector_batch), 3, 2)
    assert_close(y, expected(L, x, transpose))


@pytest.mark.parametrize(
    ("log_diag_batch", "off_diag_batch"), [((3,), ()), ((), (3,)), ((2, 1), (3,)), ((1, 3), (2, 1)), ((0,), (1,))]
)
def test_log_diag_and_off_diag_broadcast_with_each_other(log_diag_batch, off_diag_batch):
    stencil, grid = STENCILS["3x3"], (3, 2)
    log_diag, _ = random_factor(stencil.offsets, grid, log_diag_batch)
    _, off_diag = random_factor(stencil.offsets, grid, off_diag_batch)
    L = bg.StencilCholesky(log_diag, off_diag, stencil)
    assert L.batch_shape == torch.broadcast_shapes(log_diag_batch, off_diag_batch)
    assert L.log_diag.shape == L.diag.shape == (*L.batch_shape, *grid)
    assert L.off_diag.shape == (*L.batch_shape, len(stencil), *grid)
    torch.testing.assert_close(L.to_dense(), dense(L), **EXP)
    assert_close(L.logdet(), torch.linalg.slogdet(dense(L)).logabsdet)
    x = torch.randn(4, *(1,) * len(L.batch_shape), *grid, dtype=torch.float64)
    assert_close(L.solve(x), dense_solve(L, x))


@pytest.mark.parametrize(("operation", "expected", "transpose"), OPERATIONS)
def test_views_and_strides_are_accepted(operation, expected, transpose):
    stencil, grid = STENCILS["5x5"], (5, 7)
    log_diag, off_diag = random_factor(stencil.offsets, grid, batch=(2,))
    # As a network may give them: channels last, the log-diagonal one of the channels, a flipped vector on every other column.
    channels_last = torch.cat([log_diag[:, None], off_diag], 1).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    strided = bg.StencilCholesky(channels_last[:, 0], channels_last[:, 1:], stencil)
    x = torch.randn(7, 10, dtype=torch.float64)[:, ::2].T
    assert not any(t.is_contiguous() for t in (strided.log_diag, strided.off_diag, x))
    y = getattr(strided, operation)(x, transpose)
    assert_close(y, expected(bg.StencilCholesky(log_diag, off_diag, stencil), x, transpose))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("operation", "expected", "transpose"), OPERATIONS)
def test_lower_precision_coefficients_are_computed_with_in_float32(operation, expected, transpose, dtype):
    L = random_cholesky(STENCILS["3x3"], (5, 7), batch=(2,), dtype=dtype)
    assert L.dtype == dtype
    assert L.diag.dtype == L.logdet().dtype == L.to_dense().dtype == torch.float32
    x = torch.randn(2, 5, 7)
    y = getattr(L, operation)(x, transpose)
    assert y.dtype == torch.float32
    assert_close(y, expected(L, x, transpose))
    assert_close(L.to_dense(), dense(L))
    assert_close(L.logdet(), torch.linalg.slogdet(dense(L)).logabsdet)
    low = getattr(L, operation)(x.to(dtype), transpose)
    assert low.dtype == dtype
    # The input is exact in float32 and only the result is rounded.
    torch.testing.assert_close(
        low.float(), getattr(L, operation)(x.to(dtype).float(), transpose), rtol=torch.finfo(dtype).eps, atol=0
    )


def test_scipy_of_a_factor_in_bfloat16_that_needs_a_gradient():
    log_diag, off_diag = random_factor(STENCILS["3x3"].offsets, (3, 4), dtype=torch.bfloat16)
    L = bg.StencilCholesky(log_diag.requires_grad_(), off_diag.requires_grad_(), STENCILS["3x3"])
    assert torch.equal(torch.from_numpy(L.to_scipy().todense()), L.to_dense())


@pytest.mark.parametrize(
    ("name", "grid"), [("5x5", (5, 3)), ("5x5", (1, 1)), ("skewed", (3, 4)), ("volume", (2, 3, 4)), ("line", (4,))]
)
@pytest.mark.parametrize(("operation", "expected", "transpose"), OPERATIONS)
def test_gradients_equal_the_dense_ones(operation, expected, transpose, name, grid):
    stencil = STENCILS[name]
    tensors = [*random_factor(stencil.offsets, grid, batch=(2,)), torch.randn(3, 2, *grid, dtype=torch.float64)]
    log_diag, off_diag, x = (t.requires_grad_() for t in tensors)
    L = bg.StencilCholesky(log_diag, off_diag, stencil)
    cotangent = torch.randn(3, 2, *grid, dtype=torch.float64)
    actual = torch.autograd.grad(getattr(L, operation)(x, transpose), tensors, cotangent)
    wanted = torch.autograd.grad(expected(L, x, transpose), tensors, cotangent, materialize_grads=True)
    for a, w in zip(actual, wanted, strict=True):
        assert_close(a, w)


@pytest.mark.parametrize("name", ["5x5", "skewed", "volume", "line with a gap"])
def test_entries_that_do_not_exist_have_no_gradient_at_all(name):
    stencil = STENCILS[name]
    grid = (3, 2, 4)[-stencil.ndim :]
    log_diag, off_diag = random_factor(stencil.offsets, grid, batch=(2,))
    outside = ~exists(stencil.offsets, grid).expand_as(off_diag)
    assert off_diag[outside].isnan().all()
    L = bg.StencilCholesky(log_diag, off_diag.requires_grad_(), stencil)
    b = torch.randn(2, *grid, dtype=torch.float64)
    values = [L.matvec(b), L.matvec(b, transpose=True), L.solve(b), L.solve(b, transpose=True)]
    values.append(bg.negative_log_likelihood(b, log_diag, off_diag, stencil))
    for value in values:
        (grad,) = torch.autograd.grad(value.square().sum(), off_diag)
        assert (grad[outside] == 0).all()
        assert grad.isfinite().all()


def test_expand_repeats_the_factor():
    L = random_cholesky(STENCILS["3x3"], (3, 4), batch=(2, 1))
    expanded = L.expand((5, 2, 3))
    assert expanded.batch_shape == (5, 2, 3)
    assert expanded.log_diag.shape == expanded.diag.shape == (5, 2, 3, 3, 4)
    assert expanded.off_diag.shape == (5, 2, 3, 4, 3, 4)
    assert expanded.off_diag.data_ptr() == L.off_diag.data_ptr()
    assert torch.equal(expanded.to_dense(), L.to_dense().expand(5, 2, 3, 12, 12))
    assert torch.equal(expanded.logdet(), L.logdet().expand(5, 2, 3))
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_close(expanded.solve(x), L.solve(x).expand(5, 2, 3, 3, 4))
    assert_close(expanded.matvec(x), L.matvec(x).expand(5, 2, 3, 3, 4))
    assert L.expand([0, 2, 1]).matvec(x).shape == (0, 2, 1, 3, 4)
    assert expanded.expand((5, 2, 3)).expand((4, 5, 2, 3)).batch_shape == (4, 5, 2, 3)


@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 2), (1, 1), (0, 3, 0)])
def test_expand_refuses_what_is_no_expansion(batch_shape):
    with pytest.raises(ValueError, match="batch_shape"):
        random_cholesky(STENCILS["3x3"], (3, 4), batch=(3, 2)).expand(batch_shape)


class LargestResult(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        storages = [t.untyped_storage().nbytes() // t.itemsize for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *storages])
        return result


def test_a_repeated_factor_gets_its_gradient_without_a_copy_per_repetition():
    stencil, grid, samples = STENCILS["5x5"], (4, 4), 50
    log_diag, off_diag = (t.requires_grad_() for t in random_factor(stencil.offsets, grid))
    b = torch.randn(samples, *grid, dtype=torch.float64)
    with LargestResult() as largest:
        bg.StencilCholesky(log_diag, off_diag, stencil).expand((samples,)).solve(b, transpose=True).sum().backward()
    assert off_diag.grad.isfinite().all()
    # The vectors, not samples x (K-1) x n.
    assert largest.numel == samples * math.prod(grid)


def test_copies_and_pickles():
    L = random_cholesky(STENCILS["5x5"], (3, 4), batch=(2,)).expand((5, 2))
    for other in (copy.deepcopy(L), pickle.loads(pickle.dumps(L))):
        assert other.stencil == L.stencil
        assert other.batch_shape == L.batch_shape
        assert torch.equal(other.to_dense(), L.to_dense())


def test_repr():
    L = random_cholesky(STENCILS["5x5"], (3, 4), batch=(2,))
    assert repr(L) == "StencilCholesky(batch_shape=(2,), grid=(3, 4), offsets=12, dtype=torch.float64, device=cpu)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_diagonal_that_overflows_gives_infinity(dtype):
    stencil, grid = STENCILS["3x3"], (2, 3)
    log_diag, off_diag = random_factor(stencil.offsets, grid, dtype=dtype)
    log_diag[0, 1] = 1000.0
    L = bg.StencilCholesky(log_diag, off_diag, stencil)
    b = torch.randn(grid, dtype=dtype)
    assert L.diag[0, 1] == torch.inf
    assert L.matvec(b)[0, 1] == torch.inf * b[0, 1].sign()
    assert bg.negative_log_likelihood(b, log_diag, off_diag, stencil) == torch.inf
    # The sum of the logarithms does not overflow, and e⁻¹⁰⁰⁰ is 0 in either dtype, so these are right.
    torch.testing.assert_close(L.logdet(), log_diag.sum())
    for transpose in (False, True):
        x = L.solve(b, transpose)
        assert x[0, 1] == 0
        assert x.isfinite().all()


def test_negative_log_likelihood_equals_the_dense_one():
    L = random_cholesky(STENCILS["5x5"], (4, 3), batch=(2,))
    residual = torch.randn(5, 2, 4, 3, dtype=torch.float64)
    value = bg.negative_log_likelihood(residual, L.log_diag, L.off_diag, L.stencil)
    whitened = dense_matvec(L, residual, transpose=True).flatten(2)
    expected = 0.5 * whitened.square().sum(-1) - torch.linalg.slogdet(dense(L)).logabsdet + 6 * math.log(2 * math.pi)
    assert_close(value, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_off_diagonals_beside_a_float32_log_diagonal(dtype):
    """All that is computed is what float32 copies of the off-diagonals give."""
    stencil = STENCILS["3x3"]
    log_diag, off_diag = random_factor(stencil.offsets, (4, 5), (2,), torch.float32)
    off_diag = off_diag.to(dtype)
    mixed, full = (bg.StencilCholesky(log_diag, o, stencil) for o in (off_diag, off_diag.float()))
    assert mixed.dtype == torch.float32
    x = torch.randn(3, 2, 4, 5)

    def everything(L):
        q = bg.GMRF(torch.zeros(2, 4, 5), L, validate_args=True)
        mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
        return [
            *(L.diag, L.logdet(), L.to_dense(), L.matvec(x), L.solve(x, transpose=True)),
            *(q.log_prob(x), q.entropy(), q.variance, q.covariance_matrix, q.correlation_with((1, 1))),
            *(bg.kl_divergence(q, q.expand((2,))), q.condition(mask, x[0], tolerance=1e-7).mean),
            *(L.nearest(STENCILS["5x5"]).log_diag, L.to(torch.float64).diag),
        ]

    actual, expected = everything(mixed), everything(full)
    assert [a.dtype for a in actual] == [e.dtype for e in expected]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_of_either_dtype_beside_such_a_factor(dtype):
    stencil, grid = STENCILS["3x3"], (5, 7)
    log_diag, off_diag = random_factor(stencil.offsets, grid, (2,), torch.float32)
    mixed = bg.StencilCholesky(log_diag, off_diag.to(dtype), stencil)
    single = bg.StencilCholesky(log_diag, off_diag.to(dtype).float(), stencil)
    for loc in (torch.randn(grid), torch.randn(grid).to(dtype)):
        q, p = bg.GMRF(loc, mixed), bg.GMRF(loc.float(), single)
        x = torch.randn(4, 1, *grid)
        assert_close(q.log_prob(x), p.log_prob(x).double())
        assert_close(q.log_prob(x.to(dtype)), p.log_prob(x.to(dtype).float()).double())
        assert q.sample().dtype == q.variance.dtype == loc.dtype

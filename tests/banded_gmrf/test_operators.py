import numpy as np
import pytest
import scipy.ndimage
import scipy.sparse
import torch

from banded_gmrf import operators
from banded_gmrf.operators import Convolution, Downsample, LinearOperator, Mask, Matrix
from banded_gmrf.operators.base import as_operator, check_adjoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),  # of torch's own, at the first forward derivative
]

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
GRIDS = [(7,), (1,), (5, 6), (1, 6), (6, 1), (2, 2), (3, 4, 5), (2, 1, 3)]
SCIPY = {"zero": "constant", "reflect": "reflect", "periodic": "wrap"}


def random(*shape, **options):
    return torch.randn(shape, dtype=torch.float64, **options)


def every_operator(grid):
    """One of each kind, and compositions, on a grid."""
    n = torch.Size(grid).numel()
    sizes = [(3, 4, 2)[axis] for axis in range(len(grid))]
    dense = random(4, n) * (torch.rand(4, n) < 0.5)
    blur = Convolution(random(*sizes), "reflect")
    every_second = Downsample((2,) * len(grid))
    mask = torch.rand(grid) < 0.5
    return {
        "zero": Convolution(random(*sizes), "zero"),
        "reflect": blur,
        "periodic": Convolution(random(*sizes), "periodic"),
        "each axis": Convolution(random(*sizes), ("reflect", "zero", "periodic")[: len(grid)]),
        "downsample": every_second,
        "mask": Mask(mask),
        "dense": Matrix(dense),
        "coo": Matrix(dense.to_sparse_coo()),
        "csr": Matrix(dense.to_sparse_csr()),
        "csc": Matrix(dense.to_sparse_csc()),
        "scipy": Matrix(scipy.sparse.csr_array(dense.numpy())),
        "scipy integers": Matrix(scipy.sparse.coo_matrix((dense > 0).int().numpy())),
        "blur and sample": every_second @ blur,
        "blur and mask": Mask(mask) @ blur,
        "three": Matrix(random(2, every_second.bind(grid).output_shape.numel())) @ every_second @ blur,
    }


@pytest.mark.parametrize("grid", GRIDS)
def test_convolutions_equal_those_of_scipy(grid):
    for size in (1, 2, 3, 4, 8, 13):
        kernel = random(*(size if axis != 1 else max(1, size - 1) for axis in range(len(grid))))
        x = random(2, *grid)
        for boundary, mode in SCIPY.items():
            expected = np.stack([scipy.ndimage.convolve(one, kernel.numpy(), mode=mode) for one in x.numpy()])
            A = Convolution(kernel, boundary)
            torch.testing.assert_close(A(x), torch.from_numpy(expected), **CLOSE)
            A = A.bind(grid)
            y = random(2, *grid)
            torch.testing.assert_close(A.adjoint(y).flatten(1), y.flatten(1) @ A.to_dense(), **CLOSE)


def test_boundaries_of_each_axis():
    down, across, x = random(3), random(4), random(6, 5)
    expected = scipy.ndimage.convolve1d(x.numpy(), down.numpy(), axis=0, mode="wrap")
    expected = scipy.ndimage.convolve1d(expected, across.numpy(), axis=1, mode="reflect")
    actual = Convolution(torch.outer(down, across), ("periodic", "reflect"))(x)
    torch.testing.assert_close(actual, torch.from_numpy(expected), **CLOSE)


@pytest.mark.parametrize("grid", GRIDS)
def test_operators_and_adjoints_equal_their_matrices(grid):
    for name, A in every_operator(grid).items():
        bound = A.bind(grid)
        assert bound.grid == grid
        matrix = bound.to_dense()
        m = bound.output_shape.numel()
        assert matrix.shape == (m, torch.Size(grid).numel()), name
        check_adjoint(bound)
        for batch in ((), (3,), (2, 0), (2, 3)):
            x, y = random(*batch, *grid), random(*batch, *bound.output_shape)
            # A matrix without a grid takes an axis of one site before the others for a batch of one field.
            unbound = A if min(grid) > 2 else bound
            for seen, adjoint in ((unbound(x), bound.adjoint(y)), (bound(x), bound.bind(grid).adjoint(y))):
                assert seen.shape == (*batch, *bound.output_shape), name
                assert adjoint.shape == x.shape, name
                expected = (matrix @ x.reshape(*batch, matrix.shape[-1], 1)).reshape(seen.shape)
                torch.testing.assert_close(seen, expected, **CLOSE)
                torch.testing.assert_close(adjoint, (matrix.mT @ y.reshape(*batch, m, 1)).reshape(x.shape), **CLOSE)


def test_operators_take_tensors_that_are_not_contiguous():
    for A in every_operator((5, 6)).values():
        x = random(6, 2, 5).permute(1, 2, 0)
        torch.testing.assert_close(A(x), A(x.contiguous()), **CLOSE)


def test_selections_are_known_as_such():
    grid, x = (5, 6), random(5, 6)
    for name, A in every_operator(grid).items():
        sites = A.bind(grid).selected_sites()
        assert (sites is not None) == (name in ("downsample", "mask"))
        if sites is not None:
            assert torch.equal(x.flatten()[sites], A(x).flatten())
    mask = torch.rand(3, 3) < 0.5
    both = (Mask(mask) @ Downsample(2)).bind(grid)
    assert torch.equal(x.flatten()[both.selected_sites()], both(x))


def test_operators_with_a_batch():
    grid, x, y = (4, 5), random(3, 4, 5), random(3, 4, 5)
    kernels, matrices = random(3, 2, 3), random(3, 7, 20)
    blurs = Convolution(kernels, "reflect", ndim=2)
    assert blurs.batch_shape == (3,)
    expected = torch.stack([Convolution(k, "reflect")(one) for k, one in zip(kernels, x, strict=True)])
    torch.testing.assert_close(blurs(x), expected, **CLOSE)
    expected = torch.stack([Convolution(k, "reflect").adjoint(one) for k, one in zip(kernels, y, strict=True)])
    torch.testing.assert_close(blurs.adjoint(y), expected, **CLOSE)
    A = Matrix(matrices, grid)
    torch.testing.assert_close(A(x), torch.einsum("bmn,bn->bm", matrices, x.flatten(1)), **CLOSE)
    for operator in (blurs.bind(grid), A, (A @ blurs).bind(grid)):
        assert operator.batch_shape == (3,)
        assert operator.to_dense().shape == (3, operator.output_shape.numel(), 20)
        check_adjoint(operator)


@pytest.mark.parametrize("boundary", list(SCIPY))
def test_gradients_and_transformations(boundary):
    kernel, x, dense = random(3, 2), random(4, 2), random(3, 8)
    sparse = (dense * (dense > 0)).to_sparse_coo().coalesce()

    def blur(kernel, x):
        return Convolution(kernel, boundary)(x)

    def blur_back(kernel, y):
        return Convolution(kernel, boundary).adjoint(y)

    def times(matrix, x):
        return Matrix(matrix)(x)

    def of_entries(entries, x):
        return Matrix(torch.sparse_coo_tensor(sparse.indices(), entries, sparse.shape, check_invariants=True))(x)

    inputs = [(blur, kernel), (blur_back, kernel), (times, dense), (of_entries, sparse.values())]
    for function, parameter in inputs:
        arguments = (parameter.clone().requires_grad_(), x.clone().requires_grad_())
        forward = function is not of_entries  # of torch's sparse tensors there are none
        assert torch.autograd.gradcheck(function, arguments, check_forward_ad=forward)
        assert torch.autograd.gradgradcheck(function, arguments)
    for function, parameter in inputs[:3]:
        jacobian = torch.func.jacrev(function)(parameter, x)
        torch.testing.assert_close(jacobian, torch.func.jacfwd(function)(parameter, x), **CLOSE)
        many = torch.stack([x, 2 * x])
        each = torch.func.vmap(function, (None, 0))(parameter, many)
        torch.testing.assert_close(each, torch.stack([function(parameter, x), 2 * function(parameter, x)]), **CLOSE)
    for A in (Downsample(2, grid=(4, 2)), Mask(torch.rand(4, 2) < 0.5)):
        assert torch.autograd.gradcheck(A, x.clone().requires_grad_(), check_forward_ad=True)
        assert torch.autograd.gradcheck(A.adjoint, random(*A.output_shape, requires_grad=True), check_forward_ad=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_has_the_dtype_of_the_field(dtype):
    for A in every_operator((5, 6)).values():
        x = random(2, 5, 6).to(dtype)
        y = A(x)
        assert y.dtype == dtype
        eps = 30 * torch.finfo(dtype).eps  # rounding of the result, and of sums of at most 30 terms in single precision
        torch.testing.assert_close(y.double(), A(x.double()), rtol=eps, atol=eps)


class Doubled:
    """Another library's operator, for batches (N, H, W) alone."""

    def __call__(self, x):
        assert x.ndim == 3
        return 2 * x[:, 1:]

    def adjoint(self, y):
        return 2 * torch.nn.functional.pad(y, (0, 0, 1, 0))


class Physics(torch.nn.Module):
    """As deepinv's: images (N, C, H, W), filters in single precision."""

    def __init__(self):
        super().__init__()
        self.register_buffer("filter", torch.rand(1, 1, 3, 3))

    def A(self, x):  # noqa: N802, their name
        return torch.nn.functional.conv2d(x, self.filter)

    def A_adjoint(self, y):  # noqa: N802
        return torch.nn.functional.conv_transpose2d(y, self.filter)


class Sums(LinearOperator):
    """A user's own, which says all it knows: sums of the rows."""

    def __init__(self, grid=None):
        if grid is not None:
            self.grid, self.output_shape = torch.Size(grid), torch.Size(grid[:1])

    def __call__(self, x):
        return x.sum(-1)

    def adjoint(self, y):
        return y.unsqueeze(-1).expand(*y.shape, 5)


def test_operators_of_others():
    grid, x = (4, 5), random(2, 3, 4, 5)
    for other, expected, shape in (
        (Doubled(), 2 * x[..., 1:, :], (3, 5)),
        (Physics(), None, (2, 3)),
        (Sums(), x.sum(-1), (4,)),
        (Sums(grid), x.sum(-1), (4,)),
    ):
        A = as_operator(other).bind(grid)
        assert (A.grid, A.output_shape) == (grid, shape)
        check_adjoint(A)
        y = A(x)
        if expected is None:
            expected = other.A(x.reshape(6, 1, *grid).float()).reshape(2, 3, 2, 3).double()
        torch.testing.assert_close(y, expected, **CLOSE)
        assert A.adjoint(y).shape == x.shape
        assert A(x[:0]).shape == (0, 3, *shape)
        assert (Matrix(torch.ones(1, torch.Size(shape).numel())) @ A)(x).shape == (2, 3, 1)
        assert (other @ Convolution(torch.ones(3, 3))).bind(grid)(x).shape == (2, 3, *shape)


class Wrong(Doubled):
    def adjoint(self, y):
        return 2 * torch.nn.functional.pad(y, (0, 0, 0, 1))


def test_wrong_adjoints_are_found():
    with pytest.raises(ValueError, match=r"is not the adjoint of operator: .* ⟨A u, v⟩ is .*, but ⟨u, Aᵀv⟩ is"):
        check_adjoint(as_operator(Wrong()).bind((4, 5)))
    too_many = as_operator(type("Shifted", (Doubled,), {"__call__": lambda self, x: 2 * x[:, 1:] + 1})())
    with pytest.raises(ValueError, match="is not the adjoint"):
        check_adjoint(too_many.bind((4, 5)))
    shorter = as_operator(type("Shorter", (Doubled,), {"adjoint": lambda self, y: y})())
    with pytest.raises(ValueError, match=r"gives \(1, 3, 5\), expected \(1, 4, 5\)"):
        check_adjoint(shorter.bind((4, 5)))


KERNEL = torch.ones(3, 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Convolution([1.0]), TypeError, "kernel is a list, expected a torch.Tensor"),
        (lambda: Convolution(KERNEL.long()), TypeError, "kernel is torch.int64, expected float16"),
        (
            lambda: Convolution(torch.ones(1, 1, 3, 3)),
            ValueError,
            r"kernel has shape \(1, 1, 3, 3\), expected one of 1 to 3 axes",
        ),
        (lambda: Convolution(torch.ones(3, 0)), ValueError, r"kernel has shape \(3, 0\), expected at least one entry"),
        (lambda: Convolution(KERNEL, "wrap"), ValueError, "boundary is 'wrap', expected 'zero', 'reflect' or 'periodic'"),
        (lambda: Convolution(KERNEL, ["zero"]), ValueError, r"boundary is \['zero'\], expected 'zero', 'reflect'"),
        (lambda: Convolution(KERNEL * torch.nan), ValueError, "kernel has NaN or infinite entries"),
        (lambda: Convolution(KERNEL, grid=(4,)), ValueError, r"Convolution has 2 axes, which does not fit the grid \(4,\)"),
        (lambda: Convolution(KERNEL)(torch.ones(4)), ValueError, r"x has shape \(4,\), Convolution needs a grid of 2 axes"),
        (
            lambda: Convolution(KERNEL, grid=(4, 4))(torch.ones(5, 4)),
            ValueError,
            r"x has shape \(5, 4\), expected \(..., 4, 4\)",
        ),
        (lambda: Convolution(KERNEL)(torch.ones(4, 4).int()), TypeError, "x is torch.int32, expected float16"),
        (lambda: Convolution(KERNEL)(torch.ones(4, 4, device="meta")), ValueError, "x is on meta, Convolution is on cpu"),
        (
            lambda: Convolution(torch.ones(3, 2, 2), ndim=2)(torch.ones(2, 4, 4)),
            ValueError,
            r"x has batch shape \(2,\), .*\(3,\)",
        ),
        (lambda: Downsample(0), ValueError, "factor is .*, expected at least 1 for each of 1 to 3 axes"),
        (lambda: Downsample(1.5), TypeError, "factor is 1.5, expected an integer"),
        (lambda: Downsample((2, 2)).bind((3, 4, 5)), ValueError, r"Downsample has 2 axes, .* the grid \(3, 4, 5\)"),
        (lambda: Downsample(2).adjoint(torch.ones(2, 2)), ValueError, "Downsample has no grid yet: its adjoint needs one"),
        (lambda: Downsample(2, grid=(4, 4)).bind((4, 5)), ValueError, r"Downsample is on the grid \(4, 4\), expected \(4, 5\)"),
        (lambda: Mask(torch.ones(4)), TypeError, "mask is torch.float32, expected a bool tensor"),
        (lambda: Mask([True]), TypeError, "mask is list, expected a bool tensor"),
        (lambda: Mask(torch.ones(2, 0).bool()), ValueError, r"mask has shape \(2, 0\), expected a grid of 1 to 3 axes"),
        (lambda: Mask(torch.ones(4, 5).bool())(torch.ones(5, 4)), ValueError, r"x has shape \(5, 4\), expected \(..., 4, 5\)"),
        (
            lambda: Mask(torch.ones(4, 5).bool()).adjoint(torch.ones(4, 5)),
            ValueError,
            r"y has shape \(4, 5\), expected \(..., 20\)",
        ),
        (lambda: Matrix(np.ones((2, 3))), TypeError, "matrix is a ndarray, expected a torch.Tensor"),
        (lambda: Matrix(scipy.sparse.eye_array(3, dtype=complex)), TypeError, "matrix is complex128, expected real numbers"),
        (lambda: Matrix(torch.ones(3)), ValueError, r"matrix has shape \(3,\), expected \(\*batch, m, n\)"),
        (
            lambda: Matrix(torch.ones(2, 2, 3).to_sparse_coo()),
            ValueError,
            r"matrix is sparse .* \(2, 2, 3\), expected \(m, n\)",
        ),
        (lambda: Matrix(torch.ones(2, 3), grid=(2, 2)), ValueError, r"Matrix has 3 columns, .* the grid \(2, 2\)"),
        (
            lambda: Matrix(torch.ones(2, 3))(torch.ones(2, 2)),
            ValueError,
            r"x has shape \(2, 2\), Matrix needs a grid of 3 sites",
        ),
        (lambda: Matrix(torch.ones(2, 3)).to_dense(), ValueError, "has no grid yet"),
        (lambda: Matrix(torch.ones(2, 3)) @ Mask(torch.ones(2, 2).bool()), ValueError, r"gives \(4,\), which .* does not take"),
        (lambda: as_operator(torch.ones(2, 2)), TypeError, "operator is a Tensor, .*: operators.Matrix makes"),
        (lambda: as_operator(abs), TypeError, "operator is a builtin_function_or_method, .* a call and .adjoint, or"),
        (lambda: Sums((4, 5)).bind((3, 5)), ValueError, r"operator is on the grid \(4, 5\), expected \(3, 5\)"),
        (lambda: as_operator(Doubled()).adjoint(torch.ones(1, 3, 5)), ValueError, "has no grid yet: its adjoint needs one"),
        (lambda: LinearOperator()(torch.ones(3)), NotImplementedError, "LinearOperator does not define __call__"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_namespace():
    assert operators.__all__ == ["Convolution", "Downsample", "LinearOperator", "Mask", "Matrix"]


def test_a_kernel_that_is_not_finite_is_refused_under_vmap_too():
    kernels = torch.ones(2, 3, 3, dtype=torch.float64)
    kernels[1, 0, 0] = torch.nan
    x = torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="kernel has NaN"):
        torch.vmap(lambda kernel: Convolution(kernel)(x))(kernels)

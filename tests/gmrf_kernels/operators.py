"""The registered operators as the tests call them: random arguments, and the values by dense float64 linear algebra.

Also what tests compare with them, and the same values in other strides.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from gmrf_kernels.checks import accumulate_dtype
from gmrf_kernels.stencils import Offsets, unflatten
from tests.cases import GRIDS, STENCILS
from tests.dense import dense_factor, neighbours, random_factor

OPERATORS = (
    *("matvec", "matvec transposed", "matvec transposed log", "solve", "solve transposed", "solve log"),
    *("outer", "nll", "nll_factor_grad"),
)

# Few, because a backend may compile each of them for each dtype. The far line reaches beyond the neighbours that the CPU's
# recursion keeps in registers.
OFFSETS: dict[str, Offsets] = {
    "far line": ((1,), (6,)),
    **{name: STENCILS[name].offsets for name in ("diagonal", "3x3", "5x5", "skewed", "volume")},
}
NDIM = {"far line": 1, "diagonal": 2, "3x3": 2, "5x5": 2, "skewed": 2, "volume": 3}

# Wide enough for vectors of 16 sites none of whose neighbours lies off the grid.
WIDE = {1: (70,), 2: (3, 70), 3: (2, 3, 40)}

HALF = (torch.float16, torch.bfloat16)
CASES = [  # dtype of the coefficients, stencil, grid
    *(
        (torch.float64, name, grid)
        for name in ("far line", "diagonal", "5x5", "skewed", "volume")
        for grid in (*GRIDS[NDIM[name]], WIDE[NDIM[name]])
    ),
    *(
        (torch.float32, name, grid)
        for name in ("far line", "5x5", "volume")
        for grid in (*GRIDS[NDIM[name]][:2], WIDE[NDIM[name]])
    ),
    *((dtype, "3x3", grid) for dtype in HALF for grid in ((5, 7), (1, 1), WIDE[2])),
]
SMALL = [("far line", (8,)), ("diagonal", (2, 3)), ("5x5", (3, 4)), ("volume", (2, 2, 3))]

# Sums of at most K = 13 terms, through solves whose matrices have condition numbers of some tens: hundreds of roundings.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def arguments(
    name: str,
    offsets: Offsets,
    grid: Sequence[int],
    samples: int = 3,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    nan_outside: bool = True,
) -> list:
    """Random arguments of an operator, coefficients in ``dtype``; diagonals of both signs where they may be."""
    log_diag, off_diag = random_factor(offsets, grid, (batch,), nan_outside=nan_outside)
    vector_dtype = accumulate_dtype(dtype)
    log_diag, off_diag = log_diag.to(device, vector_dtype), off_diag.to(device, dtype)
    diag = log_diag.exp() * torch.randn(log_diag.shape).sign().to(log_diag)
    x, y = torch.randn(2, samples, batch, *grid, dtype=torch.float64).to(device, vector_dtype)
    scale = torch.randn(samples, batch, dtype=torch.float64).to(device, vector_dtype)
    flat = [component for offset in offsets for component in offset]
    operator, *flags = name.split()
    system = [log_diag if "log" in flags else diag, off_diag, x, flat, "transposed" in flags, "log" in flags]
    return {
        "matvec": system,
        "solve": system,
        "outer": [x, y, flat, dtype],
        "nll": [x, log_diag, off_diag, flat],
        "nll_factor_grad": [scale, x, y, log_diag, flat, dtype],
    }[operator]


def operator(name: str):
    return getattr(torch.ops.gmrf_kernels, name.split()[0])


def call(name: str, args: Sequence) -> tuple[Tensor, ...]:
    """The operator's results, always as a tuple."""
    results = operator(name)(*args)
    return (results,) if isinstance(results, Tensor) else tuple(results)


def tensors(args: Sequence) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


def with_tensors(args: Sequence, new: Sequence[Tensor]) -> list:
    """The arguments, with other tensors in the place of the first ones."""
    return [*new, *args[len(new) :]]


def matrices(diag: Tensor, off_diag: Tensor, offsets: Offsets) -> Tensor:
    """(B, n, n) float64 of factors whose diagonals are given themselves, not their logarithms."""
    n = diag[0].numel() if len(diag) else math.prod(diag.shape[1:])
    unit = [dense_factor(torch.zeros_like(d), o, offsets) for d, o in zip(diag, off_diag, strict=True)]
    unit = torch.stack(unit) if unit else torch.zeros(0, n, n, dtype=torch.float64)
    return unit - torch.eye(n) + torch.diag_embed(diag.double().flatten(1))


def dense(name: str, args: Sequence) -> tuple[Tensor, ...]:
    """What ``call(name, args)`` must be, in float64."""
    results = dense_function(name, args)(*(t.detach().cpu().double() for t in tensors(args)))
    return tuple(r.detach() for r in results)


def dense_function(name: str, args: Sequence) -> Callable[..., tuple[Tensor, ...]]:
    """The dense counterpart of an operator as a function of its tensors alone, float64 on the CPU; differentiable by torch."""
    function = {"matvec": _matvec, "solve": _solve, "outer": _outer, "nll": _nll, "nll_factor_grad": _nll_factor_grad}
    return lambda *new: function[name.split()[0]](*with_tensors(args, new))


def _system(diag, off_diag, flat, transpose, log):
    L = matrices(diag.exp() if log else diag, off_diag, unflatten(flat, diag.ndim - 1))
    return L.mT if transpose else L


def _matvec(diag, off_diag, x, flat, transpose, log=False):
    A = _system(diag, off_diag, flat, transpose, log)
    return ((A @ x.flatten(2).unsqueeze(-1)).reshape(x.shape),)


def _solve(diag, off_diag, b, flat, transpose, log=False):
    A = _system(diag, off_diag, flat, transpose, log)
    return (torch.linalg.solve_triangular(A, b.flatten(2).unsqueeze(-1), upper=transpose).reshape(b.shape),)


def _outer(a, b, flat, dtype):
    grid = a.shape[2:]
    offsets = unflatten(flat, len(grid))
    off_diag = torch.zeros(a.shape[1], len(offsets), *grid, dtype=torch.float64)
    for k, here, there in neighbours(offsets, grid):
        off_diag[:, k, *here] = (a[:, :, *there] * b[:, :, *here]).sum(0)
    return (a * b).sum(0), off_diag


def _nll(residual, log_diag, off_diag, flat):
    (whitened,) = _matvec(log_diag, off_diag, residual, flat, True, log=True)
    squares, logdet = whitened.flatten(2).square().sum(-1), log_diag.flatten(1).sum(-1)
    return 0.5 * squares - logdet + 0.5 * math.prod(log_diag.shape[1:]) * math.log(2 * math.pi), whitened


def _nll_factor_grad(scale, residual, whitened, log_diag, flat, dtype):
    """By autograd, of Σ scale (wᵀLᵀr - log|L|): for w = Lᵀr its gradient is that of Σ scale (½ |Lᵀr|² - log|L|)."""
    offsets = unflatten(flat, log_diag.ndim - 1)
    if not log_diag.requires_grad:
        log_diag = log_diag.clone().requires_grad_()
    off_diag = torch.zeros(len(log_diag), len(offsets), *log_diag.shape[1:], dtype=torch.float64, requires_grad=True)
    (product,) = _matvec(log_diag, off_diag, residual, flat, True, log=True)
    value = (whitened * product).flatten(2).sum(-1) - log_diag.flatten(1).sum(-1)
    return torch.autograd.grad((scale * value).sum(), (log_diag, off_diag), create_graph=True, materialize_grads=True)


def assert_close(actual, expected):
    """Equal up to roundings of the arithmetic, relative to the largest entry, and one of the dtype that stores it."""
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    tolerance = TOLERANCE[accumulate_dtype(actual.dtype)]
    stored = torch.finfo(actual.dtype).eps if actual.dtype in HALF else 0
    largest = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.cpu().double(), expected.double(), rtol=tolerance + stored, atol=tolerance * max(1.0, largest)
    )


def assert_dense(name, *args, **options):
    """An operator's results on random `arguments` are those of dense linear algebra."""
    args = arguments(name, *args, **options)
    for actual, expected in zip(call(name, args), dense(name, args), strict=True):
        assert_close(actual, expected)


def assert_same_when_expanded(name, args, axis):
    """An operator reads tensors that repeat their first entry along an axis, with stride 0, as it reads copies of them."""
    expanded = [t.narrow(axis, 0, 1).expand(t.shape) for t in tensors(args)]
    copied = [t.contiguous() for t in expanded]
    assert_same(call(name, with_tensors(args, expanded)), call(name, with_tensors(args, copied)))


def assert_same(actual, expected):
    """The same bits."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        assert torch.equal(a, e)


def backward_error(diag, off_diag, x, b, offsets, transpose):
    """max_i of (|b - A x| / |A||x|)_i, A = L or Lᵀ, in rational numbers: it has no rounding of its own."""
    grid = x.shape
    diag, off_diag, x, b = (t.cpu().double().numpy() for t in (diag, off_diag, x, b))

    def rational(array, index):
        return Fraction(float(array[index]))

    rest, size = {}, {}
    for site in itertools.product(*map(range, grid)):
        product = rational(diag, site) * rational(x, site)
        rest[site], size[site] = rational(b, site) - product, abs(product)
    for k, here, there in neighbours(offsets, grid):
        row, column = (here, there) if transpose else (there, here)
        product = rational(off_diag, (k, *here)) * rational(x, column)
        rest[row] -= product
        size[row] += abs(product)
    return float(max(abs(rest[site]) / size[site] for site in rest))


def assert_small_backward_error(
    offsets: Offsets, grid: Sequence[int], dtype: torch.dtype, transpose: bool, device: str = "cpu"
):
    """A solve is backward stable whatever the condition.

    Diagonals spread over five orders of magnitude, off-diagonals that exceed most of them: solutions that grow by tens.
    """
    vector_dtype = accumulate_dtype(dtype)
    diag = (3 * torch.randn(2, *grid, dtype=torch.float64)).exp().to(device, vector_dtype)
    off_diag = (2 * torch.randn(2, len(offsets), *grid, dtype=torch.float64)).to(device, dtype)
    # Small right-hand sides leave float32 more room to grow in.
    b = (1e-10 * torch.randn(2, 2, *grid, dtype=torch.float64)).to(device, vector_dtype)
    flat = [component for offset in offsets for component in offset]
    x = torch.ops.gmrf_kernels.solve(diag, off_diag, b, flat, transpose, False)
    assert x.isfinite().all()
    assert x.abs().max() > 1e10 * x.abs().min()
    limit = (len(offsets) + 3) * torch.finfo(vector_dtype).eps  # K + 2, with K - 1 offsets
    for s, i in itertools.product(range(2), repeat=2):
        assert backward_error(diag[i], off_diag[i], x[s, i], b[s, i], offsets, transpose) <= limit


def strided(tensor):
    """The same values in other strides: every other element of every axis, the axes in reverse order in memory."""
    room = torch.full([2 * n for n in reversed(tensor.shape)], math.nan, dtype=tensor.dtype, device=tensor.device)
    view = room.permute(*reversed(range(room.ndim)))[(slice(None, None, 2),) * room.ndim]
    return view.copy_(tensor)


def sliced(tensor):
    """The same values as a slice of a network's output: grids stay contiguous, the batch axis strides over more channels."""
    axis = min(1, tensor.ndim - 1)
    shape = list(tensor.shape)
    shape[axis] += 3
    room = torch.full(shape, math.nan, dtype=tensor.dtype, device=tensor.device)
    return room.narrow(axis, 2, tensor.shape[axis]).copy_(tensor)

"""Other software that does the same work, each behind an adapter of a few lines.

An adapter has a method for each operation that the software can do. It converts the problem into the software's own format,
which is reported but not timed, and returns a `Prepared` call. Where a sparse library takes one matrix, the batch is one
block-diagonal matrix, which it is fastest with; SciPy and LAPACK go through the images one by one.
"""

import functools
import importlib.metadata
import importlib.util
import math
import warnings
from collections.abc import Sequence

import numpy as np
import scipy.linalg.lapack
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.nn.functional import pad

import banded_gmrf as bg

from .cases import Case, Problem
from .operations import Prepared, Tensors, trained


class Peer:
    """Software to compare with.

    Attributes:
        title: for tables and plots.
        module: what must be installed.
        devices: the types of device it runs on.
        allocates_with_torch: torch knows the memory that it takes on a GPU.
    """

    title: str
    module: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    allocates_with_torch = True

    def has(self, operation: str) -> bool:
        """Whether there is an adapter for this operation."""
        return hasattr(self, operation)

    def why_not(self, case: Case) -> str | None:
        """Why it is not compared on this case; None if it is."""
        device = torch.device(case.device).type
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        if device not in self.devices:
            return f"does not run on {device}"
        if case.dtype not in ("float32", "float64"):
            return f"does not take {case.dtype}"
        return None

    def prepare(self, problem: Problem, operation: str) -> Prepared:
        return getattr(self, operation)(problem)

    def version(self) -> str | None:
        """The installed version."""
        if importlib.util.find_spec(self.module) is None:
            return None
        return importlib.metadata.version(importlib.metadata.packages_distributions()[self.module][0])


class SciPy(Peer):
    title = "SciPy spsolve_triangular"
    module = "scipy"
    devices = ("cpu",)

    def sample(self, problem: Problem) -> Prepared:
        return self._solve(problem, [L.T for L in csr_factors(problem)], problem.white, lower=False)

    def solve(self, problem: Problem) -> Prepared:
        return self._solve(problem, [L.tocsc() for L in csr_factors(problem)], problem.cotangent, lower=True)

    def _solve(self, problem, matrices, b, lower):
        images = list(columns(b).numpy())
        solve = functools.partial(scipy.sparse.linalg.spsolve_triangular, lower=lower)
        return Prepared(lambda: list(map(solve, matrices, images)), lambda x: (from_columns(np.stack(x), problem),))


class LapackBand(Peer):
    title = "LAPACK tbtrs (band)"
    module = "scipy"
    devices = ("cpu",)

    def sample(self, problem: Problem) -> Prepared:
        return self._solve(problem, problem.white, trans="T")

    def solve(self, problem: Problem) -> Prepared:
        return self._solve(problem, problem.cotangent, trans="N")

    def _solve(self, problem, b, trans):
        bands = [band_matrix(problem, image) for image in range(problem.case.batch)]
        images = [np.asfortranarray(image) for image in columns(b).numpy()]
        tbtrs = scipy.linalg.lapack.stbtrs if problem.case.dtype == "float32" else scipy.linalg.lapack.dtbtrs
        return Prepared(
            lambda: [tbtrs(ab, image, uplo="L", trans=trans)[0] for ab, image in zip(bands, images, strict=True)],
            lambda x: (from_columns(np.stack(x), problem),),
        )


class Cholespy(Peer):
    title = "cholespy"
    module = "cholespy"
    allocates_with_torch = False

    def precision_solve(self, problem: Problem) -> Prepared:
        """It factorises the precision anew, with an order of its own: that is in the conversion, not in the time."""
        import cholespy

        solver = cholespy.CholeskySolverF if problem.case.dtype == "float32" else cholespy.CholeskySolverD
        precision = scipy.sparse.csr_array(block_diagonal(problem) @ block_diagonal(problem).T)
        precision.sort_indices()
        device = problem.case.device
        arrays = (torch.from_numpy(array).to(device) for array in (precision.indptr, precision.indices, precision.data))
        factorised = solver(precision.shape[0], *arrays, cholespy.MatrixType.CSR)
        b = columns(problem.reference_matvec(problem.white)).flatten(0, 1)
        x = torch.empty_like(b)
        return Prepared(lambda: factorised.solve(b, x), lambda _: (from_columns(x, problem),))


class TorchSparseGradUtils(Peer):
    title = "torchsparsegradutils"
    module = "torchsparsegradutils"

    def log_prob(self, problem: Problem) -> Prepared:
        log_diag, upper, value = self._likelihood(problem)
        return Prepared(lambda: (value(log_diag, upper),))

    def log_prob_grad(self, problem: Problem) -> Prepared:
        log_diag, upper, value = self._likelihood(problem)
        leaves = (log_diag.requires_grad_(), upper.requires_grad_())

        def run():
            result = value(*leaves)
            return result.detach(), *torch.autograd.grad(result.sum(), leaves)

        def read(result):
            value, log_diag_grad, upper_grad = result
            off_diag_grad = stencil_entries(to_scipy(upper_grad).T, problem)[1]
            return value, log_diag_grad.reshape(problem.factor.log_diag.shape), off_diag_grad

        return Prepared(run, read)

    def sample(self, problem: Problem) -> Prepared:
        from torchsparsegradutils import sparse_triangular_solve

        L, u = to_torch(block_diagonal(problem), problem.case.device), columns(problem.white).flatten(0, 1)
        return Prepared(
            lambda: sparse_triangular_solve(L, u, upper=False, transpose=True), lambda x: (from_columns(x, problem),)
        )

    def rsample_grad(self, problem: Problem) -> Prepared:
        from torchsparsegradutils import sparse_triangular_solve

        L = to_torch(block_diagonal(problem), problem.case.device).requires_grad_()
        u, g = (columns(vector).flatten(0, 1) for vector in (problem.white, problem.cotangent))

        def run():
            x = sparse_triangular_solve(L, u, upper=False, transpose=True)
            return x.detach(), *torch.autograd.grad(x, L, g)

        def read(result):
            diag_grad, off_diag_grad = stencil_entries(to_scipy(result[1]), problem)
            return from_columns(result[0], problem), diag_grad * problem.factor.diag, off_diag_grad

        return Prepared(run, read)

    def _likelihood(self, problem):
        """Built from `sparse_mm` alone: the diagonal beside the strictly upper triangle of Lᵀ."""
        from torchsparsegradutils import sparse_mm

        case, factor = problem.case, problem.factor
        n = math.prod(case.grid)
        upper = to_torch(scipy.sparse.triu(block_diagonal(problem).T, 1, format="csr"), case.device)
        log_diag = factor.log_diag.reshape(-1, 1)  # (batch n, 1), a copy
        x = columns(problem.x).flatten(0, 1)

        def value(log_diag: Tensor, upper: Tensor) -> Tensor:
            y = log_diag.exp() * x + sparse_mm(upper, x)
            squares = y.square().reshape(case.batch, n, case.samples).sum(1).T
            return log_diag.reshape(case.batch, n).sum(1) - 0.5 * squares - 0.5 * n * math.log(2 * math.pi)

        return log_diag, upper, value


class TorchCSR(Peer):
    title = "torch sparse CSR"
    module = "torch"

    def sample(self, problem: Problem) -> Prepared:
        return self._solve(problem, scipy.sparse.csr_array(block_diagonal(problem).T), problem.white, upper=True)

    def solve(self, problem: Problem) -> Prepared:
        return self._solve(problem, block_diagonal(problem), problem.cotangent, upper=False)

    def _solve(self, problem, matrix, b, upper):
        matrix, b = to_torch(matrix, problem.case.device), columns(b).flatten(0, 1)

        def run():
            with warnings.catch_warnings():  # torch has no other solve for sparse triangles
                warnings.filterwarnings("ignore", message="torch.triangular_solve is deprecated")
                return torch.triangular_solve(b, matrix, upper=upper).solution

        return Prepared(run, lambda x: (from_columns(x, problem),))


class CuPy(Peer):
    title = "CuPy spsolve_triangular"
    module = "cupy"
    devices = ("cuda",)
    allocates_with_torch = False

    def sample(self, problem: Problem) -> Prepared:
        return self._solve(problem, scipy.sparse.csr_array(block_diagonal(problem).T), problem.white, lower=False)

    def solve(self, problem: Problem) -> Prepared:
        return self._solve(problem, block_diagonal(problem), problem.cotangent, lower=True)

    def _solve(self, problem, matrix, b, lower):
        import cupy
        import cupyx.scipy.sparse
        from cupyx.scipy.sparse.linalg import spsolve_triangular

        arrays = tuple(cupy.asarray(array) for array in (matrix.data, matrix.indices, matrix.indptr))
        matrix = cupyx.scipy.sparse.csr_matrix(arrays, shape=matrix.shape)
        b = cupy.from_dlpack(columns(b).flatten(0, 1))
        return Prepared(
            lambda: spsolve_triangular(matrix, b, lower=lower), lambda x: (from_columns(torch.from_dlpack(x), problem),)
        )


class DenseTriangular(Peer):
    title = "torch.linalg.solve_triangular (dense)"
    module = "torch"

    def sample(self, problem: Problem) -> Prepared:
        return self._solve(problem, dense(problem).mT, problem.white, upper=True)

    def solve(self, problem: Problem) -> Prepared:
        return self._solve(problem, dense(problem), problem.cotangent, upper=False)

    def _solve(self, problem, matrices, b, upper):
        b = columns(b)
        return Prepared(lambda: torch.linalg.solve_triangular(matrices, b, upper=upper), lambda x: (from_columns(x, problem),))


class DenseNormal(Peer):
    title = "torch MultivariateNormal (dense)"
    module = "torch"

    def log_prob(self, problem: Problem) -> Prepared:
        L = dense(problem)
        x = problem.x.flatten(2)
        q = torch.distributions.MultivariateNormal(torch.zeros_like(x[0]), precision_matrix=L @ L.mT, validate_args=False)
        return Prepared(lambda: (q.log_prob(x),))


class EagerShifts(Peer):
    title = "torch, one shift at a time"
    module = "torch"

    def log_prob(self, problem: Problem) -> Prepared:
        x, stencil, factor = problem.x, problem.stencil, problem.factor
        return Prepared(lambda: (shifted_log_prob(x, factor.log_diag, factor.off_diag, stencil),))

    def log_prob_grad(self, problem: Problem) -> Prepared:
        x, stencil, leaves = problem.x, problem.stencil, trained(problem)

        def run():
            value = shifted_log_prob(x, *leaves, stencil)
            return value.detach(), *torch.autograd.grad(value.sum(), leaves, materialize_grads=True)

        return Prepared(run)


PEERS: dict[str, Peer] = {
    "scipy": SciPy(),
    "band": LapackBand(),
    "cholespy": Cholespy(),
    "torchsparsegradutils": TorchSparseGradUtils(),
    "csr": TorchCSR(),
    "cupy": CuPy(),
    "dense": DenseTriangular(),
    "normal": DenseNormal(),
    "shifts": EagerShifts(),
}


def shifted_log_prob(x: Tensor, log_diag: Tensor, off_diag: Tensor, stencil: bg.Stencil) -> Tensor:
    """The log likelihood (samples, batch) as one writes it in torch, without this library."""
    reach = [max((abs(offset[axis]) for offset in stencil.offsets), default=0) for axis in range(stencil.ndim)]
    padded = pad(x, [r for r in reversed(reach) for _ in range(2)])
    y = log_diag.exp() * x
    for k, offset in enumerate(stencil.offsets):
        moved = tuple(slice(r + o, r + o + n) for r, o, n in zip(reach, offset, log_diag.shape[1:], strict=True))
        y = torch.addcmul(y, off_diag[:, k], padded[:, :, *moved])
    n = math.prod(log_diag.shape[1:])
    return log_diag.flatten(1).sum(1) - 0.5 * y.square().flatten(2).sum(2) - 0.5 * n * math.log(2 * math.pi)


def columns(vectors: Tensor) -> Tensor:
    """(samples, batch, *grid) as matrices (batch, n, samples), sites in raster order."""
    return vectors.flatten(2).permute(1, 2, 0).contiguous()


def from_columns(matrices: Tensor | np.ndarray, problem: Problem) -> Tensor:
    """(batch, n, samples), or (batch n, samples), back to (samples, batch, *grid)."""
    case = problem.case
    matrices = torch.as_tensor(matrices).reshape(case.batch, -1, case.samples)
    return matrices.permute(2, 0, 1).reshape(case.samples, case.batch, *case.grid)


def csr_factors(problem: Problem) -> list[scipy.sparse.csr_array]:
    """The factor of each image."""
    factor = problem.factor
    images = zip(factor.log_diag, factor.off_diag, strict=True)
    return [bg.StencilCholesky(log_diag, off_diag, problem.stencil).to_scipy() for log_diag, off_diag in images]


def block_diagonal(problem: Problem) -> scipy.sparse.csr_array:
    """The factors of all images as one matrix (batch n, batch n)."""
    return scipy.sparse.block_diag(csr_factors(problem), format="csr")


def dense(problem: Problem) -> Tensor:
    """The same as a tensor (batch, n, n)."""
    case = problem.case
    n = math.prod(case.grid)
    matrices = torch.empty(case.batch, n, n, dtype=problem.x.dtype, device=case.device)
    for matrix, L in zip(matrices, csr_factors(problem), strict=True):
        matrix.copy_(torch.from_numpy(L.toarray()))
    return matrices


def to_torch(matrix: scipy.sparse.csr_array, device: str) -> Tensor:
    """The same matrix as a sparse CSR tensor with 32-bit indices, with which torch is fastest."""
    matrix.sort_indices()
    indptr, indices = (torch.from_numpy(array.astype(np.int32)) for array in (matrix.indptr, matrix.indices))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")  # that CSR is in beta, and that it is not checked
        return torch.sparse_csr_tensor(indptr, indices, torch.from_numpy(matrix.data), matrix.shape).to(device)


def to_scipy(matrix: Tensor) -> scipy.sparse.csr_array:
    """The reverse of `to_torch`."""
    arrays = (matrix.values(), matrix.col_indices(), matrix.crow_indices())
    return scipy.sparse.csr_array(tuple(array.cpu().numpy() for array in arrays), shape=matrix.shape)


def stencil_entries(matrix: scipy.sparse.sparray, problem: Problem) -> Tensors:
    """Diagonal (batch, *grid) and off-diagonals (batch, K-1, *grid) of a block-diagonal lower triangle."""
    case, stencil = problem.case, problem.stencil
    exists = stencil.mask(case.grid)
    off_diag = torch.zeros(case.batch, len(stencil), *case.grid, dtype=problem.x.dtype)
    for k, offset in enumerate(stencil.offsets):
        below = flat_shift(offset, case.grid)
        entries = matrix.diagonal(-below)
        entries = np.pad(entries, (0, matrix.shape[0] - len(entries))).reshape(case.batch, *case.grid)
        off_diag[:, k] = torch.from_numpy(entries) * exists[k]
    diag = torch.from_numpy(matrix.diagonal().reshape(case.batch, *case.grid))
    return diag.to(case.device), off_diag.to(case.device)


def band_matrix(problem: Problem, image: int) -> np.ndarray:
    """The factor of one image in LAPACK's band storage: row d holds the entries d below the diagonal, by column."""
    case, factor, stencil = problem.case, problem.factor, problem.stencil
    shifts = [flat_shift(offset, case.grid) for offset in stencil.offsets]
    bands = np.zeros((max(shifts, default=0) + 1, math.prod(case.grid)), dtype=case.dtype, order="F")
    bands[0] = factor.diag[image].flatten()
    for exists, off_diag, shift in zip(stencil.mask(case.grid), factor.off_diag[image], shifts, strict=True):
        bands[shift, exists.flatten()] = off_diag[exists]
    return bands


def flat_shift(offset: Sequence[int], grid: Sequence[int]) -> int:
    """How much later in raster order the neighbour comes."""
    return sum(o * math.prod(grid[axis + 1 :]) for axis, o in enumerate(offset))

"""What only a GPU shows of the Triton backend, in every operation: the same bits on every run, sizes beyond 32 bits, streams,
CUDA graphs, and memory. Values and derivatives are in `test_operators`."""

import pytest
import torch

import gmrf_kernels
from tests.emulation import DEVICE as CUDA
from tests.emulation import EMULATOR, sized
from tests.gmrf_kernels.operators import (
    OFFSETS,
    OPERATORS,
    TOLERANCE,
    arguments,
    assert_close,
    assert_same,
    call,
    dense,
    sliced,
    strided,
    tensors,
    with_tensors,
)

pytestmark = pytest.mark.gpu

# Many tiles and many wavefronts, and sizes that nothing divides.
LARGE = sized((201, 203), (9, 35))
EVEN = sized((64, 128), (6, 128))
MILLION = sized((1024, 1024), (32, 32))


@pytest.fixture
def room():
    """A function that skips the test unless so many bytes of the GPU are free."""
    if EMULATOR:
        yield lambda size: None
        return
    torch.cuda.empty_cache()

    def require(size):
        free, _ = torch.cuda.mem_get_info()
        if free < size:
            pytest.skip(f"needs {size / 2**30:.0f} GiB of free GPU memory, {free / 2**30:.0f} GiB are")

    yield require
    torch.cuda.empty_cache()


def large(name, dtype=torch.float32, samples=3, batch=5):
    return arguments(name, OFFSETS["5x5"], LARGE, samples, batch, dtype, CUDA, nan_outside=False)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_same_bits_on_every_run(name, dtype):
    args = large(name, dtype)
    expected = call(name, args)
    for _ in range(sized(10, 2)):
        assert_same(call(name, args), expected)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("layout", [strided, sliced])
@pytest.mark.parametrize(("dtype", "grid"), [(torch.float32, EVEN), (torch.bfloat16, EVEN), (torch.float32, LARGE)])
def test_the_same_bits_for_all_strides(name, layout, dtype, grid):
    """Rows of 128 sites are loaded in vectors where they are contiguous."""
    args = arguments(name, OFFSETS["5x5"], grid, 3, 4, dtype, CUDA)
    assert_same(call(name, with_tensors(args, [layout(t) for t in tensors(args)])), call(name, args))


@pytest.mark.parametrize("name", OPERATORS)
def test_many_tiles_equal_the_reference(name):
    args = large(name, torch.float64)
    actual = call(name, args)
    with gmrf_kernels.use_backend("reference"):
        expected = call(name, args)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e.cpu())


def test_the_likelihood_of_a_million_sites_in_float32():
    args = arguments("nll", OFFSETS["5x5"], MILLION, 1, 1, torch.float32, CUDA, nan_outside=False)
    value, _ = call("nll", args)
    exact, _ = call("nll", [t.double() if isinstance(t, torch.Tensor) else t for t in args])
    torch.testing.assert_close(value.double(), exact, rtol=TOLERANCE[torch.float32], atol=0)


# --- sizes ---


def random_on_gpu(name, offsets, grid, batch, dtype):
    """As `arguments`, drawn on the GPU: float32 copies of all coefficients would not fit."""
    diag = 1 + torch.rand(batch, *grid, device=CUDA)
    # Not `empty`: the emulator does not see what torch writes in place.
    off_diag = torch.zeros(batch, len(offsets), *grid, dtype=dtype, device=CUDA).uniform_(-0.05, 0.05)
    x, y = torch.randn(2, 1, batch, *grid, device=CUDA)
    flat = [component for offset in offsets for component in offset]
    return {
        "matvec": [diag, off_diag, x, flat, False, False],
        "matvec transposed": [diag, off_diag, x, flat, True, False],
        "matvec transposed log": [diag.log(), off_diag, x, flat, True, True],
        "solve": [diag, off_diag, x, flat, False, False],
        "solve transposed": [diag, off_diag, x, flat, True, False],
        "solve log": [diag.log(), off_diag, x, flat, False, True],
        "outer": [x, y, flat, dtype],
        "nll": [x, diag.log(), off_diag, flat],
        "nll_factor_grad": [torch.ones(1, batch, device=CUDA), x, y, diag.log(), flat, dtype],
    }[name]


def last_image(args):
    """The arguments for the last image alone."""
    return [(t[-1:] if t.shape[0] > 1 else t[:, -1:]).contiguous() if isinstance(t, torch.Tensor) else t for t in args]


@pytest.mark.parametrize("name", OPERATORS)
def test_a_batch_of_more_than_two_billion_coefficients(name, room):
    room(16 * 2**30)
    batch, grid, offsets = sized(175, 3), sized((1024, 1024), (16, 32)), OFFSETS["5x5"]
    assert EMULATOR or batch * len(offsets) * 1024**2 > 2**31
    args = random_on_gpu(name, offsets, grid, batch, torch.bfloat16)
    actual = call(name, args)
    alone = call(name, last_image(args))
    for a, e in zip(actual, alone, strict=True):
        torch.testing.assert_close(a[-1:] if a.shape[0] == batch else a[:, -1:], e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in OPERATORS if not name.startswith("solve")])
def test_an_image_of_more_than_two_billion_coefficients(name, room):
    """Against the reference, which takes the offsets one by one."""
    room(24 * 2**30)
    grid, offsets = sized((2**14, 2**14 + 8), (16, 24)), OFFSETS["5x5"]
    assert EMULATOR or len(offsets) * grid[0] * grid[1] > 2**31
    args = random_on_gpu(name, offsets, grid, 1, torch.bfloat16)
    actual = call(name, args)
    with gmrf_kernels.use_backend("reference"):
        expected = call(name, args)
    for a, e in zip(actual, expected, strict=True):
        rtol = torch.finfo(a.dtype).eps if a.dtype == torch.bfloat16 else TOLERANCE[a.dtype]
        # Piece by piece, because a comparison takes several times the memory of what it compares.
        for piece, expected_piece in zip(a.flatten().split(2**27), e.flatten().split(2**27), strict=True):
            torch.testing.assert_close(piece, expected_piece, rtol=rtol, atol=TOLERANCE[torch.float32])


def with_rows_far_apart(t):
    """The same values, 2³⁰ - 8 elements from one row of the grid to the next."""
    stride = sized(2**30, 2**10) - 8
    *batch, height, width = t.shape
    row = t.new_empty(*batch, width)
    memory = t.new_zeros((height - 1) * stride + row.numel())
    return memory.as_strided(t.shape, (*row.stride()[:-1], stride, 1)).copy_(t)


@pytest.mark.parametrize("name", OPERATORS)
def test_offsets_inside_a_grid_beyond_32_bits(name, room):
    room(16 * 2**30)
    args = arguments(name, OFFSETS["5x5"], (4, 40), 1, 1, torch.bfloat16, CUDA, nan_outside=False)
    expected = call(name, args)
    # One tensor is all that fits: the coefficients, or the first vector of an operation that has none.
    grids = [i for i, t in enumerate(tensors(args)) if t.shape[-2:] == (4, 40)]
    far = next((i for i in grids if tensors(args)[i].dtype == torch.bfloat16), grids[0])
    assert_same(
        call(name, with_tensors(args, [with_rows_far_apart(t) if i == far else t for i, t in enumerate(tensors(args))])),
        expected,
    )


# --- streams, graphs, memory ---


@pytest.mark.gpu("streams")
@pytest.mark.parametrize("name", OPERATORS)
def test_the_current_stream(name):
    args, later = large(name), large(name)
    expected = call(name, later)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: on another stream, kernels would read what the arguments were before
        for t, new in zip(tensors(args), tensors(later), strict=True):
            t.copy_(new)
        actual = call(name, args)
    stream.synchronize()
    assert_same(actual, expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.gpu("streams")
@pytest.mark.parametrize("name", OPERATORS)
def test_no_call_waits_for_the_gpu(name):
    args = large(name)
    call(name, args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(name, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu("second device")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPERATORS)
def test_tensors_on_another_device_than_the_current(name):
    args = arguments(name, OFFSETS["5x5"], (5, 7), device="cuda:1")
    for actual, expected in zip(call(name, args), dense(name, args), strict=True):
        assert actual.device.index == 1
        assert_close(actual, expected)


@pytest.mark.gpu("CUDA graphs")
@pytest.mark.parametrize("name", OPERATORS)
def test_a_cuda_graph(name):
    args = large(name)
    call(name, args)  # compiles, which a capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(name, args)
    for _ in range(2):
        for t, new in zip(tensors(args), tensors(large(name)), strict=True):
            t.copy_(new)
        graph.replay()
        assert_same(results, call(name, args))


@pytest.mark.gpu("memory of its own")
def test_a_slice_of_a_network_is_not_copied(room):
    """The likelihood and its gradients of bfloat16 channels allocate the gradients, vectors, and little else."""
    room(4 * 2**30)
    offsets, images, grid = OFFSETS["5x5"], 16, (512, 512)
    head = torch.empty(images, 2 + len(offsets), *grid, dtype=torch.bfloat16, device=CUDA).uniform_(-0.1, 0.1)
    residual = torch.randn(images, *grid, device=CUDA)
    off_diag = head[:, 2:].requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gmrf_kernels.negative_log_likelihood(residual, head[:, 1], off_diag, offsets, 2).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    vector = residual.nbytes
    assert peak < off_diag.grad.nbytes + 6 * vector

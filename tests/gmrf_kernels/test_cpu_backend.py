"""What is the CPU backend's own: threads, forked processes, and kernels for stencils of many offsets."""

import gc
import hashlib
import math
import multiprocessing
import signal
import sys
import threading
import time
import weakref
from array import array
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import banded_gmrf as bg
from gmrf_kernels import cpu, cpu_compile, cpu_plan, memory, reference, threads
from tests.cases import GRIDS
from tests.gmrf_kernels.cpu_backend import HANGS, assert_same_bits, forks, in_forked_process, run_python
from tests.gmrf_kernels.operators import (
    NDIM,
    OFFSETS,
    OPERATORS,
    SMALL,
    WIDE,
    arguments,
    assert_dense,
    assert_same_when_expanded,
    assert_small_backward_error,
    call,
    sliced,
    tensors,
    with_tensors,
)


@pytest.fixture(autouse=True)
def keep_the_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def looped(monkeypatch):
    """Every stencil has too many offsets to be unrolled."""
    monkeypatch.setattr(cpu_plan, "_MOST_UNROLLED_OFFSETS", -1)


@pytest.fixture(params=["unrolled", "looped"])
def either_kernel(request):
    """Both the kernels specialised to a stencil and those for many offsets."""
    if request.param == "looped":
        request.getfixturevalue("looped")


def large(name, dtype=torch.float64, samples=2):
    """Arguments large enough for threads; an odd number of images, that no number of threads divides."""
    args = arguments(name, OFFSETS["5x5"], (20, 33), samples, 7, dtype, nan_outside=False)
    assert cpu_plan._SERIAL_COEFFICIENTS < 7 * 12 * 20 * 33
    return args


def digest(results) -> str:
    return hashlib.sha256(b"".join(r.numpy().tobytes() for r in results)).hexdigest()


# --- threads ---


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_same_bits_for_any_number_of_threads(name, dtype):
    assert_same_bits_for_any_number_of_threads(name, dtype)


def assert_same_bits_for_any_number_of_threads(name, dtype):
    args = large(name, dtype)
    torch.set_num_threads(1)
    expected = call(name, args)
    for count in (2, 3):
        torch.set_num_threads(count)
        for _ in range(3):
            assert_same_bits(call(name, args), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_same_bits_without_openmp(name, monkeypatch):
    args = large(name)
    torch.set_num_threads(3)
    expected = call(name, args)
    monkeypatch.setattr(threads, "_openmp_parallel", lambda: None)
    monkeypatch.setattr(threads, "_pool", None)
    assert_same_bits(call(name, args), expected)
    assert threads._pool is not None
    threads._pool.shutdown()


@pytest.mark.skipif(sys.platform != "linux", reason="torch carries GNU OpenMP in its wheels for Linux")
def test_openmp_of_torch_is_found():
    assert threads._openmp_parallel() is not None


@pytest.mark.parametrize("name", OPERATORS)
def test_as_many_threads_as_torch_says(name, monkeypatch):
    counts = []

    def record(kernel, data, count, owners):
        counts.append(count)
        threads.run_in_threads(kernel, data, count, owners)

    monkeypatch.setattr(cpu_plan, "run_in_threads", record)
    few = arguments(name, OFFSETS["5x5"], (4, 5))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        call(name, large(name))
        call(name, few)  # a small call is not worth waking a thread
    assert counts == [1, 1, 2, 1, 3, 1]


def test_a_solve_takes_no_more_threads_than_images(monkeypatch):
    counts = []
    monkeypatch.setattr(cpu_plan, "run_in_threads", lambda kernel, data, count, owners: counts.append(count) or kernel(data))
    torch.set_num_threads(3)
    call("solve", arguments("solve", OFFSETS["5x5"], (60, 70), samples=1, batch=1))
    assert counts == [1]


@pytest.mark.parametrize("openmp", [True, False])
def test_calls_from_several_python_threads_at_once(openmp, monkeypatch, nothing_compiled):
    if not openmp:
        monkeypatch.setattr(threads, "_openmp_parallel", lambda: None)
    torch.set_num_threads(2)
    calls = [(name, large(name)) for name in OPERATORS]
    with ThreadPoolExecutor(4) as pool:
        # Kernels are loaded by the first calls: these race, too.
        actual = list(pool.map(lambda c: call(*c), calls * 4))
    for i, results in enumerate(actual):
        assert_same_bits(results, call(*calls[i % len(calls)]))


class _Buffer:
    """Memory that a worker writes."""


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, which processes of pytest-xdist ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("where", ["in its own share", "while it waits"])
def test_an_interrupt_leaves_the_pool_its_buffers(where, monkeypatch):
    """Today's results are freed by Ctrl-C, and tomorrow's lie where workers of Python's pool still write."""
    monkeypatch.setattr(threads, "_openmp_parallel", lambda: None)
    monkeypatch.setattr(threads, "_pool", None)
    main, started, written = threading.get_ident(), threading.Event(), []

    def kernel(data):
        if threading.get_ident() == main:
            started.wait(HANGS)
            if where == "in its own share":
                raise KeyboardInterrupt
            return
        started.set()
        time.sleep(0.2)
        if where == "while it waits":
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)
        written.append(owner() is not None)

    buffer = _Buffer()
    owner = weakref.ref(buffer)
    with pytest.raises(KeyboardInterrupt):
        threads.run_in_threads(kernel, 0, 2, owners=(buffer,))
    assert written == [True]  # and no longer at work
    threads._pool.shutdown()


def test_work_that_an_interrupt_abandons_owns_its_buffers(monkeypatch):
    """Where an interrupt comes between two of Python's instructions nothing waits for the work."""
    monkeypatch.setattr(threads, "_openmp_parallel", lambda: None)
    monkeypatch.setattr(threads, "_pool", None)
    monkeypatch.setattr(threads, "_wait", lambda futures: None)
    main, go_on, alive = threading.get_ident(), threading.Event(), []

    def kernel(data):
        if threading.get_ident() == main:
            raise KeyboardInterrupt
        go_on.wait(HANGS)
        alive.append(owner() is not None)

    def interrupted():
        buffer = _Buffer()
        with pytest.raises(KeyboardInterrupt):
            threads.run_in_threads(kernel, 0, 2, owners=(buffer,))
        return weakref.ref(buffer)

    owner = interrupted()
    gc.collect()
    go_on.set()
    threads._pool.shutdown()
    assert alive == [True]
    gc.collect()
    assert owner() is None


@pytest.mark.parametrize("name", OPERATORS)
def test_kernels_name_all_memory_that_they_use(name, either_kernel, monkeypatch):
    """Every address among a kernel's arguments is that of an owner's memory."""
    seen = []

    def record(kernel, data, count, owners):
        ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in owners if isinstance(t, torch.Tensor)]
        numbers = next(o for o in owners if isinstance(o, array))
        assert data == numbers.buffer_info()[0]
        ranges.append((data, data + 8 * len(numbers)))  # scratch lies behind the arguments
        seen.extend(any(start <= a < stop for start, stop in ranges) for a in numbers if a > 2**32)
        kernel(data)

    monkeypatch.setattr(cpu_plan, "run_in_threads", record)
    call(name, arguments(name, OFFSETS["5x5"], (4, 5)))
    assert len(seen) >= 4
    assert all(seen)


INTERRUPTED = """
import os, signal, sys, threading, time
import torch
from gmrf_kernels import cpu, threads
threads._openmp_parallel = lambda: None
torch.set_num_threads(2)
offsets = ((0, 1), (1, -1), (1, 0), (1, 1))
diag, off_diag, b = torch.ones(64, 96, 128), torch.zeros(64, 4, 96, 128), torch.ones(1, 64, 96, 128)
cpu.solve(diag, off_diag, b, offsets, True, False)
def on_interrupt(number, frame):
    while frame is not None:
        if frame.f_code is calls.__code__:
            raise KeyboardInterrupt
        frame = frame.f_back
signal.signal(signal.SIGINT, on_interrupt)
def calls():
    while time.monotonic() < deadline:
        cpu.solve(diag, off_diag, b, offsets, True, False)
done = threading.Event()
def interrupt():
    while not done.wait(0.003):
        os.kill(os.getpid(), signal.SIGINT)
interrupts = threading.Thread(target=interrupt)
interrupts.start()
count, deadline = 0, time.monotonic() + 3
while time.monotonic() < deadline:
    try:
        calls()
    except KeyboardInterrupt:
        count += 1
done.set()
interrupts.join()
assert torch.equal(cpu.solve(diag, off_diag, b, offsets, True, False), b)
print(count > 10)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends itself signals")
def test_a_storm_of_interrupts():
    done = run_python(INTERRUPTED)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


# --- forked processes ---


def _digests(count, calls):
    torch.set_num_threads(count)
    return [digest(call(*c)) for c in calls]


@forks
@pytest.mark.parametrize("count", [1, 2])
def test_a_forked_process_computes_the_same_bits(count):
    """Threads of the parent are gone in the child, and what waits for them waits for ever."""
    calls = [(name, large(name)) for name in OPERATORS]
    expected = _digests(2, calls)
    assert in_forked_process(_digests, count, calls) == expected
    assert _digests(2, calls) == expected  # and the parent's threads are as they were


@forks
def test_a_process_forked_while_other_threads_call(monkeypatch):
    """Locks that another thread holds at the fork are never released in the child."""
    monkeypatch.setattr(memory, "_SMALLEST_BYTES", 1)
    calls = [(name, large(name)) for name in OPERATORS]
    expected = _digests(2, calls)
    done = threading.Event()

    def busy():
        while not done.is_set():
            memory.empty((64,), torch.float64)
            call(*calls[0])

    others = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
    for other in others:
        other.start()
    try:
        # Holding the lock makes certain what the other threads make likely.
        with cpu_compile._lock:
            child = ThreadPoolExecutor(1).submit(in_forked_process, _digests, 1, calls)
            while not multiprocessing.active_children():
                time.sleep(0.01)
        assert child.result() == expected
    finally:
        done.set()
        for other in others:
            other.join()


class _Solutions(torch.utils.data.Dataset):
    def __init__(self, args):
        self.args = args

    def __len__(self):
        return 4

    def __getitem__(self, i):
        diag, off_diag, b, *rest = self.args
        torch.set_num_threads(2)  # a worker has one unless it asks for more
        return call("solve", [diag, off_diag, b * (i + 1), *rest])[0]


@forks
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on a machine of one core
def test_data_loader_workers():
    torch.set_num_threads(2)
    data = _Solutions(large("solve"))
    expected = [data[i] for i in range(len(data))]
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=HANGS)
    assert_same_bits(list(loader), expected)


# --- results ---


@pytest.mark.parametrize("name", OPERATORS)
def test_results_of_threads_are_written_everywhere(name, either_kernel, monkeypatch):
    args = large(name)
    expected = call(name, args)
    monkeypatch.setattr(cpu, "empty", lambda shape, dtype: torch.full(tuple(shape), torch.nan, dtype=dtype))
    torch.set_num_threads(2)
    assert_same_bits(call(name, args), expected)


@pytest.mark.parametrize("name", ["outer", "nll_factor_grad"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_written_past_the_caches_are_the_same(name, dtype, either_kernel, monkeypatch):
    args = arguments(name, OFFSETS["5x5"], (5, 64), dtype=dtype)
    expected = call(name, args)
    monkeypatch.setattr(cpu, "_STREAMING_BYTES", 0)
    cpu_plan.forget_plans()
    assert_same_bits(call(name, args), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_neither_arguments_nor_memory_around_results_are_written(name, either_kernel, monkeypatch):
    args = arguments(name, OFFSETS["5x5"], (3, 37), nan_outside=False)
    before = [t.clone() for t in tensors(args)]
    rooms = []

    def surrounded(shape, dtype):
        size = torch.Size(shape).numel()
        rooms.append(torch.full((size + 256,), 7.0, dtype=dtype))
        return rooms[-1][128 : 128 + size].view(*shape)

    monkeypatch.setattr(cpu, "empty", surrounded)
    call(name, args)
    assert rooms
    for room in rooms:
        assert (room[:128] == 7).all()
        assert (room[-128:] == 7).all()
    assert_same_bits(tensors(args), before)


# --- samples that share a factor ---


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 2])
def test_a_sample_is_solved_alike_alone_and_among_others(transpose, dtype, count):
    """To the bit, in each number of samples in step; also where a sample or the factor leaves the normal range."""
    diag, off_diag, b, *_ = arguments("solve", OFFSETS["5x5"], (9, 37), 9, 3, dtype, nan_outside=False)
    off_diag[1, 0, 4] = torch.finfo(dtype).smallest_normal / 4  # a row that is walked again, for all samples of a factor
    b[4, 2, 3, 5] = torch.inf  # and one for one sample
    torch.set_num_threads(count)

    def solve(b):
        return cpu.solve(diag, off_diag, b, OFFSETS["5x5"], transpose, False)

    alone = torch.cat([solve(one) for one in b.split(1)])
    for samples in range(2, 10):
        torch.testing.assert_close(solve(b[:samples]), alone[:samples], rtol=0, atol=0, equal_nan=True)
    assert alone[:4].isfinite().all()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_sample_is_multiplied_alike_alone_and_among_others(transpose, dtype):
    """To the bit, in each number of samples that are computed together; also where one of them is not finite."""
    diag, off_diag, x, *_ = arguments("matvec", OFFSETS["5x5"], (9, 37), 9, 3, dtype)
    x[4, 2, 3, 5] = torch.inf

    def product(x):
        return cpu.matvec(diag, off_diag, x, OFFSETS["5x5"], transpose, False)

    alone = torch.cat([product(one) for one in x.split(1)])
    for samples in range(2, 10):
        torch.testing.assert_close(product(x[:samples]), alone[:samples], rtol=0, atol=0, equal_nan=True)
    assert alone[:4].isfinite().all()
    residual, log_diag, off_diag, *_ = arguments("nll", OFFSETS["5x5"], (9, 37), 9, 3, dtype)
    # At a row's end: sites beyond it have this neighbour, and are not of the image.
    residual[4, 2, 3, 36] = torch.inf
    assert cpu.nll(residual, log_diag, off_diag, OFFSETS["5x5"])[0][4, 2] == torch.inf
    values = torch.cat([cpu.nll(one, log_diag, off_diag, OFFSETS["5x5"])[0] for one in residual.split(1)])
    for samples in (2, 3, 5, 9):
        value, _ = cpu.nll(residual[:samples], log_diag, off_diag, OFFSETS["5x5"])
        torch.testing.assert_close(value, values[:samples], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("samples", "batch", "threads", "expected"),
    [
        (1, 1, 1, (1, False)),
        (1, 2, 1, (2, False)),
        (1, 3, 2, (1, False)),
        (2, 1, 1, (2, True)),
        (2, 1, 2, (1, False)),
        (3, 5, 2, (2, True)),
        (16, 1, 2, (4, True)),
        (4, 1, 2, (2, True)),
        (4, 2, 2, (4, True)),
    ],
)
def test_samples_share_coefficients_unless_that_leaves_threads_without_work(samples, batch, threads, expected):
    assert cpu_plan._solved_in_step(samples, batch, threads) == expected


# --- several fields ---


LOW_RANK = [
    ((1,), 1, 1, 1),
    ((3, 5), 2, 4, 1),
    ((33, 40), 5, 6, 2),
    ((4, 2, 3), 2, 16, 5),
    ((65, 64), 2, 16, 1),
    ((1100,), 5, 3, 9),
    ((2, 3), 0, 2, 1),
    ((2, 3), 2, 2, 0),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("grid", "batch", "rank", "samples"), LOW_RANK)
def test_densities_with_a_low_rank_part_equal_the_reference(grid, batch, rank, samples, dtype, monkeypatch, poisoned_memory):
    """Tiles, spans and parts of the batch that do not come out even; whatever the layout and the number of threads."""
    offsets = ((0,) * (len(grid) - 1) + (1,), (1, *[0] * (len(grid) - 1)))[: len(grid)]
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    residual, log_diag, off_diag, factors, value_bar = (
        scale * torch.randn(shape, dtype=vector)
        for scale, shape in (
            (1.0, (samples, batch, *grid)),
            (0.1, (batch, *grid)),
            (0.1, (batch, len(offsets), *grid)),
            (1.0, (batch, rank, *grid)),
            (1.0, (samples, batch)),
        )
    )
    given = residual, log_diag, off_diag.to(dtype), factors
    expected = reference.low_rank_log_density(*given, offsets)
    of_expected = reference.low_rank_gradients(value_bar, *given, *expected[1:], offsets, [True] * 4)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4  # thousands of sums of numbers that were rounded once
    close = {"rtol": tolerance, "atol": tolerance}
    two_images = 2 * (rank + samples) * math.prod(grid) * residual.itemsize
    results = []
    for count, cached in (
        (1, cpu._CACHED_BYTES),
        (2, cpu._CACHED_BYTES),
        (1, two_images),
        (2, two_images // 2),
        (2, 1),
        (1, 1),
    ):
        torch.set_num_threads(count)
        monkeypatch.setattr(cpu, "_CACHED_BYTES", cached)
        # Threads however little there is to do.
        monkeypatch.setattr(cpu_plan, "_SERIAL_COEFFICIENTS", -1)
        cpu_plan.forget_plans()
        actual = cpu.low_rank_log_density(*given, offsets)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, **close)
        value, nothing, system = cpu.low_rank_log_density(*given, offsets, keep=False)
        assert nothing is None
        assert_same_bits((value, system), actual[::2])
        gradients = cpu.low_rank_gradients(value_bar, *given, *actual[1:], offsets, [True] * 4)
        for one, other in zip(gradients, of_expected, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=max(tolerance, 2 * torch.finfo(other.dtype).eps), atol=tolerance)
        for i in range(4):
            alone = cpu.low_rank_gradients(value_bar, *given, *actual[1:], offsets, [i == j for j in range(4)])
            assert [g is None for g in alone] == [i != j for j in range(4)]
            assert_same_bits((alone[i],), (gradients[i],))
        results.append((*actual, *gradients))
    for result in results:
        assert_same_bits(result, results[0])


def test_layouts_of_a_low_rank_part():
    offsets, grid = OFFSETS["3x3"], (5, 7)
    residual, factors = torch.randn(3, 4, *grid).transpose(0, 1), torch.randn(2, 3, *grid, 3).permute(1, 0, 4, 2, 3)[:, 0]
    log_diag, off_diag = 0.1 * torch.randn(1, *grid).expand(3, *grid), 0.1 * torch.randn(1, 4, *grid).expand(3, 4, *grid)
    given = residual, log_diag, off_diag, factors
    contiguous = [t.contiguous() for t in given]
    value_bar = torch.ones(()).expand(4, 3)
    actual, expected = (cpu.low_rank_log_density(*tensors, offsets) for tensors in (given, contiguous))
    assert_same_bits(actual, expected)
    assert_same_bits(
        cpu.low_rank_gradients(value_bar, *given, *actual[1:], offsets, [True] * 4),
        cpu.low_rank_gradients(value_bar.contiguous(), *contiguous, *expected[1:], offsets, [True] * 4),
    )


def test_a_low_rank_part_takes_memory_in_proportion_to_the_samples():
    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes = [t.untyped_storage().nbytes() // t.itemsize for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            self.largest = max(self.largest, *sizes, 0)
            return result

    samples, rank, grid = 300, 2, (3, 4)
    given = torch.randn(samples, 1, *grid), torch.zeros(1, *grid), torch.zeros(1, 1, *grid), torch.randn(1, rank, *grid)
    with Largest() as mode:
        value, whitened, system = cpu.low_rank_log_density(*given, ((0, 1),))
        cpu.low_rank_gradients(torch.ones_like(value), *given, whitened, system, ((0, 1),), [True] * 4)
    assert (samples + rank) * 12 <= mode.largest < 4 * (samples + rank) * 12


@pytest.mark.parametrize("backend", [cpu, reference])
def test_systems_that_have_no_root_are_nan_and_leave_other_images_alone(backend):
    """A factor with NaN, one that overflows, and equal ones so large that I is lost beside their squares."""
    grid, offsets = (3, 5), ((0, 1),)
    residual, factors = torch.randn(2, 4, *grid), torch.randn(4, 3, *grid)
    log_diag, off_diag = torch.zeros(4, *grid), torch.zeros(4, 1, *grid)
    log_diag[1] = 10
    alone = backend.low_rank_log_density(residual[:, 3:], log_diag[3:], off_diag[3:], factors[3:], offsets)
    factors[0, 1, 0, 0] = torch.nan
    factors[1, 2] = 1e38
    factors[2] = 1e30
    value, whitened, system = backend.low_rank_log_density(residual, log_diag, off_diag, factors, offsets)
    infinite = torch.full((1, 1, *grid), 1e170, dtype=torch.float64)
    one = residual[:, :1].double(), log_diag[:1].double(), off_diag[:1].double(), infinite
    assert backend.low_rank_log_density(*one, offsets)[0].isnan().all()
    assert value[:, :3].isnan().all()
    assert whitened[3:, :3].isnan().all()
    gradients = backend.low_rank_gradients(
        torch.ones(2, 4), residual, log_diag, off_diag, factors, whitened, system, offsets, [True] * 4
    )
    assert gradients[3][:3].isnan().all()
    assert gradients[3][3].isfinite().all()
    torch.testing.assert_close(value[:, 3:], alone[0])


# --- stencils of many offsets ---

# Longer than the blocks of a row in which a solve takes it; more rows than a band has.
MANY = {
    "line": (tuple((o,) for o in range(1, 70)), (150,)),
    "patch": (bg.Stencil.square(13).offsets, (18, 7)),
    "box": (bg.Stencil.box((2, 2, 3)).offsets, (3, 4, 9)),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("stencil", MANY)
def test_stencils_of_many_offsets_equal_dense_linear_algebra(name, stencil, poisoned_memory):
    offsets, grid = MANY[stencil]
    assert not cpu_plan.unrolled(offsets)
    for samples, batch in [(1, 1), (3, 2)]:
        assert_dense(name, offsets, grid, samples, batch)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("stencil", OFFSETS)
def test_looped_kernels_equal_dense_linear_algebra(name, stencil, looped, poisoned_memory):
    ndim = NDIM[stencil]
    for grid in (*GRIDS[ndim], WIDE[ndim]):
        assert_dense(name, OFFSETS[stencil], grid)


@pytest.mark.parametrize("name", ["nll", "solve", "outer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_looped_kernels_in_other_dtypes(name, dtype, looped):
    for stencil in ("far line", "3x3", "volume"):
        assert_dense(name, OFFSETS[stencil], WIDE[NDIM[stencil]], dtype=dtype)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("stencil", "grid"), [("far line", (70,)), ("5x5", (6, 40)), ("volume", (3, 4, 30))])
def test_backward_error_of_a_looped_solve(transpose, stencil, grid, looped):
    assert_small_backward_error(OFFSETS[stencil], grid, torch.float64, transpose)


@pytest.mark.parametrize("name", OPERATORS)
def test_looped_kernels_take_any_strides_of_samples_and_images(name, looped):
    for stencil, grid in SMALL:
        args = arguments(name, OFFSETS[stencil], grid)
        assert_same_bits(call(name, with_tensors(args, [sliced(t) for t in tensors(args)])), call(name, args))
    args = arguments(name, OFFSETS["5x5"], (3, 5), samples=4, batch=3, nan_outside=False)
    for axis in (0, 1):
        assert_same_when_expanded(name, args, axis)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_same_bits_of_looped_kernels_for_any_number_of_threads(name, looped):
    assert_same_bits_for_any_number_of_threads(name, torch.float64)


def test_one_looped_kernel_serves_all_stencils(looped):
    call("solve", arguments("solve", OFFSETS["far line"], (7,)))
    compiled = cpu_compile._compiled.cache_info().currsize
    call("solve", arguments("solve", OFFSETS["volume"], (2, 2, 3)))
    assert cpu_compile._compiled.cache_info().currsize == compiled

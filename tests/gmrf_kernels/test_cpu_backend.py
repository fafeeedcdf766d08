"""What is the CPU backend's own: its cache on disk, threads, forked processes, and memory that is used again."""

import functools
import gc
import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import banded_gmrf as bg
from gmrf_kernels import cpu, memory, threads
from tests.cases import GRIDS
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

# Seconds after which a process or thread that should be done in one is taken to hang.
HANGS = 30

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(autouse=True)
def keep_the_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nothing_compiled(monkeypatch):
    """As in a new process: kernels come from the disk cache or are compiled."""
    monkeypatch.setattr(cpu, "_compiled", functools.cache(cpu._compiled.__wrapped__))


@pytest.fixture
def looped(monkeypatch):
    """Every stencil has too many offsets to be unrolled."""
    monkeypatch.setattr(cpu, "_MOST_UNROLLED_OFFSETS", -1)


@pytest.fixture(params=["unrolled", "looped"])
def either_kernel(request):
    """Both the kernels specialised to a stencil and those for many offsets."""
    if request.param == "looped":
        request.getfixturevalue("looped")


def large(name, dtype=torch.float64, samples=2):
    """Arguments large enough for threads; an odd number of images, that no number of threads divides."""
    args = arguments(name, OFFSETS["5x5"], (20, 33), samples, 7, dtype, nan_outside=False)
    assert cpu._SERIAL_COEFFICIENTS < 7 * 12 * 20 * 33
    return args


def assert_same_bits(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def digest(results) -> str:
    return hashlib.sha256(b"".join(r.numpy().tobytes() for r in results)).hexdigest()


# --- the cache on disk ---

ONE_CALL = """
import sys, warnings
warnings.simplefilter("error")
import torch, gmrf_kernels
if sys.argv[1] == "no compiler":
    from numba.core.compiler import CompilerBase
    def compile_extra(self, function):
        raise AssertionError(f"{function} is compiled again")
    CompilerBase.compile_extra = compile_extra
ones = torch.ones(1, 5, dtype=torch.float64)
print(gmrf_kernels.matvec(ones, ones[:, None] / 3, ones / 7, ((1,),), 1).tolist())
"""


def test_a_second_process_does_not_compile_again(tmp_path):
    def run(*options):
        environment = {**os.environ, "BANDED_GMRF_CACHE": str(tmp_path / "cache")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-c", ONE_CALL, *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2 * HANGS, check=False)
        assert done.returncode == 0, done.stderr
        files = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path / "cache").rglob("*") if p.is_file()}
        return done.stdout, files

    first, second = run("compiler"), run("no compiler")
    assert first == second
    assert {".py", ".nbi", ".nbc"} <= {path.suffix for path in first[1]}
    assert not any(path.suffix == ".tmp" for path in first[1])


def test_an_unusable_cache_only_costs_the_compile(tmp_path, monkeypatch, nothing_compiled):
    args = arguments("matvec", OFFSETS["far line"], (7,))
    expected = call("matvec", args)
    regular_file = tmp_path / "file"
    regular_file.write_text("")
    monkeypatch.setenv("BANDED_GMRF_CACHE", str(regular_file / "cache"))
    cpu._compiled.cache_clear()
    with pytest.warns(UserWarning, match="compiled kernels are not kept"):
        actual = call("matvec", args)
    assert_same_bits(actual, expected)
    # Once is enough.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(call("matvec", args), expected)


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("BANDED_GMRF_CACHE", str(tmp_path / "a"))
    assert cpu._cache_directory() == tmp_path / "a"
    monkeypatch.delenv("BANDED_GMRF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu._cache_directory() == tmp_path / "banded_gmrf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cpu._cache_directory() == Path.home() / ".cache" / "banded_gmrf"


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

    def record(kernel, data, count):
        counts.append(count)
        threads.run_in_threads(kernel, data, count)

    monkeypatch.setattr(cpu, "run_in_threads", record)
    few = arguments(name, OFFSETS["5x5"], (4, 5))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        call(name, large(name))
        call(name, few)  # a small call is not worth waking a thread
    assert counts == [1, 1, 2, 1, 3, 1]


def test_a_solve_takes_no_more_threads_than_images(monkeypatch):
    counts = []
    monkeypatch.setattr(cpu, "run_in_threads", lambda kernel, data, count: counts.append(count) or kernel(data))
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


# --- forked processes ---


def _in_forked_process(function, *args):
    """What the function returns in a forked child; a child that hangs fails the test."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(function(*args)), daemon=True)
    child.start()
    sender.close()
    try:
        assert receiver.poll(HANGS), "the child hangs"
        return receiver.recv()
    finally:
        child.kill()
        child.join()


def _digests(count, calls):
    torch.set_num_threads(count)
    return [digest(call(*c)) for c in calls]


@forks
@pytest.mark.parametrize("count", [1, 2])
def test_a_forked_process_computes_the_same_bits(count):
    """Threads of the parent are gone in the child, and what waits for them waits for ever."""
    calls = [(name, large(name)) for name in OPERATORS]
    expected = _digests(2, calls)
    assert _in_forked_process(_digests, count, calls) == expected
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
        with cpu._compile_lock:
            child = ThreadPoolExecutor(1).submit(_in_forked_process, _digests, 1, calls)
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
    assert not cpu._unrolled(offsets)
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
    compiled = cpu._compiled.cache_info().currsize
    call("solve", arguments("solve", OFFSETS["volume"], (2, 2, 3)))
    assert cpu._compiled.cache_info().currsize == compiled


# --- memory ---


@pytest.fixture
def no_free_blocks(monkeypatch):
    monkeypatch.setattr(memory, "_free", [])


LARGE = (memory._SMALLEST_BYTES // 8, 2)  # twice the smallest size that is kept


def test_a_freed_block_is_used_again(no_free_blocks):
    first = memory.empty(LARGE, torch.float64)
    assert (first.shape, first.dtype, first.is_contiguous()) == (LARGE, torch.float64, True)
    address = first.data_ptr()
    assert address % 64 == 0
    del first
    # Of the same bytes, whatever the shape and dtype.
    assert memory.empty((LARGE[1], 2 * LARGE[0]), torch.float32).data_ptr() == address


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda t: t[7:9], id="view"),
        pytest.param(lambda t: t.numpy()[7:9], id="numpy"),
        pytest.param(lambda t: t.detach(), id="detached"),
        pytest.param(lambda t: t.view(torch.int64), id="dtype"),
        pytest.param(lambda t: t.untyped_storage(), id="storage"),
    ],
)
def test_a_block_in_use_is_not_handed_out(make, no_free_blocks):
    tensor = memory.empty(LARGE, torch.float64)
    address = tensor.data_ptr()
    user = make(tensor)
    del tensor
    other = memory.empty(LARGE, torch.float64)
    assert other.data_ptr() != address
    del user
    assert memory.empty(LARGE, torch.float64).data_ptr() == address


def test_small_results_and_other_sizes_take_no_kept_block(no_free_blocks):
    block = memory.empty(LARGE, torch.float64)
    address = block.data_ptr()
    del block
    assert len(memory._free) == 1
    assert memory.empty((LARGE[0] + 1, 2), torch.float64).data_ptr() != address
    memory.empty((3, 4), torch.float32)
    assert memory.empty((0, 4), torch.float32).shape == (0, 4)
    assert sorted(map(len, memory._free)) == [2 * LARGE[0] * 8, 2 * (LARGE[0] + 1) * 8]


def test_no_more_than_the_limit_is_kept(no_free_blocks, monkeypatch):
    size = LARGE[0] * LARGE[1] * 8
    monkeypatch.setattr(memory, "_KEPT_BYTES", 2 * size)
    blocks = [memory.empty(LARGE, torch.float64) for _ in range(4)]
    del blocks
    assert len(memory._free) == 2


def test_gradients_reach_results_in_kept_memory(no_free_blocks, monkeypatch):
    """Blocks come back while autograd, which runs backward passes in threads of its own, takes others."""
    monkeypatch.setattr(memory, "_SMALLEST_BYTES", 1)
    args = arguments("nll", OFFSETS["5x5"], (5, 7), nan_outside=False)
    inputs = [t.requires_grad_() for t in tensors(args)]
    expected = None
    for _ in range(5):
        gradients = torch.autograd.grad(call("nll", args)[0].sum(), inputs)
        expected = expected or [g.clone() for g in gradients]
        assert_same_bits(gradients, expected)


def _collected_blocks():
    gc.freeze()  # what exists already need not be looked at each time
    for i in range(2000):
        cycle = [memory.empty((64 + i % 8,), torch.float64)]
        cycle.append(cycle)
        del cycle
        # The collector runs at the next of every few allocations: at another place in `memory` for each number.
        gc.set_threshold(1 + i % 16)
        memory.empty((64 + i % 8,), torch.float64)
    return "done"


@forks
def test_blocks_freed_by_the_garbage_collector(no_free_blocks, monkeypatch):
    """The collector runs at any allocation, those inside `memory` among them: a block that it frees there must not wait."""
    monkeypatch.setattr(memory, "_SMALLEST_BYTES", 1)
    # In a process of its own, because a thread that waits for itself cannot be ended.
    assert _in_forked_process(_collected_blocks) == "done"

"""Memory of large CPU results, which is used again."""

import gc
import mmap

import numpy as np
import pytest
import torch

from gmrf_kernels import memory
from tests.gmrf_kernels.cpu_backend import assert_same_bits, forks, in_forked_process
from tests.gmrf_kernels.operators import OFFSETS, arguments, call, tensors


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
    assert in_forked_process(_collected_blocks) == "done"


def test_one_result_beyond_the_limit_leaves_the_blocks_that_are_kept(no_free_blocks, monkeypatch):
    size = LARGE[0] * LARGE[1] * 8
    monkeypatch.setattr(memory, "_KEPT_BYTES", 2 * size)
    blocks = [memory.empty(LARGE, torch.float64) for _ in range(2)]
    del blocks
    memory.empty((2 * LARGE[0] + 1, LARGE[1]), torch.float64)
    assert list(map(len, memory._free)) == [size, size]


@forks
@pytest.mark.parametrize("again", [False, True])
def test_a_forked_child_does_not_write_into_its_parents_results(again, no_free_blocks):
    block = memory.empty(LARGE, torch.float64)
    if again:
        address = block.data_ptr()
        del block
        block = memory.empty(LARGE, torch.float64)
        assert block.data_ptr() == address
    block.fill_(1.0)

    def child():
        block.numpy()[:] = np.float64(2.0)
        return float(block[-1, -1])

    assert in_forked_process(child) == 2.0
    assert (block == 1).all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages here")
def test_a_kernel_without_huge_pages(no_free_blocks, monkeypatch):
    class Block(mmap.mmap):
        def madvise(self, *args):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Block)
    result = memory.empty(LARGE, torch.float64).fill_(1.0)
    assert (result == 1).all()


def test_kept_blocks_do_not_grow(no_free_blocks):
    """As README says."""
    larger = (2 * LARGE[0], LARGE[1])
    assert memory.empty(LARGE, torch.float64).clone().resize_(larger).shape == larger
    with pytest.raises(RuntimeError, match="not resizable"):
        memory.empty(LARGE, torch.float64).resize_(larger)

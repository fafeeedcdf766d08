"""Factors, precisions and distributions behave as tensors do: ``to``, ``detach``, indexing; and they are pytree nodes."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import banded_gmrf as bg
from tests.cases import STENCILS
from tests.dense import random_factor

STENCIL, GRID = STENCILS["3x3"], (3, 4)


def factor(log_diag_batch=(), off_diag_batch=None, dtype=torch.float64):
    log_diag, _ = random_factor(STENCIL.offsets, GRID, log_diag_batch, dtype)
    off_diag_batch = log_diag_batch if off_diag_batch is None else off_diag_batch
    _, off_diag = random_factor(STENCIL.offsets, GRID, off_diag_batch, dtype, nan_outside=False)
    return bg.StencilCholesky(log_diag, off_diag, STENCIL)


def precision(*args, **kwargs):
    L = factor(*args, **kwargs)
    return bg.StencilPrecision(*L.coefficients)


def distribution(*args, **kwargs):
    L = factor(*args, **kwargs)
    return bg.GMRF(torch.randn(GRID).to(L.dtype), L)


def low_rank(*args, **kwargs):
    L = factor(*args, **kwargs)
    batch = L.coefficients.off_diag.shape[:-3]
    return bg.LowRankGMRF(torch.randn(GRID).to(L.dtype), L, torch.randn(*batch, 4, *GRID).to(L.dtype))


KINDS = [factor, precision, distribution, low_rank]


def tensors(node):
    """All that an object consists of, with its whole batch: (*batch, ...)."""
    if isinstance(node, bg.StencilPrecision):
        batch = node.batch_shape
        return [node.diag.expand(*batch, *GRID), node.off_diag.expand(*batch, len(STENCIL), *GRID)]
    if isinstance(node, bg.LowRankGMRF):
        return [*tensors(node.local), node.factors]
    return [*([node.loc] if isinstance(node, bg.GMRF) else []), node.log_diag, node.off_diag]


def assert_same(actual, expected):
    assert type(actual) is type(expected)
    assert actual.batch_shape == expected.batch_shape
    assert actual.stencil == expected.stencil
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)


BATCHES = [((3, 2), (3, 2)), ((3, 2), (2,)), ((), (3, 2)), ((3, 1), (1, 2))]

INDICES = [
    0,
    -1,
    np.int64(1),
    slice(1, None),
    slice(2, 2),
    None,
    ...,
    (1, 0),
    (..., 0),
    (slice(None), None),
    (..., slice(0, 2), 1),
    (slice(None), slice(None, None, 2)),
    (None, ..., None, 1),
    torch.tensor([2, 0, 0]),
    torch.tensor(1),
    [1, 2],
    torch.tensor([True, False, True]),
    (torch.tensor([2, 1]), torch.tensor([0, 1])),
    (..., torch.tensor([1, 1, 0])),
    (torch.tensor([2, 1]), None, 1),
    torch.tensor([[True, False], [True, True], [False, False]]),
    (..., torch.tensor([[True, False], [True, True], [False, False]])),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("batches", BATCHES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_indexing_is_that_of_the_batch_axes(kind, batches, index):
    node = kind(*batches)
    chosen = node[index]
    assert type(chosen) is type(node)
    assert chosen.batch_shape == torch.zeros(3, 2)[index].shape
    explicit = index if isinstance(index, tuple) else (index,)
    for actual, whole in zip(tensors(chosen), tensors(node), strict=True):
        flat = whole.flatten(2).movedim(-1, 0)  # (numbers of an element, 3, 2)
        expected = torch.stack([numbers[explicit] for numbers in flat], -1).reshape(actual.shape)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_expanded_factor_is_indexed_without_copies(index):
    L = factor().expand((3, 2))
    chosen = L[index]
    assert chosen.batch_shape == torch.zeros(3, 2)[index].shape
    if not any(isinstance(i, torch.Tensor | list) for i in (index if isinstance(index, tuple) else (index,))):
        assert chosen.coefficients.off_diag.numel() == L.coefficients.off_diag.numel()
        assert chosen.coefficients.off_diag.data_ptr() == L.coefficients.off_diag.data_ptr()
    x = torch.randn(GRID, dtype=torch.float64)
    assert torch.equal(chosen.matvec(x), L.unexpanded().matvec(x).expand(*chosen.batch_shape, *GRID))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [(0, 0, 0), 3, (..., 2), (None, 0, 0, 0), torch.tensor([3]), torch.ones(2, 2) > 0])
def test_indices_that_are_none(kind, index):
    with pytest.raises(IndexError, match=r"has batch shape \(3, 2\), and only the batch can be indexed: .*ind"):
        kind((3, 2))[index]
    with pytest.raises(IndexError, match=r"has batch shape \(\), and only the batch can be indexed"):
        kind()[0]


@pytest.mark.parametrize("kind", KINDS)
def test_iteration_is_that_along_the_first_batch_axis(kind):
    node = kind((3, 2))
    elements = list(node)
    assert len(elements) == 3
    assert_same(elements[2], node[2])
    with pytest.raises(TypeError, match="has no batch axes to iterate over"):
        iter(kind())


@pytest.mark.parametrize("kind", KINDS)
def test_to_converts_and_moves(kind):
    node = kind((2,), ())
    for single in (
        node.to(torch.float32),
        node.to(dtype=torch.float32),
        node.to("cpu", torch.float32),
        node.to(torch.zeros(1)),
    ):
        assert [t.dtype for t in tensors(single)] == [torch.float32] * len(tensors(node))
        assert single.batch_shape == node.batch_shape
    assert_same(single.to(torch.float64), kind_of(node, [t.float().double() for t in stored(node)]))
    assert {t.device.type for t in tensors(node.to(device="meta"))} == {"meta"}
    assert_same(node.to(torch.float64), node)
    assert node.to(torch.float64, copy=True).stencil == STENCIL
    with pytest.raises(TypeError, match=r"is torch.int64, expected float16, bfloat16, float32 or float64"):
        node.to(torch.int64)


def stored(node):
    if isinstance(node, bg.LowRankGMRF):
        return [*stored(node.local), node._factors]
    if isinstance(node, bg.GMRF):
        return [node.loc, *node.precision_cholesky.coefficients[:2]]
    return [node.diag, node.off_diag] if isinstance(node, bg.StencilPrecision) else [*node.coefficients[:2]]


def kind_of(node, parts):
    if isinstance(node, bg.GMRF | bg.LowRankGMRF):
        return type(node)(parts[0], bg.StencilCholesky(*parts[1:3], STENCIL), *parts[3:])
    return type(node)(*parts, STENCIL)


def test_to_keeps_an_expansion_unexpanded():
    L = factor().expand((5,)).to(torch.float32)
    assert L.batch_shape == (5,)
    assert L.coefficients.log_diag.shape == GRID


@pytest.mark.parametrize("kind", KINDS)
def test_detach_has_the_same_values_and_no_gradient(kind):
    node = kind((2,), ())
    node = kind_of(node, [t.clone().requires_grad_() for t in stored(node)])
    detached = node.detach()
    assert_same(detached, node)
    assert not any(t.requires_grad for t in tensors(detached))
    assert stored(detached)[-1].data_ptr() == stored(node)[-1].data_ptr()


@pytest.mark.parametrize("batches", [((), ()), ((2,), (2,)), ((2,), ()), ((3, 1), (2,))], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pytree_node_with_the_whole_batch_in_every_leaf(kind, batches):
    node = kind(*batches)
    leaves, spec = pytree.tree_flatten(node)
    for leaf, tensor in zip(leaves, tensors(node), strict=True):
        assert torch.equal(leaf, tensor)
    assert_same(pytree.tree_unflatten(leaves, spec), node)
    assert_same(pytree.tree_map(torch.detach, {"a": [node]})["a"][0], node)
    assert pytree.tree_structure(kind(*batches)) == spec
    restored = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert_same(pytree.tree_unflatten(leaves, restored), node)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(node)[0]]
    assert paths[-1].endswith(".factors" if kind is low_rank else ".off_diag")


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_are_the_stored_tensors_themselves(kind):
    """Wrappers hook on the tensors that they find in an output: a view of them would not be part of the graph."""
    node = kind((2,))
    assert all(leaf is tensor for leaf, tensor in zip(pytree.tree_leaves(node)[-2:], stored(node)[-2:], strict=True))


@pytest.mark.parametrize(
    "placeholder",
    [None, object(), 3.0, torch.zeros(()), torch.zeros(5, 5)],
    ids=["None", "object", "number", "tensor without axes", "tensor without a batch"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pytree_of_placeholders_keeps_its_structure(kind, placeholder):
    node = kind((2,), ())
    spec = pytree.tree_structure(node)
    held = pytree.tree_unflatten([placeholder] * spec.num_leaves, spec)
    assert pytree.tree_structure(held, is_leaf=lambda x: x is None) == spec or placeholder is None
    assert_same(pytree.tree_unflatten(pytree.tree_leaves(node), spec), node)


def test_vmap_over_objects_and_out_of_functions():
    L = factor((5,), (5,))
    x = torch.randn(5, *GRID, dtype=torch.float64)
    assert torch.equal(torch.vmap(lambda L, x: L.solve(x))(L, x), L.solve(x))
    q = bg.GMRF(x, factor())  # a factor shared by all
    y = torch.randn(5, *GRID, dtype=torch.float64)
    q = bg.GMRF(x, q.precision_cholesky.unexpanded(), validate_args=False)
    torch.testing.assert_close(torch.vmap(lambda q, y: q.log_prob(y))(q, y), q.log_prob(y), rtol=1e-13, atol=1e-13)

    def make(log_diag):
        return bg.StencilCholesky(log_diag, L.off_diag[0], STENCIL)

    made = torch.vmap(make)(L.log_diag)
    assert made.batch_shape == (5,)
    assert_same(made, bg.StencilCholesky(L.log_diag, L.off_diag[0].expand(L.off_diag.shape), STENCIL))
    two = torch.vmap(lambda log_diag: bg.StencilCholesky(log_diag.expand(2, *GRID), L.off_diag[0], STENCIL))(L.log_diag)
    assert two.batch_shape == (5, 2)
    assert_same(two[:, 1], made)
    drawn = torch.vmap(lambda loc, L: bg.GMRF(loc, L, validate_args=False))(x, L)
    assert (drawn.batch_shape, drawn.event_shape) == ((5,), GRID)
    assert torch.equal(drawn.log_prob(y), bg.GMRF(x, L).log_prob(y))
    nested = torch.vmap(torch.vmap(make))(L.log_diag.expand(2, 5, *GRID))
    assert nested.batch_shape == (2, 5)
    expanded = torch.vmap(lambda L, x: L.matvec(x))(factor().expand((5,)), x)
    assert expanded.shape == (5, *GRID)
    precisions = torch.vmap(lambda L: bg.StencilPrecision(*L.coefficients))(L)
    assert precisions.batch_shape == (5,)


def test_vmap_maps_any_axis_of_the_batch():
    L = factor((3, 1), (2,))
    x = torch.randn(GRID, dtype=torch.float64)
    actual = torch.vmap(lambda L: L.matvec(x), in_dims=1, out_dims=1)(L)
    assert torch.equal(actual, L.matvec(x))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_files(kind):
    node = kind((2,), ())
    file = io.BytesIO()
    torch.save(node, file)
    copies = [copy.copy(node), copy.deepcopy(node), pickle.loads(pickle.dumps(node))]
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    for other in copies:
        assert_same(other, node)
        assert_same(other[1], node[1])


def test_checkpoints_pass_factors_and_their_gradients():
    tensors = [t.requires_grad_() for t in random_factor(STENCIL.offsets, GRID, (2,))]
    x = torch.randn(2, *GRID, dtype=torch.float64)

    def loss(reentrant):
        L = checkpoint(lambda a, b: bg.StencilCholesky(2 * a, 2 * b, STENCIL), *tensors, use_reentrant=reentrant)
        return bg.negative_log_likelihood(x, *L.coefficients).sum()

    expected = bg.negative_log_likelihood(x, 2 * tensors[0], 2 * tensors[1], STENCIL).sum()
    for a, e in zip(*(torch.autograd.grad(v, tensors) for v in (loss(False), expected)), strict=True):
        assert torch.equal(a, e)


def test_export_of_a_module_whose_output_is_a_factor(keep_torch_defaults):
    class Head(torch.nn.Module):
        def forward(self, features):
            return bg.StencilCholesky(features[:, 0], features[:, 1:], STENCIL)

    features = torch.randn(2, 5, *GRID)
    program = torch.export.export(Head(), (features,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program, torch.export.load(file)):
        assert_same(exported.module()(features), Head()(features))


def test_a_distribution_for_pyro_is_a_node_too():
    pytest.importorskip("pyro", reason="pyro-ppl is not installed")
    from banded_gmrf.pyro import GMRF

    q = GMRF(torch.zeros(GRID, dtype=torch.float64), factor((2,)), validate_args=False)
    same = pytree.tree_map(torch.detach, q)
    assert_same(same, q)
    assert same._validate_args is False
    assert_same(q[1], GMRF(q.loc[1], q.precision_cholesky[1]))

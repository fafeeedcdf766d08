"""Calls that go past torch's dispatcher, and all that must not: whatever would see an operator sees it, and gets it right."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import gmrf_kernels
from gmrf_kernels import operators
from gmrf_kernels.stencils import flatten, unflatten
from tests.gmrf_kernels.operators import OFFSETS, OPERATORS, arguments, assert_same, call, tensors, with_tensors


def call_directly(name, args):
    """The operator as the public functions and the derivatives call it, offsets as tuples."""
    results = getattr(operators, name.split()[0])(*(unflatten(a, 2) if isinstance(a, list) else a for a in args))
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


class Spy:
    """A registered operator that takes down its name when it is called."""

    def __init__(self, op, seen):
        self.op, self.seen, self.redispatch = op, seen, op.redispatch

    def __call__(self, *args):
        self.seen.append(self.op.name().split("::")[1])
        return self.op(*args)


@pytest.fixture
def through_the_dispatcher(monkeypatch):
    """The names of the operators whose calls reach torch's dispatcher."""
    seen = []
    for name in ("matvec", "solve", "outer", "nll", "nll_factor_grad"):
        operator = getattr(operators, name)
        monkeypatch.setattr(operator, "op", Spy(operator.op, seen))
    return seen


@pytest.mark.parametrize("name", OPERATORS)
def test_direct_calls_are_what_the_dispatcher_gives(name, device, through_the_dispatcher):
    """Values, and derivatives twice, to the bit."""
    args = arguments(name, OFFSETS["5x5"], (3, 4), device=device)

    def derivatives(function):
        inputs = [t.clone().requires_grad_() for t in tensors(args)]
        results = function(name, with_tensors(args, inputs))
        first = torch.autograd.grad([r.pow(3).sum() for r in results], inputs, create_graph=True)
        second = torch.autograd.grad([g.nan_to_num().pow(2).sum() for g in first], inputs)
        return results, first, second

    assert_same(call_directly(name, args), call(name, args))
    through_the_dispatcher.clear()
    direct = derivatives(call_directly)
    assert not through_the_dispatcher
    for actual, expected in zip(direct, derivatives(call), strict=True):
        assert_same(actual, expected)


def test_public_functions_and_their_derivatives_call_the_kernels_directly(device, through_the_dispatcher):
    log_diag, off_diag, x = _inputs(device)
    _score(log_diag, off_diag, x).backward()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        _score(log_diag, off_diag, x)
    assert not through_the_dispatcher


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OPERATORS)
def test_registered_operators_refuse_dtypes_that_kernels_would_misread(name, dtype, device):
    args = arguments(name, OFFSETS["5x5"], (3, 4), device=device, dtype=torch.float32)
    for i, tensor in enumerate(tensors(args)):
        is_off_diag = tensor.ndim == 4 and tensor.shape[1] == len(OFFSETS["5x5"])
        if is_off_diag and dtype != torch.float64:
            continue  # 16 bits beside float32 are what they are for
        wrong = [t.to(dtype) if j == i else t for j, t in enumerate(tensors(args))]
        with pytest.raises(TypeError, match=r"is torch\.\w+, expected torch\.float"):
            call(name, with_tensors(args, wrong))


def _inputs(device, requires_grad=True):
    _, log_diag, off_diag, _ = arguments("nll", OFFSETS["5x5"], (3, 4), device=device, nan_outside=False)
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64).to(device)
    return [t.requires_grad_(requires_grad) for t in (log_diag, off_diag, x)]


def _score(log_diag, off_diag, x):
    offsets = OFFSETS["5x5"]
    y = gmrf_kernels.solve(log_diag, off_diag, x, offsets, 2, log=True)
    z = gmrf_kernels.matvec(log_diag, off_diag, y.sin(), offsets, 2, transpose=True, log=True)
    diag, below = gmrf_kernels.outer(x, z, offsets, 2, sample_ndim=1)
    value = gmrf_kernels.negative_log_likelihood(z, log_diag, off_diag, offsets, 2)
    return diag.pow(2).sum() + below.pow(2).sum() + value.sum()


FORWARD = ["solve", "matvec", "outer", "nll"]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gmrf_kernels":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_every_operator(device):
    inputs = _inputs(device)
    with Seen() as mode:
        _score(*inputs).backward()
    assert mode.names[:4] == FORWARD
    assert len(mode.names) > 8  # those of the backward pass


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_function_mode_goes_through_the_dispatcher(device, through_the_dispatcher):
    inputs = _inputs(device)
    expected = _score(*inputs)
    assert not through_the_dispatcher
    with Functions():
        assert_same([_score(*inputs)], [expected])
    assert through_the_dispatcher == FORWARD


def test_the_profiler_names_every_operator(device):
    inputs = _inputs(device)
    with profile() as profiled:
        _score(*inputs).backward()
    names = {event.name for event in profiled.events()}
    assert {f"gmrf_kernels::{name}" for name in (*FORWARD, "nll_factor_grad")} <= names


class Tagged(torch.Tensor):
    """A subclass that torch's operators keep."""


def test_a_subclass_is_kept(device):
    log_diag, off_diag, x = _inputs(device, requires_grad=False)
    y = gmrf_kernels.solve(log_diag, off_diag, x.as_subclass(Tagged), OFFSETS["5x5"], 2)
    assert type(y) is Tagged
    assert_same([y.as_subclass(torch.Tensor)], [gmrf_kernels.solve(log_diag, off_diag, x, OFFSETS["5x5"], 2)])


def test_a_lazy_negation_is_carried_out(device):
    """The imaginary part of a conjugate is memory with the wrong sign, and a bit that says so."""
    log_diag, off_diag, x = _inputs(device, requires_grad=False)
    lazy = torch.complex(x, -x).conj().imag
    assert lazy.is_neg()
    y = gmrf_kernels.solve(log_diag, off_diag, lazy, OFFSETS["5x5"], 2)
    assert_same([y], [gmrf_kernels.solve(log_diag, off_diag, x, OFFSETS["5x5"], 2)])


def test_inference_mode(device, through_the_dispatcher):
    inputs = _inputs(device, requires_grad=False)
    expected = _score(*inputs)
    with torch.inference_mode():
        assert_same([_score(*(t.clone() for t in inputs))], [expected])
    assert not through_the_dispatcher


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_graphs_have_the_operators(device):
    """None of them becomes a constant of the graph."""
    inputs, others = _inputs(device, requires_grad=False), _inputs(device, requires_grad=False)
    others = [0.5 * t for t in others]
    graph = make_fx(_score)(*inputs)
    assert [n.target.__name__.split(".")[0] for n in graph.graph.nodes if "gmrf_kernels" in str(n.target)] == FORWARD
    assert_same([graph(*others)], [_score(*others)])
    assert_same([torch.jit.trace(_score, inputs, check_trace=False)(*others)], [_score(*others)])


def test_functionalized(device):
    inputs = _inputs(device, requires_grad=False)
    assert_same([torch.func.functionalize(_score)(*inputs)], [_score(*inputs)])


def test_a_pullback_outside_of_its_transformation(device):
    """It meets tensors that the transformation wrapped and no longer knows."""
    inputs = _inputs(device, requires_grad=False)
    value, pullback = torch.func.vjp(_score, *inputs)
    actual = pullback(torch.ones_like(value))
    inputs = [t.requires_grad_() for t in inputs]
    torch.testing.assert_close(actual, torch.autograd.grad(_score(*inputs), inputs), rtol=1e-12, atol=1e-12)


def test_a_frame_that_dynamo_could_not_trace(device, keep_torch_defaults):
    """What is called beside a graph goes through the dispatcher: dynamo must not look into kernels."""
    inputs = _inputs(device)

    def broken(*inputs):
        torch._dynamo.graph_break()
        return _score(*inputs)

    compiled = torch.compile(broken, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), _score(*inputs), rtol=1e-12, atol=1e-12)


# --- the likelihood's value, whose whitened residual autograd does not see ---


def _value(residual, log_diag, off_diag):
    return gmrf_kernels.negative_log_likelihood(residual, log_diag, off_diag, OFFSETS["5x5"], 2)


def _value_of_operator(residual, log_diag, off_diag):
    return torch.ops.gmrf_kernels.nll(residual, log_diag, off_diag, flatten(OFFSETS["5x5"]))[0]


@pytest.mark.parametrize("trained", [(0, 1, 2), (1, 2), (0,), (1,), (2,)])
def test_derivatives_of_the_value_are_those_of_the_operator(trained, device, through_the_dispatcher):
    log_diag, off_diag, x = _inputs(device, requires_grad=False)

    def derivatives(function):
        inputs = [t.clone().requires_grad_(i in trained) for i, t in enumerate((x, log_diag, off_diag))]
        leaves = [inputs[i] for i in trained]
        value = function(*inputs)
        first = torch.autograd.grad(value.pow(2).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), leaves)
        plain = torch.autograd.grad(function(*inputs).sum(), leaves)
        return value, *first, *second, *plain

    actual = derivatives(_value)
    assert not through_the_dispatcher
    for a, e in zip(actual, derivatives(_value_of_operator), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, in forward mode
def test_what_meets_the_value_only_in_its_backward_pass(device, through_the_dispatcher):
    """Mapped cotangents, saved tensors of another class, tangents of the cotangent."""
    log_diag, off_diag, x = _inputs(device)
    leaves = (log_diag, off_diag)
    value, cotangents = _value(x.detach(), *leaves), torch.eye(4, dtype=x.dtype, device=x.device).view(4, 2, 2)
    rows = torch.autograd.grad(value, leaves, cotangents, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(value, leaves, c, retain_graph=True) for c in cotangents]
    for row, e in zip(rows, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(row, torch.stack(e), rtol=1e-12, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(cotangents[0], cotangents[1])
        bars = torch.autograd.grad(value, leaves, dual)
        for bar, e, tangent in zip(bars, *expected[:2], strict=True):
            unpacked = torch.autograd.forward_ad.unpack_dual(bar)
            torch.testing.assert_close(unpacked.primal, e, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(unpacked.tangent, tangent, rtol=1e-12, atol=1e-12)
    through_the_dispatcher.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.as_subclass(Tagged)):
        value = _value(x.detach(), *leaves)
    for bar, e in zip(torch.autograd.grad(value, leaves, cotangents[0]), expected[0], strict=True):
        torch.testing.assert_close(bar.as_subclass(torch.Tensor), e, rtol=1e-12, atol=1e-12)
    assert through_the_dispatcher

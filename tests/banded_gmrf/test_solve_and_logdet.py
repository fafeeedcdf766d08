"""A⁻¹b, log |A| and their gradients from blocks of A⁻¹, against dense float64 linear algebra."""

import pytest
import torch

import banded_gmrf as bg
from banded_gmrf.recursions.elimination import block_cholesky
from banded_gmrf.recursions.solve_and_logdet import solve_and_logdet

WIDTHS = (2, 3, 1, 2)
REACHES = (3, 1, 2, 0)  # of each block, in sites after it
CPU = torch.device("cpu")


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def contribution(name, root, weight):
    """What a block adds; the name stands for arguments that are no tensors."""
    assert isinstance(name, str)
    return root @ root.mT, weight


def blocks(batch, weight_batch):
    """Roots (*batch, m, w), and diagonals of another batch."""
    sizes = zip(WIDTHS, REACHES, strict=True)
    return [("block", random(*batch, w + reach, w), random(*weight_batch, w).square() + 1) for w, reach in sizes]


def dense(parts):
    """A, from the definition of `BlockMatrix`'s sum."""
    n, start, total = sum(WIDTHS), 0, 0
    for (_, root, weight), width in zip(parts, WIDTHS, strict=True):
        gram, m = root @ root.mT, root.shape[-2]
        padded = torch.nn.functional.pad(gram, (start, n - start - m) * 2)
        total = total + padded + torch.diag_embed(torch.nn.functional.pad(weight, (start, n - start - width)))
        start += width
    return total


def both(parts, b):
    """The quantities by blocks, and densely."""
    A = dense(parts)
    factor = block_cholesky(
        contribution, [tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in p) for p in parts], WIDTHS, CPU
    )
    actual = solve_and_logdet(contribution, parts, WIDTHS, CPU, factor, b)
    return actual, (torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1), torch.logdet(A))


@pytest.mark.parametrize(
    ("batch", "weight_batch", "b_batch"),
    [
        ((), (), ()),
        ((), (), (4,)),
        ((3,), (), (3,)),
        ((), (3,), (2, 3)),
        ((1, 3), (2, 1), (2, 1)),
        ((2, 1), (1, 1), (5, 1, 3)),
        ((0,), (), (0,)),
    ],
)
def test_values_and_derivatives(batch, weight_batch, b_batch):
    parts, b = blocks(batch, weight_batch), random(*b_batch, sum(WIDTHS))
    tensors = [b, *(t for part in parts for t in part[1:])]
    for t in tensors:
        t.requires_grad_()
    actual, expected = both(parts, b)
    bars = [random(*value.shape) for value in expected]
    for _ in range(3):  # the values, and their first and second derivatives in a random direction
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
        actual, expected = (torch.autograd.grad(values, tensors, bars, create_graph=True) for values in (actual, expected))
        bars = [random(*value.shape) for value in expected]
    # Without a graph the first derivatives come from blocks of the inverse.
    actual, expected = both(parts, b)
    bars = [random(*value.shape) for value in expected]
    for a, e in zip(*(torch.autograd.grad(values, tensors, bars) for values in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_only_what_is_asked_for_has_a_gradient():
    parts, b = blocks((), ()), random(sum(WIDTHS))
    parts[1][1].requires_grad_()
    actual, expected = ((x.sum() + logdet) for x, logdet in both(parts, b))
    for a, e in zip(*(torch.autograd.grad(value, parts[1][1]) for value in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("quantity", ["log_evidence", "mean", "variance"])
def test_a_factor_that_an_optimiser_changed_in_place_is_factorised_again(quantity):
    log_diag = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    q = bg.GMRF(torch.zeros(3, 4, dtype=torch.float64), bg.StencilCholesky(log_diag, random(4, 3, 4), bg.Stencil.square(3)))
    y = random(3, 4)
    p = q.posterior(y, 1.0)
    getattr(p, quantity).sum().backward()
    with torch.no_grad():
        log_diag += 1
    again, new = getattr(p, quantity), getattr(q.posterior(y, 1.0), quantity)
    torch.testing.assert_close(again, new, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(value.sum(), log_diag)[0] for value in (again, new)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)

import pytest
import torch

import banded_gmrf as bg
from gmrf_kernels import normals
from tests.cases import STENCILS
from tests.dense import random_factor

pytestmark = pytest.mark.usefixtures("keep_torch_defaults")


def test_a_distribution_can_live_inside_a_compiled_function(monkeypatch):
    stencil = STENCILS["3x3"]

    def score(loc, log_diag, off_diag, value):
        q = bg.GMRF(loc, bg.StencilCholesky(log_diag, off_diag, stencil))
        x = q.rsample((2,))
        return q.log_prob(value), q.expand((5, 2)).log_prob(x[:, None]), q.entropy(), q.whiten(x)

    tensors = [torch.zeros(3, 4, dtype=torch.float64), *random_factor(stencil.offsets, (3, 4), batch=(2,))]
    arguments = [*(t.requires_grad_() for t in tensors), torch.randn(3, 4, dtype=torch.float64)]
    # Without a code generator: what is compiled here is the graph; the operators in it are the same as outside.
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")

    def values_and_gradients(function):
        torch.manual_seed(1)
        values = function(*arguments)
        return values, torch.autograd.grad(sum(v.sum() for v in values), tensors)

    actual = values_and_gradients(compiled)
    # Compiled, torch draws; of a seed it makes other numbers than the CPU backend.
    monkeypatch.setattr(normals, "_runs_eagerly", lambda: False)
    torch.testing.assert_close(actual, values_and_gradients(score), rtol=1e-12, atol=1e-12)

"""The training loop: what a batch holds, and that an interrupted training ends with the same numbers."""

import pytest
import torch
from rich.console import Console
from torch import nn

from experiments import training


def test_epochs_hold_every_row_once_in_another_order():
    rows = training.ShuffledEpochs(count=10, batch_size=3, seed=1)
    assert rows.steps_per_epoch == 3
    epochs = [torch.cat([rows(3 * epoch + step) for step in range(3)]) for epoch in range(2)]
    for epoch in epochs:
        assert len(epoch.unique()) == 9
    assert not torch.equal(*epochs)
    assert torch.equal(training.ShuffledEpochs(10, 3, seed=1)(4), rows(4))
    assert not torch.equal(training.ShuffledEpochs(10, 3, seed=2)(4), rows(4))


@pytest.mark.parametrize("batch_size", [0, 11])
def test_impossible_batch(batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}, expected 1 to 10"):
        training.ShuffledEpochs(10, batch_size, seed=0)


def test_learning_rate_rises_and_falls():
    rate = training.warmup_cosine(2.0, 100)
    values = [rate(step) for step in range(100)]
    assert max(values) < 2
    assert values.index(max(values)) in (9, 10)
    assert values == sorted(values[:10]) + sorted(values[10:], reverse=True)
    assert values[-1] < 1e-3


class InterruptionError(Exception):
    pass


def train(steps, state=None, fail_at=None):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))
    data = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    calls = 0

    def loss(x):
        nonlocal calls
        if calls == fail_at:
            raise InterruptionError
        calls += 1
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    losses = training.fit(
        model,
        loss,
        (data,),
        steps=steps,
        rows=training.ShuffledEpochs(20, 5, seed=0),
        learning_rate=training.warmup_cosine(0.01, steps),
        title="test",
        console=Console(quiet=True),
        state=state,
    )
    return model, losses


@pytest.mark.parametrize("fail_at", [1, 6, 11])
def test_interrupted_training_goes_on_to_the_same_numbers(tmp_path, monkeypatch, fail_at):
    """With batch normalisation, dropout and Adam's moments: everything that a step depends on is in the state."""
    whole, losses = train(12)
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_STATES", 0)
    state = tmp_path / "state.pt"
    with pytest.raises(InterruptionError):
        train(12, state, fail_at)
    resumed, resumed_losses = train(12, state)
    assert resumed_losses == losses
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_finished_training_is_not_repeated(tmp_path):
    state = tmp_path / "state.pt"
    _, losses = train(5, state)
    resumed, resumed_losses = train(5, state, fail_at=0)
    assert resumed_losses == losses
    assert not resumed.training


def test_gradient_that_is_not_finite_stops_the_training():
    model = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="non-finite"):
        training.fit(
            model,
            lambda x: model(x).sum() * float("nan"),
            (torch.ones(2, 1),),
            steps=1,
            rows=lambda step: torch.tensor([0]),
            learning_rate=lambda step: 0.1,
            title="test",
            console=Console(quiet=True),
        )

"""The training loop: what a batch holds, and that an interrupted training ends with the same numbers."""

import pytest
import torch
from rich.console import Console
from torch import nn

from experiments import training
from experiments.stopping import EarlyStopping, Patience


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


def train(steps, state=None, fail_at=None, patience=None):
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

    @torch.no_grad()
    def score():
        return (model(data) - data.sum(1, keepdim=True)).square().mean().item()

    stopping = None if patience is None else EarlyStopping(score, 4, patience)
    losses = training.fit(
        model,
        loss,
        (data,),
        steps=steps,
        rows=training.ShuffledEpochs(20, 5, seed=0),
        learning_rate=training.warmup_cosine(0.01, steps) if stopping is None else lambda step: stopping.rate(step, 0.3),
        title="test",
        console=Console(quiet=True),
        state=state,
        stopping=stopping,
    )
    return model, losses, stopping


@pytest.mark.parametrize("fail_at", [1, 6, 11])
def test_interrupted_training_goes_on_to_the_same_numbers(tmp_path, monkeypatch, fail_at):
    """With batch normalisation, dropout and Adam's moments: everything that a step depends on is in the state."""
    whole, losses, _ = train(12)
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_STATES", 0)
    state = tmp_path / "state.pt"
    with pytest.raises(InterruptionError):
        train(12, state, fail_at)
    resumed, resumed_losses, _ = train(12, state)
    assert resumed_losses == losses
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_finished_training_is_not_repeated(tmp_path):
    state = tmp_path / "state.pt"
    _, losses, _ = train(5, state)
    resumed, resumed_losses, _ = train(5, state, fail_at=0)
    assert resumed_losses == losses
    assert not resumed.training


PATIENCE = Patience(epochs=2, least_epochs=5, drops=1, factor=0.5)


def test_training_ends_when_its_score_falls_no_more_with_the_best_parameters():
    model, losses, stopping = train(4000, patience=PATIENCE)
    assert stopping.finished
    assert 5 <= len(stopping.scores) < 1000
    assert len(losses) == 4 * len(stopping.scores)
    assert stopping.scores[stopping.best_epoch - 1] == min(stopping.scores)
    # Evaluated again, in evaluation mode, the parameters have the score that was the best.
    assert stopping._score() == min(stopping.scores)
    assert not model.training


@pytest.mark.parametrize("fail_at", [3, 22, 41])
def test_training_that_ends_by_itself_is_interrupted_and_goes_on_to_the_same_numbers(tmp_path, monkeypatch, fail_at):
    whole, losses, stopping = train(200, patience=PATIENCE)
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_STATES", 0)
    state = tmp_path / "state.pt"
    with pytest.raises(InterruptionError):
        train(200, state, min(fail_at, len(losses) - 1), PATIENCE)
    for _ in range(2):  # the second time it has ended already
        resumed, resumed_losses, again = train(200, state, patience=PATIENCE)
        assert resumed_losses == losses
        assert again.scores == stopping.scores
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_learning_rate_falls_after_each_wait():
    network, scores = nn.Linear(1, 1), iter([5.0, 4.0, 4.5, 4.5, 4.5, 3.0, 3.0, 3.0, 3.0])
    stopping = EarlyStopping(lambda: next(scores), 10, Patience(epochs=2, least_epochs=5, drops=1, factor=0.1))
    assert [stopping.rate(step, 2.0) for step in (0, 4, 9, 30)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    rates = []
    for epoch in range(7):
        assert not stopping.after(10 * epoch + 3, network)
        assert stopping.after(10 * epoch + 9, network)
        rates.append(stopping.rate(10 * epoch + 10, 2.0))
        assert stopping.finished == (epoch == 7)
    # Not before the fifth pass, though the score has not fallen for two.
    assert rates == pytest.approx([2, 2, 2, 2, 0.2, 0.2, 0.2])
    assert stopping.best_epoch == 6
    stopping.after(79, network)
    assert stopping.finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected an integer of at least 1"),
        ({"drops": -1}, "drops is -1, expected"),
        ({"least_epochs": 2.5}, "least_epochs is 2.5, expected"),
        ({"factor": 1.0}, "factor is 1.0, expected more than 0 and less than 1"),
    ],
)
def test_impossible_patience(change, message):
    with pytest.raises(ValueError, match=message):
        Patience(**change)


def test_a_score_that_is_not_finite_stops_the_training():
    with pytest.raises(RuntimeError, match="score of validation images is nan after pass 1"):
        EarlyStopping(lambda: float("nan"), 1, Patience()).after(0, nn.Linear(1, 1))


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

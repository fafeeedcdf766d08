"""The training loop in a process that is killed, and its logs."""

import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from torch import nn

from experiments.training import ShuffledEpochs, fit

# Saves its state after every step, for as long as it is let.
_ENDLESS = """
import sys
from pathlib import Path
from experiments import training
from tests.experiments.test_fit import train
training._SECONDS_BETWEEN_STATES = 0
train(10**6, state=Path(sys.argv[1]))
"""


def train(steps, **options):
    """A small network with batch normalisation and noise in its loss: final weights and losses."""
    torch.manual_seed(0)
    data = torch.randn(30, 5)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))
    losses = fit(
        model,
        lambda x, noise: (model(x + 0.1 * noise) - x).square().mean(),
        (data,),
        steps=steps,
        rows=ShuffledEpochs(30, 8, seed=0),
        learning_rate=lambda step: 1e-2,
        title="",
        console=Console(quiet=True),
        prepare=lambda x: (x, torch.randn(x.shape)),
        **options,
    )
    return model.state_dict(), losses


def test_a_killed_training_resumes_to_the_same_numbers(tmp_path):
    state = tmp_path / "state.pt"
    with subprocess.Popen([sys.executable, "-c", _ENDLESS, str(state)]) as process:
        try:
            while not state.exists() and process.poll() is None:
                time.sleep(0.1)
            time.sleep(0.2)
        finally:
            process.kill()
    done = len(torch.load(state, weights_only=True)["losses"])
    assert done > 0
    resumed, uninterrupted = train(done + 20, state=state), train(done + 20)
    assert resumed[1] == uninterrupted[1]
    torch.testing.assert_close(resumed[0], uninterrupted[0], rtol=0, atol=0)


def test_logs_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, losses = train(40, log=tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "learning rate", "examples per second"}
    assert [event.step for event in events.Scalars("loss")] == [20, 40]
    assert events.Scalars("loss")[-1].value == pytest.approx(losses[-1])


def test_logs_without_tensorboard_name_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        train(1, log=tmp_path)

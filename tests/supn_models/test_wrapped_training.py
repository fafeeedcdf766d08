"""DDP and FSDP2 train networks whose output is a factor or a distribution as one process does."""

import os
import subprocess
import sys

import torch

from .wrapped_training import MODULES, train


def test_two_processes_train_as_one_does(tmp_path):
    path = tmp_path / "found.pt"
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.supn_models.wrapped_training"]
    outcome = subprocess.run(
        [sys.executable, "-m", *command, path], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert outcome.returncode == 0, outcome.stderr
    together = torch.load(path)
    assert len(together) == 10
    for name, make in MODULES.items():
        module, _ = make()
        start, alone = dict(module.named_parameters()), train(make)
        for how, found in together.items():
            if not how.startswith(name):
                continue
            # Two means of two are a mean of four up to rounding, in float64 and, where the outputs are cast, in float32.
            tolerance = 1e-5 if how.endswith("float32") else 1e-9
            expected = {key: value.to(found[key].dtype) for key, value in alone.items()}
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            for parameter, value in start.items():
                assert torch.equal(found[parameter], value) == parameter.startswith("autoencoder.encoder."), (how, parameter)

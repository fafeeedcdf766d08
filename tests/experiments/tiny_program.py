"""``python -m experiments`` with the preset of `tiny_faces` and a state after every step, for tests that kill it.

python -m tests.experiments.tiny_program STEPS faces ...

The process kills itself, as the kernel would, in its training step number STEPS, counted over all networks; 0 for never.
"""

import os
import signal
import sys

import torch

from experiments import training
from experiments.__main__ import app
from experiments.faces.presets import PRESETS
from tests.experiments.tiny_faces import PRESET


def kill_at(last: int) -> None:
    """End this process by SIGKILL in place of the ``last`` step of Adam."""
    step, count = torch.optim.Adam.step, 0

    def counted_step(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    torch.optim.Adam.step = counted_step


if __name__ == "__main__":
    PRESETS["faces"]["quick"] = PRESET
    training._SECONDS_BETWEEN_STATES = 0
    kill_at(int(sys.argv.pop(1)))
    app(prog_name="python -m experiments")

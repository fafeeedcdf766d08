"""The Triton kernels in Triton's interpreter, on CPU tensors.

Triton decides when it is imported whether to compile or to interpret, so each file of such tests runs in a process of its own.
Under ``TRITON_INTERPRET=1``, ``pytest tests/gmrf_kernels/interpreted_tiles.py`` runs one alone.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

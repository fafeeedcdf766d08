"""The Triton kernels in Triton's interpreter, on CPU tensors.

Triton decides when it is imported whether to compile or to interpret, so each file of such tests runs in a process of its own.
Under ``TRITON_INTERPRET=1``, ``pytest tests/gmrf_kernels/interpreted_tiles.py`` runs one alone.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"),
    reason="before Triton 3.7 its interpreter does not take numpy 2.4",
)

FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

"""What importing the library needs."""

import subprocess
import sys


def test_names_its_modules():
    code = "import banded_gmrf as bg; bg.precisions.matern_precision; bg.diagnostics.energy_score"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_works_without_triton():
    code = "import sys; sys.modules['triton'] = None; import banded_gmrf; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""What importing the library needs."""

import subprocess
import sys


def test_works_without_triton():
    code = "import sys; sys.modules['triton'] = None; import banded_gmrf; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Which commit of this repository runs: to be kept beside whatever is measured with it."""

import subprocess
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def commit() -> str | None:
    """The commit of this checkout, marked where files differ from it; None outside a checkout, as in an installed wheel."""
    # An environment may lie inside the checkout of something else.
    if not (_ROOT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=_ROOT, capture_output=True, check=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

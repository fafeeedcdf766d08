"""The README's code runs as printed."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(snippets) == 3
    assert len(snippets[0].strip().splitlines()) <= 10
    exec(compile("\n".join(snippets), str(README), "exec"), {})


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target

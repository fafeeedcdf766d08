"""The code of the documentation's pages runs as printed."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "```python\n" in page.read_text(encoding="utf-8")]


def snippets(page: Path) -> str:
    """The Python code of a page, block after block; a later one uses the names of those before it."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL))


def test_most_pages_have_code():
    assert len(PAGES) > 8


# torch itself calls what it deprecates, the first time that forward mode maps over tangents.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.usefixtures("keep_torch_defaults")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page):
    if page.stem == "other_libraries":
        pytest.importorskip("pyro")
        pytest.importorskip("linear_operator")
    exec(compile(snippets(page), str(page), "exec"), {"__name__": page.stem})

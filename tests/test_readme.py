"""The README's code runs as printed, and links between the pages lead somewhere."""

import re
from pathlib import Path

import pytest

from tests.readme import README, snippets

ROOT = README.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/*.md")])


def test_snippets_run():
    first, *others = snippets()
    assert len(others) == 2
    assert len(first.strip().splitlines()) <= 10
    exec(compile("\n".join([first, *others]), str(README), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target

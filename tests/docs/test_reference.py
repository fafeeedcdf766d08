"""Every public name has its place in the reference."""

import inspect
import re
from pathlib import Path

import pytest

import banded_gmrf
import gmrf_kernels
import supn_models

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
MODULES = [banded_gmrf, banded_gmrf.operators, banded_gmrf.diagnostics, banded_gmrf.precisions, gmrf_kernels, supn_models]


def listed() -> set[str]:
    """The full names in all lists of the reference's pages."""
    names = set()
    for page in REFERENCE.glob("*.rst"):
        module = ""
        for line in page.read_text(encoding="utf-8").splitlines():
            if found := re.match(r"\.\. (?:current)?module:: (\S+)", line):
                module = found.group(1)
                names.add(module)
            elif found := re.match(r"   ([A-Za-z]\S*)$", line):
                names.add(f"{module}.{found.group(1)}")
    return names


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module):
    public = {f"{module.__name__}.{name}" for name in module.__all__}
    if module is banded_gmrf.precisions:  # the page has them where they are exported, one level above
        public = {f"banded_gmrf.{name}" for name in module.__all__}
    assert public <= listed()


def docstrings(module) -> dict[str, str]:
    """What is written at the public names of a module and at their members, by name."""
    found = {name: getattr(module, name) for name in module.__all__}
    for name, one in list(found.items()):
        if inspect.isclass(one):
            found |= {f"{name}.{key}": getattr(one, key) for key in vars(one) if not key.startswith("_")}
    return {name: inspect.getdoc(one) or "" for name, one in found.items()}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstrings_read_as_they_are_meant(module):
    for name, text in docstrings(module).items():
        assert not re.search(r"^\S.*(?<!::)\n\n {4}", text, flags=re.MULTILINE), f"{name}: code without :: is a quotation"
        assert not re.search(r"^ +\w+: \w\.$", text, flags=re.MULTILINE), f"{name}: a letter and a full stop begin a list"

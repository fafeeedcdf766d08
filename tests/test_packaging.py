"""What is built from the checkout: the sdist, and the wheel from it, as a user without Triton installs it."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import banded_gmrf
from tests.readme import README, snippets

ROOT = Path(__file__).parent.parent
PACKAGES = {"banded_gmrf": ROOT, "supn_models": ROOT, "gmrf_kernels": ROOT / "kernels"}
REQUIRED = {"torch", "numpy", "scipy", "numba", "llvmlite"}
OPTIONAL = {"deepinv", "linear_operator", "pyro", "safetensors", "triton"}  # imported where they are used only


def build(kind: str, source: Path, target: Path) -> Path:
    """The path of what setuptools builds from ``source``: an ``sdist`` or a ``wheel``."""
    target.mkdir()
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(target)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = target.iterdir()
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The unpacked sdist, and a folder with what its wheel installs."""
    root = tmp_path_factory.mktemp("built")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "results")
    shutil.copytree(ROOT, root / "checkout", ignore=unwanted)
    with tarfile.open(build("sdist", root / "checkout", root / "sdist")) as archive:
        archive.extractall(root / "unpacked", filter="data")
    (source,) = (root / "unpacked").iterdir()
    with zipfile.ZipFile(build("wheel", source, root / "wheel")) as archive:
        archive.extractall(root / "installed")
    return source, root / "installed"


def files(root: Path, pattern: str) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob(pattern)}


def test_the_wheel_holds_every_module_and_nothing_else(built):
    _, installed = built
    modules = {f"{p}/{f}" for p, parent in PACKAGES.items() for f in files(parent / p, "*.py")}
    assert files(installed, "*.py") == modules
    assert files(installed, "py.typed") == {f"{package}/py.typed" for package in PACKAGES}


def test_the_sdist_holds_no_tests(built):
    source, _ = built
    assert not [f for f in files(source, "*.py") if "test" in f]


def test_metadata(built):
    (distribution,) = importlib.metadata.distributions(path=[str(built[1])])
    assert distribution.version == banded_gmrf.__version__
    assert distribution.metadata["License-Expression"] == "MIT"
    required = {re.match(r"[\w-]+", r).group() for r in distribution.requires if "extra ==" not in r}
    assert required == REQUIRED
    assert {"gpu", "dev", "pyro"} <= set(distribution.metadata.get_all("Provides-Extra"))


def test_the_description_is_the_readmes_and_stands_alone():
    # Read where there is no repository: a picture or a link to a file would be broken there.
    text = (ROOT / "docs" / "description.md").read_text()
    assert not re.search(r"\]\((?!https://)", text)
    for block in text.strip().split("\n\n"):
        assert block in README.read_text(), block


def test_the_citation_names_this_version():
    assert f"\nversion: {banded_gmrf.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_import_is_declared():
    for package, parent in PACKAGES.items():
        for path in (parent / package).rglob("*.py"):
            names = set()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names.add(node.module.split(".")[0])
            assert names <= sys.stdlib_module_names | PACKAGES.keys() | REQUIRED | OPTIONAL, path


def test_the_first_steps_run_from_the_wheel_without_triton(built, tmp_path):
    code = ["import sys; sys.modules['triton'] = None", *snippets()[:2]]
    code.append(f"assert bg.__file__.startswith({str(built[1])!r}), bg.__file__")
    (tmp_path / "first_steps.py").write_text("\n".join(code))
    environment = {**os.environ, "PYTHONPATH": str(built[1])}
    command = [sys.executable, "first_steps.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""No circle of imports, and downwards only, as read from the source with what is deferred; and no file too long."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each package with those that it may import, itself included always.
BELOW = {
    "gmrf_kernels": set(),
    "banded_gmrf": {"gmrf_kernels"},
    "supn_models": {"gmrf_kernels", "banded_gmrf"},
    "programs": set(),
    "experiments": {"gmrf_kernels", "banded_gmrf", "supn_models", "programs"},
    "bench": {"gmrf_kernels", "banded_gmrf", "supn_models", "programs"},
}
FOLDERS = {name: ROOT / "kernels" / name if name == "gmrf_kernels" else ROOT / name for name in BELOW}
MAX_LINES = 400


def modules() -> dict[str, Path]:
    """Every module of the packages, by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


MODULES = modules()


def imports(module: str) -> set[str]:
    """The modules of the packages that one imports anywhere in its text: at its top, in functions, for type checkers.

    Importing a module runs the ``__init__`` of its packages first. Those above the importing module run before it in any case,
    and their imports are not its own.
    """
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    targets = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                targets.add(inner if inner in MODULES else base)
    reached = set()
    for target in targets:
        names = target.split(".")
        above = {".".join(names[:size]) for size in range(1, len(names) + 1)}
        reached |= {name for name in above if name in MODULES and (name == target or not f"{module}.".startswith(f"{name}."))}
    return reached - {module}


def modules_of(package: str) -> list[str]:
    return [module for module in MODULES if module.partition(".")[0] == package]


GRAPH = {module: imports(module) for module in MODULES}


def test_the_graph_is_read_from_the_source():
    assert "gmrf_kernels.checks" in GRAPH["banded_gmrf.cholesky"]
    assert "banded_gmrf.stencil" in GRAPH["banded_gmrf.cholesky"]
    assert "banded_gmrf.recursions.strips" in GRAPH["banded_gmrf.recursions.covariances"]
    assert "banded_gmrf" not in GRAPH["banded_gmrf.cholesky"]


def test_no_circle_of_imports():
    done, path = set(), []

    def visit(module: str):
        assert module not in path, " imports ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for target in sorted(GRAPH[module]):
                visit(target)
            path.pop()
            done.add(module)

    for module in MODULES:
        visit(module)


@pytest.mark.parametrize("package", BELOW)
def test_imports_run_downwards_only(package):
    for module in modules_of(package):
        reached = {target.partition(".")[0] for target in GRAPH[module]}
        assert reached <= BELOW[package] | {package}, module


def test_the_map_of_the_library_is_true():
    """The docstring of `banded_gmrf` names every file and folder, each below all that it imports."""
    text = ast.get_docstring(ast.parse(MODULES["banded_gmrf"].read_text(encoding="utf-8")))
    order = [name.rstrip("/") for names in re.findall(r"^    (.+?)  ", text, flags=re.MULTILINE) for name in names.split(", ")]
    inside = {module: module.split(".")[1] for module in modules_of("banded_gmrf") if "." in module}
    assert set(order) == set(inside.values())
    for module, name in inside.items():
        for target in GRAPH[module] & inside.keys():
            if module != "banded_gmrf.analysis.divergence" or inside[target] not in ("gmrf", "low_rank"):
                assert order.index(inside[target]) <= order.index(name), f"{module} imports {target}"


@pytest.mark.parametrize("package", BELOW)
def test_a_long_file_says_why(package):
    for module in modules_of(package):
        text = MODULES[module].read_text(encoding="utf-8")
        if len(text.splitlines()) > MAX_LINES:
            assert "one file because" in (ast.get_docstring(ast.parse(text)) or "").lower(), module

"""The project's docstrings as Sphinx must see them: shapes like (*batch, *grid) are no emphasis, and short names are links."""

import re

from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.nodes import make_refnode

PACKAGES = ("banded_gmrf", "supn_models", "gmrf_kernels")


def escape(line: str) -> str:
    """The line with asterisks and bars as they are, but for what stands between double backquotes."""
    parts = re.split(r"(``.*?``)", line)
    return "".join(part if i % 2 else re.sub(r"\*(?=\w)|\||(?<=\w)_(?!\w)", r"\\\g<0>", part) for i, part in enumerate(parts))


def process(app, what, name, obj, options, lines: list[str]) -> None:
    """Escape; and read a property's docstring as a function's: napoleon takes what stands before a colon for its type."""
    lines[:] = [escape(line) for line in lines]
    if what in ("attribute", "property"):
        sections = GoogleDocstring("\n".join(lines), app.config, app, "method", name, obj, options).lines()
        lines[:] = ["..", "", *sections]  # an empty comment: napoleon finds no colon in it, and leaves the rest alone


def resolve_short_name(app, env, node, content):
    """`GMRF.posterior`, written anywhere, is the page of ``banded_gmrf.GMRF.posterior``."""
    if node.get("refdomain") != "py":
        return None
    objects, name = env.domains.python_domain.objects, node["reftarget"]
    full = [f"{package}.{name}" for package in PACKAGES] + sorted(known for known in objects if known.endswith(f".{name}"))
    for found in (objects[one] for one in full if one in objects):
        return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, content, name)
    return None


def skip_what_torch_defines(app, what, name, obj, skip, options):
    """Members that a class inherits from another library have their pages there."""
    function = getattr(obj, "fget", None) or getattr(obj, "func", None) or obj
    module = getattr(function, "__module__", None) or ""
    return None if module.partition(".")[0] in PACKAGES else True


def setup(app):
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-skip-member", skip_what_torch_defines)
    app.connect("missing-reference", resolve_short_name)
    return {"parallel_read_safe": True}

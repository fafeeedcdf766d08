"""In the guides, names of the library between backquotes are links to their pages: `SparseGMRF`, `q.condition(mask, values)`.

In docstrings Sphinx does so itself. In Markdown a link would have to be written out, which the file as one reads it in the
checkout does not need.
"""

import re

from docutils import nodes
from sphinx.util.nodes import make_refnode

PACKAGES = ("banded_gmrf", "supn_models", "gmrf_kernels")
# What the guides call their objects, and where a method that is named alone is looked for first.
OWNERS = {"q": "GMRF", "p": "ConditionalGMRF", "L": "StencilCholesky"}
ELSEWHERE = ("reference/", "auto_examples/", "generated/")


def candidates(text: str) -> list[str]:
    """Full names that a text may stand for, the likeliest first."""
    found = re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)*)(\(.*\))?", text, flags=re.DOTALL)
    if not found:
        return []
    name = re.sub(r"^bg\.", "banded_gmrf.", found.group(1))
    first, _, rest = name.partition(".")
    if first in OWNERS:
        return [f"banded_gmrf.{OWNERS[first]}.{rest}"]
    methods = [f"banded_gmrf.{owner}.{name}" for owner in OWNERS.values()] if "_" in name else []  # `mean` may be anything
    return [name, *(f"{package}.{name}" for package in PACKAGES), f"banded_gmrf.diagnostics.{name}", *methods]


def link_names(app, doctree, docname: str) -> None:
    if docname.startswith(ELSEWHERE):
        return
    objects = app.env.domains.python_domain.objects
    for literal in list(doctree.findall(nodes.literal)):
        if isinstance(literal.parent, nodes.reference | nodes.title):
            continue
        for name in candidates(literal.astext()):
            page = objects.get(name)
            if page and page.objtype != "module":  # `deepinv` is another library, or an extra
                literal.replace_self(make_refnode(app.builder, docname, page.docname, page.node_id, literal.deepcopy(), name))
                break


def setup(app):
    app.connect("doctree-resolved", link_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

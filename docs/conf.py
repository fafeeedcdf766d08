"""Sphinx's settings: ``make docs``. Nothing is fetched while it builds."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: scripts of the gallery are small

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "docs" / "extensions")]

from torchvision_operators import declare_missing_operators  # noqa: E402

import banded_gmrf  # noqa: E402

declare_missing_operators()

OURS = ("banded_gmrf", "gmrf_kernels", "supn_models")

project = "banded-gmrf"
author = "the authors of banded-gmrf"
copyright = author
version = release = banded_gmrf.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "generated_pages",
    "guide_links",
    "plain_docstrings",
]
exclude_patterns = ["_build", "description.md", "gallery"]
templates_path = ["_templates"]
nitpicky = True
# What other libraries define, and what annotations name that has no page. Their inventories would have to be fetched.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|scipy|pyro|deepinv|linear_operator|collections|typing|pathlib|types)(\..*)?"),
    (r"py:class", r"Tensor|banded_gmrf\.inference\.(conditioning\.Conditionable|noise\.ObservationModel)"),
]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "py:obj"
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"\.py$",
    "backreferences_dir": "reference/generated/backreferences",
    "doc_module": OURS,
    "reference_url": dict.fromkeys(OURS),
    "capture_repr": (),
    "download_all_examples": False,
    "show_signature": False,
    "show_memory": False,
    "image_srcset": ["2x"],
    "min_reported_time": 1,
    "write_computation_times": False,  # its pages would load a script from the network
    "abort_on_example_error": False,
}

html_theme = "furo"
html_title = "banded-gmrf"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

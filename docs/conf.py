"""How Sphinx builds the site: `python3 noxfile.py -s docs`."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The extensions of the site, the tables that tests and benchmarks make, and the package itself.
sys.path[:0] = [str(HERE / "_extensions"), str(HERE.parent / "tests"), str(HERE.parent)]

import portable_softmax  # noqa: E402 - found by the path above

project = "portable_softmax"
author = "portable_softmax developers"
copyright = f"the {author}"
version = release = portable_softmax.__version__

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    # Our own, in docs/_extensions.
    "mathml",
    "formulas",
    "names",
    "generated",
]
# Results that are generated: the pages in results/ include them.
exclude_patterns = ["_build", "accuracy.md", "reported.md", "semantics.md", "triton_resources.md"]
nitpicky = True
default_role = "name"

# Every code cell runs at every build, and an exception ends it.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # the docstrings say it in words
autodoc_member_order = "bysource"
numpydoc_show_class_members = False  # the reference lists methods itself
numpydoc_xref_param_type = False

html_theme = "furo"
html_title = f"portable_softmax {release}"
pygments_dark_style = "monokai"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

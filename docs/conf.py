"""Configure Sphinx, which builds the documentation (`bash tools/docs.sh`).

The source folder is the whole repository, so links between documentation, results and code are the
same in the built pages and in the repository.
"""

import logging
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

from nmt_moe import __version__  # noqa: E402

logging.disable(logging.INFO)  # fairseq logs while it is imported

project = "nmt_moe"
author = "The nmt_moe authors"
copyright = author
release = __version__
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "recipes/**.md", "benchmarks/**.md"]
exclude_patterns = [".*", "build", "nmt_moe", "tests", "tools", "**/work"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3

# Docstrings follow Google's style; `name` in them is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"nmt_moe {release}"
html_show_sphinx = False
html_copy_source = False
# The README is the front page of the repository; the front page of the built pages is docs/index.
orphans = ["README"]

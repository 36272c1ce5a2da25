"""Configuration of the documentation: ``make docs`` builds it without network access, warnings as errors."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import generate  # noqa: E402

import noisysam  # noqa: E402

project = "noisysam"
author = "The noisysam authors"
copyright = author  # shown at the foot of every page
version = release = noisysam.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "pydata_sphinx_theme"
html_title = "noisysam"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
smartquotes = False  # options begin with two hyphens
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "show_prev_next": False,
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": {"**": ["page-toc"], "methods": [], "optimizers": []},  # these two have wide tables
}
html_sidebars = {page: [] for page in ("index", "quickstart", "concepts", "notebooks/*")}  # they have no subpages

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # reports begin their sections below the page's title
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}


def setup(app: object) -> None:
    """Write the generated pages before anything is read; expand markers and link component names as pages are read."""
    generate.write_pages(Path(__file__).parent)
    app.connect("source-read", generate.on_source_read)  # type: ignore[attr-defined]

"""The site: Sphinx over the Markdown pages of this folder. `make docs` builds it, and any warning fails it."""

from typing import Any

from sphinx.application import Sphinx

project = "Arriero"
author = "Arriero's authors"
extensions = ["myst_parser"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
exclude_patterns = ["generators", "_build"]
nitpicky = True
smartquotes = False  # two dashes begin an option
html_theme = "furo"
html_title = "Arriero"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sourcelink = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "nord-darker"


def setup(app: Sphinx) -> dict[str, Any]:
    """Nothing but what Sphinx asks of a configuration that may be read in parallel."""
    return {"parallel_read_safe": True}

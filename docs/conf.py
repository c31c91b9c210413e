"""The site: Sphinx over the Markdown pages of this folder. `make docs` builds it, and any warning fails it."""

from typing import Any

from sphinx.application import Sphinx

project = "Arriero"
author = "Arriero's authors"
extensions = ["myst_parser"]
myst_heading_anchors = 4
exclude_patterns = ["generators"]
nitpicky = True
smartquotes = False  # two dashes begin an option
html_theme = "furo"
html_title = "Arriero"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False

NAVIGATION = {
    "Use": (
        *(
            "install",
            "export",
            "calibrate",
            "check",
            "nightly",
            "build",
            "run",
            "serve",
            "dynamo",
            "deploy",
            "ranks",
            "bench",
        ),
        *("polygraphy", "examples"),
    ),
    "Look up": ("command-line", "python-api", "json", "formats", "spec-json", "measured", "debugging", "security"),
    "Change": ("architecture", "ops", "tree"),
}
"""The pages by caption. A page that is missing here fails the build."""


def add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """Puts the navigation behind the index, which a forge shows without it."""
    if docname == "index":
        for caption, pages in NAVIGATION.items():
            listed = "\n".join(pages)
            source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects the navigation."""
    app.connect("source-read", add_navigation)
    return {"parallel_read_safe": True}

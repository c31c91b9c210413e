"""Writes the pages of `docs/` that the code says best: command line, Python interface, `spec.json`, the tree.

`python docs/generate.py` writes them anew; a test compares what is committed with what `pages` returns. Modules are
read, not imported, but for the command line and `arriero.spec`, so that no library of an extra is needed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from generators import command_line, python_api, spec_json, tree

DOCS = Path(__file__).parent
NOTICE = "<!-- Written by docs/generate.py: change the code, then run `make docs`. -->\n\n"
PAGES: dict[str, Callable[[], str]] = {
    "command-line.md": command_line.page,
    "python-api.md": python_api.page,
    "spec-json.md": spec_json.page,
    "tree.md": tree.page,
}


def pages() -> dict[str, str]:
    """The text of every generated page, by its file name."""
    return {name: NOTICE + page().rstrip("\n") + "\n" for name, page in PAGES.items()}


def main() -> None:
    """Writes the pages that differ from what is there."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, text in pages().items():
        path = DOCS / name
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
            print(f"Wrote {path.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()

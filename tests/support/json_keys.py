"""Keys of results as the documentation has them."""

import re
from pathlib import Path

PAGE = (Path(__file__).parent.parent.parent / "docs" / "json.md").read_text("utf-8")


def documented(table: str) -> set[str]:
    """The keys in the table of that head."""
    rows = PAGE.partition(f"| {table} | |\n|---|---|\n")[2].partition("\n\n")[0].splitlines()
    keys = {key for row in rows for key in re.findall(r"`([a-z_]+)`", row.split(" | ")[0])}
    assert keys, table
    return keys

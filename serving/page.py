"""The chat page: one file that asks nobody but its own server.

Enters: the page's parts in `web/`. Leaves: the page. Invariant: its policy lets no script and no style run but its own,
by their hashes, so that nothing a model writes does.
"""

import functools
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

PARTS = {"STYLE": ("style.css",), "SCRIPT": ("markdown.js", "chat.js")}
WEB = Path(__file__).parent / "web"


@functools.cache
def page() -> bytes:
    """The page, as it is sent."""
    text = (WEB / "index.html").read_text("utf-8")
    for name, files in PARTS.items():
        part = "\n".join((WEB / file).read_text("utf-8") for file in files)
        digest = b64encode(sha256(part.encode()).digest()).decode()
        text = text.replace(f"{name}-HASH", f"sha256-{digest}").replace(f"/*{name}*/", part)
    return text.encode()

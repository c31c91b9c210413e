"""A tokenizer for models of random weights, whose every token has a text: what servers need to speak.

Enters: a number of tokens. Leaves: the tiny Llama 4's tokenizer and chat template, with words behind its tokens that no
text is ever split into, so that a model may give them and no prompt has them.
"""

import json
import shutil
import string
from pathlib import Path

TINY = Path(__file__).parent.parent.parent / "examples" / "tiny-llama4"


def write_tokenizer(folder: Path, size: int) -> None:
    """Writes `tokenizer.json` of so many tokens, its settings and the chat template into a checkpoint."""
    found = json.loads((TINY / "tokenizer.json").read_text("utf-8"))
    vocabulary: dict[str, int] = found["model"]["vocab"]
    known = len(vocabulary.keys() | {each["content"] for each in found["added_tokens"]})
    vocabulary |= {word(number): number for number in range(known, size)}
    (folder / "tokenizer.json").write_text(json.dumps(found, ensure_ascii=False), "utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, folder / name)


def word(number: int) -> str:
    """A word of four letters with a space before it, as a byte-level vocabulary has it."""
    letters = ""
    for _ in range(4):
        number, place = divmod(number, 26)
        letters += string.ascii_uppercase[place]
    return f"Ġ{letters}"

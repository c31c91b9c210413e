"""Stop strings in a stream of text.

Enters: a text in parts, and texts of special tokens, which are matched but not shown. Leaves: the same text up to the
first stop string. Invariant: nothing is shown that may turn out to belong to one.
"""

import functools
from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer


class StopText:
    """Watches a stream for the first of some strings.

    Args:
        stop_strings: One string, or several; empty ones are ignored.
    """

    def __init__(self, stop_strings: str | Sequence[str]) -> None:
        several = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        self.stops = [stop for stop in several if stop]
        self.held = ""
        self.hidden: list[bool] = []  # of each character held, whether it is a special token's

    def take(self, text: str, special: str = "") -> tuple[str, bool]:
        """Takes the next text.

        Args:
            text: The text.
            special: The text of a special token behind it, which is never shown.

        Returns:
            The text that may be shown, and whether a stop string has come.
        """
        if not self.stops:
            return text, False
        self.held += text + special
        self.hidden += [False] * len(text) + [True] * len(special)
        if found := [place for stop in self.stops if (place := self.held.find(stop)) >= 0]:
            shown = self._show(min(found))
            self.held, self.hidden = "", []
            return shown, True
        return self._show(len(self.held) - max(self._overlap(stop) for stop in self.stops)), False

    def rest(self) -> str:
        """Returns the text that was held back, once no more comes."""
        return self._show(len(self.held))

    def _show(self, cut: int) -> str:
        """Releases the first characters that are held. Returns those to be shown."""
        shown = "".join(each for each, hidden in zip(self.held[:cut], self.hidden, strict=False) if not hidden)
        self.held, self.hidden = self.held[cut:], self.hidden[cut:]
        return shown

    def _overlap(self, stop: str) -> int:
        """Characters at the end of the held text that begin a stop string."""
        longest = min(len(stop) - 1, len(self.held))
        return next((size for size in range(longest, 0, -1) if self.held.endswith(stop[:size])), 0)


@functools.lru_cache(maxsize=4)
def special_texts(tokenizer: Tokenizer) -> Mapping[int, str]:
    """The texts of a tokenizer's special tokens, by their ids."""
    return {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}

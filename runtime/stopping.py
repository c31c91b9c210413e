"""Stop strings in a stream of text.

Enters: a text in parts. Leaves: the same text up to the first stop string. Invariant: nothing is shown that may turn
out to belong to one.
"""

from collections.abc import Sequence


class StopText:
    """Watches a stream for the first of some strings.

    Args:
        stop_strings: One string, or several; empty ones are ignored.
    """

    def __init__(self, stop_strings: str | Sequence[str]) -> None:
        several = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        self.stops = [stop for stop in several if stop]
        self.held = ""

    def take(self, text: str) -> tuple[str, bool]:
        """Takes the next text. Returns the text that may be shown, and whether a stop string has come."""
        self.held += text
        if found := [place for stop in self.stops if (place := self.held.find(stop)) >= 0]:
            shown, self.held = self.held[: min(found)], ""
            return shown, True
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown, False

    def rest(self) -> str:
        """Returns the text that was held back, once no more comes."""
        shown, self.held = self.held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Characters at the end of the held text that begin a stop string."""
        longest = min(len(stop) - 1, len(self.held))
        return next((size for size in range(longest, 0, -1) if self.held.endswith(stop[:size])), 0)

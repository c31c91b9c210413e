"""Prompt lookup: the next tokens guessed from what the same words were followed by before.

Enters: a sequence as it grows. Leaves: a draft of its next tokens, for the model to verify in one piece; a text that
quotes its prompt, or itself, is then read several tokens at a time (Saxena 2023, as in `transformers`'
`prompt_lookup_num_tokens`). A draft is only a guess: whoever verifies it goes on from the first token that the model
would have chosen otherwise, so that nothing changes but the time and what a piece rounds otherwise than a step.
"""

from collections.abc import Sequence

NGRAMS = (5, 3)
"""Tokens at the end of a sequence that must have come before; the first of these that did is taken.

In continuations of documentation by the tiny Llama 4, what followed 2 tokens was right 35 times in 100, what followed 4
57 times, and after 8 tokens 95 times.
"""


class Lookup:
    """The places of a sequence's n-grams, and how long a draft is worth while.

    A draft that is right is nearly free, one that is wrong is not: each of its tokens may want other experts. So drafts
    grow while they are right, and start again from what was right of the last one.

    Args:
        limit: Tokens of a draft at most; 0 drafts nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.length = min(limit, 2)
        self.seen = 0
        self.places: dict[tuple[int, ...], int] = {}  # where what followed an n-gram the last time begins

    def draft(self, ids: Sequence[int], room: int) -> list[int]:
        """Guesses the tokens after a sequence, `room` of them at most; none where its end has not come before.

        Args:
            ids: The same sequence every time, with more at its end.
            room: How many there may be.
        """
        count = min(self.length, room)
        if count < 1:
            return []
        for end in range(self.seen, len(ids)):  # not the n-gram at the end itself: nothing follows it yet
            for size in NGRAMS:
                if end >= size:
                    self.places[tuple(ids[end - size : end])] = end
        self.seen = len(ids)
        for size in NGRAMS:
            place = self.places.get(tuple(ids[-size:])) if len(ids) > size else None
            if place is not None:
                return list(ids[place : place + count])
        return []

    def judge(self, drafted: int, accepted: int) -> None:
        """Takes notice of how many tokens of a draft were right."""
        self.length = min(self.limit, 2 * drafted if accepted == drafted else accepted + 1)

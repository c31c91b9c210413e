"""Tokens as clients see them in log-probabilities: their text and their bytes.

Enters: token ids. Leaves: OpenAI's objects. Invariant: the bytes of a text's tokens, put together, are the text's; a
token that is a part of a character has its own bytes, and a replacement character as its text.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from ..errors import SessionError
from ..runtime.grammars.vocabulary import byte_letters
from ..runtime.logprobs import TokenLogprobs

MARKS = ("<|python_start|>", "<|python_end|>")
"""Special tokens that stand around calls."""


class TokenTexts:
    """The texts of a model's tokens.

    Args:
        tokenizer: Its tokenizer; None where it has none, and tokens have numbers for texts.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.added = {} if tokenizer is None else tokenizer.get_added_tokens_decoder()
        self.letters = byte_letters()
        self.marks = {
            token: each.content for token, each in self.added.items() if each.special and each.content in MARKS
        }
        self.bytes_of = lru_cache(maxsize=1 << 14)(self._bytes_of)

    def text_of(self, token: int) -> str:
        """A token's text."""
        return self.bytes_of(token).decode("utf-8", "replace")

    def whole(self, tokens: Sequence[int], *, special: bool) -> str:
        """The text of tokens, special ones included or not.

        Raises:
            SessionError: There is no tokenizer.
        """
        if self.tokenizer is None:
            raise SessionError("the model has no tokenizer.json: there are no texts")
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=not special)
        return text

    def chat(self, logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """Log-probabilities as `/v1/chat/completions` has them."""
        return [
            {**self._entry(each.token, each.logprob), "top_logprobs": [self._entry(*other) for other in each.top]}
            for each in logprobs
        ]

    def completion(self, logprobs: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
        """Log-probabilities as `/v1/completions` has them.

        Args:
            logprobs: Those of new tokens.
            offset: Characters of the text before them.
        """
        tokens = [self.text_of(each.token) for each in logprobs]
        offsets = [offset]
        for token in tokens:
            offsets.append(offsets[-1] + len(token))
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [self._columns(each) for each in logprobs],
            "text_offset": offsets[:-1],
        }

    def echoed(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs], text: str) -> dict[str, Any]:
        """Log-probabilities of an echoed prompt as `/v1/completions` has them.

        Args:
            ids: Its tokens.
            logprobs: Those of its tokens but the first.
            text: The prompt as it is echoed, without tokens that the tokenizer has put before it.
        """
        found = self.completion([TokenLogprobs(ids[0], 0.0), *logprobs], 0)
        found["token_logprobs"][0] = found["top_logprobs"][0] = None
        end = 0
        for place, token in enumerate(found["tokens"]):
            found["text_offset"][place] = end
            end += len(token) if text.startswith(token, end) or ids[place] not in self.added else 0
        return found

    def _columns(self, place: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens in a place, and the chosen one; of equal texts the likeliest."""
        found: dict[str, float] = {}
        for token, value in (*place.top, (place.token, place.logprob)):
            found.setdefault(self.text_of(token), value)
        return found

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        found = self.bytes_of(token)
        return {"token": found.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(found)}

    def _bytes_of(self, token: int) -> bytes:
        if self.tokenizer is None:
            return str(token).encode()
        if token in self.added:
            return self.added[token].content.encode()
        text = self.tokenizer.id_to_token(token) or ""
        if all(letter in self.letters for letter in text):
            return bytes(self.letters[letter] for letter in text)
        return text.encode()

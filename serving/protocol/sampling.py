"""Fields that every request for text has: the choice of tokens, its limits, and who asks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .reading import Sized, Within

Name = Annotated[str, Sized(most=256)]
MOST_CHOICES = 16
"""Continuations of one prompt at most."""

MOST_STOPS = 16
"""Texts at most that end a continuation."""

Stop = Annotated[str, Sized(least=1, most=256)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Fields of OpenAI's service that say how it keeps and bills a request.

    Attributes:
        store: Nothing is stored: only false is taken.
        metadata: Given back in an answer that has a place for it.
        service_tier: There is one tier.
        user: The person that asks: users take turns where requests wait.
        safety_identifier: The same, where there is no `user`.
        prompt_cache_key: Taken and not needed: known beginnings are found by their contents, whatever the key.
        prompt_cache_retention: Known beginnings are held in memory, and for no time that is promised.
    """

    store: Literal[False] | None = None
    metadata: Annotated[dict[str, Annotated[str, Sized(most=512)]], Sized(most=16)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None

    @property
    def asker(self) -> str:
        """The name by which users take turns."""
        return self.user or self.safety_identifier or ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choosing(Stored):
    """The choice of tokens; a field that is null or left out is as the checkpoint's generation config says.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: Keeps the likeliest tokens that make up this probability.
        top_k: Keeps this number of the likeliest tokens; 0 and -1 keep all.
        min_p: Keeps tokens with this share of the likeliest's probability.
        repetition_penalty: Above 1 discourages tokens that occurred, in the prompt or since.
        frequency_penalty: Above 0 discourages new tokens, the more often they occurred.
        presence_penalty: Above 0 discourages new tokens that occurred.
        logit_bias: Numbers that are added to logits, by token id.
        seed: The seed of the draws; of several continuations the first has it, the second the next number, and so on.
        stop: Texts that end a continuation, which ends before them.
        grammar: A grammar in Lark's form, as llguidance takes it, that the text matches.
        regex: A regular expression that the whole text matches.
        stream: Whether the text comes piece by piece, as server-sent events.
    """

    temperature: Annotated[float, Within(0, 2)] | None = None
    top_p: Annotated[float, Within(0, 1)] | None = None
    top_k: Annotated[int, Within(-1, 1 << 31)] | None = None
    min_p: Annotated[float, Within(0, 1)] | None = None
    repetition_penalty: Annotated[float, Within(above=0, most=100)] | None = None
    frequency_penalty: Annotated[float, Within(-2, 2)] | None = None
    presence_penalty: Annotated[float, Within(-2, 2)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Within(-100, 100)]], Sized(most=1024, pattern="^[0-9]{1,9}$")] | None
    ) = None
    seed: Annotated[int, Within(-(1 << 63), (1 << 63) - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Sized(most=MOST_STOPS)] | None = None
    grammar: Annotated[str, Sized(least=1, most=1 << 16)] | None = None
    regex: Annotated[str, Sized(least=1, most=1 << 14)] | None = None
    stream: bool | None = None

    def settings(self) -> dict[str, Any]:
        """The words of `Session.request` for what is given, one continuation's."""
        found: dict[str, Any] = {name: getattr(self, name) for name in SAME if getattr(self, name) is not None}
        if found.get("top_k") == -1:
            found["top_k"] = 0
        if found.get("temperature") is not None:
            found["do_sample"] = found["temperature"] > 0
            if not found["do_sample"]:
                del found["temperature"]
        stops: str | Sequence[str] | None = self.stop
        if stops:
            found["stop_strings"] = [stops] if isinstance(stops, str) else list(stops)
        return found

    def seeded(self, index: int) -> dict[str, int]:
        """The seed of one continuation of several."""
        return {} if self.seed is None else {"seed": (self.seed + index) % (1 << 64)}


SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "grammar",
    "regex",
)
"""Fields whose names are those of a session's settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamOptions:
    """Additions to a stream's text.

    Attributes:
        include_usage: Whether a last event counts the tokens.
        include_obfuscation: Pads against listeners; only false is taken: use TLS.
    """

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None

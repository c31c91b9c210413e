"""A checkpoint's own settings of generation, and a caller's laid over them.

Enters: a folder's `generation_config.json`, and the settings of a request. Leaves: `Defaults` and `Choice`. Invariant:
a value out of range is refused by its name, and the precedence is that of `transformers`.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ArrieroWarning, FolderError, SessionError
from ..files.folders import read_json
from . import checks
from .draws import Sampling

DEFAULT_TOP_K = 50
"""Tokens that a draw keeps where neither the checkpoint nor the caller says, as in `transformers`."""

CHOICES = tuple(each.name for each in dataclasses.fields(Sampling))
"""Settings by which tokens are chosen."""

IGNORED_OUTSIDE = ("eos_token_id", "suppress_tokens", "begin_suppress_tokens")
"""Fields of a file in which a token outside the vocabulary changes nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How one prompt is continued, checked.

    Attributes:
        count: New tokens at most.
        sampling: The choice of tokens.
        ends: Tokens that end the sequence.
        stop_strings: Texts that end it.
        top_logprobs: Likeliest tokens whose log-probabilities are returned beside the chosen one's; None returns none.
    """

    count: int
    sampling: Sampling
    ends: frozenset[int]
    stop_strings: tuple[str, ...]
    top_logprobs: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """A checkpoint's settings of generation, for a caller who gives none.

    Attributes:
        eos_token_ids: Tokens that end the sequence.
        sampling: The choice of tokens; greedy where the checkpoint does not ask for draws.
        drawn_temperature: Temperature of a caller who asks for draws and names none.
        max_new_tokens: New tokens at most; None is no limit.
        max_length: Tokens of prompt and continuation at most, without `max_new_tokens`; None is no limit.
        stop_strings: Texts that end the sequence.
    """

    eos_token_ids: tuple[int, ...] = ()
    sampling: Sampling = field(default_factory=lambda: Sampling(top_k=DEFAULT_TOP_K))
    drawn_temperature: float = 1.0
    max_new_tokens: int | None = None
    max_length: int | None = None
    stop_strings: tuple[str, ...] = ()

    @property
    def limits_length(self) -> bool:
        """Whether the checkpoint says how long a continuation is."""
        return self.max_new_tokens is not None or self.max_length is not None

    def choose(self, settings: Mapping[str, Any], prompt: int, room: int, vocabulary: int) -> Choice:
        """Lays a caller's settings over these; one that is None is as the checkpoint says.

        Args:
            settings: The settings by their names, `max_new_tokens` among them.
            prompt: Number of the prompt's tokens.
            room: New tokens that the session can hold.
            vocabulary: Tokens that there are.

        Raises:
            SessionError: A setting is out of range.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        chosen = {name: given[name] for name in CHOICES if name in given}
        if "min_length" in given and "min_new_tokens" not in given and self.sampling.min_new_tokens:
            _overruled("min_length", "min_new_tokens", "the generation config")
        if (temperature := self._temperature(given)) is not None:
            chosen["temperature"] = temperature
        sampling = dataclasses.replace(self.sampling, **chosen)
        sampling.check_vocabulary(vocabulary)
        ends, stops = given.get("eos_token_id"), given.get("stop_strings")
        return Choice(
            count=min(room, self._count(given, prompt, room)),
            sampling=sampling,
            ends=frozenset(self.eos_token_ids if ends is None else checks.token_ids("eos_token_id", ends, vocabulary)),
            stop_strings=self.stop_strings if stops is None else checks.texts("stop_strings", stops),
            top_logprobs=_top_logprobs(given),
        )

    def _temperature(self, given: Mapping[str, Any]) -> float | None:
        """The temperature that `do_sample` makes of the settings; None leaves it."""
        if "do_sample" not in given:
            return None
        draws = checks.flag("do_sample", given["do_sample"])
        temperature = given.get("temperature", self.drawn_temperature if draws else 0.0)
        temperature = checks.number("temperature", temperature, "a number from 0 up", 0.0)
        if draws and temperature == 0:
            raise SessionError("temperature is 0 though do_sample is True: give a number above 0, or leave one out")
        if temperature and not draws:
            _overruled("temperature", "do_sample=False", "the caller")
        return temperature if draws else 0.0

    def _count(self, given: Mapping[str, Any], prompt: int, room: int) -> int:
        """New tokens at most: `max_new_tokens` wherever it is said, else `max_length`, else the room there is."""
        most, longest = given.get("max_new_tokens"), given.get("max_length")
        if most is not None:
            most = checks.whole("max_new_tokens", most)
        if longest is not None:
            longest = checks.whole("max_length", longest)
        if longest is not None and (most is not None or self.max_new_tokens is not None):
            _overruled("max_length", "max_new_tokens", "the generation config" if most is None else "the caller")
        most = self.max_new_tokens if most is None else most
        longest = self.max_length if longest is None else longest
        if most is not None:
            return most
        if longest is None:
            return room
        if longest <= prompt:
            raise SessionError(f"the prompt has {prompt} tokens, max_length is {longest}: give max_new_tokens instead")
        return longest - prompt


def read_defaults(folder: Path, vocabulary: int | None = None) -> Defaults:
    """Reads `generation_config.json`; without `do_sample` in it, the largest logit is taken.

    Args:
        folder: A model or bundle.
        vocabulary: Tokens that there are; None looks at none. Ends and forbidden tokens outside change nothing, and
            are warned of.

    Raises:
        FolderError: The file is damaged, or a value in it out of range.
    """
    path = folder / "generation_config.json"
    config = {name: value for name, value in read_json(path).items() if value is not None}
    try:
        for name in IGNORED_OUTSIDE:
            if name in config:
                config[name] = _inside(name, config[name], vocabulary, path)
        temperature = config.pop("temperature", 1.0)
        if draws := "do_sample" in config and checks.flag("do_sample", config["do_sample"]):
            checks.number("temperature", temperature, "a number from 0 up", 0.0)
        chosen = {name: config[name] for name in CHOICES if name in config and name != "seed"}
        sampling = Sampling(**{"top_k": DEFAULT_TOP_K, **chosen, "temperature": temperature if draws else 0.0})
        if vocabulary is not None:
            sampling.check_vocabulary(vocabulary)
        limits = [name for name in ("max_new_tokens", "max_length") if name in config]
        return Defaults(
            eos_token_ids=config.get("eos_token_id", ()),
            sampling=sampling,
            drawn_temperature=_drawn(temperature),
            stop_strings=checks.texts("stop_strings", config.get("stop_strings", ())),
            **{name: checks.whole(name, config[name]) for name in limits},
        )
    except SessionError as error:
        raise FolderError(f"{path}: {error}: correct it") from error


def _inside(name: str, value: Any, vocabulary: int | None, path: Path) -> tuple[int, ...]:
    """A file's token ids without those that no model can choose, of which it warns."""
    several = value if isinstance(value, list) else [value]
    negative = [each for each in several if type(each) is int and each < 0]
    kept = [each for each in several if type(each) is not int or each >= 0]
    tokens = checks.token_ids(name, kept if isinstance(value, list) or not kept else value)
    inside = tuple(token for token in tokens if vocabulary is None or token < vocabulary)
    if outside := [*negative, *(token for token in tokens if token not in inside)]:
        said = f"{path.name}: {name} {outside[0]} is outside the vocabulary and changes nothing"
        warnings.warn(said, ArrieroWarning, stacklevel=3)
    return inside


def _drawn(temperature: Any) -> float:
    """A file's temperature for draws; one that the file itself does not use may be anything."""
    try:
        return checks.number("temperature", temperature, "a number above 0", 0.0) or 1.0
    except SessionError:
        return 1.0


def _top_logprobs(given: Mapping[str, Any]) -> int | None:
    """Likeliest tokens to return; None where no log-probabilities are asked for."""
    top = checks.whole("top_logprobs", given.get("top_logprobs", 0))
    if top > MOST_LOGPROBS:
        checks.refuse("top_logprobs", top, f"a whole number from 0 to {MOST_LOGPROBS}")
    if checks.flag("logprobs", given.get("logprobs", False)):
        return top
    if top:
        raise SessionError(f"top_logprobs is {top}, but logprobs is not set: give logprobs=True as well")
    return None


MOST_LOGPROBS = 20
"""Likeliest tokens whose log-probabilities are returned at most, as in OpenAI's interface."""


def _overruled(name: str, by: str, where: str) -> None:
    """Warns of a setting that another overrules, as in `transformers`."""
    warnings.warn(f"{name} is overruled by {by} of {where}: leave one out", ArrieroWarning, stacklevel=5)

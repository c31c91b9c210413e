"""Requests as NVIDIA Dynamo's frontend sends them to a worker, and the chunks that it takes back.

Enters: a request's dictionary, its prompt in tokens already; pieces of a continuation. Leaves: what `Session.request`
takes; dictionaries of tokens. Invariant: what is asked for is done or refused by its name. The frontend keeps a few
fields of OpenAI's to itself, `logit_bias` among them, so they never come here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import SessionError
from ..runtime import Generated
from ..runtime.images.data_urls import read_data_url
from ..runtime.logprobs import TokenLogprobs
from .errors import RequestError
from .rides import FINISHES
from .texts import TokenTexts

SAME = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
)
"""Options of sampling whose names are those of a session's settings."""

NOT_DONE = ("use_beam_search", "length_penalty", "best_of")
"""Options of sampling that are refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A request in a session's words.

    Attributes:
        ids: The prompt.
        count: New tokens at most; None is as many as there is room for.
        settings: Settings of all continuations.
        seed: The first continuation's seed; the others' follow it.
        choices: Continuations.
        images: The prompt's images, as their files' bytes.
    """

    ids: list[int]
    count: int | None
    settings: dict[str, Any]
    seed: int | None
    choices: int
    images: list[bytes]

    def of(self, index: int) -> dict[str, Any]:
        """The settings of one continuation."""
        return self.settings if self.seed is None else {**self.settings, "seed": (self.seed + index) % (1 << 64)}


def read_request(request: Mapping[str, Any], most_choices: int) -> Asked:
    """Reads a request.

    Args:
        request: As the frontend sends it.
        most_choices: Continuations at most.

    Raises:
        RequestError: It asks for what is not done.
    """
    sampling, stops = _part(request, "sampling_options"), _part(request, "stop_conditions")
    for name in NOT_DONE:
        if (found := sampling.get(name)) is True or found not in (None, 0, 1):
            raise RequestError(f"{name} is {found!r}, which this worker does not do: leave it out", name)
    choices = sampling.get("n") or 1
    if not 1 <= choices <= most_choices:
        raise RequestError(f"n is {choices}, this worker gives at most {most_choices} at once", "n")
    return Asked(
        ids=[int(token) for token in request["token_ids"]],
        count=stops.get("max_tokens"),
        settings={
            **_sampling(sampling),
            **_constraint(sampling.get("guided_decoding")),
            **_ends(request, stops),
            **_logprobs(_part(request, "output_options")),
        },
        seed=sampling.get("seed"),
        choices=choices,
        images=_images(request.get("multi_modal_data") or {}),
    )


def chunk(index: int, piece: Generated, texts: TokenTexts) -> dict[str, Any]:
    """A piece as the frontend takes it, without the counts that the last one has."""
    found: dict[str, Any] = {"token_ids": piece.ids, "index": index}
    if piece.logprobs:
        found["log_probs"] = [each.logprob for each in piece.logprobs]
        found["top_logprobs"] = [_likeliest(each, texts) for each in piece.logprobs]
    if piece.finish is not None:
        found["finish_reason"] = FINISHES[piece.finish]
    return found


def usage(prompt: int, new: int, known: int) -> dict[str, Any]:
    """The counts of tokens: the prompt's, new ones, and those of the prompt that were known."""
    details = {"cached_tokens": known}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": details,
    }


def _part(request: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = request.get(name) or {}
    if not isinstance(found, Mapping):
        raise RequestError(f"{name} is no object", name)
    return found


def _sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: options[name] for name in SAME if options.get(name) is not None}
    if (top_k := options.get("top_k")) is not None:
        found["top_k"] = max(0, top_k)  # -1 keeps all
    if (temperature := found.get("temperature")) is not None:
        found["do_sample"] = temperature > 0
        if not temperature > 0:
            del found["temperature"]
    return found


def _constraint(guided: Any) -> dict[str, Any]:
    """The grammar, the schema or the expression that the text follows."""
    if not guided:
        return {}
    given = {name: guided[name] for name in ("json", "regex", "choice", "grammar") if guided.get(name) is not None}
    if guided.get("structural_tag") is not None:
        message = "structural_tag is not done by this worker: give a JSON schema, a regex or a grammar"
        raise RequestError(message, "structural_tag")
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} are given: give one of them", next(iter(given)))
    if "choice" in given:
        return {"regex": "|".join(re.escape(str(each)) for each in given["choice"])}
    return {"json_schema" if name == "json" else name: value for name, value in given.items()}


def _ends(request: Mapping[str, Any], stops: Mapping[str, Any]) -> dict[str, Any]:
    """Ends of a continuation."""
    asked = [*(stops.get("stop_token_ids") or ())]
    known = [*(request.get("eos_token_ids") or ()), *(stops.get("stop_token_ids_hidden") or ())]
    found: dict[str, Any] = {}
    if stops.get("ignore_eos"):
        found["eos_token_id"] = asked
    elif asked or known:
        found["eos_token_id"] = list(dict.fromkeys([*asked, *known]))
    if texts := stops.get("stop"):
        found["stop_strings"] = [texts] if isinstance(texts, str) else list(texts)
    if least := stops.get("min_tokens"):
        found["min_new_tokens"] = least
    return found


def _logprobs(options: Mapping[str, Any]) -> dict[str, Any]:
    if options.get("prompt_logprobs") is not None:
        raise RequestError("prompt_logprobs are not given by this worker: leave them out", "prompt_logprobs")
    count = options.get("logprobs")
    return {} if count is None else {"logprobs": True, "top_logprobs": count}


def _images(data: Mapping[str, Any]) -> list[bytes]:
    """A prompt's images, which come as data URLs."""
    if other := sorted(kind for kind, given in data.items() if given and kind != "image_url"):
        raise RequestError(
            f"{other[0]} is not taken by this worker, which takes images alone: leave it out", "messages"
        )
    found = []
    for index, item in enumerate(data.get("image_url") or ()):
        where = f"image {index + 1}"
        url = item.get("Url") if isinstance(item, Mapping) else item
        if not isinstance(url, str) or url[:5].lower() != "data:":
            raise RequestError(f"{where} is no data URL: send it as data:image/png;base64,…", "messages")
        try:
            found.append(read_data_url(url, where))
        except SessionError as error:
            raise RequestError(str(error), "messages") from error
    return found


def _likeliest(token: TokenLogprobs, texts: TokenTexts) -> list[dict[str, Any]]:
    """The likeliest tokens in a token's place, the token itself where there are none."""
    pairs: Sequence[tuple[int, float]] = token.top or ((token.token, token.logprob),)
    return [
        {"rank": rank, "token_id": each, "token": texts.text_of(each), "logprob": logprob}
        for rank, (each, logprob) in enumerate(pairs, 1)
    ]

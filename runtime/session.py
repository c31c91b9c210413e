"""A session: prompts in, tokens and text out.

Enters: texts, conversations, token ids and images. Leaves: new tokens and their text, at once or as a stream, of one
prompt or of many side by side. Invariant: the model is run by `TokenSession` alone.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import numpy as np

from ..errors import SessionError
from .backends.interface import DecoderBackend
from .chat.settings import ChatSettings
from .continuation import Generated, Request, Settings, joined
from .flight import stream_requests
from .images.tower import Tower
from .lookup import Lookup
from .prompt import Images, Prompt, PromptReader, Tokens
from .rider import ride_alone
from .sampling import Sampling
from .state import Limits
from .text import Defaults, Text
from .token_session import TokenSession


class Session(TokenSession):
    """A loaded model with its tokenizer.

    Args:
        decoder: The decoder on its back end.
        text: The tokenizer and chat template.
        defaults: The checkpoint's generation defaults.
        limits: Positions and rows that the session holds at most.
        tower: The vision tower; None where the model takes no images.
        prefix_bytes: Keys and values of earlier prompts to keep for those that begin alike; 0 keeps none.
    """

    def __init__(
        self,
        decoder: DecoderBackend,
        text: Text,
        defaults: Defaults,
        limits: Limits,
        tower: Tower | None = None,
        prefix_bytes: int = 0,
    ) -> None:
        super().__init__(decoder, limits, tower, prefix_bytes)
        self.text, self.defaults = text, defaults
        self.prompt_reader = PromptReader(text, None if tower is None else tower.spec)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        images: Images = (),
        prompt_lookup_num_tokens: int | None = None,
        **settings: Unpack[Settings],
    ) -> Generated:
        """Continues a prompt; the arguments are those of `stream`. Returns the new tokens and their text."""
        return joined(list(self.stream(prompt, max_new_tokens, images, prompt_lookup_num_tokens, **settings)))

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        images: Images = (),
        prompt_lookup_num_tokens: int | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[Generated]:
        """Continues a prompt piece by piece.

        Args:
            prompt: A text, token ids taken as they are, or messages for the chat template; see `PromptReader.read`.
            max_new_tokens: New tokens at most; None is until the end of the sequence or of `max_seq`.
            images: Paths, data URLs, bytes, PIL images or arrays, one or a list: one for each `<|image|>` in the
                prompt; a text without any of these is about all of them.
            prompt_lookup_num_tokens: Tokens at most that are guessed from those that followed the same words before,
                and verified in one piece; None or 0 is none. The continuation is the same, drawn or greedy.
            **settings: The choice of tokens and the ends of the text, and what belongs to messages, as `tools`; see
                `Settings`.

        Raises:
            SessionError: The prompt is empty, too long, or not in the vocabulary, an image cannot be read or has no
                place in it, or a setting is out of range.
        """
        if (drafts := prompt_lookup_num_tokens or 0) < 0:
            raise SessionError(f"prompt_lookup_num_tokens is {drafts}, expected a whole number from 0 up")
        return ride_alone(self, self.request(prompt, max_new_tokens, images, **settings), Lookup(drafts))

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | None = None,
        *,
        slots: int | None = None,
        **settings: Unpack[Settings],
    ) -> list[Generated]:
        """Continues several prompts at once; the arguments are those of `stream_many`.

        Returns:
            The new tokens and their text, in the order of the prompts.
        """
        pieces: list[list[Generated]] = [[] for _ in prompts]
        for number, piece in self.stream_many(prompts, max_new_tokens, slots=slots, **settings):
            pieces[number].append(piece)
        return [joined(each) for each in pieces]

    def stream_many(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | None = None,
        *,
        slots: int | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[tuple[int, Generated]]:
        """Continues several prompts at once, each as if it were alone: one that ends makes room for the next.

        Args:
            prompts: Each as in `stream`; images stand in messages.
            max_new_tokens: New tokens of each at most; None is until its end or that of `max_seq`.
            slots: Sequences at once; None takes `flight.DEFAULT_SLOTS`, or `max_batch` if that is less.
            **settings: The same for all prompts, see `Settings`. Each has a sampler of its own with the same seed.

        Yields:
            The prompt's number, and a piece of its continuation.

        Raises:
            SessionError: As `stream` does, before anything is computed.
        """
        requests = [self.request(prompt, max_new_tokens, **settings) for prompt in prompts]
        return stream_requests(self, requests, slots)

    def request(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        images: Images = (),
        **settings: Unpack[Settings],
    ) -> Request:
        """Checks a prompt and its settings, for a `Flight` to take; the arguments are those of `stream`."""
        if unknown := sorted(settings.keys() - Settings.__annotations__.keys()):
            raise TypeError(f"unknown setting {unknown[0]!r}: choose from {', '.join(Settings.__annotations__)}")
        chat: Any = {name: value for name, value in settings.items() if name in ChatSettings.__annotations__}
        tokens = self.read(prompt, images, **chat)
        fields = {field.name for field in dataclasses.fields(Sampling)}
        given: dict[str, Any] = {name: v for name, v in settings.items() if name in fields and v is not None}
        ends = settings.get("eos_token_id")
        ends = self.defaults.eos_token_ids if ends is None else np.atleast_1d(np.asarray(ends, dtype=np.int64)).tolist()
        room = self.max_seq - len(tokens.ids)
        if not room and max_new_tokens != 0:
            raise SessionError(f"the prompt fills all {self.max_seq} tokens that the session holds: load with more")
        if max_new_tokens is not None and max_new_tokens < 0:
            raise SessionError(f"max_new_tokens is {max_new_tokens}, expected a whole number from 0 up")
        return Request(
            prompt=tokens,
            count=room if max_new_tokens is None else min(max_new_tokens, room),
            sampling=dataclasses.replace(self.defaults.sampling, **given),
            ends=frozenset(ends),
            stop_strings=settings.get("stop_strings") or (),
            text=self.text,
        )

    def read(self, prompt: Prompt, images: Images = (), **settings: Unpack[ChatSettings]) -> Tokens:
        """Reads a prompt: its token ids, checked against the vocabulary and `max_seq`, and its images' tiles.

        Raises:
            SessionError: As `stream` does.
        """
        tokens = self.prompt_reader.read(prompt, images, **settings)
        ids = tokens.ids
        if not ids:
            raise SessionError("the prompt holds no tokens: give some text or ids")
        self.check_ids(ids)
        if len(ids) > self.max_seq:
            of_images = f" ({seen} of its images)" if (seen := sum(token == self.image_token for token in ids)) else ""
            raise SessionError(
                f"the prompt has {len(ids)} tokens{of_images}, the session holds {self.max_seq}: shorten it, or load "
                f"with a larger max_seq (the model's context is {self.spec.max_positions})"
            )
        return tokens

"""A session: prompts in, tokens and text out.

Enters: texts, conversations, token ids and images. Leaves: new tokens and their text, at once or as a stream, of one
prompt or of many side by side. Invariant: the model is run by `TokenSession` alone.
"""

import functools
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, Unpack

from ..errors import SessionError, shortened
from .backends.interface import DecoderBackend
from .chat.settings import ChatSettings
from .checks import whole
from .continuation import Generated, Request, Settings, joined
from .defaults import Defaults
from .draft import Draft
from .flight import stream_requests
from .grammars.compiler import KINDS, GrammarCompiler
from .guesses import Guessing
from .images.tower import Tower
from .prompt import Images, Prompt, PromptReader, Tokens, prompt_list
from .speculation import ride_alone
from .state import Limits
from .text import Text
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
        draft: The head that drafts tokens; None where the model has none.
    """

    def __init__(
        self,
        decoder: DecoderBackend,
        text: Text,
        defaults: Defaults,
        limits: Limits,
        tower: Tower | None = None,
        prefix_bytes: int = 0,
        draft: Draft | None = None,
    ) -> None:
        super().__init__(decoder, limits, tower, prefix_bytes, draft)
        self.text, self.defaults = text, defaults
        text.expect(limits.max_seq)
        self.prompt_reader = PromptReader(text, None if tower is None else tower.spec)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        images: Images = (),
        prompt_lookup_num_tokens: int | None = None,
        draft_tokens: int | None = None,
        **settings: Unpack[Settings],
    ) -> Generated:
        """Continues a prompt; the arguments are those of `stream`. Returns the new tokens and their text."""
        guesses = prompt_lookup_num_tokens, draft_tokens
        return joined(list(self.stream(prompt, max_new_tokens, images, *guesses, **settings)))

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        images: Images = (),
        prompt_lookup_num_tokens: int | None = None,
        draft_tokens: int | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[Generated]:
        """Continues a prompt piece by piece.

        Args:
            prompt: A text, token ids taken as they are, or messages for the chat template; see `PromptReader.read`.
            max_new_tokens: New tokens at most; None is as the generation config says, or until the end of the sequence
                or of `max_seq`.
            images: Paths, data URLs, bytes, PIL images or arrays, one or a list: one for each `<|image|>` in the
                prompt; a text without any of these is about all of them.
            prompt_lookup_num_tokens: Tokens at most that are guessed from those that followed the same words before,
                and verified in one piece; None or 0 is none. The continuation is the same, drawn or greedy.
            draft_tokens: Tokens at most that the model's draft guesses where prompt lookup knows none, verified
                likewise; 0 is none. None takes `USUAL_DRAFT` where the model has a draft.
            **settings: The choice of tokens and the ends of the text, and what belongs to messages, as `tools`; see
                `Settings`.

        Raises:
            SessionError: The prompt is empty, too long, or not in the vocabulary, an image cannot be read or has no
                place in it, or a setting is out of range.
        """
        guessing = self.guessing(prompt_lookup_num_tokens, draft_tokens)
        return ride_alone(self, self.request(prompt, max_new_tokens, images, **settings), guessing)

    def guessing(self, prompt_lookup_num_tokens: int | None = None, draft_tokens: int | None = None) -> Guessing:
        """Checks how tokens are to be guessed; the arguments are those of `stream`.

        Raises:
            SessionError: A number is out of range, or a draft is asked for that the model does not have.
        """
        lookup = whole("prompt_lookup_num_tokens", prompt_lookup_num_tokens or 0)
        if draft_tokens is None:
            return Guessing(lookup=lookup, draft=self.usual_draft)
        if whole("draft_tokens", draft_tokens) and self.draft is None:
            raise SessionError("draft_tokens is given, and the model has no draft: export it with --draft HEAD")
        return Guessing(lookup=lookup, draft=draft_tokens)

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | None = None,
        *,
        slots: int | None = None,
        prefill_budget: int | None = None,
        prompt_lookup_num_tokens: int | None = None,
        draft_tokens: int | None = None,
        **settings: Unpack[Settings],
    ) -> list[Generated]:
        """Continues several prompts at once; the arguments are those of `stream_many`.

        Returns:
            The new tokens and their text, in the order of the prompts. A prompt that an error ended has the `finish`
            "error", the error, and its tokens until then; the others go on.
        """
        prompts = prompt_list(prompts)
        pieces: list[list[Generated]] = [[] for _ in prompts]
        found = self.stream_many(
            prompts,
            max_new_tokens,
            slots=slots,
            prefill_budget=prefill_budget,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            draft_tokens=draft_tokens,
            **settings,
        )
        for number, piece in found:
            pieces[number].append(piece)
        return [joined(each) for each in pieces]

    def stream_many(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | None = None,
        *,
        slots: int | None = None,
        prefill_budget: int | None = None,
        prompt_lookup_num_tokens: int | None = None,
        draft_tokens: int | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[tuple[int, Generated]]:
        """Continues several prompts at once, each as if it were alone: one that ends makes room for the next.

        Args:
            prompts: Each as in `stream`; images stand in messages.
            max_new_tokens: New tokens of each at most, as in `stream`.
            slots: Sequences at once; None takes `flight.DEFAULT_SLOTS`, or `max_batch` if that is less.
            prefill_budget: Tokens of prompts that a step reads at most while others decode, so that these go on; None
                reads as the decoder takes them, which is the fastest for all together.
            prompt_lookup_num_tokens: As in `stream`.
            draft_tokens: As in `stream`.
            **settings: The same for all prompts, see `Settings`. Each has a sampler of its own with the same seed.

        Yields:
            The prompt's number, and a piece of its continuation. An error while it is computed ends its own prompt
            alone: with a piece that has the `finish` "error" and the error.

        Raises:
            SessionError: As `stream` does, before anything is computed.
        """
        guessing = self.guessing(prompt_lookup_num_tokens, draft_tokens)
        requests = [self.request(prompt, max_new_tokens, **settings) for prompt in prompt_list(prompts)]
        return stream_requests(self, requests, slots, prefill_budget, guessing)

    def request(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        images: Images = (),
        **settings: Unpack[Settings],
    ) -> Request:
        """Checks a prompt and its settings, for a `Flight` to take; the arguments are those of `stream`."""
        if unknown := sorted(map(str, settings.keys() - Settings.__annotations__.keys())):
            raise SessionError(f"unknown setting {shortened(unknown[0])}{_choice(unknown[0])}")
        self.decoder.check_files()
        chat: Any = {name: value for name, value in settings.items() if name in ChatSettings.__annotations__}
        tokens = self.read(prompt, images, **chat)
        room = self.max_seq - len(tokens.ids)
        if not room and max_new_tokens != 0:
            longer = ", or load with a larger max_seq" if self.max_seq < self.spec.max_positions else ""
            raise SessionError(f"the prompt fills all {self.max_seq} tokens of the session: shorten it{longer}")
        asked = {**settings, "max_new_tokens": max_new_tokens}
        choice = self.defaults.choose(asked, len(tokens.ids), room, self.spec.vocab_size)
        if choice.stop_strings and self.text.tokenizer is None:
            raise SessionError(f"{self.text.folder} has no tokenizer.json: give eos_token_id instead of stop_strings")
        grammars = self.grammars if any(settings.get(kind) is not None for kind in KINDS) else None
        return Request(
            prompt=tokens,
            count=choice.count,
            sampling=choice.sampling,
            ends=choice.ends,
            stop_strings=choice.stop_strings,
            text=self.text,
            top_logprobs=choice.top_logprobs,
            grammar=None if grammars is None else grammars.read(settings),
        )

    @functools.cached_property
    def grammars(self) -> GrammarCompiler:
        """The grammars that continuations follow.

        Raises:
            SessionError: The folder has no tokenizer.
        """
        if self.text.tokenizer is None:
            raise SessionError(f"{self.text.folder} has no tokenizer.json: leave grammar, json_schema and regex out")
        return GrammarCompiler(self.text.tokenizer, self.spec.vocab_size)

    def read(self, prompt: Prompt, images: Images = (), **settings: Unpack[ChatSettings]) -> Tokens:
        """Reads a prompt: its token ids, checked against the vocabulary and `max_seq`, and its images' tiles.

        Raises:
            SessionError: As `stream` does.
        """
        tokens = self.prompt_reader.read(prompt, images, **settings)
        ids = tokens.ids
        if not ids:
            raise SessionError("the prompt holds no tokens: give some text or ids")
        if len(ids) > self.max_seq:
            of_images = f" ({seen} of its images)" if (seen := sum(token == self.image_token for token in ids)) else ""
            raise SessionError(
                f"the prompt has {len(ids)} tokens{of_images}, the session holds {self.max_seq}: shorten it, or load "
                f"with a larger max_seq (the model's context is {self.spec.max_positions})"
            )
        self.check_ids(ids)
        return tokens


def _choice(name: str) -> str:
    """The settings that a caller may have meant, and all there are."""
    known = list(Settings.__annotations__)
    meant = get_close_matches(ALIASES.get(name, name), known, n=1)
    hint = f"; did you mean {meant[0]}?" if meant else ""
    return f": choose from {', '.join(known)}{hint}"


ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "stop": "stop_strings",
    "eos": "eos_token_id",
}
"""Other libraries' names of settings."""

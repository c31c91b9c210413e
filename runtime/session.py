"""A session: prompts in, tokens and text out.

Underneath is a stateful step over a batch of sequences (`start`, `prefill`, `decode`); `logits`, `generate` and
`stream` are written with it.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import SessionError
from ..spec.geometry import ModelSpec
from .backends.interface import Decoding
from .continuation import Generated, Request, Settings, joined
from .flight import stream_requests
from .images.features import Features, RowFeatures
from .images.sources import ImageSource
from .images.tower import Vision
from .lookup import Lookup
from .pieces import cut
from .prefix import Prefixes
from .prompt import Prompt, Tokens, read_prompt
from .rider import ride_alone
from .sampling import Sampling
from .state import Limits, State
from .text import Defaults, Text


class Session:
    """A loaded model.

    Args:
        decoder: The graph on its engine.
        text: The tokenizer and chat template.
        defaults: The checkpoint's generation defaults.
        limits: How much the session holds.
        vision: What takes images; None where the model takes none.
        prefix_bytes: Keys and values of earlier prompts to keep for those that begin alike; 0 keeps none.
    """

    def __init__(
        self,
        decoder: Decoding,
        text: Text,
        defaults: Defaults,
        limits: Limits,
        vision: Vision | None = None,
        prefix_bytes: int = 0,
    ) -> None:
        self.decoder, self.text, self.defaults, self.vision = decoder, text, defaults, vision
        self.limits, self.max_seq, self.max_batch = limits, limits.max_seq, limits.max_batch
        self.prefixes = Prefixes(decoder.spec.chunk, prefix_bytes)

    @property
    def spec(self) -> ModelSpec:
        """The model's geometry."""
        return self.decoder.spec

    @property
    def image_token(self) -> int | None:
        """Id of the token that stands for an image feature; None where the model takes no images."""
        return None if self.vision is None else self.vision.spec.image_token

    def start(self, batch: int = 1, positions: int | None = None) -> State:
        """Starts sequences of no tokens.

        Args:
            batch: Rows.
            positions: Tokens that each row can hold; None takes `max_seq`.
        """
        if batch < 1 or (positions is not None and positions < 1):
            raise SessionError(f"batch is {batch} and positions {positions}, expected whole numbers from 1 up")
        if self.max_batch is not None and batch > self.max_batch:
            raise SessionError(f"{batch} rows are more than max_batch {self.max_batch}: load with a larger one")
        positions = self.max_seq if positions is None else positions
        if positions > self.max_seq:
            limit = f"the model's context is {self.spec.max_positions}"
            raise SessionError(f"{positions} tokens are more than max_seq {self.max_seq}: load with more ({limit})")
        return State(self.decoder, batch, positions)

    def prefill(self, state: State, rows: Sequence[Sequence[int]], features: Features = ()) -> NDArray[np.float32]:
        """Adds tokens to each row, at least one, and where they have images, each row's features.

        Returns:
            The logits [B, V] after each row's last token.
        """
        if not all(len(row) for row in rows):
            raise SessionError(f"expected tokens for each of {len(rows)} rows")
        logits_BV = np.empty((len(rows), self.spec.vocab_size), dtype=np.float32)
        for row, _, logits_SV in self._run(state, rows, features, last_only=True):
            logits_BV[row] = logits_SV[-1]
        return logits_BV

    def extend(
        self, state: State, rows: Sequence[Sequence[int]], features: Features = ()
    ) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Adds tokens to each row; a row that holds some already may get none.

        Args:
            state: The sequences.
            rows: Each row's new tokens.
            features: Each row's image features [M, H], one for each image token among the new ones; empty where no row
                has any.

        Yields:
            Row, the number of its new tokens before these, and logits [S, V] after each of the next S. These come in
            pieces: only one piece's logits are in memory, however many tokens there are.
        """
        return self._run(state, rows, features, last_only=False)

    def decode(self, state: State, tokens_B: Sequence[int]) -> NDArray[np.float32]:
        """Adds one token to every row. Returns the logits [B, V] after it."""
        if len(tokens_B) != state.batch:
            raise SessionError(f"{len(tokens_B)} tokens for {state.batch} rows: give each row one")
        if int(state.past_B.max()) >= state.caches.positions:
            raise SessionError(f"a sequence is full at {state.caches.positions} tokens: start it with more positions")
        self._check_ids(tokens_B)
        ids_B1 = np.asarray(tokens_B, dtype=np.int64)[:, None]
        logits = state.binding(slice(0, len(ids_B1))).step(ids_B1, state.past_B, np.zeros_like(ids_B1))
        state.past_B += 1
        return logits[:, 0]

    def logits(self, ids_BS: ArrayLike, lengths_B: ArrayLike | None = None) -> NDArray[np.float32]:
        """Teacher-forced logits of whole sequences.

        Args:
            ids_BS: Token ids [B, S], right-padded where rows are shorter.
            lengths_B: Real tokens of each row, 1 to S; None is all.

        Returns:
            Logits [B, S, V] in float32, after each token; zeros at pads.

        Raises:
            SessionError: Wrong shapes, ids outside the vocabulary, or more tokens than the session holds.
        """
        ids = np.asarray(ids_BS)
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise SessionError(f"ids are {ids.dtype} {list(ids.shape)}, expected whole numbers [B, S]")
        batch, length = ids.shape
        lengths = np.full(batch, length) if lengths_B is None else np.asarray(lengths_B)
        whole = lengths.shape == (batch,) and np.issubdtype(lengths.dtype, np.integer)
        if not whole or lengths.min() < 1 or lengths.max() > length:
            raise SessionError(f"lengths are {lengths.tolist()}, expected {batch} numbers from 1 to {length}")
        state = self.start(batch, length)
        logits_BSV = np.zeros((batch, length, self.spec.vocab_size), dtype=np.float32)
        rows = [row[:count].tolist() for row, count in zip(ids, lengths, strict=True)]
        for row, start, logits_SV in self._run(state, rows, (), last_only=False):
            logits_BSV[row, start : start + len(logits_SV)] = logits_SV
        return logits_BSV

    def score(
        self, ids: Sequence[int], decoded: int = 0, features_MH: NDArray[np.float32] | None = None
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Teacher-forced logits of one sequence piece by piece, so that a long one's need not fit in memory.

        Args:
            ids: Token ids.
            decoded: How many of the last tokens run one at a time, as in generation; those before are prefilled.
                A decoded token is never an image's.
            features_MH: The features of its images; None where it has none.

        Yields:
            The number of a piece's first token, and logits [S, V] after each of its tokens.
        """
        if not 0 <= decoded < len(ids):
            raise SessionError(f"{decoded} of {len(ids)} tokens are to be decoded: one at least is prefilled")
        state, prefilled = self.start(1, len(ids)), len(ids) - decoded
        features = () if features_MH is None else [features_MH]
        for _, start, logits_SV in self.extend(state, [ids[:prefilled]], features):
            yield start, logits_SV
        for at in range(prefilled, len(ids)):
            yield at, self.decode(state, [ids[at]])

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        images: Sequence[ImageSource] = (),
        prompt_lookup_num_tokens: int | None = None,
        **settings: Unpack[Settings],
    ) -> Generated:
        """Continues a prompt; the arguments are those of `stream`. Returns the new tokens and their text."""
        return joined(list(self.stream(prompt, max_new_tokens, images, prompt_lookup_num_tokens, **settings)))

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        images: Sequence[ImageSource] = (),
        prompt_lookup_num_tokens: int | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[Generated]:
        """Continues a prompt piece by piece.

        Args:
            prompt: A text, token ids taken as they are, or messages for the chat template; see `prompt.read_prompt`.
            max_new_tokens: New tokens at most; None is until the end of the sequence or of `max_seq`.
            images: Paths, bytes, PIL images or arrays: one for each `<|image|>` in the prompt, or what it is about.
            prompt_lookup_num_tokens: Tokens at most that are guessed from what the last ones were followed by before,
                and verified in one piece; None or 0 is none. The continuation is the same, with draws as without.
            **settings: How tokens are chosen and what ends them, see `Settings`.

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
            **settings: Of all of them, see `Settings`. Each has a sampler of its own with the same seed.

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
        images: Sequence[ImageSource] = (),
        **settings: Unpack[Settings],
    ) -> Request:
        """A prompt and how to continue it, checked, for a `Flight` to take; the arguments are those of `stream`."""
        if unknown := sorted(settings.keys() - Settings.__annotations__.keys()):
            raise TypeError(f"unknown setting {unknown[0]!r}: choose from {', '.join(Settings.__annotations__)}")
        tokens = self.read(prompt, images)
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
        )

    def read(self, prompt: Prompt, images: Sequence[ImageSource] = ()) -> Tokens:
        """A prompt's token ids, checked against the vocabulary and the session's length, and its images' tiles.

        Raises:
            SessionError: As `stream` does.
        """
        tokens = read_prompt(prompt, images, self.text, self.vision)
        ids = tokens.ids
        if not ids:
            raise SessionError("the prompt holds no tokens: give some text or ids")
        self._check_ids(ids)
        if len(ids) > self.max_seq:
            of_images = f" ({seen} of its images)" if (seen := sum(token == self.image_token for token in ids)) else ""
            raise SessionError(
                f"the prompt has {len(ids)} tokens{of_images}, the session holds {self.max_seq}: shorten it, or load "
                f"with a larger max_seq (the model's context is {self.spec.max_positions})"
            )
        return tokens

    def encode(self, pixels_N3PP: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        """Image features [M, H] of tiles [N, 3, P, P]; None of none."""
        if pixels_N3PP is None or not len(pixels_N3PP):
            return None
        assert self.vision is not None
        return self.vision.encode(pixels_N3PP)

    def _run(
        self, state: State, rows: Sequence[Sequence[int]], features: Features, *, last_only: bool
    ) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Adds tokens piece by piece.

        Yields:
            Row, the number of its new tokens before the piece, and logits [S, V] of the piece's tokens (of its last
            one only where `last_only`; then only those of the last piece count).
        """
        held = zip(rows, state.past_B, strict=False)
        if len(rows) != state.batch or not all(len(row) or past for row, past in held):
            raise SessionError(f"expected tokens for each of {state.batch} rows")
        for row, tokens in enumerate(rows):
            if len(tokens):
                self._check_ids(tokens)
            total = int(state.past_B[row]) + len(tokens)
            if total > state.caches.positions:
                raise SessionError(f"row {row} would have {total} tokens, its caches hold {state.caches.positions}")
        given = RowFeatures(rows, features, self.image_token, self.spec.hidden_size)
        done = [0] * len(rows)
        longest = self.decoder.longest if last_only else self.decoder.longest_with_logits
        new = [len(row) for row in rows]
        for piece in cut(state.past_B.tolist(), new, self.spec.chunk, longest, self.decoder.most):
            first, width = piece.rows.start, max(piece.lengths)
            ids_BS = np.zeros((len(piece.lengths), width), dtype=np.int64)
            for index, length in enumerate(piece.lengths):
                start = done[first + index]
                ids_BS[index, :length] = rows[first + index][start : start + length]
            lengths_B = np.array(piece.lengths, dtype=np.int32)
            positions_BR = (
                lengths_B[:, None].astype(np.int64) - 1
                if last_only
                else np.broadcast_to(np.arange(width, dtype=np.int64), ids_BS.shape)
            )
            features_MH = given.take(piece.rows, ids_BS)
            logits = state.binding(piece.rows).step(ids_BS, state.past_B[piece.rows], positions_BR, features_MH)
            state.past_B[piece.rows] += lengths_B
            for index, length in enumerate(piece.lengths):
                yield first + index, done[first + index], logits[index] if last_only else logits[index, :length]
                done[first + index] += length

    def _check_ids(self, ids: Sequence[int]) -> None:
        if outside := [token for token in (min(ids), max(ids)) if not 0 <= token < self.spec.vocab_size]:
            raise SessionError(f"token id {outside[0]} is outside the vocabulary of {self.spec.vocab_size}")

"""A folder as a model of EleutherAI's `lm-eval`, so that its tasks run on exports, quantised models and bundles.

Enters: the harness's requests, in text. Leaves: log-likelihoods and generated texts. Importing this module registers
the model `arriero`; `python -m arriero.accuracy.harness` is the harness's own command line with it registered:

    python -m arriero.accuracy.harness run --model arriero --model_args pretrained=scout-int8 --tasks hellaswag

Invariant: texts become the same tokens, cut and continued the same way, as in the harness's own Hugging Face back end,
so that its numbers are comparable; but control tokens that stand in a conversation's messages are ordinary text, as
everywhere here. What the harness computes in common is inherited from it.
"""

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray
from tqdm import tqdm

from ..errors import ArrieroError, SessionError
from ..files.folders import read_spec
from ..loading import load
from ..runtime.chat.messages import Message
from ..runtime.chat.settings import ChatSettings
from ..runtime.draws import Sampling
from ..runtime.session import Session
from ..runtime.state import State

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Key of the answer in a cache, the context's tokens, and the continuation's."""

Answer = tuple[float, bool]
"""A continuation's log-likelihood, and whether greedy decoding would have written it."""

AUTO_BATCH = 8
"""Rows at once where the batch size is `auto` and the session has no limit of its own."""

SETTINGS = tuple(sorted({field.name for field in dataclasses.fields(Sampling)} - {"temperature"}))
"""Generation settings of a task that a session takes under the same name."""


@register_model("arriero")
class FolderModel(TemplateLM):  # type: ignore[misc]
    """A model or bundle folder.

    Args:
        pretrained: The folder.
        batch_size: Contexts that are read at once; continuations follow row by row.
        max_batch_size: The batch size where `batch_size` is `auto`.
        max_length: Tokens of a sequence at most; what is longer is cut on the left. None takes the model's context, or
            what an engine was built for.
        add_bos_token: Whether texts begin with the tokenizer's special tokens; None is as the tokenizer does.
        prefix_token_id: Token before a text that has no context; None takes BOS, or EOS where there is none.
        threads: Threads of one operator on a CPU.
        weights: Folder of the weight files, where they have moved.
        device: The harness's `--device`, which says `cuda:0` where nobody asked: not looked at, since a folder runs on
            what it was built for.

    Raises:
        ArrieroError: The folder, its weights or a setting is not as it must be.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        threads: int | None = None,
        weights: str | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.folder = Path(pretrained)
        spec = read_spec(self.folder)
        if max_length is None and spec.engine is None:
            max_length = spec.model.max_positions
        self.session: Session = load(self.folder, max_seq=max_length, threads=threads, weights=weights)
        self.text = self.session.text
        self.add_bos_token = add_bos_token
        self.rendered: dict[str, list[int]] = {}  # conversations whose messages hold what a control token is written as
        eos = self.text.special_id("eos_token")
        if eos is None:
            raise SessionError(f"{self.folder}: tokenizer_config.json names no eos_token: add it")
        bos = self.text.special_id("bos_token")
        self._eos, self._prefix = eos, eos if bos is None else bos
        if prefix_token_id is not None:
            self._prefix = prefix_token_id
        self.batch_size = self._batch_size(batch_size, max_batch_size)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self._prefix

    @property
    def max_length(self) -> int:
        """Tokens of a sequence at most."""
        return self.session.max_seq

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say how many: the Hugging Face back end's number."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness files tokenised requests."""
        return str(self.folder.resolve()).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for the harness's records; the folder has one, whatever name is asked for."""
        return self.text.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as a prompt, up to where the assistant begins, or within its last message."""
        try:
            return self._render(chat_history, add_generation_prompt)
        except SessionError:
            without_system = [message for message in chat_history if message["role"] != "system"]
            if len(without_system) == len(chat_history):
                raise
            return self._render(without_system, add_generation_prompt)

    def _render(self, messages: Sequence[Message], asks: bool) -> str:
        """A conversation as text; where its tokens are not those of that text, they are kept for `tok_encode`."""
        settings: ChatSettings = {"add_generation_prompt": asks, "continue_final_message": not asks}
        text = self.text.render_chat(messages, **settings)
        ids = self.text.encode_chat(messages, **settings)
        if ids != self.text.encode(text, special_tokens=False):
            self.rendered[text] = ids
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a text that has BOS written at its start gets no second one."""
        is_prompt = add_special_tokens is None and self.add_bos_token is not False
        for length in sorted({len(text) for text in self.rendered}, reverse=True):
            if (ids := self.rendered.get(string[:length])) is not None:
                start = self.text.encode("")[:1] if is_prompt or add_special_tokens else []
                rest = self.text.encode(string[length:], special_tokens=False) if string[length:] else []
                return [*(start if ids[:1] != start else []), *ids, *rest]
        if is_prompt:
            return self.text.encode_prompt(string)
        return self.text.encode(string, special_tokens=bool(add_special_tokens))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of `max_length` tokens where they are longer."""
        windows: list[Request] = []
        counts = []
        for request in requests:
            (text,) = request.args
            pieces = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            found = [(None, *make_disjoint_window(piece)) for piece in pieces]
            windows.extend(found)
            counts.append(len(found))
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(answers)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues texts, greedily unless a task asks for samples, up to its stop strings."""
        texts = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Running generate_until requests"):
            context, settings = request.args
            texts.append(self._generate(context, settings))
            self.cache_hook.add_partial("generate_until", (context, settings), texts[-1])
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **unused: Any
    ) -> list[Answer]:
        """Reads each context once, and from there its continuations one after another."""
        questions: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            questions[self._fit(context, continuation)].append(index)
        longest_first = sorted(questions, key=lambda context: (-len(context), context))
        answers: dict[int, Answer] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for start in range(0, len(longest_first), self.batch_size):
                contexts = longest_first[start : start + self.batch_size]
                asked = [questions[context] for context in contexts]
                choices = [[requests[index][2] for index in indices] for indices in asked]
                for row, choice, answer in score(self.session, contexts, choices):
                    index = asked[row][choice]
                    answers[index] = answer
                    if requests[index][0] is not None:  # parts of longer texts are not kept
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                    bar.update()
        return [answers[index] for index in range(len(requests))]

    def _fit(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
        """The context, cut on the left where the model cannot hold it; the last token is never read, only scored."""
        room = self.max_length + 1 - len(continuation)
        if not continuation or room < 1:
            raise SessionError(
                f"a continuation has {len(continuation)} tokens, expected 1 to max_length {self.max_length}: "
                "give a larger max_length, or leave the task out"
            )
        return tuple(context[-room:])

    def _generate(self, context: str, given: dict[str, Any]) -> str:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        tokenizer = self.text.tokenizer
        assert tokenizer is not None
        stops = handle_stop_sequences(
            settings.pop("until"), eos=tokenizer.decode([self._eos], skip_special_tokens=False)
        )
        count, sampled = settings.pop("max_gen_toks"), settings.pop("do_sample")
        temperature = settings.pop("temperature", None)
        if unknown := sorted(settings.keys() - set(SETTINGS)):
            known = ", ".join(("until", "max_gen_toks", "do_sample", "temperature", *SETTINGS))
            raise SessionError(f"generation setting {unknown[0]!r} is unknown: choose from {known}")
        room = self.max_length - count
        if room < 1:
            raise SessionError(f"max_gen_toks is {count}, max_length {self.max_length}: give a larger max_length")
        special = tokenizer.get_added_tokens_decoder()
        ends = {token for token, added in special.items() if added.content in stops}
        result = self.session.generate(
            self.tok_encode(context)[-room:],
            count,
            do_sample=sampled,
            temperature=temperature if sampled else None,
            eos_token_id=sorted({*self.session.defaults.eos_token_ids, *ends}),
            stop_strings=stops,
            **{"seed": int(np.random.randint(2**31)), **settings},  # the harness seeds numpy's generator
        )
        return postprocess_generated_text(self.text.decode(result.ids), stops, think_end_token=None)

    def _batch_size(self, asked: int | str, largest: int | None) -> int:
        limit = self.session.max_batch
        size = (largest or limit or AUTO_BATCH) if str(asked).startswith("auto") else int(asked)
        if size < 1:
            raise SessionError(f"batch_size is {size}, expected a whole number from 1 up, or auto")
        return size if limit is None else min(size, limit)


def score(
    session: Session, contexts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]]
) -> Iterator[tuple[int, int, Answer]]:
    """Scores several continuations of each of some contexts.

    The contexts are read once, in one batch. Then each row goes on with one of its choices, and back to its context.
    Only the logits of one piece of one continuation are ever in memory.

    Args:
        session: The model.
        contexts: Token ids of each row, at least one.
        choices: Continuations of each row, each at least one token.

    Yields:
        Row, choice, and its log-likelihood with whether it is the greedy one.
    """
    lengths = [len(context) for context in contexts]
    longest = [length + max(len(choice) for choice in row) - 1 for length, row in zip(lengths, choices, strict=True)]
    state = session.start(len(contexts), max(longest))
    first_BV = session.prefill(state, contexts)
    for turn in range(max(map(len, choices))):
        rows = [row[turn] if turn < len(row) else [] for row in choices]
        totals = [match(first_BV[row : row + 1], tokens[:1]) for row, tokens in enumerate(rows)]
        if any(len(tokens) > 1 for tokens in rows):
            if turn:
                state = return_to(session, state, contexts)
            for row, start, logits_SV in session.extend(state, [tokens[:-1] for tokens in rows]):
                total, greedy = match(logits_SV, rows[row][start + 1 : start + 1 + len(logits_SV)])
                totals[row] = (totals[row][0] + total, totals[row][1] and greedy)
        yield from ((row, turn, totals[row]) for row, tokens in enumerate(rows) if tokens)


def return_to(session: Session, state: State, contexts: Sequence[Sequence[int]]) -> State:
    """The state after the contexts again: rewound, or read anew where a choice ran over a chunk's boundary."""
    try:
        state.rewind([len(context) for context in contexts])
    except SessionError:
        state = session.start(len(contexts), state.caches.positions)
        session.prefill(state, contexts)
    return state


def match(logits_SV: NDArray[np.float32], tokens: Iterable[int]) -> Answer:
    """The log-likelihood of tokens under the logits before each, and whether each has the largest."""
    total, greedy = 0.0, True
    for logits_V, token in zip(logits_SV, tokens, strict=False):
        largest = logits_V.max()
        log_sum = np.log(np.exp(logits_V - largest).sum(dtype=np.float64))
        total += float(logits_V[token] - largest) - float(log_sum)
        greedy = greedy and int(logits_V.argmax()) == token
    return total, greedy


def main() -> None:
    """The harness's command line; Arriero's own errors are one line, as everywhere."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ArrieroError as error:
        print(f"arriero: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

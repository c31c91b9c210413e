"""`arriero run`: a model's words on stdout, streamed, in a conversation, or as JSON."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SessionError
from . import options
from .batch import Answers, answer_all, check_prompts, job_of, read_prompts
from .chat import Chat, turn_of
from .streams import as_utf8, check_stdin, is_read, read_option, read_stdin, show_json
from .terminal import Terminal

if TYPE_CHECKING:
    from ..runtime import Generated, Session

CHAT_BYTES = 1 << 30
"""Keys and values of a conversation's earlier turns that are kept at most."""

SETTINGS_OF_ALL = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "seed",
    "stop_strings",
    "eos_token_id",
)
"""Settings that a file of prompts is answered with."""

MAX_NEW_TOKENS = 512
"""New tokens at most where neither the user nor the generation config says."""


SETTINGS = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "seed",
    "regex",
    "top_logprobs",
)
"""Options of `run` that are settings of these names."""


def run(
    folder: options.Folder,
    prompt: options.Prompt = None,
    prompts: options.Prompts = None,
    output: options.Answers = None,
    image: options.Image = None,
    chat: options.Chat = False,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    no_repeat_ngram_size: options.NoRepeatNgramSize = None,
    min_new_tokens: options.MinNewTokens = None,
    seed: options.Seed = None,
    prompt_lookup: options.PromptLookup = 0,
    draft_tokens: options.DraftTokens = None,
    stop_string: options.StopString = None,
    eos_token_id: options.EosTokenId = None,
    ignore_eos: options.IgnoreEos = False,
    json_schema: options.JsonSchema = None,
    grammar: options.Grammar = None,
    regex: options.Regex = None,
    top_logprobs: options.TopLogprobs = None,
    max_seq: options.MaxSeq = None,
    threads: options.Threads = None,
    pages: options.Pages = "auto",
    weights: options.Moved = None,
    trust: options.Trust = False,
    force: options.ForceAnswers = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Run a model: stream the continuation of a prompt, say what is in an image, or chat."""
    given = locals()
    settings: dict[str, Any] = {name: given[name] for name in SETTINGS}
    settings |= {"prompt_lookup_num_tokens": prompt_lookup, "draft_tokens": draft_tokens, "stop_strings": stop_string}
    settings |= {"logprobs": top_logprobs is not None, "eos_token_id": [] if ignore_eos else eos_token_id}
    terminal = Terminal(extra="export", as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with terminal.errors_shown():
        settings |= {"json_schema": read_option(json_schema, "--json-schema")}
        settings |= {"grammar": read_option(grammar, "--grammar")}
        of_one = {"--prompt": prompt, "--image": image, "--chat": chat, "--system": system}
        check_prompts(prompts, output, of_one, prompt_lookup, top_logprobs, as_json=as_json)
        loading = {"max_seq": max_seq, "threads": threads, "weights": weights, "trust": trust, "pages": pages}
        if prompts is not None and output is not None:
            run_prompts(folder, prompts, output, settings, loading, terminal, force=force, as_json=as_json)
            return
        prompt, system = texts_of(prompt, system, chat)
        session, loaded = opened(folder, settings, terminal, prefix_bytes=CHAT_BYTES if chat else 0, **loading)
        if chat:
            converse(session, settings, as_json, terminal, prompt=prompt, system=system, images=image or ())
        else:
            answer(session, prompt, {**settings, "images": image or ()}, as_json, {"load_seconds": loaded}, terminal)


def converse(
    session: "Session",
    settings: dict[str, Any],
    as_json: bool,
    terminal: Terminal,
    *,
    prompt: str | None,
    system: str | None,
    images: Sequence[Path],
) -> None:
    """Holds a conversation; what would refuse every turn, or is wrong with the first one's images, ends it at once."""
    messages = begun(system)
    session.read([*messages, *turn_of("?", images)])
    reply = partial(reply_to, session, settings, as_json, terminal)
    Chat(answer=reply, terminal=terminal, messages=messages, waiting=list(images)).run(prompt)


def reply_to(
    session: "Session",
    settings: dict[str, Any],
    as_json: bool,
    terminal: Terminal,
    said: list[dict[str, Any]],
    is_asked: Callable[[], bool],
) -> str:
    """Answers a conversation's last turn; returns the text."""
    return answer(session, said, settings, as_json, {}, terminal, is_asked)


def begun(system: str | None) -> list[dict[str, Any]]:
    """A conversation that has its system message alone."""
    return [] if system is None else [{"role": "system", "content": system}]


def opened(folder: Path, settings: dict[str, Any], terminal: Terminal, **loading: Any) -> tuple["Session", float]:
    """The session, and the seconds that it took to load; `settings` get a limit where nothing sets one."""
    from ..loading import load

    started = time.perf_counter()
    session = load(folder, **loading)
    loaded = time.perf_counter() - started
    if settings["max_new_tokens"] is None and not session.defaults.limits_length:
        settings["max_new_tokens"] = MAX_NEW_TOKENS
    terminal.detail(f"[{folder} loaded in {loaded:.2f} s, for sequences of {session.max_seq} tokens]")
    return session, loaded


def run_prompts(
    folder: Path,
    prompts: Path,
    output: Path,
    settings: dict[str, Any],
    loading: dict[str, Any],
    terminal: Terminal,
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Answers a file of prompts; exits with 2 where one of them could not be answered."""
    from ..loading import load

    started = time.perf_counter()
    asked = read_prompts(prompts)
    chosen = {name: value for name, value in settings.items() if name in SETTINGS_OF_ALL and value is not None}
    answers = Answers(output, job_of(folder, prompts, {**chosen, "max_seq": loading["max_seq"]}), force=force)
    if answers.done:
        terminal.say(f"Going on: {len(answers.done)} of {len(asked)} prompts are answered.")
    session = load(folder, **loading)
    if "max_new_tokens" not in chosen and not session.defaults.limits_length:
        chosen["max_new_tokens"] = MAX_NEW_TOKENS
    guessing = session.guessing(None, settings["draft_tokens"])
    with terminal.progress_shown("Answering") as progress:
        failed = answer_all(session, asked, answers, chosen, progress, guessing)
    seconds = time.perf_counter() - started
    if as_json:
        show_json({"file": str(output), "prompts": len(asked), "failed": failed, "seconds": round(seconds, 3)})
    terminal.say(f"Wrote {output}: {len(asked) - failed} of {len(asked)} prompts answered in {seconds:.1f} s")
    if failed:
        raise SystemExit(2)


def texts_of(prompt: str | None, system: str | None, chat: bool) -> tuple[str | None, str | None]:
    """The prompt, read from stdin where it is there, and the system message, before any weights are loaded."""
    if not chat and prompt is None:
        raise SessionError("there is nothing to say: give --prompt TEXT, --prompt - for stdin, or --chat")
    if system is not None and not chat:
        raise SessionError("--system is the first message of a conversation: add --chat")
    if chat or prompt == "-":
        check_stdin()
    return read_stdin() if prompt == "-" else prompt and as_utf8(prompt), system and as_utf8(system)


def answer(
    session: "Session",
    prompt: Any,
    settings: dict[str, Any],
    as_json: bool,
    measured: dict[str, float],
    terminal: Terminal,
    is_ended: Callable[[], bool] = lambda: False,
) -> str:
    """Streams one continuation to stdout, or prints it as JSON, until `is_ended` or nobody reads. Returns its text."""
    from ..runtime.continuation import joined

    started = time.perf_counter()
    pieces: list[Generated] = []
    first = None
    for piece in session.stream(prompt, **settings):
        first = first or time.perf_counter() - started
        pieces.append(piece)
        if not as_json:
            print(piece.text, end="", flush=True)
        if is_ended() or not is_read():
            break
    seconds = time.perf_counter() - started
    whole, count = joined(pieces), len(pieces)
    rate = (count - 1) / (seconds - first) if first and count > 1 else 0.0
    accepted = whole.accepted / whole.drafted if whole.drafted else None
    if as_json:
        result: dict[str, Any] = {
            "text": whole.text,
            "ids": whole.ids,
            "finish": whole.finish,
            **measured,
            "first_token_seconds": first,
            "tokens_per_second": rate,
            "reused_tokens": whole.reused,
            "drafted_tokens": whole.drafted,
            "accepted_tokens": whole.accepted,
            "acceptance_rate": accepted,
        }
        if settings["logprobs"]:
            result["logprobs"] = [dataclasses.asdict(each) for each in whole.logprobs]
        show_json(result)
    else:
        print(flush=True)
        if first is not None:
            known = f" ({whole.reused} of the prompt's tokens were known)" if whole.reused else ""
            guessed = (
                "" if accepted is None else f", {whole.accepted} of {whole.drafted} guesses right ({accepted:.0%})"
            )
            terminal.say(f"[{count} tokens, the first after {first:.2f} s{known}, then {rate:.0f} tokens/s{guessed}]")
    return whole.text

"""`arriero run`: a model's words on stdout, streamed, in a conversation, or as JSON."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SessionError
from . import options
from .terminal import Terminal

if TYPE_CHECKING:
    from ..runtime import Generated, Session

CHAT_BYTES = 1 << 30
"""Keys and values of a conversation's earlier turns that are kept at most."""

IMAGE_LINE = "/image "
"""Beginning of a conversation's line that names an image for the next."""


def run(
    folder: options.Folder,
    prompt: options.Prompt = None,
    image: options.Image = None,
    chat: options.Chat = False,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    prompt_lookup: options.PromptLookup = 0,
    stop_string: options.StopString = None,
    eos_token_id: options.EosTokenId = None,
    ignore_eos: options.IgnoreEos = False,
    max_seq: options.MaxSeq = None,
    threads: options.Threads = None,
    weights: options.Moved = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Run a model: stream the continuation of a prompt, say what is in an image, or chat."""
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
    settings |= {"top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty, "seed": seed}
    settings |= {"prompt_lookup_num_tokens": prompt_lookup, "stop_strings": stop_string or ()}
    settings |= {"eos_token_id": [] if ignore_eos else eos_token_id}
    terminal = Terminal(extra="export", quiet=quiet, verbose=verbose, debug=debug)
    with terminal.errors_shown():
        if not chat and prompt is None:
            raise SessionError("there is nothing to say: give --prompt TEXT, --prompt - for stdin, or --chat")
        if system is not None and not chat:
            raise SessionError("--system is the first message of a conversation: add --chat")
        from ..loading import load

        started = time.perf_counter()
        kept = CHAT_BYTES if chat else 0
        session = load(folder, max_seq=max_seq, threads=threads, weights=weights, prefix_bytes=kept)
        loaded = time.perf_counter() - started
        terminal.detail(f"[{folder} loaded in {loaded:.2f} s, for sequences of {session.max_seq} tokens]")
        prompt = sys.stdin.read() if prompt == "-" else prompt
        if chat:
            converse(session, system, prompt, image or [], settings, as_json, terminal)
        else:
            measured = {"load_seconds": loaded}
            answer(session, prompt, {**settings, "images": image or ()}, as_json, measured, terminal)


def answer(
    session: "Session",
    prompt: Any,
    settings: dict[str, Any],
    as_json: bool,
    measured: dict[str, float],
    terminal: Terminal,
) -> str:
    """Streams one continuation to stdout, or prints it as JSON. Returns its text."""
    from ..runtime.continuation import joined

    started = time.perf_counter()
    pieces: list[Generated] = []
    first = None
    for piece in session.stream(prompt, **settings):
        first = first or time.perf_counter() - started
        pieces.append(piece)
        if not as_json:
            print(piece.text, end="", flush=True)
    seconds = time.perf_counter() - started
    whole, count = joined(pieces), len(pieces)
    rate = (count - 1) / (seconds - first) if first and count > 1 else 0.0
    accepted = whole.accepted / whole.drafted if whole.drafted else None
    if as_json:
        result = {
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
        print(json.dumps(result, ensure_ascii=False))
    else:
        print()
        if first is not None:
            known = f" ({whole.reused} of the prompt's tokens were known)" if whole.reused else ""
            guessed = (
                "" if accepted is None else f", {whole.accepted} of {whole.drafted} guesses right ({accepted:.0%})"
            )
            terminal.say(f"[{count} tokens, the first after {first:.2f} s{known}, then {rate:.0f} tokens/s{guessed}]")
    return whole.text


def converse(
    session: "Session",
    system: str | None,
    first: str | None,
    images: Sequence[Path],
    settings: dict[str, Any],
    as_json: bool,
    terminal: Terminal,
) -> None:
    """Takes a line a turn from stdin and answers in the conversation so far, until stdin ends.

    The images belong to the first turn; a line `/image FILE` adds one to the next. A turn whose image cannot be taken
    is reported and forgotten.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    waiting = list(images)
    for line in turns(first):
        if line.startswith(IMAGE_LINE):
            waiting.append(Path(line.removeprefix(IMAGE_LINE).strip()).expanduser())
            continue
        parts = [{"type": "image", "path": str(path)} for path in waiting]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": line}] if parts else line})
        waiting = []
        try:
            text = answer(session, messages, settings, as_json, {}, terminal)
        except SessionError as error:
            if not parts or not sys.stdin.isatty():
                raise
            terminal.show_error(error)
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": text})


def turns(first: str | None) -> Iterator[str]:
    """The user's lines: the one given, then those typed."""
    if first is not None:
        yield first
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()

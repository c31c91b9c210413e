"""`arriero serve`: a model behind OpenAI's interface."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SessionError, shortened
from . import options
from .streams import show_json
from .terminal import Terminal

if TYPE_CHECKING:
    from ..serving.server import ServerSettings


def serve(
    folder: options.Folder,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    unix_socket: options.UnixSocket = None,
    model_name: options.ModelName = None,
    slots: options.Slots = None,
    max_seq: options.MaxSeq = None,
    threads: options.Threads = None,
    pages: options.Pages = "auto",
    weights: options.Moved = None,
    trust: options.Trust = False,
    prefill_budget: options.PrefillBudget = None,
    prefix_bytes: options.PrefixBytes = None,
    share_prefixes: options.SharePrefixes = False,
    cache_bytes: options.CacheBytes = None,
    queue: options.Queue = 128,
    draft_tokens: options.DraftTokens = None,
    api_key_file: options.ApiKeyFile = None,
    open_metrics: options.OpenMetrics = False,
    tls_certificate: options.TlsCertificate = None,
    tls_key: options.TlsKey = None,
    cors_origin: options.CorsOrigin = None,
    allow_host: options.AllowHost = None,
    allow_image_host: options.AllowImageHost = None,
    max_body_bytes: options.MaxBodyBytes = "32M",
    max_bodies_bytes: options.MaxBodiesBytes = "256M",
    max_prompt_tokens: options.MaxPromptTokens = None,
    max_new_tokens: options.MostNewTokens = None,
    max_images: options.MaxImages = 16,
    first_token_seconds: options.FirstTokenSeconds = 0.0,
    total_seconds: options.TotalSeconds = 0.0,
    drain_seconds: options.DrainSeconds = 30.0,
    dynamo: options.Dynamo = False,
    log_prompts: options.LogPrompts = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the address on stdout, as JSON, when requests are taken.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Log nothing but faults.")] = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Serve a model: OpenAI's chat, completions and responses, with a page, metrics and a log in JSON lines."""
    asked = SimpleNamespace(**locals())
    with Terminal(extra="serve", quiet=quiet, verbose=verbose, debug=debug).errors_shown():
        from ..serving.logs import Log
        from ..serving.server import serve as run

        check_extra(folder)
        log = Log(has_prompts=log_prompts, is_silent=quiet, debug=debug)
        settings, on_ready = settings_of(asked), show_json if as_json else lambda about: None
        if dynamo:
            refuse_doors(asked)
            from ..serving.dynamo_worker import serve_dynamo

            serve_dynamo(settings, log, on_ready)
        else:
            run(settings, log, on_ready)


def settings_of(asked: SimpleNamespace) -> "ServerSettings":
    """A server's settings, from the verb's options by their names.

    Raises:
        SessionError: One is out of range.
    """
    from ..serving.server import ServerSettings
    from ..serving.service import Limits

    limits = Limits(
        body_bytes=sized("--max-body-bytes", asked.max_body_bytes),
        all_bodies_bytes=sized("--max-bodies-bytes", asked.max_bodies_bytes),
        prompt_tokens=at_least("--max-prompt-tokens", asked.max_prompt_tokens, 1),
        new_tokens=at_least("--max-new-tokens", asked.max_new_tokens, 1),
        images=at_least("--max-images", asked.max_images, 0),
        first_token_seconds=at_least("--first-token-seconds", asked.first_token_seconds, 0),
        total_seconds=at_least("--total-seconds", asked.total_seconds, 0),
        image_hosts=frozenset(each.rstrip(".") for each in named("--allow-image-host", asked.allow_image_host, HOST)),
    )
    return ServerSettings(
        folder=asked.folder,
        name=asked.model_name,
        host=asked.host,
        port=asked.port,
        unix_socket=asked.unix_socket,
        api_key_file=asked.api_key_file,
        opens_metrics=asked.open_metrics,
        tls_certificate=asked.tls_certificate,
        tls_key=asked.tls_key,
        origins=named("--cors-origin", asked.cors_origin, ORIGIN),
        hosts=named("--allow-host", asked.allow_host, HOST),
        max_seq=asked.max_seq,
        threads=asked.threads,
        pages=asked.pages,
        weights=asked.weights,
        trust=asked.trust,
        slots=at_least("--slots", asked.slots, 1),
        prefill_budget=at_least("--prefill-budget", asked.prefill_budget, 1),
        prefix_bytes=None if asked.prefix_bytes is None else sized("--prefix-bytes", asked.prefix_bytes),
        cache_bytes=None if asked.cache_bytes is None else sized("--cache-bytes", asked.cache_bytes),
        shares_prefixes=asked.share_prefixes,
        queue=at_least("--queue", asked.queue, 0),
        draft_tokens=asked.draft_tokens,
        drain_seconds=at_least("--drain-seconds", asked.drain_seconds, 0),
        limits=limits,
    )


def refuse_doors(asked: SimpleNamespace) -> None:
    """Refuses options of the HTTP server beside `--dynamo`, whose frontend is the one that listens.

    Raises:
        SessionError: One is given.
    """
    names = ("unix_socket", "api_key_file", "tls_certificate", "tls_key", "cors_origin", "allow_host")
    given = [name for name in names if getattr(asked, name) is not None]
    usuals = (("host", "127.0.0.1"), ("port", 8000), ("open_metrics", False))
    given += [name for name, usual in usuals if getattr(asked, name) != usual]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise SessionError(f"{option} is given beside --dynamo, whose frontend listens: give it there, leave it out")


UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def sized(name: str, value: str) -> int:
    """A number of bytes, as 1048576, 64M or 2G.

    Raises:
        SessionError: It is none.
    """
    text = value.strip().upper().removesuffix("B").removesuffix("I")
    number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS and text else (text, "")
    if not (number.isascii() and number.isdigit() and len(number) < 16):
        raise SessionError(f"{name} is {value[:40]!r}, expected a number of bytes, as 1048576, 64M or 2G")
    return int(number) * UNITS[unit]


HOST = re.compile(r"(?![^:]*:\d*$)[^/\s*]+"), "a host's name alone, as example.org"
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+"), "an origin as browsers send it, https://example.org, or *"


def named(option: str, values: list[str] | None, form: tuple[re.Pattern[str], str]) -> tuple[str, ...]:
    """Names in lower case, as they are compared.

    Raises:
        SessionError: One is of another form, so that no request would ever be of it.
    """
    found = tuple(each.lower() for each in values or ())
    pattern, expected = form
    if wrong := [each for each in found if not pattern.fullmatch(each)]:
        raise SessionError(f"{option} is {shortened(wrong[0])}, expected {expected}")
    return found


def at_least(name: str, value: Any, least: int) -> Any:
    """A number that is not less than `least`.

    Raises:
        SessionError: It is.
    """
    if value is not None and not value >= least:
        raise SessionError(f"{name} is {value}, expected a number from {least} up")
    return value


def check_extra(folder: Path) -> None:
    """Refuses a model folder, or a group of them, which is lowered first, where what lowers it is not installed."""
    from importlib.util import find_spec

    from ..files.folders import rank_folder, read_spec

    spec = read_spec(folder)
    kind = rank_folder(folder, spec, 0)[1].kind if spec.kind == "group" else spec.kind
    if kind == "model" and find_spec("onnx") is None:
        raise SessionError(
            f"{folder} is a model folder, which is lowered first and needs arriero[export]: pip install "
            "'arriero[export,serve]', or serve a bundle (arriero build --target cpu)"
        )

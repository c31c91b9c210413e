"""The command line: one verb a stage, a thin skin over the Python interface.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 regressed (`check` only), 2 could not, 130
interrupted.
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from .terminal import answer, converse, errors_shown, progress_shown

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Takes a Llama 4 checkpoint to the machines that serve it: export, calibrate, build, run, check.",
)

CHAT_BYTES = 1 << 30
"""Keys and values of a conversation's earlier turns that are kept at most."""

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output folder of Arriero's.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Moved = Annotated[Path | None, typer.Option(help="Folder of the weight files, where they have moved.")]
Threads = Annotated[int | None, typer.Option(help="Threads.", show_default="the processors allowed")]
Samples = Annotated[int, typer.Option(help="Windows of text at most.")]
CheckedWindow = Annotated[
    int | None, typer.Option(help="Tokens of a window.", show_default="two chunks and a quarter, at least 512")
]


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a Hugging Face Llama 4 checkpoint; only read.")],
    output: Output,
    dtype: Annotated[
        str | None, typer.Option(help="Convert the weights to float32, float16 or bfloat16.", show_default="as stored")
    ] = None,
    copy_weights: Annotated[
        bool, typer.Option("--copy-weights", help="Copy the weights, so that the folder stands alone.")
    ] = False,
    tp: Annotated[int, typer.Option(help="Split the model over so many ranks, a folder each.")] = 1,
    ep: Annotated[
        int | None,
        typer.Option(help="Groups of ranks over which the experts are distributed.", show_default="as --tp"),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a checkpoint to ONNX: the model folder. The weights stay where they are."""
    with errors_shown(debug), progress_shown("Exporting") as progress:
        from ..export import export_checkpoint

        started = time.perf_counter()
        model = export_checkpoint(
            checkpoint,
            output,
            dtype=dtype,  # type: ignore[arg-type]
            copy_weights=copy_weights,
            tp=tp,
            ep=ep,
            force=force,
            progress=progress,
            notice=lambda line: print(line, file=sys.stderr),
        )
        report_folder(model, time.perf_counter() - started, as_json)


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(help="Model folder that `arriero export` wrote; only read.")],
    output: Output,
    recipe: Annotated[str, typer.Option(help="int8, fp8 or int4.")],
    data: Annotated[
        list[Path],
        typer.Option(
            help="File to calibrate on: text, or conversations (.jsonl): a line each, as "
            '{"messages": [{"role": "user", "content": "What is this?"}, …], "images": ["photo.jpg"]}, '
            "paths relative to the file; may be repeated."
        ),
    ],
    activations: Annotated[
        str | None, typer.Option(help="static, or dynamic: a scale a token.", show_default="the recipe's")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="absmax, percentile, entropy or mse.", show_default="the recipe's")
    ] = None,
    percentile: Annotated[float | None, typer.Option(help="For --clip percentile, in percent.")] = None,
    smoothing: Annotated[
        str | None, typer.Option(help="none, smoothquant or awq.", show_default="the recipe's")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Of the smoothing, 0 to 1.", show_default="searched")] = None,
    rounding: Annotated[str | None, typer.Option(help="nearest or gptq.", show_default="the recipe's")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share an int4 scale: 32, 64 or 128.", show_default="64")
    ] = None,
    kv_cache: Annotated[str | None, typer.Option(help="int8 or fp8: quantise keys and values.")] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="PATTERN=FORMAT for some weights, as 'layers.0.*=none'; may be repeated.")
    ] = None,
    samples: Samples = 128,
    window: Annotated[
        int | None, typer.Option(help="Tokens of a window.", show_default="a chunk and a quarter, at least 512")
    ] = None,
    floor: Annotated[int, typer.Option(help="Tokens that every expert must have seen.")] = 32,
    all_experts: Annotated[bool, typer.Option("--all-experts", help="Measure every expert over every token.")] = False,
    weights: Moved = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantise a model with statistics of text and images: another model folder. A killed run goes on where it was."""
    with errors_shown(debug), progress_shown("Calibrating", "tokens") as progress:
        from ..calibration import calibrate_model
        from ..calibration.presets import parse_recipe

        started = time.perf_counter()
        changes = {
            "activations": activations,
            "clip": clip,
            "percentile": percentile,
            "smoothing": smoothing,
            "strength": strength,
            "rounding": rounding,
            "group_size": group_size,
            "kv_cache": kv_cache,
        }
        folder = calibrate_model(
            model,
            output,
            recipe=parse_recipe(recipe, changes, override or ()),
            data=data,
            samples=samples,
            window=window,
            floor=floor,
            all_experts=all_experts,
            weights=weights,
            force=force,
            progress=progress,
            notice=lambda line: print(line, file=sys.stderr),
        )
    with errors_shown(debug):
        report_quantised(folder, time.perf_counter() - started, as_json)


@app.command()
def build(
    model: Annotated[Path, typer.Argument(help="Model folder that `arriero export` wrote.")],
    output: Output,
    target: Annotated[
        str, typer.Option(help="cpu; tensorrt-rtx:sm89,sm120 (any GPUs, needs none); tensorrt (the GPU here).")
    ] = "cpu",
    max_batch: Annotated[int | None, typer.Option(help="Rows at once.", show_default="8")] = None,
    max_seq: Annotated[
        int | None, typer.Option(help="Tokens that a sequence may hold.", show_default="the context, at most 16384")
    ] = None,
    max_prefill: Annotated[int | None, typer.Option(help="Tokens of a prefill piece.", show_default="2048")] = None,
    max_tiles: Annotated[
        int | None, typer.Option(help="Tiles of images that the vision tower takes at once.", show_default="17")
    ] = None,
    gqa: Annotated[
        str | None, typer.Option(help="Attention by our plugin or TensorRT's own layers: plugin, native.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Weights: all inside the engine; experts outside it; all outside.", show_default="experts"),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="int8 or int4: round keys and values, with no calibration; cpu only.", show_default="16 bits or more"
        ),
    ] = None,
    workspace: Annotated[int | None, typer.Option(help="MiB of scratch memory that a layer may use.")] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Let built-in weights stay in the host's memory.")
    ] = False,
    timing_cache: Annotated[Path | None, typer.Option(help="File of the timing cache; tensorrt only.")] = None,
    weights_from: Annotated[
        Path | None, typer.Option(help="Folder of the model's weight files, where they have moved.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Build a model for one target: the bundle folder. Options but --kv-cache and --force shape a TensorRT engine."""
    with errors_shown(debug), progress_shown("Building") as progress:
        from ..engine import Options, build_bundle

        started = time.perf_counter()
        options = Options(
            max_batch=max_batch,
            max_seq=max_seq,
            max_prefill=max_prefill,
            max_tiles=max_tiles,
            gqa=gqa,  # type: ignore[arg-type]
            weights=weights,  # type: ignore[arg-type]
            workspace=None if workspace is None else workspace << 20,
            weight_streaming=weight_streaming,
            timing_cache=timing_cache,
            weights_from=weights_from,
        )
        bundle = build_bundle(
            model,
            output,
            target=target,
            options=options,
            kv_cache=kv_cache,  # type: ignore[arg-type]
            force=force,
            progress=progress,
        )
        report_folder(bundle, time.perf_counter() - started, as_json)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Model or bundle folder.")],
    layers: Annotated[
        bool, typer.Option("--layers", help="List each fused layer of an engine with its sizes.")
    ] = False,
    max_seq: Annotated[
        int | None,
        typer.Option(help="Tokens of a sequence to reckon memory for; CPU.", show_default="the context, at most 16384"),
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows at once to reckon memory for; CPU.")] = 1,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a folder is: geometry, KV cache, the memory it will take, and an engine's profiles and fused layers."""
    with errors_shown(debug):
        from ..measuring.summary import summarise

        found = summarise(folder, every_layer=layers, max_seq=max_seq, batch=batch)
        if as_json:
            print(json.dumps(found))
        else:
            from .tables import show_summary

            show_summary(found)


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Model or bundle folder.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; - reads it from stdin.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Image that the prompt is about, or that stands at its <|image|>; may be repeated."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Hold a conversation, one line a turn; /image FILE adds an image to the next."),
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. As the next four: default from the generation config.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep so many of the likeliest; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest that make up this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep those with this share of the likeliest's.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random draws.")] = None,
    prompt_lookup: Annotated[
        int,
        typer.Option(
            help="Guess so many tokens at most from what the last ones were followed by before, and verify them "
            "at once; the text stays the same but for rounding."
        ),
    ] = 0,
    stop_string: Annotated[list[str] | None, typer.Option(help="Text that ends it; may be repeated.")] = None,
    eos_token_id: Annotated[list[int] | None, typer.Option(help="Token that ends it; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Let no token end it.")] = False,
    max_seq: Annotated[
        int | None, typer.Option(help="Tokens that a sequence may hold.", show_default="the context, at most 16384")
    ] = None,
    threads: Threads = None,
    weights: Moved = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a model: stream the continuation of a prompt, say what is in an image, or chat."""
    with errors_shown(debug):
        from ..errors import SessionError
        from ..loading import load

        if not chat and prompt is None:
            raise SessionError("there is nothing to say: give --prompt TEXT, --prompt - for stdin, or --chat")
        if system is not None and not chat:
            raise SessionError("--system is the first message of a conversation: add --chat")
        started = time.perf_counter()
        kept = CHAT_BYTES if chat else 0
        session = load(folder, max_seq=max_seq, threads=threads, weights=weights, prefix_bytes=kept)
        loaded = time.perf_counter() - started
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "prompt_lookup_num_tokens": prompt_lookup,
            "stop_strings": stop_string or (),
            "eos_token_id": [] if ignore_eos else eos_token_id,
        }
        if prompt == "-":
            prompt = sys.stdin.read()
        if chat:
            converse(session, system, prompt, image or [], settings, as_json)
        else:
            answer(session, prompt, {**settings, "images": image or ()}, as_json, {"load_seconds": loaded})


@app.command()
def bench(
    folder: Annotated[Path, typer.Argument(help="Model or bundle folder.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for bench.json and bench.png.")] = None,
    prefill: Annotated[
        str | None, typer.Option(help="Tokens of the prompts.", show_default="128,512,2048, as the context allows")
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Rows at once.", show_default="1,4,8")] = None,
    decode_tokens: Annotated[int, typer.Option(help="Tokens decoded after each prompt.")] = 32,
    runs: Annotated[int, typer.Option(help="Timed runs of each; medians are given.")] = 3,
    threads: Threads = None,
    weights: Moved = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output folder.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a model: first token, prefill, decode, and the bandwidth beside what this machine's memory gives."""
    with errors_shown(debug), progress_shown("Timing") as progress:
        from ..measuring.bench import check_output, measure_folder, parse_sizes, write_measured

        if output is not None:
            check_output(output, force=force)
        found = measure_folder(
            folder,
            prefill=parse_sizes(prefill, "--prefill"),
            batch=parse_sizes(batch, "--batch"),
            decode_tokens=decode_tokens,
            runs=runs,
            threads=threads,
            weights=weights,
            progress=progress,
        )
        if output is not None:
            write_measured(found, output, force=force)
    with errors_shown(debug):
        if as_json:
            print(json.dumps(found))
        else:
            from .tables import show_measured

            show_measured(found, output)


@app.command()
def check(
    candidate: Annotated[Path, typer.Argument(help="Checkpoint, model or bundle to be judged.")],
    against: Annotated[Path, typer.Option(help="The reference: one of these too, or a golden file.")],
    data: Annotated[
        list[Path] | None, typer.Option(help="Text file; may be repeated. A golden file has its own text.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for verdict.json, junit.xml and report.html.")
    ] = None,
    locate: Annotated[
        bool, typer.Option("--locate", help="Walk the layers: which one, which tensor or attribute is wrong first.")
    ] = False,
    max_perplexity_ratio: Annotated[
        float | None, typer.Option(help="Perplexity over the reference's.", show_default="by format")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Nats a token.", show_default="by format")] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Share of tokens with the same likeliest one.", show_default="by format")
    ] = None,
    max_flips: Annotated[float | None, typer.Option(help="Share of tokens that only one of them gets right.")] = None,
    max_router_flips: Annotated[float | None, typer.Option(help="Share of choices of experts that differ.")] = None,
    min_greedy: Annotated[float | None, typer.Option(help="Tokens generated alike, of 32.")] = None,
    samples: Samples = 24,
    window: CheckedWindow = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of the candidate's weight files, where they have moved.")
    ] = None,
    against_weights: Annotated[Path | None, typer.Option(help="The same of the reference.")] = None,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing report.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Hold a candidate against a reference: by how much accuracy moved, where, and whether that is allowed.

    Exits with 0 where all limits are kept, 1 where one is broken, 2 where it could not run or there is not enough data.
    """
    with errors_shown(debug), progress_shown("Checking", "tokens") as progress:
        from ..accuracy import check as hold
        from ..accuracy.report import VERDICT, write_report
        from ..files.output import check_free

        if output is not None:
            check_free(output, force=force, mark=VERDICT)
        verdict = hold(
            candidate,
            against,
            data=data,
            samples=samples,
            window=window,
            limits={
                "perplexity_ratio": max_perplexity_ratio,
                "kl": max_kl,
                "top1": min_top1,
                "flips": max_flips,
                "router_flips": max_router_flips,
                "greedy": min_greedy,
            },
            locate_fault=locate,
            weights=weights,
            reference_weights=against_weights,
            threads=threads,
            progress=progress,
        )
        if output is not None:
            write_report(verdict, output, force=force)
    with errors_shown(debug):
        if as_json:
            print(json.dumps(verdict.as_fields()))
        else:
            from .tables import show_verdict

            show_verdict(verdict.as_fields(), output)
    raise typer.Exit({"pass": 0, "regressed": 1, "undecided": 2}[verdict.outcome])


@app.command()
def golden(
    reference: Annotated[Path, typer.Argument(help="Checkpoint, model or bundle.")],
    data: Annotated[list[Path], typer.Option(help="Text file; may be repeated.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    samples: Samples = 24,
    window: CheckedWindow = None,
    weights: Moved = None,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing golden file.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Record a reference once, so that checks against it need not run it again."""
    with errors_shown(debug), progress_shown("Recording", "tokens") as progress:
        from ..accuracy import record_golden

        started = time.perf_counter()
        file = record_golden(
            reference,
            output,
            data=data,
            samples=samples,
            window=window,
            weights=weights,
            threads=threads,
            force=force,
            progress=progress,
        )
        report_folder(file, time.perf_counter() - started, as_json)


def report_folder(folder: Path, seconds: float, as_json: bool, **more: Any) -> None:
    """Says what was written, a folder or a file, and as JSON what else there is to say."""
    files = [folder] if folder.is_file() else [file for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    if as_json:
        print(json.dumps({"folder": str(folder), "bytes": size, "seconds": round(seconds, 3), **more}))
    else:
        print(f"Wrote {folder} ({size / 1e6:.1f} MB) in {seconds:.1f} s", file=sys.stderr)


def report_quantised(folder: Path, seconds: float, as_json: bool) -> None:
    """Says what became of each weight."""
    report = json.loads((folder / "report.json").read_text("utf-8"))
    records = [record for layer in report["layers"] + report["tower"] for record in layer["records"]]
    records += report["head"]
    if not as_json:
        from .tables import show_weights

        show_weights(records, report["kept"])
    report_folder(folder, seconds, as_json, weights=records)


def show_version(value: bool) -> None:
    """Prints the version and ends."""
    if value:
        print(f"arriero {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Takes a Llama 4 checkpoint to the machines that serve it: export, calibrate, build, run."""


def main() -> None:
    """The entry point of the `arriero` command."""
    app()

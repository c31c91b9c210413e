"""The main job end to end, each step as a person would type it, with its time; then the cost of quantising.

Leaves its folders in `demo/`, and the image that it describes, `demo/scene.png`.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
ARRIERO = Path(sys.executable).with_name("arriero")


class Step(NamedTuple):
    """A command, its name in the table of times, and its purpose in a line."""

    name: str
    purpose: str
    command: str


CALIBRATE = "calibrate demo/model --data examples/tiny-llama4/unseen.txt --data demo/training.txt --samples 16 --force"
SHOWN = "calibrate demo/sees --data demo/scenes/conversations.jsonl --data demo/training.txt --samples 16 --force"
SEE = "run demo/sees-fp8 --image demo/scene.png --temperature 0 --prompt"
STEPS = (
    Step(
        "export",
        "A tiny Llama 4, trained on Python's documentation, becomes an ONNX graph; its weights stay where they are.",
        "export examples/tiny-llama4 -o demo/model --force",
    ),
    Step(
        "calibrate INT8",
        "Text shows which scales lose least; weights become int8.",
        f"{CALIBRATE} --recipe int8 -o demo/int8",
    ),
    Step("calibrate FP8", "The same model in fp8.", f"{CALIBRATE} --recipe fp8 -o demo/fp8"),
    Step(
        "golden",
        "The exact model's answers over text that nothing has seen, kept in a file to check others against.",
        "golden demo/model --data demo/held_out.txt -o demo/golden.safetensors --force",
    ),
    Step(
        "check INT8",
        "The cost of int8, with intervals and a verdict.",
        "check demo/int8 --against demo/golden.safetensors -o demo/int8-check --force",
    ),
    Step(
        "check FP8",
        "The cost of fp8, against the model itself; --locate looks for a layer that is out of line.",
        "check demo/fp8 --against demo/model --data demo/held_out.txt --locate -o demo/fp8-check --force",
    ),
    Step("build for CPU", "A bundle: all that a CPU needs.", "build demo/model -o demo/cpu --target cpu --force"),
    Step(
        "run",
        "The bundle writes. The model has 5 million weights: expect its grammar, not its facts, to hold.",
        "run demo/cpu --prompt 'The with statement is used to' --max-new-tokens 100 --temperature 0.3 --seed 1",
    ),
    Step(
        "build for a GPU",
        "A TensorRT-RTX engine with our kernels compiled for compute capability 8.9; no GPU is needed to build it.",
        "build demo/model -o demo/rtx --target tensorrt-rtx:sm89 --force",
    ),
    Step("inspect", "The engine's sizes, memory and layers.", "inspect demo/rtx"),
    Step(
        "export with vision",
        "A tiny Llama 4 that sees: its vision tower becomes a graph beside the decoder's.",
        "export examples/tiny-llama4-vision -o demo/sees --force",
    ),
    Step(
        "calibrate FP8",
        "Tower and decoder in fp8, shown conversations with images.",
        f"{SHOWN} -o demo/sees-fp8 --recipe fp8",
    ),
    Step("describe", "demo/scene.png is a drawing that it was not trained on.", f"{SEE} 'What is this?'"),
    Step("ask", "A question about the same image.", f"{SEE} 'Where is the yellow cross?'"),
    Step(
        "chat",
        "The text model in its chat template.",
        "run demo/cpu --chat --prompt 'Explain list.append.' --max-new-tokens 80 --temperature 0",
    ),
)


def write_data() -> None:
    """Writes held-out documentation and a held-out scene, and some of what the models were trained on to calibrate."""
    sys.path += [str(ROOT / "examples" / "tiny-llama4"), str(ROOT / "examples" / "tiny-llama4-vision")]
    from corpus import documents, held_out_text
    from scenes import draw_one, write_conversations

    (ROOT / "demo").mkdir(exist_ok=True)
    draw_one(ROOT / "demo" / "scene.png")
    write_conversations(ROOT / "demo" / "scenes", 16)
    training = [document.text for document in documents() if not document.is_held_out][::12]
    (ROOT / "demo" / "training.txt").write_text("\n\n\n".join(training), "utf-8")
    (ROOT / "demo" / "held_out.txt").write_text(held_out_text(), "utf-8")


def verdicts() -> Table:
    """The cost of quantising, side by side."""
    table = Table("model", "weights, MB", "perplexity", "rise", "KL, nats", "verdict", title="On held-out text")
    found = {
        name: json.loads((ROOT / "demo" / f"{name}-check" / "verdict.json").read_text()) for name in ("int8", "fp8")
    }
    exact = found["int8"]["metrics"]["reference_perplexity"]["value"]
    table.add_row("bf16", megabytes(ROOT / "examples" / "tiny-llama4"), f"{exact:.2f}", "", "", "")
    for name, verdict in found.items():
        values = {metric: estimate["value"] for metric, estimate in verdict["metrics"].items()}
        rise = f"{100 * (values['perplexity_ratio'] - 1):+.2f} %"
        figures = (f"{values['perplexity']:.2f}", rise, f"{values['kl']:.4f}", verdict["outcome"])
        table.add_row(name, megabytes(ROOT / "demo" / name), *figures)
    return table


def serve(console: Console) -> float:
    """Starts the server, asks it as any client would, and stops it. Returns the seconds that it took."""
    console.print("\n[dim]The bundle behind OpenAI's interface, asked by curl.[/dim]", highlight=False)
    started = time.perf_counter()
    console.print("[bold]$ arriero serve demo/cpu[/bold]", highlight=False)
    command = [ARRIERO, "serve", "demo/cpu", "--port", "0", "--json", "--quiet"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        if not (line := server.stdout.readline()):
            sys.exit(server.wait())
        url = json.loads(line)["address"] + "/v1/chat/completions"
        asked = {"messages": [{"role": "user", "content": "Explain list.append."}], "max_tokens": 60}
        body = json.dumps(asked)
        console.print(f"[bold]$ curl {url} -H 'content-type: application/json' -d '{body}'[/bold]", highlight=False)
        curl = ["curl", "--silent", "--show-error", "--fail", url, "-H", "content-type: application/json", "-d", body]
        if code := subprocess.run(curl).returncode:
            sys.exit(code)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    if code:
        sys.exit(code)
    console.print(f"\n[dim]Stopped by SIGTERM: exit code {code}.[/dim]", highlight=False)
    return time.perf_counter() - started


def megabytes(folder: Path) -> str:
    """The size of a folder's weights."""
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:.1f}"


def main() -> None:
    """Runs the steps; the first that fails ends the demo with its exit code."""
    console = Console()
    write_data()
    table = Table("step", "seconds", title="From a Llama 4 checkpoint to text", min_width=40)
    for number, step in enumerate(STEPS, 1):
        console.print(f"\n[dim]{number} of {len(STEPS)}. {step.purpose}[/dim]", highlight=False)
        console.print(f"[bold]$ arriero {step.command}[/bold]", highlight=False)
        started = time.perf_counter()
        code = subprocess.run(f"'{ARRIERO}' {step.command}", shell=True, cwd=ROOT, stdin=subprocess.DEVNULL).returncode
        if code and not step.name.startswith("check"):  # whose code is the verdict
            sys.exit(code)
        table.add_row(step.name, f"{time.perf_counter() - started:.1f}")
    table.add_row("serve", f"{serve(console):.1f}")
    console.print()
    console.print(table)
    console.print(verdicts())
    console.print("Everything lies in demo/: the reports are demo/*-check/report.html, the image is demo/scene.png.")
    console.print("The command is .venv/bin/arriero; --help lists its verbs.", highlight=False)


if __name__ == "__main__":
    main()

"""The main job end to end, each step as a person would type it, with its time; then what quantising costs.

Leaves its folders in `demo/`, and the image that it describes, `demo/scene.png`.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
ARRIERO = Path(sys.executable).with_name("arriero")
CALIBRATE = "calibrate demo/model --data README.md --data demo/training.txt --samples 16 --force"
SHOWN = "calibrate demo/sees --data demo/scenes/conversations.jsonl --data demo/training.txt --samples 16 --force"
SEE = "run demo/sees-fp8 --image demo/scene.png --temperature 0 --prompt"
STEPS = (
    ("export", "export examples/tiny-llama4 -o demo/model --force"),
    ("INT8", f"{CALIBRATE} --recipe int8 -o demo/int8"),
    ("FP8", f"{CALIBRATE} --recipe fp8 -o demo/fp8"),
    ("golden", "golden demo/model --data demo/held_out.txt -o demo/golden.safetensors --force"),
    ("check INT8", "check demo/int8 --against demo/golden.safetensors -o demo/int8-check --force"),
    ("check FP8", "check demo/fp8 --against demo/model --data demo/held_out.txt --locate -o demo/fp8-check --force"),
    ("build", "build demo/model -o demo/cpu --target cpu --force"),
    ("run", "run demo/cpu --prompt 'The with statement is used to' --max-new-tokens 100 --temperature 0.3 --seed 1"),
    ("engine", "build demo/model -o demo/rtx --target tensorrt-rtx:sm89 --force"),
    ("inspect", "inspect demo/rtx"),
    ("export", "export examples/tiny-llama4-vision -o demo/sees --force"),
    ("FP8", f"{SHOWN} -o demo/sees-fp8 --recipe fp8"),
    ("describe", f"{SEE} 'What is this?'"),
    ("ask", f"{SEE} 'Where is the yellow cross?'"),
    ("chat", "run demo/cpu --chat --prompt 'Explain list.append.' --max-new-tokens 80 --temperature 0"),
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
    """Table of what quantising costs, side by side."""
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


def megabytes(folder: Path) -> str:
    """Megabytes of a folder's weights."""
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:.1f}"


def main() -> None:
    """Runs the steps; the first that fails ends the demo with its exit code."""
    console = Console()
    write_data()
    table = Table("step", "seconds", title="From a Llama 4 checkpoint to text", min_width=40)
    for name, command in STEPS:
        console.print(f"\n[bold]$ arriero {command}[/bold]", highlight=False)
        started = time.perf_counter()
        code = subprocess.run(f"'{ARRIERO}' {command}", shell=True, cwd=ROOT, stdin=subprocess.DEVNULL).returncode
        if code and not name.startswith("check"):  # whose code is the verdict
            sys.exit(code)
        table.add_row(name, f"{time.perf_counter() - started:.1f}")
    console.print()
    console.print(table)
    console.print(verdicts())


if __name__ == "__main__":
    main()

"""The main job end to end, each step as a person would type it, with its time; then what quantising costs.

Leaves its folders in `demo/`.
"""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import arriero

ROW = 512
"""Tokens that perplexity is measured over at once."""

ROOT = Path(__file__).parent.parent
ARRIERO = Path(sys.executable).with_name("arriero")
CALIBRATE = "calibrate demo/model --data README.md --data demo/training.txt --samples 16 --force"
STEPS = (
    ("export", "export examples/tiny-llama4 -o demo/model --force"),
    ("INT8", f"{CALIBRATE} --recipe int8 -o demo/int8"),
    ("FP8", f"{CALIBRATE} --recipe fp8 -o demo/fp8"),
    ("build", "build demo/model -o demo/cpu --target cpu --force"),
    ("run", "run demo/cpu --prompt 'The with statement is used to' --max-new-tokens 100 --temperature 0.3 --seed 1"),
    ("engine", "build demo/model -o demo/rtx --target tensorrt-rtx:sm89 --force"),
    ("inspect", "inspect demo/rtx"),
    ("chat", "run demo/cpu --chat --prompt 'Explain list.append.' --max-new-tokens 80 --temperature 0"),
)


def write_texts() -> None:
    """Writes the held-out documentation, and some of what the model was trained on for calibration."""
    sys.path.insert(0, str(ROOT / "examples" / "tiny-llama4"))
    from corpus import documents, held_out_text

    (ROOT / "demo").mkdir(exist_ok=True)
    training = [document.text for document in documents() if not document.is_held_out][::12]
    (ROOT / "demo" / "training.txt").write_text("\n\n\n".join(training), "utf-8")
    (ROOT / "demo" / "held_out.txt").write_text(held_out_text(), "utf-8")


def perplexities() -> Table:
    """The perplexity per token of the original and the quantised models on a part of the held-out text."""
    table = Table("model", "weights, MB", "perplexity", "rise", title="On held-out text", min_width=40)
    exact = None
    for name in ("model", "int8", "fp8"):
        session = arriero.load(ROOT / "demo" / name)
        ids = session.text.encode((ROOT / "demo" / "held_out.txt").read_text("utf-8"), special_tokens=False)
        rows = np.array(ids[: len(ids) // ROW * ROW]).reshape(-1, ROW)[::2]
        losses = []
        for row in rows:
            logits = session.logits(row[None])[0, :-1].astype(np.float64)
            largest = logits.max(-1)
            log_sums = np.log(np.exp(logits - largest[:, None]).sum(-1)) + largest
            losses.append(log_sums - logits[np.arange(len(logits)), row[1:]])
        found = float(np.exp(np.mean(losses)))
        exact = found if exact is None else exact
        folder = ROOT / "examples" / "tiny-llama4" if name == "model" else ROOT / "demo" / name
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        label = "bf16" if name == "model" else name
        table.add_row(label, f"{size / 1e6:.1f}", f"{found:.2f}", f"{100 * (found / exact - 1):+.2f} %")
    return table


def main() -> None:
    """Runs the steps; the first that fails ends the demo with its exit code."""
    console = Console()
    write_texts()
    table = Table("step", "seconds", title="From a Llama 4 checkpoint to text", min_width=40)
    for name, command in STEPS:
        console.print(f"\n[bold]$ arriero {command}[/bold]", highlight=False)
        started = time.perf_counter()
        code = subprocess.run(f"'{ARRIERO}' {command}", shell=True, cwd=ROOT, stdin=subprocess.DEVNULL).returncode
        if code:
            sys.exit(code)
        table.add_row(name, f"{time.perf_counter() - started:.1f}")
    console.print()
    console.print(table)
    console.print(perplexities())


if __name__ == "__main__":
    main()

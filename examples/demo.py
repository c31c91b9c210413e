"""The main job end to end, each step as a person would type it, with its time.

Leaves its folders in `demo/`.
"""

import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
ARRIERO = Path(sys.executable).with_name("arriero")
STEPS = (
    ("export", "export examples/tiny-llama4 -o demo/model --force"),
    ("build", "build demo/model -o demo/cpu --target cpu --force"),
    ("run", "run demo/cpu --prompt 'The with statement is used to' --max-new-tokens 100 --temperature 0.3 --seed 1"),
    ("engine", "build demo/model -o demo/rtx --target tensorrt-rtx:sm89 --force"),
    ("inspect", "inspect demo/rtx"),
    ("chat", "run demo/cpu --chat --prompt 'Explain list.append.' --max-new-tokens 80 --temperature 0"),
)


def main() -> None:
    """Runs the steps; the first that fails ends the demo with its exit code."""
    console = Console()
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


if __name__ == "__main__":
    main()

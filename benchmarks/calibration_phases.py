"""The time of calibration at Scout's width by function: one layer of random weights, hidden 5120 and experts of 8192.

Looks every 5 ms at which of this project's functions each working thread is in, and shares out the processor time by
that. With 16 experts the layer has 4.4 GB, which are written beside a result of half the size.

    python benchmarks/calibration_phases.py [--recipe fp8] [--experts 16] [--tokens 1024] [--threads 2] [--lines]
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from support.dense import write_random_checkpoint
from support.peak import WATCH
from support.sparse import SCOUT

from arriero.export import export_checkpoint

RUN = f"""
import collections, json, sys, time
import numpy as np, torch
torch.set_num_threads(int(sys.argv[4]))
from arriero.calibration import calibrate_model
{WATCH}found = collections.Counter()
def look():
    mine = threading.get_ident()
    while not done.wait(0.005):
        for thread, frame in sys._current_frames().items():
            while frame is not None and thread != mine:
                name = frame.f_globals.get("__name__", "")
                if name.startswith("arriero."):
                    code = frame.f_code
                    line = f":{{frame.f_lineno}}" if sys.argv[6] == "lines" else ""
                    found[f"{{name[8:]}}: {{code.co_qualname}}{{line}}"] += 1
                    break
                frame = frame.f_back
threading.Thread(target=look, daemon=True).start()
ids = np.random.default_rng(0).integers(3, 4000, (1, int(sys.argv[5])))
started, used = time.perf_counter(), time.process_time()
calibrate_model(sys.argv[1], sys.argv[2], recipe=sys.argv[3], data=ids, floor=0)
figures = [time.perf_counter() - started, time.process_time() - used, peak[0] - before]
done.set()
print(json.dumps([figures, found]))
"""
SHOWN = 25


def main() -> None:
    parser = argparse.ArgumentParser(description="Calibration's time by function.")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lines", action="store_true", help="by line and not by function")
    parser.add_argument("--folder", type=Path, help="keeps the model here, and takes it from here another time")
    arguments = parser.parse_args()
    config = {**SCOUT, "num_hidden_layers": 1, "num_local_experts": arguments.experts, "vocab_size": 4096}
    config |= {"bos_token_id": 0, "eos_token_id": 1}
    with tempfile.TemporaryDirectory() as name:
        kept = arguments.folder or Path(name)
        if not (kept / "model").exists():
            write_random_checkpoint(config, kept / "checkpoint", pool=1 << 25)
            export_checkpoint(kept / "checkpoint", kept / "model")
        rest = [arguments.recipe, arguments.threads, arguments.tokens, "lines" if arguments.lines else ""]
        command = [sys.executable, "-c", RUN, kept / "model", Path(name) / "quantised", *rest]
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        found = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, env=environment)
        size = sum(path.stat().st_size for path in (kept / "checkpoint").glob("*.safetensors"))
    (seconds, used, peak), counts = json.loads(found.stdout)
    table = Table("function", "share, %", "CPU, s", title=f"One layer to {arguments.recipe}, {arguments.tokens} tokens")
    total = sum(counts.values())
    for place, count in collections.Counter(counts).most_common(SHOWN):
        table.add_row(place, f"{100 * count / total:.1f}", f"{used * count / total:.1f}")
    Console().print(table)
    print(
        f"{arguments.experts} experts, {size / 1e9:.2f} GB of weights, {arguments.threads} threads: {seconds:.1f} s, "
        f"{used:.1f} s of processor time, {size / seconds / 1e9:.3f} GB/s, {size / used / 1e9:.3f} GB a CPU second, "
        f"peak {peak:.0f} MB"
    )


if __name__ == "__main__":
    main()

"""Damaged files of every format that is read: each is taken or refused in a line, in 5 s and 2 GB.

    PYTHONPATH=tests/support python tests/fuzz/files.py [--cases 10000] [--seed 0] [--batch 500]

Kinds of files come by turns: specs, graphs, configurations, drafts, tokenizers, templates, weights' headers, golden
files, limits, keys, data and images. A batch runs in a process of its own. What a session computes of a bundle with a
damaged `spec.json` must be what it computes of the good one. Counts are printed by kind, and each trouble with its seed
and number.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hostile_batches import run_cases
from hostile_files import write_bases

from arriero.accuracy.golden import record_golden
from arriero.engine import build_bundle
from arriero.export import export_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--cases", type=int, default=10000)
parser.add_argument("--first", type=int, default=0)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--batch", type=int, default=500)
arguments = parser.parse_args()
with tempfile.TemporaryDirectory() as name:
    folder, started = Path(name), time.perf_counter()
    model = export_checkpoint(EXAMPLES / "tiny-llama4", folder / "made" / "model", copy_weights=True)
    bundle = build_bundle(model, folder / "made" / "bundle")
    sees = export_checkpoint(EXAMPLES / "tiny-llama4-vision", folder / "made" / "sees", copy_weights=True)
    seeing = build_bundle(sees, folder / "made" / "seeing")
    data = [EXAMPLES / "tiny-llama4" / "unseen.txt"]
    golden = record_golden(bundle, folder / "made" / "golden.safetensors", data=data, samples=1, window=32)
    base = folder / "base"
    base.mkdir()
    checkpoint = folder / "made" / "checkpoint"
    write_bases(base, model, bundle, seeing, EXAMPLES / "tiny-llama4", golden)
    counts: Counter[tuple[str, str]] = Counter()
    troubles: list[str] = []
    last = arguments.first + arguments.cases
    for first in range(arguments.first, last, arguments.batch):
        some, trouble = run_cases(base, arguments.seed, first, min(last, first + arguments.batch))
        counts += some
        troubles += trouble
        for line in trouble:
            print(line, flush=True)
        print(f"{first + arguments.batch} cases, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
for kind in sorted({kind for kind, _ in counts}):
    print(f"{kind:28} {counts[kind, 'taken']:6} taken {counts[kind, 'refused']:6} refused")
print(f"{counts.total()} cases, {len(troubles)} troubles")
sys.exit(bool(troubles))

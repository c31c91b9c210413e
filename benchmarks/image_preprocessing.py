"""Images into a prompt: Arriero's preprocessing beside `transformers`' `Llama4Processor`, in one process.

Both are given the same prompt and the same images, as a JPEG file opened with Pillow (decoding is part of the time) or
as pixels in memory, and both give token ids and normalised tiles. Runs alternate; a row is the median of each, and the
median of the ratios of neighbouring runs. That the ids are equal and the pixels a step of the resize apart at most is
checked on the way. Each has one thread by default (ours: of NumPy's BLAS): with two, on a virtual machine of two cores,
PyTorch's wait for one another, and a small image takes `transformers` more than ten times as long, which is no measure
of anything else. On a machine that others use, `--cpu` counts the process's own time instead of the clock's.

Where torchvision is not installed, the functions that `transformers` takes from it are the tests' own
(`tests/support/llama4_processor.py`), which call PyTorch as it does.

    python benchmarks/image_preprocessing.py [--runs 9] [--threads 1] [--cpu]
"""

import argparse
import io
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from arriero.runtime.images.placeholders import ImagePrompts
from arriero.runtime.text import Text

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests" / "support"))

from llama4_processor import stand_in_for_torchvision  # noqa: E402
from pictures import photo  # noqa: E402

SIZES = {"640 × 427": [(640, 427)], "1600 × 1200": [(1600, 1200)], "4000 × 3000": [(4000, 3000)]}
SIZES |= {"900 × 4000": [(900, 4000)], "four of 800 × 600": [(800, 600)] * 4}
TOKENS = ("image", "patch", "image_start", "image_end", "tile_x_separator", "tile_y_separator")


def prepare_folder(folder: Path) -> None:
    """Writes a tokenizer with Llama 4's image tokens, and its preprocessor's settings."""
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples" / "tiny-llama4" / name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in TOKENS]})
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="Image preprocessing beside transformers.")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu else time.perf_counter
    peer = "torchvision"
    if find_spec("torchvision") is None:
        stand_in_for_torchvision()
        peer = "torchvision's stand-in"
    torch.set_num_threads(arguments.threads)
    threadpool_limits(arguments.threads, "blas")
    table = Table("image", "from", "tiles", "tokens", "Arriero, ms", "transformers, ms", "ratio")
    with tempfile.TemporaryDirectory() as name:
        prepare_folder(Path(name))
        from transformers import AutoTokenizer, Llama4ImageProcessor, Llama4Processor

        processor = Llama4Processor(Llama4ImageProcessor(), AutoTokenizer.from_pretrained(name))
        text = Text(Path(name))
        prompts = ImagePrompts(text)
        for label, sizes in SIZES.items():
            pictures = [photo("sklearn").resize(size, Image.Resampling.BICUBIC) for size in sizes]
            prompt = "<|image|>" * len(pictures) + "What do you see?"
            files = [io.BytesIO() for _ in pictures]
            for picture, file in zip(pictures, files, strict=True):
                picture.save(file, "JPEG", quality=90)
            sources: dict[str, Callable[[], list[Image.Image]]] = {
                "JPEG": lambda files=files: [Image.open(file) for file in files],
                "pixels": lambda pictures=pictures: pictures,
            }
            for source, give in sources.items():
                ids, tiles = prompts.prepare(text.encode(prompt), give())
                theirs = processor(images=give(), text=prompt)
                assert ids == theirs["input_ids"][0]
                pixels = torch.cat([each.reshape(-1, *each.shape[-3:]) for each in theirs["pixel_values"]])
                assert np.abs(tiles - pixels.float().numpy()).max() <= 3 / 255  # a step of 2/255, rounded to bf16
                rows = []
                for _ in range(arguments.runs):
                    ours = timed(lambda give=give, prompt=prompt: prompts.prepare(text.encode(prompt), give()), clock)
                    peer_s = timed(lambda give=give, prompt=prompt: processor(images=give(), text=prompt), clock)
                    rows.append((ours, peer_s))
                ours, peers = (statistics.median(each) * 1e3 for each in zip(*rows, strict=True))
                ratio = statistics.median(their / our for our, their in rows)
                row = f"{len(tiles)}", f"{len(ids)}", f"{ours:.1f}", f"{peers:.1f}", f"{ratio:.2f}"
                table.add_row(label, source, *row)
    Console().print(f"{peer}, PyTorch's threads: {torch.get_num_threads()}, runs: {arguments.runs}")
    Console().print(table)


if __name__ == "__main__":
    main()

"""Checkpoints, bundles and GGUFs that the CPU races run, each made once a folder, and their runs in child processes."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.files.folders import read_spec
from arriero.files.processors import processors
from arriero.measuring.timing import Stream
from arriero.spec.recipe import Override, Recipe

from .contenders import Task
from .dense import write_random_checkpoint, write_random_head
from .tokenizer import write_tokenizer

FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15, "bf16": 32, "f32": 0}
"""llama.cpp's numbers of the types that a file can be quantised to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A contender: an engine and the form of its weights."""

    engine: str
    form: str
    bits: int

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.form}"

    def is_usual(self, bits: list[int]) -> bool:
        """Whether it takes part where it is not named: what is compiled for minutes does not."""
        return self.bits in bits and self.engine != "compiled"


ENTRIES = (
    Entry(engine="arriero", form="int4", bits=4),
    Entry(engine="llama", form="q4_0", bits=4),
    Entry(engine="llama", form="q4_k_m", bits=4),
    Entry(engine="arriero", form="int8", bits=8),
    Entry(engine="arriero", form="int8-32", bits=8),
    Entry(engine="arriero", form="fp8", bits=8),
    Entry(engine="llama", form="q8_0", bits=8),
    Entry(engine="arriero", form="bfloat16", bits=16),
    Entry(engine="llama", form="bf16", bits=16),
    Entry(engine="torch", form="bfloat16", bits=16),
    Entry(engine="compiled", form="bfloat16", bits=16),
    Entry(engine="arriero", form="float32", bits=32),
    Entry(engine="llama", form="f32", bits=32),
    Entry(engine="torch", form="float32", bits=32),
    Entry(engine="compiled", form="float32", bits=32),
)


class Workshop:
    """Makes what contenders run, each thing once a folder; but bundles, which are what is being worked on.

    Args:
        folder: What it makes.
        bundles: Bundles that it makes.
        config: The checkpoint's.
        group: Weights that share an int4 scale.
        quantiser: llama.cpp's program `llama-quantize`; None takes its function from `llama-cpp-python`.
        drafted: Whether our models have an EAGLE-3 head, random as they are.
    """

    def __init__(
        self,
        folder: Path,
        bundles: Path,
        config: dict[str, Any],
        group: int,
        quantiser: Path | None = None,
        *,
        drafted: bool = False,
    ) -> None:
        self.folder, self.bundles, self.config, self.group = folder, bundles, config, group
        self.quantiser = quantiser
        self.checkpoint = folder / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.checkpoint.exists():
            say("writing the checkpoint")
            write_random_checkpoint(config, self.checkpoint)
            write_tokenizer(self.checkpoint, config["vocab_size"])
        self.head = folder / "head" if drafted else None
        if self.head is not None and not self.head.exists():
            write_random_head(config, self.head)

    def make(self, entry: Entry) -> Path:
        """The folder or file that a contender loads."""
        match entry.engine:
            case "arriero":
                return self._bundle(entry.form)
            case "llama":
                return self._gguf(entry.form)
        return self.checkpoint

    def size(self, entry: Entry, made: Path) -> int:
        """Bytes of what a contender loads: its weights' files and, of ours, the graph."""
        if made.is_file():
            return made.stat().st_size
        if entry.engine == "arriero":
            spec = read_spec(made)
            return sum(file.size for file in spec.weight_files) + (made / spec.graph).stat().st_size
        return sum(path.stat().st_size for path in made.glob("*.safetensors"))

    def reference(self) -> NDArray[np.float32]:
        """The logits that others are compared with."""
        path = self.folder / "reference.npy"
        if not path.exists():
            say("logits by transformers in float32")
            run_child(task_of("torch", self.checkpoint, self.config, dtype="float32", logits=str(path)))
        logits: NDArray[np.float32] = np.load(path)
        return logits

    def _bundle(self, form: str) -> Path:
        from arriero.engine import build_bundle

        path = self.bundles / form
        return path if path.exists() else build_bundle(self._model(form), path)

    def _model(self, form: str) -> Path:
        name = f"model-int4-{self.group}" if form == "int4" else f"model-{form}"
        name += "" if self.head is None else "-drafted"
        if (path := self.folder / name).exists():
            return path
        if form in ("bfloat16", "float32"):
            from arriero.export import export_checkpoint

            say(f"exporting {form}")
            return export_checkpoint(self.checkpoint, path, dtype=form, draft=self.head)
        from arriero.calibration import calibrate_model

        source = self._model("bfloat16")
        say(f"rounding to {form}")
        ids_WS = np.random.default_rng(0).integers(0, self.config["vocab_size"], (1, 64))
        kind, _, group = form.partition("-")
        head = Override(pattern="lm_head", format=kind)  # type: ignore[arg-type]
        size = int(group) if group else self.group if kind == "int4" else 64  # of int8 64 is none
        recipe = Recipe(format=kind, activations="dynamic", group_size=size, overrides=(head,))  # type: ignore[arg-type]
        return calibrate_model(source, path, recipe=recipe, data=ids_WS, floor=0)

    def _gguf(self, form: str) -> Path:
        path = self.folder / f"{form}.gguf"
        if path.exists():
            return path
        unfinished = path.with_suffix(".new")
        if form == "bf16":
            from .gguf_file import write_gguf

            say("writing bf16.gguf")
            write_gguf(self.checkpoint, unfinished)
        else:
            source = self._gguf("bf16")
            say(f"writing {path.name}")
            if self.quantiser is None:
                quantise_gguf(source, unfinished, form)
            else:
                command = [self.quantiser, *(() if form.endswith("_m") else ("--pure",)), source, unfinished, form]
                subprocess.run([*map(str, command), str(processors())], check=True, capture_output=True)
        unfinished.rename(path)
        return path


def quantise_gguf(source: Path, target: Path, form: str) -> None:
    """Runs llama.cpp's quantiser: every matrix alike, but in the mixtures, whose names end in a letter."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[form], processors()
    settings.pure = not form.endswith("_m")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings) != 0:
        raise SystemExit(f"llama.cpp does not quantise {source} to {form}")


def task_of(engine: str, path: Path, config: dict[str, Any], **changes: Any) -> Task:
    """A task that times nothing, but for the changes."""
    plain = Task(
        engine=engine,
        path=str(path),
        dtype="float32",
        threads=1,
        vocabulary=config["vocab_size"],
        context=512,
        steps=32,
        runs=0,
        batch=1,
        batch_context=128,
    )
    return replace(plain, **changes)


def run_child(task: Task) -> dict[str, Any]:
    """Runs a contender. `first` is the time from the command to its first token."""
    threads = str(task.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("contenders.py")), json.dumps(asdict(task))]
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{task.engine} {task.path} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "first_at" in found:
        found["first"] = found.pop("first_at") - started
    return found


def stream_speed(stream: Stream, cpu_time: bool) -> float:
    """Bytes that can be read in a second: the fastest of three readings, since nothing makes one faster than it is."""
    speeds = []
    for _ in range(3):
        started = time.process_time()
        speed = stream.read()
        speeds.append(stream.size / (time.process_time() - started) if cpu_time else speed)
    return max(speeds)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]

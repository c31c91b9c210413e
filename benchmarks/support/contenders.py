"""One contender of the CPU races in a process of its own: Arriero, llama.cpp, or `transformers`.

Enters: a `Task` as JSON, the only argument. Leaves: what was measured, as JSON on the last line of stdout. Each
contender has the same three methods, and the same code times them. Its peak of memory is the process's own.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The work of one process.

    Attributes:
        engine: `arriero`, `llama`, `torch` or `compiled`.
        path: The bundle, the GGUF, or the checkpoint.
        dtype: Type that `transformers` computes in.
        threads: Threads of one operator.
        vocabulary: Tokens to draw from.
        context: Tokens in front of the decoded ones, and of the prompt whose prefill is timed.
        steps: Decode steps that are timed.
        runs: Times that each case is timed; 0 leaves out the case.
        batch: Rows of the batch.
        batch_context: Tokens in front of a batch's decoded ones.
        lengths: Tokens in the caches at which decoding is timed, growing, instead of all cases.
        cpu_time: Whether seconds are the processor's and not the clock's.
        logits: Where to write the logits of the prompt that contenders are compared on; then nothing is timed.
    """

    engine: str
    path: str
    dtype: str
    threads: int
    vocabulary: int
    context: int
    steps: int
    runs: int
    batch: int
    batch_context: int
    lengths: Sequence[int] = ()
    cpu_time: bool = False
    logits: str | None = None


class Contender(Protocol):
    """A loaded model. Rows of a batch are equally long."""

    def start(self, batch: int, positions: int) -> None:
        """Begins sequences of no tokens."""

    def prefill(self, rows: Sequence[Sequence[int]]) -> Logits:
        """Adds tokens to each row. Returns the logits [B, V] after its last."""

    def decode(self, tokens_B: Sequence[int]) -> Logits:
        """Adds one token to each row. Returns the logits [B, V] after it."""

    def logits(self, ids: Sequence[int]) -> Logits:
        """The logits [S, V] after each token of one sequence."""


class Arriero:
    """A bundle in our session."""

    def __init__(self, task: Task) -> None:
        import arriero

        self.session = arriero.load(task.path, threads=task.threads, max_seq=longest(task))

    def start(self, batch: int, positions: int) -> None:
        self.state = self.session.start(batch, positions)

    def prefill(self, rows: Sequence[Sequence[int]]) -> Logits:
        return self.session.prefill(self.state, rows)

    def decode(self, tokens_B: Sequence[int]) -> Logits:
        return self.session.decode(self.state, tokens_B)

    def logits(self, ids: Sequence[int]) -> Logits:
        return self.session.logits([ids])[0]

    def step_bytes(self, batch: int, past: float, folder: Path) -> float:
        """Bytes that a decode step must read."""
        from arriero.files.folders import read_spec
        from arriero.runtime.memory import step_reads

        sizes = {name: value.tensor_size_in_bytes() for name, value in self.session.decoder.weights.items()}
        return step_reads(read_spec(folder), sizes, batch, past).total


class Llama:
    """A GGUF in llama.cpp, through `llama-cpp-python`'s bindings of its C interface.

    Settings are its defaults (caches in float16, flash attention where it chooses it, weights laid out anew where its
    kernels like that), but for caches of chunked layers, which hold one chunk.
    """

    def __init__(self, task: Task) -> None:
        import llama_cpp

        self.api, self.threads, self.context = llama_cpp, task.threads, None
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(task.path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {task.path}")
        self.vocabulary = task.vocabulary

    def start(self, batch: int, positions: int) -> None:
        api = self.api
        if self.context is not None:
            api.llama_free(self.context)
            api.llama_batch_free(self.batch)
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = batch * padded(positions), batch
        settings.n_batch = self.size = min(settings.n_ctx, 2048)
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.swa_full = False
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit(f"llama.cpp has no context of {batch} sequences of {positions} tokens")
        self.batch = api.llama_batch_init(settings.n_batch, 0, 1)
        self.past = 0

    def prefill(self, rows: Sequence[Sequence[int]]) -> Logits:
        return self._run(rows, last_only=True)

    def decode(self, tokens_B: Sequence[int]) -> Logits:
        return self._run([[token] for token in tokens_B], last_only=True)

    def logits(self, ids: Sequence[int]) -> Logits:
        self.start(1, len(ids))
        return self._run([ids], last_only=False)

    def _run(self, rows: Sequence[Sequence[int]], *, last_only: bool) -> Logits:
        tokens = [(row, place, token) for row, of_row in enumerate(rows) for place, token in enumerate(of_row)]
        last = len(rows[0]) - 1
        parts = [
            self._submit([(row, place, token, not last_only or place == last) for row, place, token in some])
            for some in (tokens[at : at + self.size] for at in range(0, len(tokens), self.size))
        ]
        self.past += len(rows[0])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _submit(self, tokens: Sequence[tuple[int, int, int, bool]]) -> Logits:
        """Runs some tokens: row, place among the new ones, id, and whether its logits are wanted."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for at, (row, place, token, wanted) in enumerate(tokens):
            batch.token[at], batch.pos[at] = token, self.past + place
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
            batch.logits[at] = wanted
        if (code := self.api.llama_decode(self.context, batch)) != 0:
            raise SystemExit(f"llama_decode returned {code}")
        outputs = sum(wanted for *_, wanted in tokens)
        if not outputs:
            return np.empty((0, self.vocabulary), np.float32)
        logits = np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (outputs, self.vocabulary))
        return logits if len(tokens) < self.size else logits.copy()  # the next call writes over it


class Torch:
    """A checkpoint in `transformers`, eager or compiled; the compiled one has caches of fixed size."""

    def __init__(self, task: Task) -> None:
        import torch
        from transformers import AutoModelForCausalLM, StaticCache

        self.torch, self.static = torch, StaticCache if task.engine == "compiled" else None
        torch.set_num_threads(task.threads)
        torch.set_grad_enabled(False)
        dtype = getattr(torch, task.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(task.path, dtype=dtype).eval()
        self.forward = torch.compile(self.model, dynamic=False) if self.static else self.model

    def start(self, batch: int, positions: int) -> None:
        self.cache = self.static and self.static(config=self.model.config, max_cache_len=positions)
        self.past = 0

    def prefill(self, rows: Sequence[Sequence[int]]) -> Logits:
        return self._run(rows, 1)[:, -1]

    def decode(self, tokens_B: Sequence[int]) -> Logits:
        return self._run([[token] for token in tokens_B], 1)[:, -1]

    def logits(self, ids: Sequence[int]) -> Logits:
        self.start(1, len(ids))
        return self._run([ids], 0)[0]

    def _run(self, rows: Sequence[Sequence[int]], kept: int) -> Logits:
        ids_BS = self.torch.tensor(rows)
        places_S = self.torch.arange(self.past, self.past + ids_BS.shape[1])
        found = self.forward(
            ids_BS,
            past_key_values=self.cache,
            position_ids=places_S[None],
            cache_position=places_S,
            use_cache=True,
            logits_to_keep=kept,
        )
        self.cache = found.past_key_values
        self.past += ids_BS.shape[1]
        return found.logits.float().numpy()


def longest(task: Task) -> int:
    """Positions that the longest sequence of a task takes."""
    return max(task.context, task.batch_context, *task.lengths) + task.steps + 1


def padded(positions: int) -> int:
    """Positions as llama.cpp takes them, a multiple of 256."""
    return -(-positions // 256) * 256


def measure(contender: Contender, task: Task) -> dict[str, Any]:
    """Times all cases of a task; the first run of a case is not counted."""
    rng = np.random.default_rng(1)
    found: dict[str, Any] = {"prefill": [], "decode": [], "batch": []}
    for run in range(task.runs + 1):
        kept = {name: [] for name in found} if run == 0 else found
        prompt = draw(rng, task, 1, task.context)
        contender.start(1, task.context + task.steps + 1)
        with Seconds(task, kept["prefill"]):
            contender.prefill(prompt).argmax(-1)
        decode(contender, rng, task, 1, kept["decode"])
    for run in range(task.runs + 1 if task.batch > 1 else 0):
        kept = {"batch": []} if run == 0 else found
        contender.start(task.batch, task.batch_context + task.steps + 1)
        contender.prefill(draw(rng, task, task.batch, task.batch_context)).argmax(-1)
        decode(contender, rng, task, task.batch, kept["batch"])
    return found


def warm_up(contender: Contender, task: Task) -> None:
    """Decodes for a while, so that what an engine does in its first seconds is not taken for its speed."""
    rng, until = np.random.default_rng(2), time.monotonic() + WARM
    while time.monotonic() < until:
        contender.start(1, FIRST_PROMPT + task.steps + 1)
        contender.prefill(draw(rng, task, 1, FIRST_PROMPT))
        decode(contender, rng, task, 1, [])


def measure_lengths(contender: Contender, task: Task) -> list[float]:
    """Seconds of a decode step at each length; the steps themselves count towards the next."""
    rng = np.random.default_rng(1)
    contender.start(1, longest(task))
    found: list[float] = []
    past = 0
    for length in task.lengths:
        while past < length:
            count = min(512, length - past)
            contender.prefill(draw(rng, task, 1, count))
            past += count
        decode(contender, rng, task, 1, found)
        past += task.steps
    return found


def draw(rng: np.random.Generator, task: Task, batch: int, length: int) -> list[list[int]]:
    return rng.integers(0, task.vocabulary, (batch, length)).tolist()


class Seconds:
    """The seconds that a block takes, divided by its parts, added to a list."""

    def __init__(self, task: Task, found: list[float], parts: int = 1) -> None:
        self.clock = time.process_time if task.cpu_time else time.perf_counter
        self.found, self.parts = found, parts

    def __enter__(self) -> None:
        self.started = self.clock()

    def __exit__(self, *error: object) -> None:
        self.found.append((self.clock() - self.started) / self.parts)


def decode(contender: Contender, rng: np.random.Generator, task: Task, batch: int, found: list[float]) -> None:
    """Times one decode step, the mean over the task's. Tokens are drawn, so that experts are chosen widely."""
    steps = draw(rng, task, task.steps, batch)
    with Seconds(task, found, task.steps):
        for tokens_B in steps:
            contender.decode(tokens_B).argmax(-1)


def peak_memory() -> int:
    """The largest resident set that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


ENGINES = {"arriero": Arriero, "llama": Llama, "torch": Torch, "compiled": Torch}
FIRST_PROMPT = 16
"""Tokens of the prompt whose first new token is waited for, from the command on."""
WARM = 3.0
"""Seconds of decoding before anything but the first token is timed."""
COMPARED = 128
"""Tokens of the prompt that contenders' logits are compared on."""


def main() -> None:
    parser = argparse.ArgumentParser(description="One contender of the CPU races.")
    parser.add_argument("task")
    task = Task(**json.loads(parser.parse_args().task))
    contender = ENGINES[task.engine](task)
    rng = np.random.default_rng(0)
    if task.logits is not None:
        np.save(task.logits, contender.logits(draw(rng, task, 1, COMPARED)[0]))
        found: dict[str, Any] = {}
    else:
        contender.start(1, FIRST_PROMPT + 1)
        contender.prefill(draw(rng, task, 1, FIRST_PROMPT)).argmax(-1)
        found = {"first": time.process_time()} if task.cpu_time else {"first_at": time.monotonic()}
        if task.lengths or task.runs:
            warm_up(contender, task)
        if task.lengths:
            found["at_lengths"] = measure_lengths(contender, task)
        elif task.runs:
            found |= measure(contender, task)
        found["peak_rss"] = peak_memory()
    if isinstance(contender, Arriero):
        past = task.context + (task.steps - 1) / 2
        found["step_bytes"] = contender.step_bytes(1, past, Path(task.path))
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # what the engines do to end is not measured


if __name__ == "__main__":
    main()

"""A small Llama 4 that is sure of its next token, trained within seconds, and the task that it is trained on.

A sequence begins with one of two tokens, which says what table holds; each token from the fourth on is what that table
has for the token two before it. So a layer must find the token before by its position, the layer of full attention the
first token from behind any number of chunks, and the experts hold the tables. Where a chunk begins, its layer does not
see the token that matters: what follows there is not trained.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from arriero.accuracy.sides.folder_side import torch_at_rest

FIRST, SYMBOLS, CYCLE = 3, 24, 8


def make_table(seed: int) -> np.ndarray:
    """A permutation whose cycles are so long that a sequence comes again after a chunk: to copy is no help."""
    cycles = np.random.default_rng(seed).permutation(SYMBOLS).reshape(-1, CYCLE)
    table = np.empty(SYMBOLS, int)
    table[cycles] = np.roll(cycles, 1, axis=1)
    return table


TABLES = np.stack([make_table(seed) for seed in range(2)])
LAYERS = {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}
"""One chunked, one of full attention."""
SIZES = {"hidden_size": 64, "intermediate_size": 32, "initializer_range": 0.05}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}
"""All are chosen, so that a tie between experts cannot change a row."""
CHUNK, LENGTH, ROWS, STEPS, RATE = 16, 40, 16, 180, 1.5e-2


def sequences(seed: int, rows: int, length: int) -> list[list[int]]:
    """Sequences of the task."""
    rng = np.random.default_rng(seed)
    tables = rng.integers(0, len(TABLES), rows)
    tokens = rng.integers(0, SYMBOLS, (rows, length))
    for place in range(3, length):
        tokens[:, place] = TABLES[tables, tokens[:, place - 2]]
    tokens[:, 0] = SYMBOLS + tables
    return (tokens + FIRST).tolist()


@functools.cache
def sure_llama4(llama4: Callable[..., Any]) -> Any:
    """A model that knows the task, trained in float32 and rounded to bfloat16; `llama4` is `conftest`'s."""
    with torch_at_rest():  # so little work gains nothing by threads, which wait for each other on a busy machine
        model = llama4(attention_chunk_size=CHUNK, **LAYERS, **SIZES, **EXPERTS).train()
        train(model)
    return model.eval().to(torch.bfloat16)


def train(model: Any) -> None:
    """Trains a model on the task, with a rate that falls to 0."""
    known = [place for place in range(2, LENGTH - 1) if place % CHUNK]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 20) * (1 - step / STEPS)
        ids = torch.tensor(sequences(step, ROWS, LENGTH))
        logits = model(ids).logits[:, known]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:][:, known].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

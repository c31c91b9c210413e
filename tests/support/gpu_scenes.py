"""Scenes over a GPU that is not there: a model lowered for TensorRT, its engine walked, its kernels interpreted."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import numpy as np
from executing_cuda import ExecutingCuda
from walked_engine import WalkedEngine

import arriero
from arriero.engine import tensorrt_lowering
from arriero.engine.profiles import decoder_profiles, decoder_shapes
from arriero.engine.tensorrt_library import open_library
from arriero.engine.tensorrt_lowering import Choices, lower_for_tensorrt
from arriero.files.folders import find_files, read_spec
from arriero.plugins.launch import Driver
from arriero.runtime import Flight
from arriero.runtime.backends.device import Device
from arriero.runtime.backends.execution import load_kernels, upload_weights
from arriero.runtime.backends.tensorrt_decoder import TensorRTDecoder
from arriero.runtime.continuation import joined
from arriero.runtime.draws import Sampling
from arriero.runtime.prefix import Prefixes
from arriero.runtime.sampling import Sampler
from arriero.runtime.session import Session
from arriero.runtime.state import Limits
from arriero.spec.built_engine import EngineSpec

CAPABILITY = 89
SMALL = 1 << 9
"""Bytes below which a weight stays inside the engine, here: small models have theirs outside as large ones have."""
FREE: dict[str, Any] = {"temperature": 0, "eos_token_id": []}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A session on the engine, the CPU's beside it, and the driver."""

    session: Session
    plain: Session
    cuda: ExecutingCuda
    engine: WalkedEngine
    decoder: TensorRTDecoder


STAGES: dict[tuple[Any, ...], Stage] = {}


def stage(
    model: str,
    max_seq: int = 64,
    max_batch: int = 4,
    max_prefill: int = 12,
    capability: int = CAPABILITY,
    graphs: bool = True,
    placement: Any = "experts",
) -> Stage:
    """Builds a model for the GPU that is not there and loads it, once."""
    key = (model, max_seq, max_batch, max_prefill, capability, placement)
    if key not in STAGES:
        STAGES[key] = load(Path(model), *key[1:])
    made = STAGES[key]
    made.decoder.captures = graphs
    if not graphs:
        made.decoder.steps.forget()
    return made


def load(model: Path, max_seq: int, max_batch: int, max_prefill: int, capability: int, placement: Any) -> Stage:
    spec, trt = read_spec(model), open_library("tensorrt-rtx")
    files, folder = find_files(model, spec.weight_files), Path(mkdtemp())
    with patch.object(tensorrt_lowering, "SMALL", SMALL):
        network = lower_for_tensorrt(model, spec, Choices(gqa=None, placement=placement, max_seq=max_seq), files)
    assert set(network.ways.values()) == {"plugin"}
    assert bool(network.weights) == (placement != "inside")
    profiles = decoder_profiles(network.caches, max_batch, max_prefill)
    shapes = [decoder_shapes(spec, profile, network.caches) for profile in profiles]
    cuda = ExecutingCuda(capability)
    engine = WalkedEngine(trt, cuda, network.graph, files, shapes, capability)
    binaries = engine.plan(capability, folder / "kernels", spec.model.vocab_size)
    about = EngineSpec(
        file="decoder.engine", flavour="tensorrt-rtx", version=trt.__version__, capabilities=(capability,),
        sha256="0" * 64,
        max_seq=max_seq, profiles=profiles, caches=network.caches, attention="plugin", experts="plugin",
        placement=placement, weight_streaming=False, weights=0, kernels=binaries,
    )  # fmt: skip
    device = Device(Driver(cuda))
    kernels = load_kernels(device, folder / "kernels", binaries)
    for creator in engine.creators.values():
        creator.kernels, creator.rows = kernels, max_batch
    record = dataclasses.replace(spec, engine=about, weights=network.weights)
    decoder = TensorRTDecoder(
        trt, device, engine, upload_weights(device, network.weights, files), record, None, kernels
    )
    plain = arriero.load(model, max_seq=max_seq)
    session = Session(decoder, plain.text, plain.defaults, Limits(max_seq, max_batch), plain.tower)
    return Stage(session, plain, cuda, engine, decoder)


def logits(model: str, ids: Sequence[Sequence[int]], lengths: Sequence[int], decoded: int, **how: Any) -> Any:
    """Teacher-forced logits of rows, prefilled, then decoded together. Returns the engine's and the CPU's."""
    made = stage(model, **how)
    found = []
    for session in (made.session, made.plain):
        state = session.start(len(ids), None)
        rows = [list(row[: length - decoded]) for row, length in zip(ids, lengths, strict=True)]
        pieces = [[] for _ in rows]
        for row, _, logits_SV in session.extend(state, rows):
            pieces[row].extend(logits_SV)
        for step in range(decoded):
            tokens = [row[length - decoded + step] for row, length in zip(ids, lengths, strict=True)]
            for row, logits_V in enumerate(session.decode(state, tokens)):
                pieces[row].append(logits_V)
        found.append(np.concatenate([np.stack(each) for each in pieces]))
    return found


def texts(model: str, prompts: Sequence[Sequence[int]], new: int, way: str, settings: Any = None, **how: Any) -> Any:
    """Continuations of prompts in a way: alone, in a flight, by guesses, or from beginnings that are known.

    Returns the engine's tokens of each, and the counts of driver calls.
    """
    made, asked = stage(model, **how), {**FREE, **(settings or {})}
    session, before = made.session, made.cuda.calls.copy()
    session.prefixes = Prefixes(session.spec.chunk, 1 << 24 if way == "prefixes" else 0)
    if way == "flight":
        flight, pieces = Flight(session, slots=min(3, session.max_batch or 3), prefill_budget=8), {}
        for prompt in prompts:
            flight.join(session.request(list(prompt), new, **asked))
        while flight.riding or flight.waiting:
            for number, piece in flight.step():
                pieces.setdefault(number, []).append(piece)
        found = [joined(pieces[number]) for number in range(len(prompts))]
    else:
        guessed = {"prompt_lookup_num_tokens": 4} if way == "guesses" else {}
        found = [session.generate(list(prompt), new, **guessed, **asked) for prompt in prompts]
    return [each.ids for each in found], [each.reused for each in found], dict(made.cuda.calls - before)


def judged(model: str, prompts: Sequence[Sequence[int]], found: Sequence[Sequence[int]], **how: Any) -> Any:
    """Of each new token, by how much the CPU's logits of its two likeliest differ, and the largest from the token's."""
    plain, rows = stage(model, **how).plain, []
    for prompt, new in zip(prompts, found, strict=True):
        after = np.concatenate([each for _, each in plain.score([*prompt, *new])])[len(prompt) - 1 : -1]
        for logits, token in zip(after, new, strict=True):
            second, first = np.sort(logits)[-2:]
            rows.append((float(first - second), float(first - logits[token])))
    return rows


def step_cost(model: str, batch: int, steps: int, **how: Any) -> Any:
    """Driver calls of a decode step with a graph, allocations of several, and seconds of Python without the kernels."""
    made = stage(model, **how)
    session, cuda = made.session, made.cuda
    state = session.start(batch, 40)
    session.prefill(state, [[3 + row] * (2 + row) for row in range(batch)])
    for _ in range(2):
        session.decode_rows(state, [5] * batch)
    drain, cuda.drain = cuda.drain, lambda: [stream.waiting.clear() for stream in cuda.streams.values()]  # type: ignore[method-assign]
    calls, allocated, started = cuda.calls.copy(), cuda.device.allocations + cuda.host.allocations, time.thread_time()
    try:
        for _ in range(steps):
            session.decode_rows(state, [5] * batch)
    finally:
        cuda.drain = drain  # type: ignore[method-assign]
    seconds = (time.thread_time() - started) / steps
    spent = {name: count / steps for name, count in (cuda.calls - calls).items()}
    return spent, cuda.device.allocations + cuda.host.allocations - allocated, seconds


def drawn(model: str, ids: Sequence[int], seeds: int, **how: Any) -> Any:
    """Tokens drawn from shortlists and from whole rows, over settings: both in the order of the settings."""
    made = stage(model, **how)
    session = made.session
    shortened, whole = [], []
    for temperature, others in (
        (0.0, {}), (0.7, {}), (3.0, {"top_p": 0.8}), (4.0, {"top_k": 5}), (5.0, {"min_p": 0.1}),
        (3.0, {"top_p": 0.9, "typical_p": 0.7}), (4.0, {"repetition_penalty": 1.3}), (20.0, {}), (200.0, {"top_k": 60}),
    ):  # fmt: skip
        state = session.start(1, 40)
        session.prefill(state, [list(ids)])
        for _ in range(2):  # the second time the temperature is known
            (row,) = session.decode_rows(state, [5])
            for seed in range(seeds):
                sampling = Sampling(temperature=temperature, seed=seed, **others)
                shortened.append(Sampler(sampling)(row, ids))
                whole.append(Sampler(sampling)(row.whole(), ids))
    return shortened, whole

"""Plugins over a device's memory, captured into CUDA graphs and held against the ops' meaning, with no engine.

The same calls run over the driver that executes and, where there is one, on a card.
"""

from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import captured_plugins
import numpy as np
import pytest
from gpu_process import Gpu

from arriero.plugins import triton_compiler
from arriero.plugins.launch import Kernel
from arriero.runtime.backends.device import Device
from arriero.spec.built_engine import Binary

CALLS = [
    *[(name, dtype) for name in ("decode, chunked, ragged", "later piece, full") for dtype in ("bf16", "fp16")],
    ("int8 cache, decode, full, ragged", "bf16"),
    ("fp8 cache, later piece, chunked", "bf16"),
    *[(name, dtype) for name in ("few tokens", "two experts a token", "many tokens") for dtype in ("bf16", "fp16")],
    ("int8, one token", "bf16"),
    ("int8, static", "fp16"),
    ("fp8, many tokens", "bf16"),
    ("int4, groups of 64", "bf16"),
    ("int4, one token", "fp16"),
]
STORED = ("int8", "fp8")


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    made = Gpu()
    yield made
    made.close()


def distance(found: Any, expected: Any) -> float:
    error, size = np.linalg.norm(found - expected), np.linalg.norm(expected)
    return float(error / size) if size else float(error)


def assert_meant(made: Any, case: str, dtype: str) -> None:
    """That outputs and caches are the meaning's to their type's rounding, at once and by the graph."""
    rounded = case.startswith(STORED)
    assert len(made) == 2
    for found, expected in made:
        for name in found:
            most = 3e-2 if rounded else {"bf16": 1e-2, "fp16": 1e-3}[dtype]
            assert distance(found[name], np.asarray(expected[name], np.float64)) < most, name


@pytest.mark.parametrize(("case", "dtype"), CALLS)
def test_a_plugin_in_a_graph_computes_what_its_op_means(gpu: Gpu, case: str, dtype: str) -> None:
    assert_meant(gpu.run("captured_plugins.executed", case=case, dtype=dtype), case, dtype)


def compile_all(kernels: Iterable[Kernel], module: str, capability: int, folder: Path) -> list[Binary]:
    found = [triton_compiler.compile_kernel(import_module(module), kernel, capability) for kernel in kernels]
    for each in found:
        (folder / each.binary.file).write_bytes(each.cubin)
    return [each.binary for each in found]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), CALLS)
def test_a_plugin_in_a_graph_computes_what_its_op_means_on_a_card(case: str, dtype: str, tmp_path: Path) -> None:
    device = Device.open()
    capability = device.driver.capability()
    if capability not in triton_compiler.CAPABILITIES or (case.startswith("fp8") and capability < 89):
        pytest.skip(f"no such kernels for compute capability {capability}")
    assert_meant(captured_plugins.play(case, dtype, device, compile_all, tmp_path), case, dtype)

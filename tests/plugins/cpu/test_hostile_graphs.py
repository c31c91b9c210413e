"""Graphs that ask the CPU's own ops for what must not be: refused in one line, or answered as the meaning says."""

import dataclasses
import os
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hostile_calls import as_constant, as_type, changed, set_attribute, set_tensor, table, together
from op_batches import batch, run, summary
from op_calls import (
    BFLOAT16,
    OpCall,
    all_reduce,
    attention,
    experts,
    fp8_experts,
    fp8_linear,
    linear,
    plain_experts,
    plain_linear,
)

from arriero.runtime.ranks.segment import HEAD, LINE

THINNED = 8
BATCH = 200
ROWS = sum(1 for _ in table(THINNED))


def outcomes(kind: str, count: int) -> dict[int, str]:
    found: dict[int, str] = {}
    for first in range(0, count, BATCH):
        found |= batch(kind, first, min(count, first + BATCH))
    return found


def test_every_graph_of_the_table_is_refused_or_right() -> None:
    """One in eight of the table's; `make fuzz` runs all of it."""
    assert ROWS >= 260
    report = summary(outcomes(f"table/{THINNED}", ROWS))
    assert report["bad"] == {}
    assert report["calls"] == ROWS
    assert report["refused by the op"] > 200
    assert report["right"] > 20


def test_random_graphs_are_refused_or_right() -> None:
    report = summary(outcomes("random", 200))
    assert report["bad"] == {}
    assert report["calls"] == 200
    assert min(report["right"], report["refused by the op"]) > 30


ATTENTION = attention(np.random.default_rng(3), "float32")
INT8_CACHE = attention(np.random.default_rng(3), "int8")
EXPERTS = experts(np.random.default_rng(9), 8)
LINEAR = linear(np.random.default_rng(0), 8)
PLAIN = plain_linear(np.random.default_rng(0), np.float16)
PLAIN_EXPERTS = plain_experts(np.random.default_rng(9), BFLOAT16)
FP8 = fp8_linear(np.random.default_rng(1))
FP8_EXPERTS = fp8_experts(np.random.default_rng(9))
SUM = all_reduce(np.random.default_rng(3))


def strangers(group: np.ndarray) -> np.ndarray:
    """The same memory, joined by another process."""
    return np.concatenate([group[:HEAD], np.zeros_like(group[HEAD : HEAD + LINE]), group[HEAD + LINE :]])


def of_both_caches(make: Callable[[np.ndarray], np.ndarray]) -> Callable[[OpCall], None]:
    return together(set_tensor("key_cache", make, ""), set_tensor("value_cache", make, ""))


FOUR_BITS = set_tensor("weight", lambda a: as_type(a, ml_dtypes.int4), "")
SET_LENGTHS = set_tensor("past_lengths", lambda a: a * 0 + 9999, "")


@pytest.mark.parametrize(
    ("base", "change", "said"),
    [
        (ATTENTION, set_attribute("heads", 0), "attribute heads is 0, and must be from 1"),
        (ATTENTION, set_attribute("scale", float("nan")), "attribute scale is nan, and must be finite"),
        (ATTENTION, set_tensor("key_cache", lambda a: a[:, :, :-1], ""), "value_cache has the shape"),
        (ATTENTION, set_tensor("key_cache", lambda a: a[:, :-1], ""), "key_cache has the shape"),
        (ATTENTION, of_both_caches(lambda a: a[:-1]), "key_cache has the shape [0, 3, 73, 26], and needs [1, 3, 73"),
        (ATTENTION, of_both_caches(lambda a: a[:, :-1]), "key_cache has the shape [1, 2, 73, 26], and needs [1, 3"),
        (
            ATTENTION,
            together(set_attribute("heads", 3), set_attribute("kv_heads", 2)),
            "attribute heads is 3, and must be a multiple of kv_heads, 2",
        ),
        (ATTENTION, set_tensor("past_lengths", lambda a: a * 0 - 1, ""), "past_lengths holds -1, behind which"),
        (INT8_CACHE, together(set_attribute("chunk", 0), SET_LENGTHS), "past_lengths holds 9999, behind which"),
        (ATTENTION, set_tensor("inv_freq", lambda a: np.zeros(500, np.float32), ""), "inv_freq"),
        (ATTENTION, set_tensor("key", lambda a: a[:, :, :-1], ""), "key has the shape"),
        (INT8_CACHE, set_tensor("key_scale", lambda a: None, ""), "key_scale is not given, and caches of int8 need it"),
        (EXPERTS, set_attribute("top_k", 0), "attribute top_k is 0, and must be from 1"),
        (EXPERTS, set_attribute("top_k", -1), "attribute top_k is -1, and must be from 1"),
        (EXPERTS, set_attribute("top_k", 1 << 62), "attribute top_k is 4611686018427387904"),
        (EXPERTS, set_attribute("top_k", 100), "100 chosen"),
        (EXPERTS, set_attribute("first_expert", 90), "experts 90 to"),
        (EXPERTS, set_attribute("width", 1 << 61), "attribute width is 2305843009213693952"),
        (EXPERTS, set_tensor("router_logits", lambda a: a[:-1], ""), "router_logits has the shape"),
        (EXPERTS, set_tensor("hidden_scale", lambda a: np.zeros(1, np.float32), ""), "hidden_scale"),
        (LINEAR, set_attribute("bits", 12), "attribute bits is 12, and must be 4 or 8 or 16 or 32"),
        *((LINEAR, set_attribute("bits", bits), f"attribute bits is {bits}, and must be 4") for bits in (2, 17, 24)),
        (LINEAR, FOUR_BITS, "weight is of type 22, and must be of uint8"),
        (LINEAR, set_attribute("bits", (1 << 32) + 8), "attribute bits is 4294967304"),
        (LINEAR, set_attribute("outputs", 0), "attribute outputs is 0"),
        (LINEAR, set_tensor("x", lambda a: a[..., :0], ""), "whose last dimension must not be 0"),
        (LINEAR, set_tensor("weight", lambda a: a.view(np.int8), ""), "weight is of int8, and must be of uint8"),
        (LINEAR, set_tensor("scale", lambda a: a.astype(np.float16), ""), "scale is of float16"),
        (SUM, as_constant("group"), "group is a constant of the graph, and must be memory that ranks share"),
        (SUM, set_tensor("group", lambda a: a * 0, ""), "group is no memory that ranks share"),
        (SUM, set_tensor("group", strangers, ""), "group is memory that this process has not joined as rank 0"),
        (
            LINEAR,
            set_tensor("x_scale", lambda a: np.zeros(1, np.float32), ""),
            "x_scale holds 0, and a scale is at least",
        ),
        (PLAIN, set_tensor("x", lambda a: a[..., :0], ""), "whose last dimension must not be 0"),
        (PLAIN, set_tensor("x", lambda a: a[..., :-1], ""), "weight has the shape"),
        (PLAIN, set_tensor("weight", lambda a: a.T, ""), "weight has the shape"),
        (
            PLAIN,
            set_tensor("weight", lambda a: a.view(np.int16), ""),
            "weight is of int16, and must be of float32, flo",
        ),
        (PLAIN_EXPERTS, set_attribute("first_expert", 90), "router_logits is of 7 experts, and experts 90 to 96 are"),
        (PLAIN_EXPERTS, set_tensor("down", lambda a: a[:-1], ""), "gate_up has the shape [7, 586, 46], and needs [6"),
        (FP8, set_tensor("weight", lambda a: a.view(np.uint8), ""), "weight is of uint8, and must be of float8e4m3fn"),
        (FP8, set_tensor("scale", lambda a: a[:-1], ""), "scale has the shape [94], and needs [95]"),
        (FP8, set_tensor("x_scale", lambda a: np.zeros(1, np.float32), ""), "x_scale holds 0, and a scale is at least"),
        (FP8, set_attribute("bound", float("nan")), "attribute bound is nan, and must be finite and not negative"),
        (FP8_EXPERTS, set_attribute("top_k", 1 << 62), "attribute top_k is 4611686018427387904"),
        (FP8_EXPERTS, set_tensor("gate_up_scale", lambda a: a[:, :-1], ""), "gate_up_scale has the shape [7, 45, 1]"),
        (FP8_EXPERTS, set_tensor("down", lambda a: a.swapaxes(1, 2), ""), "down has the shape [7, 23, 586], and needs"),
        (FP8_EXPERTS, set_tensor("router_logits", lambda a: a[:-1], ""), "router_logits has the shape [30, 7], and"),
    ],
)
def test_a_refusal_names_the_op_the_input_and_what_was_found(base: OpCall, change: object, said: str) -> None:
    if "LD_PRELOAD" not in os.environ:  # nothing here is to crash
        found = run(changed(base, change))  # type: ignore[arg-type]
        assert found.startswith(f"refused: arriero.cpu {base.op}: ")
        assert said in found


@pytest.mark.parametrize(("base", "name"), [(LINEAR, "x"), (EXPERTS, "router_logits"), (ATTENTION, "past_lengths")])
def test_numbers_at_odd_addresses_are_refused(base: OpCall, name: str) -> None:
    found = run(dataclasses.replace(base, misaligned=name))
    assert found == f"refused: arriero.cpu {base.op}: {name} lies at an address that is no multiple of 4"


@pytest.mark.parametrize(("base", "name"), [(LINEAR, "scale"), (PLAIN, "weight"), (FP8, "weight")])
def test_weights_and_their_scales_may_lie_anywhere(base: OpCall, name: str) -> None:
    assert run(dataclasses.replace(base, misaligned=name)) == "right"


def test_a_graph_that_kills_its_process_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """The way in which a batch names a graph, over one that does die."""
    import op_batches

    program = f"{tmp_path}/worker.py"
    with open(program, "w") as file:
        file.write(
            "import json, os, sys\n"
            "for number in range(int(sys.argv[2]), int(sys.argv[3])):\n"
            "    if number == 37: os.abort()\n"
            "    print(json.dumps([number, 'right']), flush=True)\n"
        )
    monkeypatch.setattr(op_batches, "__file__", program)
    found = op_batches.batch("random", 30, 50)
    assert [number for number, outcome in found.items() if outcome != "right"] == [37]
    assert "died with -6" in found[37]

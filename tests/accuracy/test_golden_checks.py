"""Golden files whose numbers no recording makes: refused when they are read, in one line."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from arriero.accuracy import check, record_golden
from arriero.accuracy.golden import check_replaceable, read_golden
from arriero.errors import AccuracyError

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def golden(tiny_model: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("golden") / "g.safetensors"
    return record_golden(tiny_model, out, data=[texts[0]], samples=2, window=32)


def put(name: str, value: float, at: int = 7) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name].flat[at] = value

    return change


def swap(name: str) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({name: np.ascontiguousarray(arrays[name][..., ::-1])})


DAMAGES: list[tuple[Callable[[Arrays], object], str]] = [
    (put("top_logs_WNK", np.nan), "top_logs_WNK holds nan, expected a finite number"),
    (put("top_logs_WNK", -np.inf), "top_logs_WNK holds -inf, expected a finite number"),
    (put("next_logs_WN", -np.inf), "next_logs_WN holds -inf, expected a finite number"),
    (put("rest_logs_WN", np.nan), "rest_logs_WN holds nan"),
    (put("rest_logs_WN", -np.inf), "rest_logs_WN holds -inf"),
    (put("next_logs_WN", 0.5), "next_logs_WN holds 0.5, expected at most 0"),
    (put("next_logs_WN", -30.0), "next_logs_WN holds -30.0, expected what top_logs_WNK has for that token"),
    (lambda a: a.update(rest_logs_WN=a["rest_logs_WN"] - 3, top_logs_WNK=a["top_logs_WNK"] - 3), "1 in all"),
    (swap("top_logs_WNK"), "top_logs_WNK does not fall from the likeliest token on"),
    (put("top_ids_WNK", -1), "top_ids_WNK holds -1, expected 0 to 2047"),
    (put("ids_WS", 1 << 30), "ids_WS holds 1073741824, expected 0 to 2047"),
    (put("continued_PC", 5000), "continued_PC holds 5000"),
    (put("experts_LWSK", 99), "experts_LWSK holds 99"),
    (lambda a: a.update(top_ids_WNK=np.zeros_like(a["top_ids_WNK"])), "top_ids_WNK names a token twice"),
    (
        lambda a: a.update(next_logs_WN=a["next_logs_WN"][:, 1:].copy()),
        "next_logs_WN has shape [2, 30], expected [2, 31]",
    ),
    (
        lambda a: a.update(top_logs_WNK=a["top_logs_WNK"].astype(np.float16)),
        "top_logs_WNK is float16, expected float32",
    ),
    (lambda a: a.update(ids_WS=a["ids_WS"][0].copy()), "ids_WS has shape [32], expected windows"),
    (lambda a: a.update(ids_WS=a["ids_WS"][:, :0].copy()), "ids_WS has shape [2, 0], expected windows"),
    (lambda a: a.update(continued_PC=a["continued_PC"][0].copy()), "continued_PC has shape"),
    (lambda a: a.update(experts_LWSK=a["experts_LWSK"][:, :1].copy()), "experts_LWSK has shape"),
    (lambda a: a.update(tiles_W=np.zeros(2, np.int32)), "belong together"),
    (lambda a: a.pop("top_ids_WNK"), "top_ids_WNK"),
    (lambda a: a.update(other=np.zeros(2, np.int32)), "other"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES, ids=[said[:30] for _, said in DAMAGES])
def test_a_number_that_none_recorded_is_named(
    golden: Path, tmp_path: Path, damage: Callable[[Arrays], object], said: str
) -> None:
    with safe_open(golden, "np") as file:
        metadata = file.metadata()
    arrays = load_file(golden)
    damage(arrays)
    path = tmp_path / "damaged.safetensors"
    save_file(arrays, path, metadata)
    with pytest.raises(
        AccuracyError, match=f"is a damaged golden file .*{re.escape(said)}.*: record it again"
    ) as caught:
        read_golden(path)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_an_intact_file_is_read_through_a_link_and_passes(golden: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(golden.read_bytes())
    (tmp_path / "g.safetensors").symlink_to("blob")
    assert check(tiny_model, tmp_path / "g.safetensors").metrics["kl"].value < 1e-7


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that are files")
def test_a_pipe_is_not_replaced_by_a_golden_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "g")
    with pytest.raises(AccuracyError, match="exists and is no golden file: it is not replaced"):
        check_replaceable(tmp_path / "g", force=True)

"""What an interrupted calibration left, changed before the next run goes on: gone on with as it was, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.calibration import calibrate_model
from arriero.calibration.reached import PROGRESS
from arriero.errors import FolderError
from arriero.files.output import resumable

IDS = np.random.default_rng(0).integers(0, 1000, (2, 64))


class Killed(BaseException):
    """An end in the middle."""


@pytest.fixture(scope="module")
def left(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that ends at its third layer."""
    out = tmp_path_factory.mktemp("left") / "out"

    def report(phase: str, done: int, total: int) -> None:
        if phase == "layer 2":
            raise Killed

    with pytest.raises(Killed):
        calibrate_model(tiny_model, out, recipe="int8", data=IDS, floor=0, progress=report)
    return resumable(out)


def said(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Changes what the progress says."""

    def act(work: Path) -> None:
        path = work / "scratch" / PROGRESS
        progress = json.loads(path.read_text())
        change(progress)
        path.write_text(json.dumps(progress))

    return act


def spoil(name: str) -> Callable[[Path], object]:
    def act(work: Path) -> None:
        data = bytearray((work / name).read_bytes())
        data[4096:] = bytes(len(data) - 4096)
        (work / name).write_bytes(data)

    return act


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            said(lambda p: p["layers"].extend(p["layers"] * 6)),
            "is damaged (14 layers and 0 parts of a vision tower are",
        ),
        (said(lambda p: p["layers"].extend(p["layers"])), "is damaged (4 shards are done, 2 are listed)"),
        (said(lambda p: p["layers"].pop()), "is damaged (1 shards are done, 2 are listed)"),
        (said(lambda p: p.update(head=[])), "is damaged (2 layers and 0 parts of a vision tower are done, of 8 and 0)"),
        (said(lambda p: p.update(tower=p["layers"])), "is damaged (2 layers and 2 parts of a vision tower are done"),
        (said(lambda p: p["shards"].clear()), "is damaged (2 shards are done, 0 are listed)"),
        (
            said(lambda p: p.update(output=["../job", "x"])),
            "scratch/job is not as the run that was interrupted left it",
        ),
        (
            said(lambda p: p["layers"][1]["records"][0].update(clip={})),
            "layers[1].records[0].clip is {}, expected a fin",
        ),
        (said(lambda p: p["layers"][0].update(unmeasured=["x"])), "unmeasured[0] is 'x', expected a whole number"),
        (lambda work: (work / "folder" / "layer-00001.safetensors").unlink(), "layer-00001.safetensors is not as"),
        (spoil("folder/layer-00000.safetensors"), "layer-00000.safetensors is not as the run that was interrupted"),
        (spoil("scratch/0.f32"), "0.f32 is not as the run that was interrupted left it"),
        (lambda work: (work / "scratch" / "0.f32").unlink(), "0.f32 is not as the run that was interrupted left it"),
        (lambda work: (work / "folder" / "more.safetensors").touch(), "more.safetensors is no file of this run"),
    ],
)
def test_what_is_not_as_it_was_left_is_refused(
    tiny_model: Path, left: Path, tmp_path: Path, change: Callable[[Path], object], expected: str
) -> None:
    work = resumable(tmp_path / "out")
    shutil.copytree(left, work)
    change(work)
    with pytest.raises(FolderError) as refused:
        calibrate_model(tiny_model, tmp_path / "out", recipe="int8", data=IDS, floor=0)
    assert expected in str(refused.value)
    assert str(refused.value).endswith("and run it again")
    assert not (tmp_path / "out").exists()

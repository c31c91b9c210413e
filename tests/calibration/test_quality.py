"""The trained tiny Llama 4 quantised: perplexity on held-out text against its bf16 weights in float32 arithmetic."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from arriero.accuracy import check, record_golden
from arriero.calibration import calibrate_model, fp8, int4, int8
from arriero.export import export_checkpoint
from arriero.spec.recipe import Recipe


@pytest.fixture(scope="module", params=[30], ids=["30 windows"])
def golden(
    request: pytest.FixtureRequest, tiny_model: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The unquantised model over some windows of the held-out text."""
    out = tmp_path_factory.mktemp("golden") / "held_out.safetensors"
    return record_golden(tiny_model, out, data=[texts[0]], samples=request.param)


def rise(model: Path, golden: Path) -> float:
    """By what share the perplexity is higher than the unquantised model's."""
    found = check(model, golden).metrics["perplexity_ratio"]
    print(
        f"{model.name}: {100 * (found.value - 1):.2f} % ({100 * (found.low - 1):.2f} to {100 * (found.high - 1):.2f})"
    )
    return found.value - 1


@pytest.mark.parametrize(
    ("recipe", "most"),
    [(int8(), 0.005), (fp8(), 0.006), (int4(), 0.03)],  # fp8 makes 0.46 %; the order of sums moves it by a tenth
    ids=["int8", "fp8", "int4"],
)
def test_perplexity_hardly_rises(
    quantised_tiny: Callable[[Recipe], Path], golden: Path, recipe: Recipe, most: float
) -> None:
    assert rise(quantised_tiny(recipe), golden) <= most


def with_outliers(checkpoint: Path, folder: Path) -> Path:
    """The same function with strong outlier channels: norm weights times 64, what reads them divided by 64."""
    shutil.copytree(checkpoint, folder)
    channels, factor = [3, 50, 121], 64.0
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if "layers." not in name:
                continue
            if name.endswith("layernorm.weight"):
                tensor[channels] *= factor
            elif (
                name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "router.weight"))
                or name.endswith(("gate_proj.weight", "up_proj.weight"))
                or name.endswith("experts.gate_up_proj")
            ):
                tensor[:, channels] /= factor
        save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("golden", [10], ids=["10 windows"], indirect=True)
def test_smoothquant_holds_where_plain_absmax_fails(
    tiny: Path, texts: tuple[Path, Path], golden: Path, tmp_path: Path
) -> None:
    model = export_checkpoint(with_outliers(tiny, tmp_path / "checkpoint"), tmp_path / "model")
    assert rise(model, golden) == pytest.approx(0, abs=1e-4)
    rises = {}
    for name, recipe in (("plain", int8(activations="static", smoothing="none")), ("smoothed", int8())):
        quantised = calibrate_model(model, tmp_path / name, recipe=recipe, data=[texts[1]], samples=6)
        rises[name] = rise(quantised, golden)
    assert rises["plain"] > 0.05
    assert rises["smoothed"] <= 0.01

"""The trained tiny Llama 4 quantised: perplexity on held-out text against its bf16 weights in float32 arithmetic."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import arriero
from arriero.calibration import calibrate_model, fp8, int4, int8
from arriero.export import export_checkpoint
from arriero.spec import Recipe

TEXT_ROWS, ROW = 30, 512
"""Of the held-out text so many rows of so many tokens are measured."""


@pytest.fixture(scope="module")
def texts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The held-out text, and a part of the text that the model was trained on, for calibration."""
    folder = tmp_path_factory.mktemp("texts")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from corpus import documents, held_out_text\n"
        "open(sys.argv[2], 'w').write(held_out_text())\n"
        "chosen = [each.text for each in documents() if not each.is_held_out][::12]\n"
        "open(sys.argv[3], 'w').write('\\n\\n\\n'.join(chosen))\n"
    )
    held_out, training = folder / "held_out.txt", folder / "training.txt"
    subprocess.run([sys.executable, "-c", code, str(tiny), str(held_out), str(training)], check=True)
    return held_out, training


def perplexity(model: Path, text: Path) -> float:
    session = arriero.load(model)
    ids = session.text.encode(text.read_text(), special_tokens=False)
    rows = np.array(ids[: len(ids) // ROW * ROW]).reshape(-1, ROW)
    rows = rows[:: max(1, len(rows) // TEXT_ROWS)]
    losses = []
    for row in rows:
        logits = torch.from_numpy(session.logits(row[None])[0, :-1])
        losses.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(row[1:])).item())
    return float(np.exp(np.mean(losses)))


@pytest.fixture(scope="module")
def exact(tiny_model: Path, texts: tuple[Path, Path]) -> float:
    return perplexity(tiny_model, texts[0])


@pytest.mark.parametrize(
    ("recipe", "rise"),
    [(int8(), 0.005), (fp8(), 0.008), (int4(), 0.03)],  # E4M3 has three bits of mantissa, whatever the scale
    ids=["int8", "fp8", "int4"],
)
def test_perplexity_hardly_rises(
    tiny_model: Path, texts: tuple[Path, Path], exact: float, tmp_path: Path, recipe: Recipe, rise: float
) -> None:
    quantised = calibrate_model(tiny_model, tmp_path / "quantised", recipe=recipe, data=[texts[1]], samples=12)
    found = perplexity(quantised, texts[0]) / exact - 1
    print(f"perplexity rises by {100 * found:.2f} %")
    assert found <= rise


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


def test_smoothquant_holds_where_plain_absmax_fails(
    tiny: Path, texts: tuple[Path, Path], exact: float, tmp_path: Path
) -> None:
    model = export_checkpoint(with_outliers(tiny, tmp_path / "checkpoint"), tmp_path / "model")
    assert perplexity(model, texts[0]) == pytest.approx(exact, rel=1e-4)
    rises = {}
    for name, recipe in (("plain", int8(activations="static", smoothing="none")), ("smoothed", int8())):
        quantised = calibrate_model(model, tmp_path / name, recipe=recipe, data=[texts[1]], samples=12)
        rises[name] = perplexity(quantised, texts[0]) / exact - 1
    print(rises)
    assert rises["plain"] > 0.05
    assert rises["smoothed"] <= 0.01

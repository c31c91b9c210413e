from pathlib import Path

import pytest

from arriero.cli.tables import parts, show_summary, size
from arriero.engine import Options, build_bundle
from arriero.errors import FolderError
from arriero.measuring.summary import summarise


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = Options(max_batch=2, max_seq=512, max_prefill=64, gqa="native", weights="outside")
    folder = tmp_path_factory.mktemp("summary") / "bundle"
    return build_bundle(tiny_model, folder, target="tensorrt-rtx:sm89", options=options)


def test_an_engines_memory_adds_up(bundle: Path) -> None:
    found = summarise(bundle)
    # 8 layers, 2 kv heads of 32, bfloat16, keys and values; 6 layers are chunked
    assert found["kv_cache"] == {
        "bytes_per_token": 2048,
        "chunked_bytes_per_token": 1536,
        "full_bytes_per_token": 512,
    }
    engine = found["engine"]
    assert engine["weights_outside_bytes"] + engine["weights_inside_bytes"] > 10.8e6
    activations = max(profile["activations_bytes"] for profile in engine["profiles"])
    for profile in engine["profiles"]:
        assert profile["kv_cache_bytes"] == 2 * (1536 * 128 + 512 * 512)
        assert profile["logits_bytes"] == 2 * 2048 * 4 * (1 if profile["name"] == "decode" else 64)
        parts = sum(profile[f"{part}_bytes"] for part in ("logits", "kv_cache"))
        weights = engine["weights_inside_bytes"] + engine["weights_outside_bytes"]
        assert profile["total_bytes"] == activations + weights + parts
    assert {"gemm", "kgen", "custom_layer"} <= {layer["kind"] for layer in found["layers"]}


def test_a_model_has_no_engine(tiny_model: Path) -> None:
    found = summarise(tiny_model)
    assert found["kind"] == "model"
    assert "engine" not in found
    assert found["model"]["chunked_layers"] == 6


def test_the_tables_show_it(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_summary(summarise(bundle))
    shown = capsys.readouterr().out
    for text in ("tensorrt-rtx:sm89", "Memory on the GPU", "prefill", "1–64", "gemm", "2.0 kB a token"):
        assert text in shown


def test_every_layer_is_listed_with_its_sizes(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = summarise(bundle, every_layer=True)
    assert len(found["every_layer"]) == sum(layer["count"] for layer in found["layers"])
    assert "layers.0: self_attn.o_proj" in {parts(layer) for layer in found["every_layer"]}
    show_summary(found)
    assert "192×192" in capsys.readouterr().out


def test_damaged_layers_are_named(bundle: Path, tmp_path: Path) -> None:
    for file in bundle.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "layers.json").write_text("[1")
    with pytest.raises(FolderError, match=r"layers\.json: cannot be read .*: build the bundle again"):
        summarise(tmp_path)


def test_sizes_are_for_people() -> None:
    assert [size(count) for count in (0, 999, 1000, 2_500_000, 215_500_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "2.5 MB",
        "215.5 GB",
    ]

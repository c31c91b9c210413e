"""A multimodal session on TensorRT engines: its control flow on a GPU that is not there."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import TRT, FakeDecoder, FakeDriver, FakeTower

import arriero
from arriero.engine import Options, build_bundle
from arriero.errors import FolderError, SessionError
from arriero.export import export_checkpoint
from arriero.files.folders import read_spec
from arriero.plugins.narrow_types import narrow, widen
from arriero.runtime.backends import tensorrt_tower as runtime_tower
from arriero.runtime.backends.device import Device
from arriero.runtime.backends.execution import Execution
from arriero.runtime.backends.tensorrt_decoder import TensorRTDecoder
from arriero.runtime.backends.tensorrt_tower import TensorRTTower, load_tower
from arriero.runtime.images.tower import Tower
from arriero.runtime.session import Session
from arriero.runtime.state import Limits
from arriero.spec.folder import FolderSpec
from arriero.spec.types import DType

IMAGE, FEATURES = 96, 4
"""The token of image features, and how many a tile has."""


@pytest.fixture(scope="module")
def model(make_multimodal: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multimodal")
    make_multimodal().save_pretrained(folder / "checkpoint")
    return export_checkpoint(folder / "checkpoint", folder / "model")


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = Options(max_batch=2, max_seq=96, max_prefill=6, max_tiles=3)
    return build_bundle(
        model, tmp_path_factory.mktemp("bundle") / "bundle", target="tensorrt-rtx:sm89", options=options
    )


def load_tower_on(driver: FakeDriver, model: Path, spec: FolderSpec, dtype: DType = "float32") -> TensorRTTower:
    assert spec.vision is not None
    assert spec.vision.engine is not None
    engine, device = FakeTower(model, driver, dtype), Device(driver)
    execution = Execution(trt=TRT, flavour="tensorrt-rtx", device=device, engine=engine, weights={})
    return TensorRTTower(execution, spec.vision.engine, spec.vision.spec, spec.model.hidden_size, dtype)


def load_on(driver: FakeDriver, model: Path, spec: FolderSpec) -> Session:
    """A session around both engines, the tower loaded when there is an image."""
    assert spec.vision is not None
    plain, dtype = arriero.load(model), spec.model.dtype
    engine = FakeDecoder(model, driver, dtype)
    decoder = TensorRTDecoder(TRT, Device(driver), engine, {}, spec)
    tower = Tower(spec.vision.spec, lambda: load_tower_on(driver, model, spec, dtype))
    return Session(decoder, plain.text, plain.defaults, Limits(96, 2), tower)


def prompts() -> tuple[list[list[int]], np.ndarray]:
    """Two rows, with five and two tiles, and the tiles; images cross pieces and chunks."""
    rng = np.random.default_rng(0)
    rows = []
    for tiles in (5, 2):
        ids = [int(token) for token in rng.integers(3, 90, 4)]
        for _ in range(tiles):
            ids += [IMAGE] * FEATURES + [int(rng.integers(3, 90))]
        rows.append(ids)
    return rows, rng.standard_normal((7, 3, 28, 28)).astype(np.float32)


def continue_both(session: Session, count: int = 12) -> list[list[int]]:
    """Encodes, prefills and decodes both rows greedily."""
    rows, pixels = prompts()
    features = session.encode(pixels)
    assert features is not None
    state = session.start(2, 80)
    logits = session.prefill(state, rows, [features[: 5 * FEATURES], features[5 * FEATURES :]])
    found = []
    for _ in range(count):
        tokens = [int(token) for token in logits[:, :90].argmax(-1)]  # never the token of images
        found.append(tokens)
        logits = session.decode(state, tokens)
    return found


def test_a_session_on_both_engines_gives_the_cpus_tokens(model: Path, bundle: Path) -> None:
    session = load_on(FakeDriver(), model, read_spec(bundle))
    assert continue_both(session) == continue_both(arriero.load(model))
    decoder, tower = session.decoder, session.tower.backend  # type: ignore[union-attr]
    *decoding, prefill = decoder.execution.engine.contexts  # type: ignore[attr-defined]
    runs = {shape for decode in decoding for shape in decode.runs}
    assert (2, 1) in runs
    assert {length for _, length in runs} == {1}
    assert len(prefill.runs) > 5  # several pieces
    assert decoding[-1].shapes["image_features"] == (1, 32)
    assert [each[0] for each in tower.context.runs] == [3, 3, 1]  # type: ignore[attr-defined]


def test_a_single_image_token_is_a_piece_not_a_decoded_token(model: Path, bundle: Path) -> None:
    session, plain = load_on(FakeDriver(), model, read_spec(bundle)), arriero.load(model)
    features = plain.encode(prompts()[1][:1])
    assert features is not None
    found = []
    for each in (session, plain):
        state = each.start(1, 40)
        each.prefill(state, [[5, 6]])
        found.append(each.prefill(state, [[IMAGE]], [features[:1]]))
    assert np.abs(found[0] - found[1]).max() < 1e-5
    *_, decode, prefill = session.decoder.execution.engine.contexts  # type: ignore[attr-defined]
    assert (decode.runs, prefill.runs) == ([], [(1, 2), (1, 1)])


def test_text_alone_never_loads_the_tower(model: Path, bundle: Path) -> None:
    session = load_on(FakeDriver(), model, read_spec(bundle))
    session.tower.open_backend = lambda: pytest.fail("there is no image")  # type: ignore[union-attr]
    ids = np.arange(3, 33)[None]
    assert np.abs(session.logits(ids) - arriero.load(model).logits(ids)).max() < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_features_are_rounded_to_the_engines_type(dtype: DType, model: Path, bundle: Path) -> None:
    spec = read_spec(bundle)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, dtype=dtype))
    driver, pixels = FakeDriver(), prompts()[1]
    features, exact = load_tower_on(driver, model, spec, dtype).encode(pixels), arriero.load(model).encode(pixels)
    assert exact is not None
    assert features.dtype == np.float32
    assert np.array_equal(features, widen(narrow(exact, dtype), dtype))
    session, plain = load_on(driver, model, spec), arriero.load(model)
    found = []
    for each in (session, plain):  # the CPU's session is given what the engine gets
        state = each.start(1, 80)
        found.append(each.prefill(state, [prompts()[0][0]], [features[: 5 * FEATURES]]))
    assert np.abs(found[0] - found[1]).max() < 1e-4


def test_floats_are_narrowed_to_the_nearest() -> None:
    import torch

    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    bits[:4] = (0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7FFFFFFF)  # two ties, the largest, a NaN that would carry over
    values = bits.view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    found, real = narrow(values, "bfloat16"), ~np.isnan(values)
    assert np.array_equal(found[real], expected[real])
    assert np.isnan(widen(found, "bfloat16")[~real]).all()
    assert np.array_equal(narrow(values[real], "float32"), values[real])


def test_a_damaged_tower_is_named(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = read_spec(bundle)
    (tmp_path / "vision.engine").write_bytes((bundle / "vision.engine").read_bytes()[:-100])
    monkeypatch.setattr(runtime_tower.Device, "open", lambda: Device(FakeDriver()))
    with pytest.raises(FolderError, match=r"vision\.engine is not what was built \(truncated or changed\)"):
        load_tower(tmp_path, spec, {})
    trt = type("Trt", (), {"Logger": type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})})
    trt.Runtime = lambda log: type("Runtime", (), {"deserialize_cuda_engine": lambda self, data: None})()  # type: ignore[attr-defined]
    monkeypatch.setattr(runtime_tower, "open_version", lambda about: trt)
    with pytest.raises(SessionError, match=r"TensorRT does not take .*vision\.engine .*build it again"):
        load_tower(bundle, spec, {})

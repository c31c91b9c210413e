"""Engines are code: one that this user did not build is asked for once."""

import dataclasses
import warnings
from pathlib import Path

import pytest

from arriero.errors import ArrieroWarning, SessionError
from arriero.files.trust import check_trusted, remember, state_folder
from arriero.spec.built_engine import Binary, CacheInput, EngineSpec, Profile
from arriero.spec.folder import FolderSpec
from arriero.spec.geometry import LayerSpec, ModelSpec

MODEL = ModelSpec(
    vocab_size=100,
    hidden_size=32,
    layers=(LayerSpec(rope=True, chunk=16, experts=False),),
    heads=4,
    kv_heads=2,
    head_dim=8,
    experts=0,
    experts_per_token=0,
    expert_size=16,
    dense_size=64,
    norm_eps=1e-5,
    qk_norm=True,
    rope_theta=5e5,
    max_positions=512,
    temperature_scale=0.1,
    temperature_floor=8.0,
    dtype="bfloat16",
)
PROFILE = Profile(name="decode", max_batch=1, usual_batch=1, max_length=1, usual_length=1, max_logits=1)
KERNEL = Binary(
    kernel="k", capability=89, file="k.cubin", entry="k", parameters=("i32",), threads=32, shared=0, sha256="b" * 64
)
ENGINE = EngineSpec(
    file="decoder.engine",
    flavour="tensorrt-rtx",
    version="1",
    capabilities=(89,),
    sha256="a" * 64,
    max_seq=64,
    profiles=(PROFILE,),
    caches=(CacheInput(name="0.key", shape=(2, 16, 8), dtype="bfloat16"),),
    attention="plugin",
    experts="",
    placement="inside",
    weight_streaming=False,
    weights=1,
    kernels=(KERNEL,),
)
SPEC = FolderSpec(kind="bundle", version="1", model=MODEL, target="tensorrt-rtx:sm89", graph="", engine=ENGINE)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def test_an_engine_that_was_not_built_here_is_refused_until_it_is_trusted_once() -> None:
    said = r"x holds an engine, which is code, and this user did not build it here: .* run it once with --trust"
    with pytest.raises(SessionError, match=said):
        check_trusted(Path("x"), SPEC)
    check_trusted(Path("x"), SPEC, trust=True)
    check_trusted(Path("elsewhere"), SPEC)


def test_an_engine_that_was_built_here_is_trusted_and_another_is_not() -> None:
    remember(Path("x"), SPEC)
    check_trusted(Path("x"), SPEC)
    others = [
        dataclasses.replace(ENGINE, sha256="c" * 64),
        dataclasses.replace(ENGINE, kernels=(dataclasses.replace(KERNEL, sha256="c" * 64),)),
        dataclasses.replace(ENGINE, kernels=(dataclasses.replace(KERNEL, entry="other"),)),
    ]
    for engine in others:
        with pytest.raises(SessionError, match="which is code"):
            check_trusted(Path("x"), dataclasses.replace(SPEC, engine=engine))


def test_a_bundle_for_the_cpu_needs_no_trust(state: Path) -> None:
    check_trusted(Path("x"), dataclasses.replace(SPEC, graph="decoder.onnx", target="cpu", engine=None))
    assert not state.exists()


def test_where_trust_cannot_be_written_down_it_holds_once_and_that_is_said(state: Path) -> None:
    state.write_text("a file where the folder should be")
    with pytest.warns(ArrieroWarning, match="not remembered as trusted"):
        check_trusted(Path("x"), SPEC, trust=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert state_folder() == state / "arriero"

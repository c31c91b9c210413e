"""A session on a TensorRT engine: its control flow on a GPU that is not there, and on a real one where there is one."""

import ctypes
import dataclasses
import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from executing_cuda import ExecutingCuda
from fake_gpu import TRT, FakeDecoder, FakeDriver

import arriero
from arriero.engine import Options, build_bundle
from arriero.engine.target import CAPABILITIES
from arriero.engine.tensorrt_library import open_library
from arriero.errors import BuildError, FolderError, SessionError
from arriero.export import export_checkpoint
from arriero.files.folders import read_spec
from arriero.plugins.launch import Driver
from arriero.runtime import Flight
from arriero.runtime.backends import tensorrt_decoder as runtime_engine
from arriero.runtime.backends.device import Device, DeviceGraph, DeviceMemory
from arriero.runtime.backends.engine_file import open_version
from arriero.runtime.backends.execution import MARGIN
from arriero.runtime.backends.tensorrt_decoder import TensorRTDecoder, load_decoder, read_engine
from arriero.runtime.continuation import joined
from arriero.runtime.prefix import Prefixes
from arriero.runtime.session import Session
from arriero.runtime.state import Limits

TARGET = "tensorrt-rtx:sm89"


@pytest.fixture(scope="module")
def wide_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(tiny, tmp_path_factory.mktemp("wide") / "model", dtype="float32")


@pytest.fixture(scope="module")
def wide_bundle(wide_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = Options(max_batch=3, max_seq=500, max_prefill=48)
    return build_bundle(wide_model, tmp_path_factory.mktemp("bundle") / "bundle", target=TARGET, options=options)


def session_of(model: Path, bundle: Path, path: Path | None = None, **about: Any) -> tuple[Session, ExecutingCuda]:
    """A session whose engine's record says other things; `size` is the GPU's memory."""
    spec, plain = read_spec(bundle), arriero.load(model, max_seq=500)
    assert spec.engine is not None
    driver = FakeDriver(**{name: about.pop(name) for name in ("size",) if name in about})
    spec = dataclasses.replace(spec, engine=dataclasses.replace(spec.engine, **about))
    decoder = TensorRTDecoder(TRT, Device(driver), FakeDecoder(model, driver), {}, spec, path)
    return Session(decoder, plain.text, plain.defaults, Limits(500, 3)), driver.cuda


@pytest.fixture
def on_fake_gpu(wide_model: Path, wide_bundle: Path) -> tuple[Session, FakeDecoder]:
    session, _ = session_of(wide_model, wide_bundle)
    return session, session.decoder.execution.engine  # type: ignore[attr-defined]


def test_an_engines_session_gives_the_cpus_tokens(wide_model: Path, on_fake_gpu: tuple[Session, FakeDecoder]) -> None:
    session, engine = on_fake_gpu
    prompt = "The list type has a method that returns the number of items. " * 4  # longer than a piece and a chunk
    settings: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0, "eos_token_id": []}
    assert session.generate(prompt, **settings) == arriero.load(wide_model, max_seq=500).generate(prompt, **settings)
    *others, decode, prefill = engine.contexts
    assert [context.profile for context in engine.contexts] == [0, 0, 0, 1]  # one for each number of rows up to 3
    assert set(decode.runs) == {(1, 1)}
    assert not any(context.runs for context in others)
    assert max(prefill.runs) <= (1, 48)
    for context, specialisation in ((decode, "eager"), (prefill, "none")):
        assert context.config.cuda_graph_strategy == "disabled"  # the session captures whole steps
        assert context.config.dynamic_shapes_kernel_specialization_strategy == specialisation
        assert context.nvtx_verbosity == "none"


def test_ragged_rows_get_the_cpus_logits(wide_model: Path, on_fake_gpu: tuple[Session, FakeDecoder]) -> None:
    session, _ = on_fake_gpu
    ids = np.random.default_rng(0).integers(10, 2000, (3, 180))
    found = session.logits(ids, [180, 7, 131])
    expected = arriero.load(wide_model, max_seq=500).logits(ids, [180, 7, 131])
    assert np.abs(found - expected).max() < 1e-4


def test_rows_are_extended_and_rewound_as_on_the_cpu(
    wide_model: Path, on_fake_gpu: tuple[Session, FakeDecoder]
) -> None:
    sessions = (on_fake_gpu[0], arriero.load(wide_model, max_seq=500))
    found = []
    for session in sessions:
        state = session.start(2, 200)
        session.prefill(state, [[5] * 60, [9] * 7])
        for more in ([[11] * 30, []], [[12], [13] * 50]):
            state.rewind([60, 7])
            found.append(np.concatenate([logits_SV for _, _, logits_SV in session.extend(state, more)]))
    for engines, cpus in zip(found[:2], found[2:], strict=True):
        assert engines.shape == cpus.shape
        assert np.abs(engines - cpus).max() < 1e-4


def test_sequences_join_and_leave_as_on_the_cpu(wide_model: Path, on_fake_gpu: tuple[Session, FakeDecoder]) -> None:
    session, engine = on_fake_gpu
    prompts = [[9 + number] * length for number, length in enumerate((130, 3, 60, 8, 1))]
    settings: dict[str, Any] = {"temperature": 0, "eos_token_id": []}
    requests = [(prompt, {"max_new_tokens": 5 + 9 * number, **settings}) for number, prompt in enumerate(prompts)]
    flight, pieces = Flight(session), {}
    for prompt, asked in requests:
        flight.join(session.request(prompt, **asked))
    while flight.riding or flight.waiting:
        for number, piece in flight.step():
            pieces.setdefault(number, []).append(piece)
    plain = arriero.load(wide_model, max_seq=500)
    for number, (prompt, asked) in enumerate(requests):
        assert joined(pieces[number]) == plain.generate(prompt, **asked)
    decoding = [set(each.runs) for each in engine.contexts if each.profile == 0 and each.runs]
    assert all(len(each) == 1 for each in decoding)  # a graph's context is not given other shapes
    assert set.union(*decoding) == {(1, 1), (2, 1), (3, 1)}


def test_guesses_are_verified_as_on_the_cpu(wide_model: Path, on_fake_gpu: tuple[Session, FakeDecoder]) -> None:
    prompt = "The list type has a method. The list type has a method that returns the list. The list type has"
    settings: dict[str, Any] = {"max_new_tokens": 60, "temperature": 0, "eos_token_id": []}
    found = on_fake_gpu[0].generate(prompt, prompt_lookup_num_tokens=6, **settings)
    assert found == arriero.load(wide_model, max_seq=500).generate(prompt, **settings)
    assert found.accepted > 0


def test_beginnings_are_known_again_as_on_the_cpu(wide_model: Path, on_fake_gpu: tuple[Session, FakeDecoder]) -> None:
    session, plain = on_fake_gpu[0], arriero.load(wide_model, max_seq=500)
    session.prefixes = Prefixes(session.spec.chunk, 1 << 26)
    settings: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0, "eos_token_id": []}
    prompt = np.random.default_rng(0).integers(10, 2000, 200).tolist()
    for end, reused in (([9], 0), ([11, 12], 192)):
        found = session.generate(prompt + end, **settings)
        assert found == plain.generate(prompt + end, **settings)
        assert found.reused == reused


def check_rows_are_copied_and_put_back(session: Session) -> None:
    state = session.start(3, 300)
    session.prefill(state, [[5] * 40, np.random.default_rng(0).integers(10, 2000, 190).tolist(), [6] * 9])
    caches, blocks = state.caches, range(128, 190, 31)  # past a boundary of chunks
    expected = [caches.read(1, start, start + 31) for start in blocks]
    state.move(1, 0)
    for start, slots in zip(blocks, expected, strict=True):
        caches.write(2, start, slots, 190)
        for row in (0, 2):
            found = caches.read(row, start, start + 31)
            assert all(np.array_equal(found[name], slots[name]) for name in slots)
    assert len({slots["3.key"].tobytes() for slots in expected}) == 2


def test_rows_are_copied_and_put_back(on_fake_gpu: tuple[Session, FakeDecoder]) -> None:
    check_rows_are_copied_and_put_back(on_fake_gpu[0])


def test_a_state_takes_over_the_memory_of_the_one_before(on_fake_gpu: tuple[Session, FakeDecoder]) -> None:
    session, engine = on_fake_gpu
    memory = engine.driver.cuda.device
    for batch, others in ((2, 2), (1, 1), (3, 3), (2, 1)):
        state = session.start(batch)
        session.prefill(state, [[10]] * batch)
        used, held = state.caches.address, memory.held
        del state
        assert memory.held == held  # kept for the next
        again = session.start(others)
        assert (again.caches.address == used) == (batch == others)
        del again
    allocated = memory.allocations
    for batch in (3, 1, 2):
        session.prefill(session.start(batch), [[10]] * batch)
    assert memory.allocations == allocated


def test_memory_of_earlier_states_makes_room_for_another(on_fake_gpu: tuple[Session, FakeDecoder]) -> None:
    session, engine = on_fake_gpu
    session.generate([10, 11], max_new_tokens=3, eos_token_id=[])
    assert session.decoder.steps.known  # type: ignore[attr-defined]
    cuda = engine.driver.cuda
    cuda.size = cuda.device.held + session.decoder.pool.row_size  # type: ignore[attr-defined]
    session.start(2)
    assert not session.decoder.steps.known  # type: ignore[attr-defined]  # of addresses that mean nothing any more
    cuda.size = 0
    with pytest.raises(SessionError, match="cuMemAlloc_v2 failed: out of memory"):
        session.start(3)


@pytest.mark.parametrize("flavour", ["tensorrt-rtx", "tensorrt"])
def test_steps_are_captured_once_and_replayed(flavour: str, wide_bundle: Path, wide_model: Path) -> None:
    session, cuda = session_of(wide_model, wide_bundle, flavour=flavour)
    plain = arriero.load(wide_model, max_seq=500)
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0, "eos_token_id": []}
    for _ in range(2):
        assert session.generate("The list type", **settings) == plain.generate("The list type", **settings)
    assert cuda.calls["cuStreamBeginCapture_v2"] == 1  # the second state has the first one's memory
    assert (
        cuda.calls["cuGraphLaunch"] == 10 + 11
    )  # 12 tokens: one from the prompt, one that runs before there is a graph


def test_where_capture_fails_steps_run_without_a_graph(wide_bundle: Path, wide_model: Path) -> None:
    session, cuda = session_of(wide_model, wide_bundle)
    cuda.refusals["cuStreamBeginCapture_v2"] = 900
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0, "eos_token_id": []}
    expected = arriero.load(wide_model, max_seq=500).generate("The list type", **settings)
    with pytest.warns(arriero.errors.ArrieroWarning, match="not captured into a CUDA graph, .* not permitted when"):
        assert session.generate("The list type", **settings) == expected
    assert session.generate("The list type", **settings) == expected
    assert cuda.calls["cuStreamBeginCapture_v2"] == 1


def test_nothing_is_freed_while_a_step_is_captured(wide_bundle: Path, wide_model: Path) -> None:
    session, cuda = session_of(wide_model, wide_bundle)
    device = session.decoder.device  # type: ignore[attr-defined]
    cycle: list[Any] = [DeviceMemory(device, 100)]
    cycle.append(cycle)  # only the garbage collector frees it
    held, before, freed = cuda.device.held, cuda.calls["cuMemFree_v2"], []

    def work() -> None:
        nonlocal cycle
        other = DeviceGraph.__new__(DeviceGraph)
        device.own(other, "cuMemFree_v2", ctypes.c_uint64(cycle[0].address + 1))  # refused, when its time has come
        del other
        cycle = [[index] for index in range(5000)]  # makes a collection due
        freed.append(cuda.calls["cuMemFree_v2"])

    with pytest.raises(ZeroDivisionError):
        device.capture(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    device.capture(work)
    assert freed == [before]
    gc.collect()
    assert cuda.calls["cuMemFree_v2"] == before + 2
    assert cuda.device.held < held
    with pytest.raises(
        SessionError, match="cuStreamSynchronize failed: operation not permitted when stream is capturing"
    ):
        device.capture(device.synchronise)
    device.synchronise()


def test_weights_are_streamed_within_what_is_left(wide_bundle: Path, wide_model: Path) -> None:
    session, cuda = session_of(wide_model, wide_bundle, weight_streaming=True, size=MARGIN + (200 << 20))
    engine = session.decoder.execution.engine  # type: ignore[attr-defined]
    assert engine.weight_streaming_budget_v2 == cuda.size - cuda.device.held - MARGIN
    held = cuda.device.held
    state = session.start(3)
    session.prefill(state, [[10], [12], [13]])
    assert cuda.device.held == held  # caches for all rows were there before the weights got the rest
    assert not session.decoder.captures  # type: ignore[attr-defined]


def test_compiled_kernels_are_kept_for_the_next_session(
    wide_bundle: Path, wide_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "bundle"
    folder.mkdir()
    for place in (folder, tmp_path / "gone"):  # a folder that cannot be written: the user's own
        session, _ = session_of(wide_model, wide_bundle, path=place)
        monkeypatch.setattr("pathlib.Path.mkdir", _no_folder) if place != folder else None
        session.generate([10, 11], max_new_tokens=3, eos_token_id=[])
        monkeypatch.undo() if place != folder else None
    assert (folder / "decoder.engine.compiled").read_bytes() == b"compiled"
    again, _ = session_of(wide_model, wide_bundle, path=folder)
    assert again.decoder.pieces.config.cache.data == b"compiled"  # type: ignore[attr-defined]


def _no_folder(path: Path, *arguments: Any, **named: Any) -> None:
    if not str(path).endswith("arriero"):
        raise PermissionError(path)
    os.makedirs(path, exist_ok=True)


def test_an_old_driver_is_named_before_anything_else(wide_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(FakeDriver(capability=120, version=(12, 4)))
    monkeypatch.setattr(runtime_engine.Device, "open", lambda rank: device)
    with pytest.raises(
        SessionError, match=r"driver serves CUDA 12\.4, tensorrt-rtx .* needs CUDA 13: install a newer driver"
    ):
        load_decoder(wide_bundle, read_spec(wide_bundle), {})


def test_a_refusal_of_tensorrt_is_an_error(on_fake_gpu: tuple[Session, FakeDecoder], monkeypatch: Any) -> None:
    session, _ = on_fake_gpu
    monkeypatch.setattr(session.decoder.pieces, "set_input_shape", lambda name, shape: name != "past.3.key")
    for _ in range(2):  # the second time as well: what was half bound is not taken for bound
        with pytest.raises(SessionError, match=r"the engine refuses past\.3\.key"):
            session.logits([[10, 11]])


def test_few_lengths_of_pieces_are_planned_for(on_fake_gpu: tuple[Session, FakeDecoder]) -> None:
    session, _ = on_fake_gpu
    for length in (*range(1, 49), 100):
        session.prefill(session.start(1), [[9] * length])
    lengths = {length for _, length in session.decoder.pieces.runs}  # type: ignore[attr-defined]
    assert lengths == {*range(2, 17), 32, 48}  # those of up to 16 as they are; a token alone is a decoded one


def test_caches_whose_rows_are_not_aligned_are_refused(wide_bundle: Path, wide_model: Path) -> None:
    about = read_spec(wide_bundle).engine
    assert about is not None
    odd = dataclasses.replace(about.caches[3], shape=(1, 3, 5))
    with pytest.raises(SessionError, match=rf"rows of cache {odd.name} do not begin at multiples of 256: build again"):
        session_of(wide_model, wide_bundle, caches=(*about.caches[:3], odd, *about.caches[4:]))


def test_limits_beyond_the_engines_are_refused(wide_bundle: Path) -> None:
    with pytest.raises(SessionError, match="max_seq is 501, the engine was built for 500: build it for more"):
        arriero.load(wide_bundle, max_seq=501)
    with pytest.raises(SessionError, match="max_batch is 4, the engine was built for 3: build it for more"):
        arriero.load(wide_bundle, max_batch=4)


def test_a_truncated_engine_is_named(wide_bundle: Path, tmp_path: Path) -> None:
    spec = read_spec(wide_bundle)
    assert spec.engine is not None
    data = (wide_bundle / "decoder.engine").read_bytes()
    (tmp_path / "decoder.engine").write_bytes(data[:-100])
    with pytest.raises(FolderError, match=r"decoder\.engine is not what was built \(truncated or changed\)"):
        read_engine(tmp_path, spec.engine)


def test_a_missing_kernel_is_named(tiny_model: Path, tmp_path: Path) -> None:
    options = Options(max_batch=1, max_seq=256, max_prefill=16)
    bundle = build_bundle(tiny_model, tmp_path / "bundle", target=TARGET, options=options)
    about = read_spec(bundle).engine
    assert about is not None
    (bundle / "kernels" / about.kernels[0].file).unlink()
    with pytest.raises(FolderError, match=rf"{about.kernels[0].file}: No such file .*: build the bundle again"):
        read_engine(bundle, about)


def test_another_version_of_tensorrt_is_named(wide_bundle: Path) -> None:
    about = read_spec(wide_bundle).engine
    assert about is not None
    with pytest.raises(
        SessionError, match=r"built by tensorrt-rtx 1\.0\.0, here is 1\.7\.1\.\d+: install that version"
    ):
        open_version(dataclasses.replace(about, version="1.0.0"))


def test_another_gpu_is_named(wide_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(FakeDriver(capability=120))
    monkeypatch.setattr(runtime_engine.Device, "open", lambda rank: device)
    with pytest.raises(SessionError, match="was built for sm89, this GPU is sm120: build for sm120"):
        load_decoder(wide_bundle, read_spec(wide_bundle), {})


def test_a_machine_without_a_gpu_is_told_so(wide_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", _no_library)
    with pytest.raises(SessionError, match="no NVIDIA driver here"):
        arriero.load(wide_bundle)


def _no_library(*_: Any, **__: Any) -> None:
    raise OSError("libcuda.so.1: cannot open shared object file")


def target_here() -> str:
    """The target for the GPU at hand; the test is skipped where no TensorRT builds for it."""
    capability = Driver().capability()
    flavour = "tensorrt-rtx" if capability in CAPABILITIES["tensorrt-rtx"] else "tensorrt"
    try:
        open_library(flavour)
    except BuildError as error:
        pytest.skip(f"sm{capability} needs {flavour}: {error}")
    return f"tensorrt-rtx:sm{capability}" if flavour == "tensorrt-rtx" else flavour


@pytest.mark.gpu
def test_a_real_gpu_copies_rows_and_puts_them_back(tiny_model: Path, tmp_path: Path) -> None:
    target = target_here()
    options = Options(max_batch=3, max_seq=600, max_prefill=96)
    check_rows_are_copied_and_put_back(
        arriero.load(build_bundle(tiny_model, tmp_path / "bundle", target=target, options=options))
    )


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"gqa": "native"}, {"weights": "inside"}, {"weights": "outside"}], ids=str)
def test_a_real_engine_gives_the_cpus_text(options: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    target = target_here()
    built = Options(max_batch=3, max_seq=600, max_prefill=96, **options)
    bundle = build_bundle(tiny_model, tmp_path / "bundle", target=target, options=built)
    session, plain = arriero.load(bundle), arriero.load(tiny_model, max_seq=600)
    ids = np.random.default_rng(0).integers(10, 2000, (3, 300))
    found, expected = session.logits(ids, [300, 7, 131]), plain.logits(ids, [300, 7, 131])
    real = np.arange(300) < np.array([[300], [7], [131]])
    agreement = (found.argmax(-1) == expected.argmax(-1))[real].mean()
    assert agreement > 0.97  # bfloat16 beside float32
    assert np.abs(found - expected)[real].mean() < 0.1
    settings: dict[str, Any] = {"max_new_tokens": 60, "temperature": 0, "eos_token_id": []}
    text = session.generate("The list type has", **settings)
    assert text.ids[:5] == plain.generate("The list type has", **settings).ids[:5]
    assert session.generate("The list type has", **settings) == text

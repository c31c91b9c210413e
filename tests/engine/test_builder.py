"""What TensorRT is asked for when an engine is built."""

from typing import Any

import pytest

from arriero.engine.builder import configure
from arriero.engine.target import parse_target
from arriero.engine.tensorrt_library import open_library


@pytest.fixture
def trt() -> Any:
    return open_library("tensorrt-rtx")


@pytest.mark.parametrize("weight_streaming", [False, True])
def test_an_engine_has_the_sessions_memory_alone_unless_weights_are_streamed(trt: Any, weight_streaming: bool) -> None:
    builder, target = trt.Builder(trt.Logger(trt.Logger.ERROR)), parse_target("tensorrt-rtx:sm89")
    config = configure(trt, builder, target, (), weight_streaming=weight_streaming)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION) is not weight_streaming
    assert config.get_flag(trt.BuilderFlag.WEIGHT_STREAMING) is weight_streaming


def test_tensorrt_refuses_both_at_once(trt: Any) -> None:
    errors: list[str] = []

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            errors.append(message)

    log = Log()
    builder = trt.Builder(log)
    config = configure(trt, builder, parse_target("tensorrt-rtx:sm89"), (), weight_streaming=True)
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network.mark_output(network.add_identity(network.add_input("x", trt.float32, (2, 2))).get_output(0))
    assert builder.build_serialized_network(network, config) is None
    assert any(
        "kREQUIRE_USER_ALLOCATION is not compatible with BuilderFlag::kWEIGHT_STREAMING" in each for each in errors
    )

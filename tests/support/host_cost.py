"""What a decode step costs the host: the processor's time of session and plugins, over a driver that does nothing.

The engine is walked once for each number of rows, to learn what its plugins are told; then they are told it again, by
TensorRT's own descriptions of tensors.
"""

import dataclasses
import time
from typing import Any

from gpu_scenes import stage
from idle_driver import IdleDriver
from walked_engine import Context, Told, WalkedEngine

from arriero.runtime.backends.tensorrt_decoder import DECODE
from arriero.runtime.backends.token_steps import TokenSteps


class LearningContext:
    """A context that finds where tensors lie, and tells no plugin."""

    def __init__(self, walked: Context) -> None:
        self.set_input_shape, self.set_tensor_address = walked.set_input_shape, walked.set_tensor_address
        self.walked = walked

    def execute_async_v3(self, stream: int) -> bool:
        self.walked.place()
        return True


class IdleEngine:
    """An engine whose contexts run their plugins' host code alone; `told` is what they are told next."""

    def __init__(self, walked: WalkedEngine) -> None:
        self.create_runtime_config, runtime = walked.create_runtime_config, walked.trt.TensorRTPhase.RUNTIME
        self.plugins = {
            name: built.creator.create_plugin(name, built.get_fields_to_serialize(), runtime)
            for name, built in walked.built.items()
        }
        self.told: dict[str, Told] = {}

    def create_execution_context(self, config: Any) -> "IdleContext":
        return IdleContext(self)


class IdleContext:
    """One context of it."""

    def __init__(self, engine: IdleEngine) -> None:
        self.engine, self.changed = engine, True
        self.plugins = {name: plugin.attach_to_context(None) for name, plugin in engine.plugins.items()}

    def set_device_memory(self, address: int, size: int) -> None:
        pass

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self.changed = True  # TensorRT tells plugins of new shapes and of new addresses
        return True

    set_tensor_address = set_optimization_profile_async = set_input_shape

    def execute_async_v3(self, stream: int) -> bool:
        told, plugins = self.engine.told, self.plugins
        if self.changed:
            for name, each in told.items():
                plugins[name].on_shape_change(each.inputs, each.outputs)
            self.changed = False
        for name, each in told.items():
            plugins[name].enqueue(*each[1:], stream)
        return True


def shape_cost(model: str, batch: int) -> dict[str, tuple[float, int]]:
    """Seconds and driver calls of a decode step, by what has been before it; each the least of several.

    Returns:
        `known`: these rows have been twice. `elsewhere`: so many have been, but elsewhere; `elsewhere, again` is the
        step behind it, which is captured. `new`: no step has had so many rows; `new, again` is the one behind it.
        `back`: these rows have been, and others since. All these have a context; the last of `new` made its own.
    """
    made = stage(model, max_batch=batch)
    made.cuda.drain = made.cuda.forget  # type: ignore[method-assign]
    decoder, session, counts = made.decoder, made.session, [batch] * 5 + list(range(3, batch))
    states, told = [], []
    steps = decoder.steps = TokenSteps(lambda: LearningContext(decoder.contexts.make(DECODE)), len(counts))
    for count in counts:
        states.append(session.start(count, 60))
        session.prefill(states[-1], [[3 + row] * 3 for row in range(count)])
        session.decode_rows(states[-1], [5] * count)
        told.append(next(reversed(steps.known.values())).context.walked.told)
    engine, library = IdleEngine(made.engine), IdleDriver()
    execution = dataclasses.replace(decoder.execution, engine=engine)
    decoder.contexts = execution.contexts(["EAGER"], decoder.contexts.activations)
    decoder.steps = TokenSteps(lambda: decoder.contexts.make(DECODE), len(counts), ready=len(counts) - 1)
    decoder.device.driver.library = library
    shortener = decoder.shortener
    assert shortener is not None
    shortener.packed = [shortener.pack(rows) for rows in range(1, batch + 1)]
    for creator in made.engine.creators.values():
        creator.alike.clear()
    found: dict[str, list[tuple[float, int]]] = {}

    def step(name: str, number: int) -> None:
        engine.told = told[number]
        calls, started = library.called, time.thread_time()
        session.decode_rows(states[number], [5] * counts[number])
        found.setdefault(name, []).append((time.thread_time() - started, library.called - calls))

    for number, count in enumerate(counts):
        kind = "first" if not number else "elsewhere" if count == batch else "new"
        for name in (kind, f"{kind}, again", *["known"] * 20):
            step(name, number)
    for number in range(len(counts)):
        step("back", number)
    return {name: min(each) for name, each in found.items()}

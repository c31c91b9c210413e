"""The vision tower as a TensorRT engine: tiles onto the GPU, image features back.

Enters: tiles, as the preprocessor cuts them. Leaves: image features in float32, as `OnnxRuntimeTower` gives them.
Invariant: the engine takes `max_tiles` tiles at once; more go in several runs over the same memory.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...plugins.narrow_types import NUMPY_DTYPES, widen
from ...spec.built_engine import TowerEngine
from ...spec.folder import FolderSpec
from ...spec.geometry import VisionSpec
from .device import Device, DeviceMemory
from .engine_file import check_machine, deserialise, open_version, read_built
from .execution import Execution, accept, upload_weights


class TensorRTTower:
    """A vision tower's engine with its weights, ready to run.

    Args:
        execution: The engine on its GPU.
        about: The engine's record in the bundle's spec.
        vision: The tower's geometry.
        size: The text decoder's hidden size (H).
        dtype: Type of the features.
    """

    def __init__(self, execution: Execution, about: TowerEngine, vision: VisionSpec, size: int, dtype: str) -> None:
        self.execution, self.about, self.vision, self.size, self.dtype = execution, about, vision, size, dtype
        self.contexts = execution.contexts(["LAZY"], execution.activations(1))
        self.context = self.contexts.make(0)
        pixels = about.max_tiles * 3 * vision.image_size**2 * np.dtype(np.float32).itemsize
        features = about.max_tiles * vision.features * size * NUMPY_DTYPES[dtype].itemsize
        self.pixels, self.features = (DeviceMemory(execution.device, each) for each in (pixels, features))
        for name, memory in (("pixels", self.pixels), ("image_features", self.features)):
            accept(self.context.set_tensor_address(name, memory.address), name)

    def encode(self, pixels_N3PP: NDArray[np.float32]) -> NDArray[np.float32]:
        """Computes the image features [M, H] of normalised tiles, at most the engine's `max_tiles` at a time."""
        self.execution.device.enter()
        most = self.about.max_tiles
        return np.concatenate(
            [self._run(pixels_N3PP[start : start + most]) for start in range(0, len(pixels_N3PP), most)]
        )

    def _run(self, pixels_N3PP: NDArray[np.float32]) -> NDArray[np.float32]:
        device, context = self.execution.device, self.context
        device.upload(self.pixels.address, pixels_N3PP)
        accept(context.set_input_shape("pixels", pixels_N3PP.shape), "pixels")
        accept(context.execute_async_v3(device.stream), "the tiles")
        features_MH = np.empty((len(pixels_N3PP) * self.vision.features, self.size), NUMPY_DTYPES[self.dtype])
        device.download(self.features.address, features_MH)
        return features_MH if self.dtype == "float32" else widen(features_MH, self.dtype)


def load_tower(folder: Path, spec: FolderSpec, files: Mapping[str, Path]) -> TensorRTTower:
    """Loads a bundle's vision tower onto the GPU that its decoder is on.

    Args:
        folder: The bundle.
        spec: Its spec.
        files: The paths of its weight files, by name.

    Raises:
        SessionError: TensorRT does not take the engine, or not on this GPU.
        FolderError: The engine is missing or damaged.
    """
    assert spec.engine is not None
    assert spec.vision is not None
    about = spec.vision.engine
    assert about is not None
    device = Device.open()
    check_machine(folder, spec.engine, device.driver)
    data = read_built(folder / about.file, about.sha256)
    trt = open_version(spec.engine)
    execution = Execution(
        trt=trt,
        flavour=spec.engine.flavour,
        device=device,
        engine=deserialise(trt, data, folder / about.file),
        weights=upload_weights(device, spec.vision.weights, files),
        file=(folder / about.file, about.sha256),
    )
    return TensorRTTower(execution, about, spec.vision.spec, spec.model.hidden_size, spec.model.dtype)

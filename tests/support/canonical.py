"""A model folder's own graph on ONNX Runtime, as it was written: nothing lowered, no kernel of ours."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort

from arriero.files.folders import find_files, read_spec

Array = np.ndarray[Any, Any]
TYPES = {"tensor(float)": (np.float32, 1), "tensor(int8)": (np.int8, 3), "tensor(float8e4m3fn)": (np.uint8, 17)}


def canonical_logits(model: Path, ids_BS: Array) -> Array:
    """Logits [B, S, V] of whole rows of a float32 model, piece by piece where its attention is chunked."""
    spec = read_spec(model)
    batch, length = ids_BS.shape
    with TemporaryDirectory() as name:
        for file, path in {spec.graph: model / spec.graph, **find_files(model, spec.weight_files, None)}.items():
            Path(name, file).hardlink_to(path)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # E4M3 is fused wrongly otherwise
        session = ort.InferenceSession(Path(name, spec.graph), options, providers=["CPUExecutionProvider"])
    caches = {}
    for each in session.get_inputs():
        if each.name.startswith("past."):
            slots = spec.model.layers[int(each.name.split(".")[1])].chunk or length
            dtype, number = TYPES[each.type]
            empty = np.zeros((batch, spec.model.kv_heads, slots, spec.model.head_dim), dtype)
            caches[each.name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(empty, number)
    names = [each.name for each in session.get_outputs()]
    piece, found = spec.model.chunk or length, []
    for start in range(0, length, piece):
        ids = ids_BS[:, start : start + piece].astype(np.int64)
        feeds = {
            "input_ids": ids,
            "past_lengths": np.full(batch, start, np.int32),
            "logit_positions": np.tile(np.arange(ids.shape[1]), (batch, 1)),
        }
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()} | caches
        outputs = dict(zip(names, session.run_with_ort_values(names, values), strict=True))
        found.append(outputs["logits"].numpy())
        caches = {name: outputs[name.replace("past", "present")] for name in caches}
    return np.concatenate(found, axis=1)

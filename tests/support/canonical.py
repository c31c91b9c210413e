"""A model folder's own graph on ONNX Runtime, as it was written: nothing lowered, no kernel of ours."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort

from arriero.folder import find_files, read_spec

Array = np.ndarray[Any, Any]
CACHES = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(float8e4m3fn)": np.uint8}
E4M3 = 17


def canonical_logits(model: Path, ids_BS: Array) -> Array:
    """Logits [B, S, V] of whole rows of a float32 model."""
    spec = read_spec(model)
    with TemporaryDirectory() as name:
        for file, path in {spec.graph: model / spec.graph, **find_files(model, spec.weight_files, None)}.items():
            Path(name, file).hardlink_to(path)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # E4M3 is fused wrongly otherwise
        session = ort.InferenceSession(Path(name, spec.graph), options, providers=["CPUExecutionProvider"])
        batch, length = ids_BS.shape
        feeds = {
            "input_ids": ids_BS.astype(np.int64),
            "past_lengths": np.zeros(batch, np.int32),
            "logit_positions": np.tile(np.arange(length), (batch, 1)),
        }
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        for each in session.get_inputs():
            if each.name.startswith("past."):
                layer = spec.model.layers[int(each.name.split(".")[1])]
                shape = (batch, spec.model.kv_heads, layer.chunk or length, spec.model.head_dim)
                empty = np.zeros(shape, CACHES[each.type])
                values[each.name] = (
                    ort.OrtValue.ortvalue_from_numpy_with_onnx_type(empty, E4M3)
                    if empty.dtype == np.uint8
                    else ort.OrtValue.ortvalue_from_numpy(empty)
                )
        found: Array = session.run_with_ort_values(["logits"], values)[0].numpy()
        return found

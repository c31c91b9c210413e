"""A model folder's canonical graphs, read without their weights."""

from pathlib import Path

import onnx
import onnx_ir as ir

from ..errors import BuildError


def read_graph(path: Path) -> ir.Model:
    """Reads a graph; its external data is not touched.

    Raises:
        BuildError: The file is missing or damaged.
    """
    try:
        return ir.from_proto(onnx.load(path, load_external_data=False))
    except OSError as error:
        raise BuildError(f"{path}: {error.strerror}: export the model again") from error
    except Exception as error:  # protobuf and onnx-ir raise their own kinds for damaged bytes
        raise BuildError(f"{path}: damaged graph ({error}): export the model again") from error

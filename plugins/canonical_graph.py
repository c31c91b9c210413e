"""A model folder's canonical graphs, read without their weights."""

from pathlib import Path

import onnx
import onnx_ir as ir

from ..errors import BuildError, shortened_text
from ..files.reading import read_bytes

REMEDY = "export the model again"

LARGEST = 1 << 30
"""Bytes of a graph's file at most; protocol buffers end at twice this."""


def read_graph(path: Path) -> ir.Model:
    """Reads a graph; its external data is not touched.

    Raises:
        BuildError: The file is missing or damaged.
    """
    try:
        content = read_bytes(path, BuildError, REMEDY, folder=path.parent, most=LARGEST)
        return ir.from_proto(onnx.load_model_from_string(content))
    except FileNotFoundError as error:
        raise BuildError(f"{path}: {error.strerror}: {REMEDY}") from error
    except BuildError:
        raise
    except Exception as error:  # protobuf and onnx-ir raise their own kinds for damaged bytes
        raise BuildError(f"{path}: damaged graph ({shortened_text(str(error), 150)}): {REMEDY}") from error

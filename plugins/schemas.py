"""Makes the ops of domain `arriero` known to onnx, once a process."""

import onnx

from .all_reduce.schema import schema as all_reduce_schema
from .gqa.schema import schema as gqa_schema
from .moe.schema import schema as moe_schema


def register() -> None:
    """Registers the schemas; calling it again changes nothing."""
    for schema in (gqa_schema(), moe_schema(), all_reduce_schema()):
        if not onnx.defs.has(schema.name, schema.domain):
            onnx.defs.register_schema(schema)

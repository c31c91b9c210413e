"""The ONNX schema of `AllReduce`, for the checker and for the exporter that emits its nodes."""

from onnx.defs import OpSchema

from . import op

FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def schema() -> OpSchema:
    """Inputs, outputs, types and attributes, as `op` describes them."""
    return OpSchema(
        op.NAME,
        op.DOMAIN,
        op.VERSION,
        doc=op.__doc__ or "",
        inputs=[OpSchema.FormalParameter(name, "T") for name in op.INPUTS],
        outputs=[OpSchema.FormalParameter(name, "T") for name in op.OUTPUTS],
        type_constraints=[("T", FLOATS, "Type of the activations.")],
        attributes=[OpSchema.Attribute("ranks", OpSchema.AttrType.INT, "How many graphs take part.")],
    )

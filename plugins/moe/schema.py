"""The ONNX schema of `MoeDispatch`, for the checker and for the exporter that emits its nodes."""

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
        type_constraints=[("T", FLOATS, "Type of the tensors.")],
        attributes=[
            OpSchema.Attribute("top_k", OpSchema.AttrType.INT, "Experts a token is sent to."),
            OpSchema.Attribute("activation", OpSchema.AttrType.STRING, "The gate's activation function."),
        ],
    )

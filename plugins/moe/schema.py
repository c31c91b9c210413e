"""The ONNX schema of `MoeDispatch`, for the checker and for the exporter that emits its nodes."""

import onnx
from onnx.defs import OpSchema

from . import op

OPTIONAL = OpSchema.FormalParameterOption.Optional
FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
STORED = ["tensor(int8)", "tensor(float8e4m3fn)", "tensor(int4)"]


def schema() -> OpSchema:
    """Inputs, outputs, types and attributes, as `op` describes them."""
    unquantised = onnx.helper.make_attribute("quantisation", "none")
    return OpSchema(
        op.NAME,
        op.DOMAIN,
        op.VERSION,
        doc=op.__doc__ or "",
        inputs=[
            *(OpSchema.FormalParameter(name, "T") for name in op.INPUTS[:2]),
            *(OpSchema.FormalParameter(name, "W") for name in op.INPUTS[2:]),
            *(
                OpSchema.FormalParameter(name, "tensor(float)", param_option=OPTIONAL)
                for name in op.WEIGHT_SCALES + op.ACTIVATION_SCALES
            ),
        ],
        outputs=[OpSchema.FormalParameter(name, "T") for name in op.OUTPUTS],
        type_constraints=[
            ("T", FLOATS, "Type of the activations."),
            ("W", [*FLOATS, *STORED], "Type of the experts' weights: T, or the one they are quantised to."),
        ],
        attributes=[
            OpSchema.Attribute("top_k", OpSchema.AttrType.INT, "Experts a token is sent to."),
            OpSchema.Attribute("activation", OpSchema.AttrType.STRING, "The gate's activation function."),
            OpSchema.Attribute(
                "quantisation",
                unquantised,
                "How the experts' weights are stored.",
            ),
            OpSchema.Attribute(
                "first_expert",
                OpSchema.AttrType.INT,
                "The router's number of the first expert whose weights are given; left out, it is 0.",
                required=False,
            ),
            OpSchema.Attribute(
                "activation_bound",
                OpSchema.AttrType.FLOAT,
                "The largest magnitude that a token's own scale is chosen for; left out, it is 0: none.",
                required=False,
            ),
        ],
    )

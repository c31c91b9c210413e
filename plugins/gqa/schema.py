"""The ONNX schema of `GroupedQueryAttention`, for the checker and for the exporter that emits its nodes."""

from onnx.defs import OpSchema

from . import op

FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
STORED = ["tensor(int8)", "tensor(float8e4m3fn)"]


def schema() -> OpSchema:
    """Inputs, outputs, types and attributes, as `op` describes them."""
    parameter, optional = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    *tensors, past_lengths, inv_freq = op.INPUTS
    return OpSchema(
        op.NAME,
        op.DOMAIN,
        op.VERSION,
        doc=op.__doc__ or "",
        inputs=[
            *(parameter(name, "T") for name in tensors[:3]),
            *(parameter(name, "C") for name in tensors[3:]),
            parameter(past_lengths, "tensor(int32)"),
            *(parameter(name, "tensor(float)", param_option=optional) for name in (inv_freq, *op.CACHE_SCALES)),
        ],
        outputs=[parameter(name, kind) for name, kind in zip(op.OUTPUTS, ("T", "C", "C"), strict=True)],
        type_constraints=[
            ("T", FLOATS, "Type of the activations."),
            ("C", [*FLOATS, *STORED], "Type of the caches: T, or the one they are quantised to."),
        ],
        attributes=[
            OpSchema.Attribute("heads", OpSchema.AttrType.INT, "Query heads."),
            OpSchema.Attribute("kv_heads", OpSchema.AttrType.INT, "Key and value heads."),
            OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, "Factor on the scores."),
            OpSchema.Attribute("chunk", OpSchema.AttrType.INT, "Positions a chunk; 0 is full attention."),
            OpSchema.Attribute("qk_norm_eps", OpSchema.AttrType.FLOAT, "Epsilon of the QK norm; 0 is none."),
            OpSchema.Attribute("temperature_scale", OpSchema.AttrType.FLOAT, "Strength of the tuning; 0 is none."),
            OpSchema.Attribute("temperature_floor", OpSchema.AttrType.FLOAT, "Positions a step of the tuning."),
        ],
    )

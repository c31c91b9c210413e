"""Parameters of a model from its geometry: in all, and those that one token passes through."""

from .geometry import ModelSpec, VisionSpec


def count_parameters(model: ModelSpec, vision: VisionSpec | None = None) -> tuple[int, int]:
    """Parameters in all, and active ones: without experts that a token is not sent to, and without the vision tower."""
    hidden, query, kv = model.hidden_size, model.heads * model.head_dim, model.kv_heads * model.head_dim
    total = active = model.vocab_size * hidden * (1 if model.tied_embeddings else 2) + hidden
    for layer in model.layers:
        common = 2 * hidden + 2 * hidden * query + 2 * hidden * kv
        if layer.experts:
            expert = 3 * hidden * model.expert_size
            common += expert + hidden * model.experts  # the shared expert and the router
            total += common + model.experts * expert
            active += common + model.experts_per_token * expert
        else:
            dense = common + 3 * hidden * model.dense_size
            total, active = total + dense, active + dense
    return total + (0 if vision is None else _tower(vision, hidden)), active


def _tower(vision: VisionSpec, text_size: int) -> int:
    """Parameters of a vision tower, its adapter and its projector."""
    hidden, width = vision.hidden_size, vision.adapter_size
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * vision.mlp_size + vision.mlp_size + hidden + 4 * hidden
    ends = hidden + vision.positions * hidden + hidden * vision.patch_values + 4 * hidden
    return vision.layers * layer + ends + width * vision.mlp_size + width * width + text_size * width
